// Apply ControlNet, Apply ControlNet to Prompt and Stack Controls show, once they have run, their hint as the network will
// see it, and say when and where it acts. The node told both; the larger the node, the larger the picture.

import { app } from "../../scripts/app.js";
import { addBox, after } from "./dom.js";

const NODES = ["ApplyControl", "ApplyControlToPrompt", "StackControls"];
const HEIGHT = 56;

app.registerExtension({
  name: "zeroconv.hint",
  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return;
    const [box, left, words] = ["div", "div", "div"].map((name) => document.createElement(name));
    const picture = Object.assign(document.createElement("img"), { title: "Open it" });
    left.hidden = true;
    left.append(picture);
    box.style.cssText = `position: relative; width: 100%; height: 100%; min-height: ${HEIGHT}px`;
    // Both lie in the room that there is and ask for none: a node must not grow over its neighbours when it has run.
    left.style.cssText = "position: absolute; inset: 0 58% 0 0";
    picture.style.cssText = "width: 100%; height: 100%; object-fit: contain; object-position: left top; cursor: pointer";
    words.style.cssText = "position: absolute; inset: 0 0 0 0; overflow-y: auto; white-space: pre-line; "
      + "font: 11px sans-serif; line-height: 1.25; color: var(--input-text); opacity: 0.8";
    words.textContent = "After a run: the hint as the control sees it.";
    picture.addEventListener("click", () => window.open(picture.src));
    box.append(left, words);
    box.className = "zeroconv-hint";
    addBox(node, "zeroconv_hint", box, HEIGHT);
    const show = (output) => {
      if (!output?.hint) return;
      const [{ pictures, says }] = output.hint;
      words.textContent = says;
      left.hidden = !pictures.length;
      words.style.left = pictures.length ? "44%" : 0;
      if (pictures.length) picture.src = app.api.apiURL(`/view?${new URLSearchParams(pictures[0])}`);
    };
    after(node, "onExecuted", show);
    // A tab that is opened again brings its outputs a little later than its nodes.
    after(node, "onConfigure", () => setTimeout(() => show(app.nodeOutputs?.[node.id]), 300));
  },
});
