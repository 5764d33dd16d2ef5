// Control Schedule shows its curve, and the mouse moves its points. What the widgets mean the server says, in numbers; what
// is dragged is written into the widgets, which are what is saved and sent. Without this file the node works just so.

import { app } from "../../scripts/app.js";
import { addBox, after } from "./dom.js";

const INPUTS = ["curve", "keyframes", "unit", "per_image"];
const CUSTOM = "custom";
/** Around the paper that the curve is drawn on; how near to a point the mouse takes it; what is no move: in pixels. */
const EDGE = { left: 40, top: 24, right: 16, bottom: 38 };
const REACH = 14;
const TREMBLE = 3;
const STYLE = `
  .zeroconv-curve { width: 100%; height: 100%; min-height: 180px; overflow: hidden; border-radius: 4px; background: var(--comfy-input-bg) }
  .zeroconv-curve svg { display: block; width: 100%; height: 100%; touch-action: none; user-select: none; font: 11px sans-serif }
  .zeroconv-curve text { fill: var(--input-text); opacity: 0.8 }
  .zeroconv-curve .grid { stroke: var(--border-color); fill: none }
  .zeroconv-curve .line { stroke: #ffb454; stroke-width: 2; fill: none }
  .zeroconv-curve circle { fill: #fff1dc; stroke: #ffb454; stroke-width: 2 }
  .zeroconv-curve .free circle { cursor: grab }
  .zeroconv-curve p { margin: 0; padding: 10px; font: 12px sans-serif; color: var(--input-text); white-space: pre-wrap }`;

function escaped(text) {
  return text.replace(/[&<>]/g, (sign) => `&#${sign.charCodeAt()};`);
}

function within(number, low, high) {
  return Math.min(Math.max(number, low), high);
}

class Curve {
  constructor(node) {
    this.node = node;
    this.widgets = Object.fromEntries(INPUTS.map((name) => [name, node.widgets.find((widget) => widget.name === name)]));
    this.told = null; // what the server says of the widgets' values
    this.known = null; // the values that it was said of
    this.held = null; // which keyframe the mouse holds, where it took it, and the axes, which stay as long
    this.box = Object.assign(document.createElement("div"), { className: "zeroconv-curve" });
    this.box.title = "Drag a point. Double-click: one more point, or one less.";
    for (const event of ["pointerdown", "pointermove", "pointerup", "dblclick"]) {
      this.box.addEventListener(event, (happened) => happened.stopPropagation()); // the node would move, too
    }
    this.box.addEventListener("pointerdown", (event) => event.button === 0 && this.take(event));
    this.box.addEventListener("pointermove", (event) => this.held && this.move(event));
    for (const end of ["pointerup", "pointercancel"]) this.box.addEventListener(end, () => this.release());
    this.box.addEventListener("dblclick", (event) => this.toggle(event));
    this.box.addEventListener("pointerenter", () => this.follow()); // what no callback told
    new ResizeObserver(() => this.draw()).observe(this.box);
    for (const widget of Object.values(this.widgets)) after(widget, "callback", () => this.follow());
  }

  // -- what there is

  /** Whether a link sets one of the widgets: then only a run knows the curve. */
  get linked() {
    return this.node.inputs?.some((input) => INPUTS.includes(input.name) && input.link != null);
  }

  /** Has the server say what the values mean; of those that come while it answers, the last are asked for next. */
  async follow() {
    if (this.asking) return;
    this.asking = true;
    while (!this.linked) {
      const values = JSON.stringify(Object.fromEntries(INPUTS.map((name) => [name, this.widgets[name].value])));
      if (values === this.known) break;
      try {
        const answer = await app.api.fetchApi("/zeroconv/schedule", { method: "POST", body: values });
        const told = await answer.json();
        this.told = this.held?.moved ? { ...told, keyframes: this.told.keyframes } : told; // the mouse may be farther on
      } catch {
        this.told = { error: "The server does not say what this curve is." };
      }
      this.known = values;
      this.draw();
    }
    this.asking = false;
  }

  /** A link came or went. */
  relinked() {
    if (this.linked) this.told = this.known = null;
    this.draw();
    this.follow();
  }

  /** After a run, which knows what links gave. */
  ran(told) {
    if (!this.linked) return;
    this.told = told;
    this.draw();
  }

  // -- where things are

  get size() {
    return [this.box.clientWidth, this.box.clientHeight];
  }

  /** Position and value at the far ends of the axes. */
  get ends() {
    return this.held ?? this.told;
  }

  /** Where on the drawing a position and a value are. */
  at([position, value]) {
    const [width, height] = this.size;
    const { right, top } = this.ends;
    const x = EDGE.left + (width - EDGE.left - EDGE.right) * position / right;
    return [x, height - EDGE.bottom - (height - EDGE.top - EDGE.bottom) * value / top];
  }

  /** Where on the drawing the mouse is: the front end may have scaled that. */
  place(event) {
    const { left, top, width, height } = this.box.getBoundingClientRect();
    return [(event.clientX - left) / width * this.size[0], (event.clientY - top) / height * this.size[1]];
  }

  /** The position and the value at a place on the drawing, in whole steps or hundredths. */
  meant([x, y]) {
    const [width, height] = this.size;
    const { right, top } = this.ends;
    const position = (x - EDGE.left) / (width - EDGE.left - EDGE.right) * right;
    const value = (height - EDGE.bottom - y) / (height - EDGE.top - EDGE.bottom) * top;
    const fine = this.fine;
    return [Math.round(within(position, 0, right) * fine) / fine, Math.round(within(value, 0, top) * 100) / 100];
  }

  /** In how many parts a position is told. */
  get fine() {
    return this.widgets.unit.value === "step" ? 1 : 100;
  }

  /** The keyframe next to a place, or -1. */
  next(place) {
    const off = this.told.keyframes.map((keyframe) => Math.hypot(...this.at(keyframe).map((at, axis) => at - place[axis])));
    const least = Math.min(...off);
    return least < REACH ? off.indexOf(least) : -1;
  }

  /** Whether the mouse may change the curve. */
  get free() {
    return !this.linked && this.told?.keyframes !== undefined;
  }

  // -- what is changed

  /** Writes keyframes into the widgets; a named curve becomes one of the user's own. */
  write(keyframes) {
    const text = keyframes.map(([at, value, on]) => `${at}: ${value}${on === "linear" ? "" : ` ${on}`}`).join("\n");
    for (const [name, value] of [["keyframes", text], ["curve", CUSTOM]]) {
      const widget = this.widgets[name];
      if (widget.value === value) continue;
      widget.value = value;
      widget.callback(value);
    }
    this.draw();
    this.node.setDirtyCanvas(true, true);
  }

  take(event) {
    if (!this.free) return;
    const from = this.place(event);
    const i = this.next(from);
    if (i < 0) return;
    this.held = { i, from, moved: false, right: this.told.right, top: this.told.top };
    this.box.setPointerCapture(event.pointerId);
  }

  /** The point goes with the mouse, and stays between its neighbours. */
  move(event) {
    const { i, from } = this.held;
    const to = this.place(event);
    if (!this.free || (!this.held.moved && Math.hypot(to[0] - from[0], to[1] - from[1]) < TREMBLE)) return;
    this.held.moved = true;
    const { keyframes } = this.told;
    const [position, value] = this.meant(to);
    const low = i > 0 ? keyframes[i - 1][0] + 1 / this.fine : 0;
    const high = i + 1 < keyframes.length ? keyframes[i + 1][0] - 1 / this.fine : this.ends.right;
    const put = low > high ? keyframes[i][0] : Math.round(within(position, low, high) * this.fine) / this.fine;
    this.told = { ...this.told, keyframes: keyframes.with(i, [put, value, keyframes[i][2]]) }; // at once; the line follows
    this.write(this.told.keyframes);
  }

  release() {
    const moved = this.held?.moved;
    this.held = null;
    if (moved) this.draw(); // the axes may be others now
  }

  /** A point goes away; where none is, one comes and goes on as the one before it did. */
  toggle(event) {
    if (!this.free) return;
    const place = this.place(event);
    const { keyframes } = this.told;
    const hit = this.next(place);
    if (hit >= 0) return keyframes.length > 1 && this.write(keyframes.toSpliced(hit, 1));
    const [position, value] = this.meant(place);
    if (keyframes.some(([there]) => there === position)) return;
    const i = keyframes.filter(([there]) => there < position).length;
    this.write(keyframes.toSpliced(i, 0, [position, value, keyframes[Math.max(i - 1, 0)][2]]));
  }

  // -- what is seen

  draw() {
    const { told } = this;
    if (!told?.points) {
      const says = told?.error ?? (this.linked ? "Run once: then the curve can be seen." : "");
      this.box.innerHTML = `<style>${STYLE}</style><p>${escaped(says)}</p>`;
      return;
    }
    const [width, height] = this.size;
    const { right, top } = this.ends;
    const quarters = [0, 0.25, 0.5, 0.75, 1];
    const across = right > 1 ? [0, 0.5, 1] : quarters;
    const text = (x, y, anchor, words) => `<text x="${x}" y="${y}" text-anchor="${anchor}">${escaped(String(words))}</text>`;
    const grid = [
      ...across.map((part) => [this.at([part * right, 0]), this.at([part * right, top])]),
      ...quarters.map((part) => [this.at([0, part * top]), this.at([right, part * top])]),
    ];
    const line = told.points.filter(([position]) => position <= right);
    line.push([right, line.at(-1)[1]]);
    this.box.innerHTML = `<style>${STYLE}</style><svg viewBox="0 0 ${width} ${height}" class="${this.free ? "free" : ""}">
      <path class="grid" d="${grid.map(([from, to]) => `M${from}L${to}`).join("")}"/>
      ${across.map((part) => text(this.at([part * right, 0])[0], height - EDGE.bottom + 17, "middle", part * right)).join("")}
      ${quarters.map((part) => text(EDGE.left - 9, this.at([0, part * top])[1] + 4, "end", part * top)).join("")}
      ${text(EDGE.left, 15, "start", "strength times")}
      ${told.per_image.length ? text(width - EDGE.right, 15, "end", `pictures: ${told.per_image.join(", ").slice(0, 24)}`) : ""}
      ${text((EDGE.left + width - EDGE.right) / 2, height - 6, "middle", told.axis)}
      <path class="line" d="M${line.map((point) => this.at(point)).join("L")}"/>
      ${told.keyframes.map((keyframe) => this.at(keyframe)).map(([x, y]) => `<circle cx="${x}" cy="${y}" r="5"/>`).join("")}
    </svg>`;
  }
}

app.registerExtension({
  name: "zeroconv.schedule",
  nodeCreated(node) {
    if (node.comfyClass !== "ControlSchedule") return;
    const curve = new Curve(node);
    addBox(node, "zeroconv_curve", curve.box, 180); // the other widgets have it all
    Object.assign(curve.widgets.keyframes.options, { getMinHeight: () => 60, getMaxHeight: () => 60 });
    for (const event of ["onConfigure", "onConnectionsChange"]) after(node, event, () => curve.relinked());
    after(node, "onExecuted", (output) => output?.curve && curve.ran(output.curve[0]));
    curve.follow();
  },
});
