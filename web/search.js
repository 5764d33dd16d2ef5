// What people type when they look for a hint or a loader ("openpose", "canny", "t2i adapter"), each as an entry of its own in
// the search and in the library. It puts down the pack's node of that kind with the choice made; that is what is saved.

import { app } from "../../scripts/app.js";

/** What is made of a picture, and the annotator that makes it. */
const HINTS = {
  "OpenPose pose": "human_pose",
  "Canny edge": "canny",
  "HED soft edge": "hed",
  "Lineart": "lineart_realistic",
  "Scribble": "scribble",
  "M-LSD (mlsd) lines": "mlsd",
  "Depth map": "depth_anything",
  "Normal map": "normal_moge",
  "Segmentation": "segments_ade20k",
  "Tile": "tile",
  "Inpaint": "inpaint",
};
/** Kinds of files that Load ControlNet reads, and what their entries are called: the page names the pack beside each. */
const FILES = {
  "ControlNet": "ControlNet", // only the very word comes before the host's own nodes that begin with it
  "T2I-Adapter": "T2I-Adapter (ZeroConv)",
  "Control-LoRA": "Control-LoRA (ZeroConv)",
};

/** The entries by name, with the pack's node and what is chosen in it. */
const ENTRIES = Object.fromEntries([
  ...Object.entries(HINTS).map(([what, annotator]) => [
    `ZeroConv.${annotator}`,
    { title: `${what} hint (ZeroConv)`, node: "Annotate", chosen: { annotator } },
  ]),
  ...Object.entries(FILES).map(([kind, title]) => [
    `ZeroConv.${kind}`,
    { title, node: "LoadControlNet", chosen: {} },
  ]),
]);

/** Adds the entries to what the server says of its nodes: each is a node of the pack with other defaults. */
function add(definitions) {
  for (const [name, { title, node, chosen }] of Object.entries(ENTRIES)) {
    const own = definitions[node];
    if (!own) return;
    const required = { ...own.input.required };
    for (const [input, value] of Object.entries(chosen)) {
      const [type, options] = required[input];
      required[input] = [type, { ...options, default: value }];
    }
    definitions[name] = { ...own, name, display_name: title, search_aliases: [], input: { ...own.input, required } };
  }
}

app.registerExtension({
  name: "zeroconv.search",
  addCustomNodeDefs: add,
  refreshComboInNodes: add, // before the search is told of all nodes anew
  beforeRegisterNodeDef(type, { name }) {
    if (!(name in ENTRIES)) return;
    const { node } = ENTRIES[name];
    type.comfyClass = type.prototype.comfyClass = node;
    const created = type.prototype.onNodeCreated;
    type.prototype.onNodeCreated = function () {
      created?.call(this);
      const own = LiteGraph.registered_node_types[node];
      Object.assign(this, { type: node, title: own.title });
      this.constructor = own; // where the page looks for a node's description
    };
  },
});
