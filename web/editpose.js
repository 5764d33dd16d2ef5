// Edit Pose is edited with the mouse: people over a picture, joint by joint. All of it is kept in the node's text, which is
// what is saved and sent; without this file the node reads the text just so.

import { app } from "../../scripts/app.js";
import { addBox, after } from "./dom.js";

const BODY = "pose_keypoints_2d";
const RIGHT_HAND = "hand_right_keypoints_2d";
const LEFT_HAND = "hand_left_keypoints_2d";
/** What hangs on the nose, the right and the left wrist, and goes where they go. */
const HANGING = { 0: "face_keypoints_2d", 4: RIGHT_HAND, 7: LEFT_HAND };
/** What may be taken hold of; of two that lie over each other the first. */
const PARTS = [BODY, ...Object.values(HANGING)];

/** Pairs of OpenPose's 18 joints; limb and joint i are drawn in the hue of 20 i degrees, as the hint is. */
const LIMBS = [
  [1, 2], [1, 5], [2, 3], [3, 4], [5, 6], [6, 7], [1, 8], [8, 9], [9, 10],
  [1, 11], [11, 12], [12, 13], [1, 0], [0, 14], [14, 16], [0, 15], [15, 17],
];
/** The right joint and the left one of each pair. */
const PAIRS = [[2, 5], [3, 6], [4, 7], [8, 11], [9, 12], [10, 13], [14, 15], [16, 17]];
/** Somebody who stands and looks at us, in shares of the height: x from the middle, y from the top. */
const STANDING = [
  [0, 0.12], [0, 0.22], [-0.1, 0.22], [-0.15, 0.37], [-0.17, 0.51], [0.1, 0.22], [0.15, 0.37], [0.17, 0.51],
  [-0.07, 0.52], [-0.08, 0.73], [-0.08, 0.93], [0.07, 0.52], [0.08, 0.73], [0.08, 0.93],
  [-0.025, 0.1], [0.025, 0.1], [-0.05, 0.11], [0.05, 0.11],
];
/** Joints of less confidence are not there, as annotators/keypoints.py has it. */
const CONFIDENT = 0.3;

/** The long side of the drawing, and in its pixels: how near to a joint the mouse takes it, what is no move, a radius. */
const LONG = 1024;
const REACH = 28;
const TREMBLE = 4;
const RADIUS = 10;

/** The frames in a text, or null for what Python alone reads: bodies of other joints, shares, people on no canvas. */
function read(text) {
  try {
    const frames = [JSON.parse(text)].flat();
    const ours = (person) => person[BODY].length === 3 * 18 && person[BODY].some((number) => number > 2);
    const fits = (frame) => frame.canvas_width > 0 && frame.canvas_height > 0 && frame.people.every(ours);
    return frames.length && frames.every(fits) ? frames : null;
  } catch {
    return null;
  }
}

/** The text of frames; of one alone, as files of OpenPose have it. */
function written(frames) {
  return JSON.stringify(frames.length > 1 ? frames : frames[0]);
}

/** Calls `then(i)` for each point of a part that is there. */
function each(part, then) {
  for (let i = 0; 3 * i < (part?.length ?? 0); i++) if (part[3 * i + 2] >= CONFIDENT) then(i);
}

function rounded(number) {
  return Math.round(10 * number) / 10;
}

/** Moves point i of a part. */
function shift(part, i, dx, dy) {
  part[3 * i] = rounded(part[3 * i] + dx);
  part[3 * i + 1] = rounded(part[3 * i + 1] + dy);
}

class Editor {
  constructor(node) {
    this.node = node;
    this.text = node.widgets.find((widget) => widget.name === "pose");
    this.past = []; // texts, for undo
    this.chosen = 0; // who was touched last
    this.at = 0; // which frame
    this.answers = new Map(); // what runs said of texts that only Python reads
    this.images = []; // of the last run
    this.held = null; // what the mouse holds
    this.box = Object.assign(document.createElement("div"), { className: "zeroconv-pose" });
    this.canvas = document.createElement("canvas");
    this.bar = document.createElement("div");
    this.box.style.cssText = "display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%; min-height: 340px";
    this.canvas.style.cssText = "flex: 1; width: 100%; min-height: 0; object-fit: contain; touch-action: none";
    this.bar.style.cssText = "display: flex; flex-wrap: wrap; gap: 4px";
    this.box.append(this.bar, this.canvas);
    this.button("add", "One more person", () => this.add());
    this.button("remove", "Take away the person touched last", () => this.edit((people, who) => people.splice(who, 1)));
    this.button("mirror", "Left and right of the person touched last", () => this.edit((people, who) => this.mirror(people[who])));
    this.button("undo", "Back by one change", () => this.past.length && this.show(this.past.pop()));
    this.button("reset", "Back to what is connected", () => this.write(""));
    this.button("load", "A JSON file of OpenPose, DWPose or CMU", () => this.load());
    this.button("save", "These people as a JSON file", () => this.save());
    this.number = Object.assign(document.createElement("input"), { type: "number", min: 1, value: 1, title: "Which frame" });
    this.number.addEventListener("input", () => { this.at = Math.max(0, this.number.value - 1); this.draw(); });
    this.bar.append(this.number);
    for (const event of ["pointerdown", "pointermove", "pointerup"]) {
      this.box.addEventListener(event, (happened) => happened.stopPropagation()); // the node would move, too
    }
    this.canvas.addEventListener("pointerdown", (event) => event.button === 0 && this.take(event));
    this.canvas.addEventListener("pointermove", (event) => this.held && this.move(event));
    for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, () => this.release());
    this.canvas.addEventListener("pointerenter", () => this.draw()); // the picture may have come
    this.canvas.addEventListener("dblclick", (event) => this.toggle(event));
    after(this.text, "callback", () => this.draw());
  }

  button(name, title, does) {
    const button = Object.assign(document.createElement("button"), { textContent: name, title });
    button.style.cssText = "font: 12px sans-serif; padding: 3px 8px; cursor: pointer; border-radius: 4px; color: var(--input-text); "
      + "background: var(--comfy-input-bg); border: 1px solid var(--border-color)";
    button.addEventListener("click", does);
    this.bar.append(button);
  }

  // -- what there is

  /** The picture under the people: that of the last run, or what the node before shows. */
  get picture() {
    const run = this.images[Math.min(this.at, this.images.length - 1)];
    const before = this.node.getInputNode?.(this.node.findInputSlot("image"))?.imgs?.[0];
    return [run, before].find((image) => image?.naturalWidth);
  }

  /** All frames, from the text or from a run that read it, or what is connected; null where none has. */
  get frames() {
    if (this.held) return this.held.frames;
    const { naturalWidth = 512, naturalHeight = 512 } = this.picture ?? {};
    const empty = [{ people: [], canvas_width: naturalWidth, canvas_height: naturalHeight }];
    const text = this.text.value.trim();
    const connected = this.node.inputs?.some((input) => input.name === "pose_keypoints" && input.link != null);
    return read(text) ?? this.answers.get(text) ?? (text || connected ? null : empty);
  }

  get frame() {
    return this.frames?.[Math.min(this.at, this.frames.length - 1)];
  }

  /** From the frame's canvas to the drawing's pixels. */
  scale({ canvas_width, canvas_height }) {
    return [this.canvas.width / canvas_width, this.canvas.height / canvas_height];
  }

  /** Where in the drawing the mouse is. */
  place(event) {
    const { left, top, width, height } = this.canvas.getBoundingClientRect();
    const zoom = Math.min(width / this.canvas.width, height / this.canvas.height); // object-fit: contain
    const x = (event.clientX - left - width / 2) / zoom + this.canvas.width / 2;
    const y = (event.clientY - top - height / 2) / zoom + this.canvas.height / 2;
    return [Math.min(Math.max(x, 0), this.canvas.width), Math.min(Math.max(y, 0), this.canvas.height)];
  }

  /** The point next to a place in the drawing, if any is within reach. */
  next([x, y], frame) {
    const [kx, ky] = this.scale(frame);
    for (const part of PARTS) {
      let found = null;
      let least = REACH;
      frame.people.forEach((person, who) => each(person[part], (i) => {
        const off = Math.hypot(kx * person[part][3 * i] - x, ky * person[part][3 * i + 1] - y);
        if (off < least) [found, least] = [{ who, part, i }, off];
      }));
      if (found) return found;
    }
    return null;
  }

  // -- what is changed

  /** The text becomes this. */
  show(text) {
    this.text.value = text;
    this.draw();
    this.node.setDirtyCanvas(true, true);
  }

  /** The same, and undo leads back. */
  write(text) {
    this.past.push(this.text.value);
    this.show(text);
  }

  /** All frames, of `of` the one that is shown copied and changed. */
  changed(change, of = this.frames) {
    const frames = [...of];
    const at = Math.min(this.at, frames.length - 1);
    frames[at] = structuredClone(frames[at]);
    change(frames[at]);
    return frames;
  }

  /** Writes what `change` makes of the people of this frame and of the one who was touched last. */
  edit(change) {
    if (!this.frame?.people.length) return;
    this.write(written(this.changed((frame) => change(frame.people, Math.min(this.chosen, frame.people.length - 1), frame))));
  }

  add() {
    if (!this.frame) return;
    this.write(written(this.changed(({ people, canvas_width, canvas_height }) => {
      const middle = ((0.5 + 0.2 * people.length) % 1) * canvas_width; // beside those who are there
      const point = ([x, y]) => [middle + x * canvas_height, y * canvas_height, 1].map(rounded);
      this.chosen = people.push({ [BODY]: STANDING.flatMap(point) }) - 1;
    })));
  }

  /** Mirrors a person in place: what was the right hand is the left one then. */
  mirror(person) {
    const all = [];
    for (const part of PARTS) each(person[part], (i) => all.push(person[part][3 * i]));
    const twice = Math.min(...all) + Math.max(...all);
    for (const part of PARTS) each(person[part], (i) => shift(person[part], i, twice - 2 * person[part][3 * i], 0));
    for (const [right, left] of person[BODY] ? PAIRS : []) {
      const [a, b] = [right, left].map((i) => person[BODY].slice(3 * i, 3 * i + 3));
      person[BODY].splice(3 * right, 3, ...b);
      person[BODY].splice(3 * left, 3, ...a);
    }
    [person[RIGHT_HAND], person[LEFT_HAND]] = [person[LEFT_HAND] ?? null, person[RIGHT_HAND] ?? null];
  }

  /** A joint goes away; where none is, the first that the chosen person lacks comes. */
  toggle(event) {
    const place = this.place(event);
    const hit = this.frame && this.next(place, this.frame);
    this.edit((people, who, frame) => {
      if (hit) return people[hit.who][hit.part].splice(3 * hit.i, 3, 0, 0, 0);
      const body = (people[who][BODY] ??= Array(3 * 18).fill(0));
      const missing = LIMBS.flat().find((i) => !(body[3 * i + 2] >= CONFIDENT));
      const [x, y] = this.scale(frame).map((k, axis) => rounded(place[axis] / k));
      if (missing !== undefined) body.splice(3 * missing, 3, x, y, 1);
    });
  }

  take(event) {
    const hit = this.frame && this.next(this.place(event), this.frame);
    if (!hit) return;
    this.chosen = hit.who;
    const { frames } = this;
    this.held = { ...hit, frames, before: frames, from: this.place(event) };
    this.canvas.setPointerCapture(event.pointerId);
    this.draw();
  }

  /** The joint goes with the mouse, and what hangs on it; with Shift the whole person. */
  move(event) {
    const { who, part, i, from, before } = this.held;
    const to = this.place(event);
    if (this.held.frames === before && Math.hypot(to[0] - from[0], to[1] - from[1]) < TREMBLE) return;
    const along = event.shiftKey ? PARTS : part === BODY && i in HANGING ? [HANGING[i]] : [];
    this.held.frames = this.changed((frame) => {
      const person = frame.people[who];
      const [dx, dy] = this.scale(frame).map((k, axis) => (to[axis] - from[axis]) / k);
      for (const name of along) each(person[name], (j) => shift(person[name], j, dx, dy));
      if (!event.shiftKey) shift(person[part], i, dx, dy);
    }, before);
    this.draw();
  }

  release() {
    const { frames, before } = this.held ?? {};
    this.held = null;
    if (frames !== before) this.write(written(frames));
  }

  // -- files

  load() {
    const input = Object.assign(document.createElement("input"), { type: "file", accept: ".json,application/json" });
    input.addEventListener("change", async () => this.write((await input.files[0].text()).trim()));
    input.click();
  }

  save() {
    const text = this.frames ? written(this.frames) : this.text.value;
    const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    Object.assign(document.createElement("a"), { href: url, download: "pose.json" }).click();
    setTimeout(() => URL.revokeObjectURL(url)); // once the download has begun
  }

  // -- what is seen

  /** After a run: the people as Python reads them, and the picture. */
  ran({ of, frames, pictures }) {
    if (!read(of)) this.answers.set(of.trim(), frames);
    this.images = pictures.map((file) => Object.assign(new Image(), { src: app.api.apiURL(`/view?${new URLSearchParams(file)}`) }));
    for (const image of this.images) image.addEventListener("load", () => this.draw());
    this.draw();
  }

  draw() {
    const { picture, frame, canvas } = this;
    const [width, height] = picture ? [picture.naturalWidth, picture.naturalHeight] : [frame?.canvas_width ?? 1, frame?.canvas_height ?? 1];
    const zoom = LONG / Math.max(width, height);
    Object.assign(canvas, { width: Math.max(1, zoom * width), height: Math.max(1, zoom * height) }); // and it is empty
    const context = canvas.getContext("2d");
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (picture) context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    this.number.style.display = this.frames?.length > 1 ? "" : "none";
    if (!frame) {
      Object.assign(context, { font: "36px sans-serif", fillStyle: "#fff", textAlign: "center" });
      context.fillText("Run once: then the people can be edited", canvas.width / 2, canvas.height / 2, canvas.width);
      return;
    }
    const [kx, ky] = this.scale(frame);
    const chosen = Math.min(this.chosen, frame.people.length - 1);
    frame.people.forEach((person, who) => this.drawPerson(context, person, kx, ky, who === chosen));
  }

  drawPerson(context, person, kx, ky, chosen) {
    const body = person[BODY] ?? [];
    const at = (part, i) => [kx * part[3 * i], ky * part[3 * i + 1]];
    const dot = (part, i, radius, colour) => {
      context.beginPath();
      context.arc(...at(part, i), radius, 0, 2 * Math.PI);
      context.fillStyle = colour;
      context.fill();
    };
    Object.assign(context, { lineWidth: RADIUS, lineCap: "round" });
    LIMBS.forEach(([a, b], limb) => {
      if (![a, b].every((i) => body[3 * i + 2] >= CONFIDENT)) return;
      context.beginPath();
      context.moveTo(...at(body, a));
      context.lineTo(...at(body, b));
      context.strokeStyle = `hsl(${20 * limb} 100% 30%)`;
      context.stroke();
    });
    for (const part of PARTS.slice(1)) each(person[part], (i) => dot(person[part], i, RADIUS / 3, "#fff"));
    each(body, (i) => {
      if (chosen) dot(body, i, RADIUS + 4, "#fff");
      dot(body, i, RADIUS, `hsl(${20 * i} 100% 50%)`);
    });
  }
}

app.registerExtension({
  name: "zeroconv.editpose",
  nodeCreated(node) {
    if (node.comfyClass !== "EditPose") return;
    const editor = new Editor(node);
    addBox(node, "zeroconv_pose", editor.box, 340); // the text has it all
    Object.assign(editor.text.options, { getMinHeight: () => 60, getMaxHeight: () => 60 });
    for (const event of ["onConfigure", "onConnectionsChange"]) after(node, event, () => editor.draw());
    after(node, "onExecuted", (output) => output?.pose && editor.ran(output.pose[0]));
    editor.draw();
  },
});
