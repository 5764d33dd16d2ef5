// On the nodes Annotate and MeasureControl only the parameters of the chosen annotator are shown. The others keep their
// values, are saved and are sent as ever: hiding is all that happens here, and without this file the nodes work the same.

import { app } from "../../scripts/app.js";
import { after } from "./dom.js";

/** The annotator that the widget `name` belongs to: the longest of `annotators` that it begins with, if any. */
function owner(name, annotators) {
  const fitting = annotators.filter((annotator) => name.startsWith(`${annotator}_`));
  return fitting.sort((a, b) => b.length - a.length)[0];
}

/** Whether the node's slot of this name has a link. */
function linked(node, name) {
  return node.inputs?.some((input) => input.name === name && input.link != null);
}

/** Has Nodes 2.0 look again at the node's widgets. */
function redraw(node) {
  if (!window.LiteGraph?.vueNodesMode) return;
  node.widgets = [...node.widgets]; // another list is seen
  // Before front end 1.34 they draw copies made when the node came into the graph: it comes once more.
  const [major, minor] = (window.__COMFYUI_FRONTEND_VERSION__ ?? "").split(".").map(Number);
  if (major === 1 && minor < 34 && !app.configuringGraph) node.graph?.onNodeAdded?.(node);
}

/** Hides the parameters of all annotators but the chosen one, save what a link sets. */
function hideOthers(node) {
  const choice = node.widgets.find((widget) => widget.name === "annotator");
  const annotators = choice.options.values;
  // Where a link chooses, any annotator may be the one.
  const showAll = linked(node, "annotator");
  for (const widget of node.widgets) {
    const annotator = owner(widget.name, annotators);
    if (annotator === undefined) continue;
    const hidden = !showAll && annotator !== choice.value && !linked(node, widget.name);
    widget.hidden = hidden; // read by the canvas
    widget.options.hidden = hidden; // read by Nodes 2.0
    // The canvas keeps a row of this height even for what it does not draw, and 4 pixels below it.
    if (hidden) widget.computeSize = () => [0, -4];
    else delete widget.computeSize;
  }
  redraw(node);
}

/** Hides as the choice says and gives the node the rows that it then needs; room that the user added stays. */
function choose(node) {
  const before = node.computeSize()[1];
  hideOthers(node);
  resize(node, node.size[1] + node.computeSize()[1] - before);
}

/** Gives the node this height, or what its rows need. */
function resize(node, height) {
  node.setSize([node.size[0], Math.max(height, node.computeSize()[1])]);
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "zeroconv.annotate",
  nodeCreated(node) {
    if (!["Annotate", "MeasureControl"].includes(node.comfyClass)) return;
    choose(node);
    after(node.widgets.find((widget) => widget.name === "annotator"), "callback", () => choose(node));
    // A saved or copied node comes with the size that it had.
    for (const event of ["onConfigure", "onConnectionsChange"]) {
      after(node, event, () => {
        hideOthers(node);
        resize(node, node.size[1]);
      });
    }
  },
});
