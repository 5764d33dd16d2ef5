// A new node that shows a picture or a report has room for it from the beginning; saved ones keep their size.

import { app } from "../../scripts/app.js";

/** Width and height in pixels, without the title. */
const SIZES = {
  CompareImages: [360, 420],
  ControlBlockWeights: [360, 520],
  ControlReport: [480, 960],
  ControlSchedule: [360, 480],
  EditPose: [440, 640],
  InspectControl: [460, 360],
  TrainControlNet: [480, 760],
};

app.registerExtension({
  name: "zeroconv.sizes",
  nodeCreated(node) {
    const size = SIZES[node.comfyClass];
    if (size) node.setSize(size.map((side, i) => Math.max(side, node.size[i])));
  },
});
