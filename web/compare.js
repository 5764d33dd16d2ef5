// Compare Images shows its two pictures over each other: what is before lies to the left of the mouse, what is after to the
// right. Of a batch, a click shows the next pair.

import { app } from "../../scripts/app.js";
import { addBox, after } from "./dom.js";

const STYLE = `
  .zeroconv-compare { position: relative; width: 100%; height: 100%; min-height: 200px; overflow: hidden; cursor: ew-resize; touch-action: none }
  .zeroconv-compare img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; pointer-events: none; user-select: none }
  .zeroconv-compare hr { position: absolute; inset: 0 auto 0 0; width: 2px; margin: 0 0 0 -1px; border: 0; background: #ffb454; pointer-events: none }
  .zeroconv-compare p { position: absolute; bottom: 4px; margin: 0; padding: 1px 5px; font: 11px sans-serif; color: #fff; background: #000a; border-radius: 4px; pointer-events: none }`;

app.registerExtension({
  name: "zeroconv.compare",
  nodeCreated(node) {
    if (node.comfyClass !== "CompareImages") return;
    const box = Object.assign(document.createElement("div"), { className: "zeroconv-compare" });
    box.innerHTML = `<style>${STYLE}</style><img hidden><img hidden><hr hidden><p style="left: 4px" hidden>before</p><p style="right: 4px" hidden>after</p>`;
    const [second, first, line, ...words] = box.querySelectorAll("img, hr, p");
    let pairs = [];
    let at = 0;

    /** The line goes to this share of the width. */
    const split = (share) => {
      first.style.clipPath = `inset(0 ${100 - 100 * share}% 0 0)`;
      line.style.left = `${100 * share}%`;
    };
    const draw = () => {
      for (const element of [second, first, line, ...words]) element.hidden = !pairs.length;
      if (!pairs.length) return;
      const address = (file) => app.api.apiURL(`/view?${new URLSearchParams(file)}`);
      [first.src, second.src] = pairs[at % pairs.length].map(address);
    };
    const show = (output) => {
      if (!output?.compare) return;
      const [told] = output.compare;
      const last = (files, i) => files[Math.min(i, files.length - 1)];
      const count = Math.max(told.before.length, told.after.length);
      pairs = Array.from({ length: count }, (_, i) => [last(told.before, i), last(told.after, i)]);
      draw();
    };
    split(0.5);

    box.addEventListener("pointermove", (event) => {
      const { left, width } = box.getBoundingClientRect();
      split(Math.min(Math.max((event.clientX - left) / width, 0), 1));
    });
    box.addEventListener("pointerdown", (event) => event.stopPropagation()); // the node would move, too
    box.addEventListener("click", () => { at += 1; draw(); });
    addBox(node, "zeroconv_compare", box, 200);
    after(node, "onExecuted", show);
    // A tab that is opened again brings its outputs a little later than its nodes.
    after(node, "onConfigure", () => setTimeout(() => show(app.nodeOutputs?.[node.id]), 300));
  },
});
