// Shows the text that a node of this pack hands to the page (a report, a file's name) on the node itself.

import { app } from "../../scripts/app.js";

const NAME = "zeroconv_text";

function textBox(node) {
  const found = node.widgets?.find((widget) => widget.name === NAME);
  if (found) return found;
  const element = document.createElement("textarea");
  element.readOnly = true;
  element.className = "comfy-multiline-input";
  Object.assign(element.style, { width: "100%", height: "100%", minHeight: "12em", fontFamily: "monospace", whiteSpace: "pre" });
  // neither the prompt nor the saved workflow keeps it
  const widget = node.addDOMWidget(NAME, NAME, element, { serialize: false, getMinHeight: () => 120, getMaxHeight: () => 260 });
  widget.serialize = false;
  return widget;
}

app.registerExtension({
  name: "zeroconv.text",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.category?.startsWith("ZeroConv")) return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      before?.apply(this, arguments);
      if (!output?.text) return;
      textBox(this).element.value = [output.text].flat().join("\n");
      this.setSize([this.size[0], Math.max(this.size[1], this.computeSize()[1])]);
    };
  },
});
