"""`LoadLabModel` and `LabScene`: the embedded model and its world, so that a graph needs no file to start from."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..lab.hints import canny_hint, depth_hint, pose_hint
from ..lab.render import render
from ..lab.scene import describe, random_scene
from .annotate import PoseKeypoint
from .host import lab


class LoadLabModel(io.ComfyNode):
    """Loads the small model that comes with the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadLabModel",
            display_name="Load Lab Model (ZeroConv)",
            category="ZeroConv/lab",
            description="The small model that comes with the pack: pictures of 128 x 128 pixels, a jointed figure and "
            "simple solids, on any CPU. Its controls are files that Load ControlNet lists.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.Vae.Output(display_name="vae"),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(lab.load_model(), lab.load_clip(), lab.load_vae())


class LabScene(io.ComfyNode):
    """Renders a scene of the lab with its hints and its prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LabScene",
            display_name="Lab Scene (ZeroConv)",
            category="ZeroConv/lab",
            description="A rendered scene with exact depth, pose and edges, and the prompt that names what is in it.",
            inputs=[
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=True),
                io.Int.Input("size", default=128, min=64, max=1024, step=8, tooltip="Side in pixels."),
                io.Boolean.Input("figure", default=True, tooltip="A jointed figure."),
                io.Int.Input("solids", default=2, min=0, max=3, tooltip="Spheres, cubes, cones and cylinders."),
            ],
            outputs=[
                io.Image.Output(display_name="image"),
                io.Image.Output(display_name="depth"),
                io.Image.Output(display_name="pose"),
                io.Image.Output(display_name="canny"),
                PoseKeypoint.Output(display_name="pose_keypoints"),
                io.String.Output(display_name="prompt"),
            ],
        )

    @classmethod
    def execute(cls, seed: int, size: int, figure: bool, solids: int) -> io.NodeOutput:
        scene = random_scene(seed, solids=solids, figure=figure)
        picture = render(scene, size)
        hints = (depth_hint(picture), pose_hint(picture), canny_hint(picture))
        images = (torch.from_numpy(array)[None] for array in (picture.image, *hints))
        return io.NodeOutput(*images, [_pose_keypoints(picture.keypoints, size)], describe(scene))


def _pose_keypoints(keypoints: Any, size: int) -> dict[str, Any]:
    """The figure as one frame of a POSE_KEYPOINT, in pixels; nobody when no joint was drawn."""
    person = {
        "pose_keypoints_2d": [float(number) for number in keypoints.reshape(-1)],
        "face_keypoints_2d": None,
        "hand_left_keypoints_2d": None,
        "hand_right_keypoints_2d": None,
    }
    people = [person] if keypoints[:, 2].any() else []
    return {"people": people, "canvas_width": size, "canvas_height": size}
