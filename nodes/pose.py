"""`EditPose`: people moved, added and taken away by hand, drawn as a hint."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui

from ..annotators.images import AnnotatorError
from ..annotators.keypoints import canvas_of, read_frame, read_frames, with_canvas, write_frame
from ..annotators.pose import draw_people
from ..controlnet_core.limits import SIDE
from .annotate import PoseKeypoint, each
from .host import given
from .host.progress import steps

NOBODY = {"people": []}
EMPTY = (512, 512)
"""Height and width of a hint without people, where no picture is connected."""


class EditPose(io.ComfyNode):
    """Draws the people of a text, which `web/editpose.js` edits with the mouse."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditPose",
            display_name="Edit Pose (ZeroConv)",
            category="ZeroConv/preprocess",
            description="People whose joints you move with the mouse, over a picture or on black, as keypoints and as "
            "the hint that openpose controls follow.",
            inputs=[
                io.String.Input(
                    "pose",
                    multiline=True,
                    default="",
                    placeholder="people as JSON; empty: those of pose_keypoints",
                    tooltip="The people as JSON, as OpenPose, DWPose and this pack write them: what you edit is kept "
                    "here. Empty: the people of pose_keypoints.",
                ),
                io.Image.Input(
                    "image", optional=True, tooltip="The picture that you edit the people on; the hint gets its size."
                ),
                PoseKeypoint.Input(
                    "pose_keypoints", optional=True, tooltip="The people to begin with, for as long as pose is empty."
                ),
            ],
            outputs=[io.Image.Output(display_name="hint"), PoseKeypoint.Output(display_name="pose_keypoints")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, pose: str, image: torch.Tensor | None = None, pose_keypoints: Any = None) -> io.NodeOutput:
        given.picture(image, "image")
        found = read_frames(pose, "pose") if pose.strip() else read_frames(pose_keypoints)
        frames = given.people(found) or [NOBODY]
        if image is None:
            height, width = _size(frames[0])
        else:
            frames = each(frames, len(image), "frames of people")
            height, width = image.shape[1:3]
        hints, written = torch.empty(len(frames), height, width, 3), []
        for i, frame in enumerate(steps(frames, cls.hidden.unique_id)):
            people = read_frame(with_canvas(frame, height, width), height, width)
            hints[i] = torch.from_numpy(draw_people(people, height, width))
            written.append(write_frame(people, height, width))
        pictures = [] if image is None else ui.PreviewImage(image, cls=cls).as_dict()["images"]
        # What the page edits: `of` tells it whether its text is still the one that was read.
        return io.NodeOutput(hints, written, ui={"pose": [{"of": pose, "frames": written, "pictures": pictures}]})


def _size(frame: Any) -> tuple[int, int]:
    """Height and width of a frame's canvas. Raises AnnotatorError where people are on none, or on a huge one."""
    canvas = canvas_of(frame)
    if canvas is None and frame["people"]:
        raise AnnotatorError(
            "the people are on no canvas, as in CMU's own files: connect the picture that they were found in, or write "
            "canvas_width and canvas_height into pose"
        )
    height, width = canvas or EMPTY
    if max(height, width) > SIDE:
        raise AnnotatorError(f"the canvas of the people is {width}x{height}, expected no side over {SIDE}: scale it")
    return height, width
