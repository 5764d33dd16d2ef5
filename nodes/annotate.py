"""`Annotate`: a picture becomes a hint."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..annotators import ANNOTATORS
from .host.progress import steps

PoseKeypoint = io.Custom("POSE_KEYPOINT")


class Annotate(io.ComfyNode):
    """Makes a hint with the annotator of the user's choice."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        parameters = [
            io.Float.Input(
                f"{annotator.name}_{parameter.name}",
                default=parameter.default,
                min=parameter.minimum,
                max=parameter.maximum,
                step=parameter.step,
                tooltip=parameter.tooltip,
            )
            for annotator in ANNOTATORS
            for parameter in annotator.parameters
        ]
        return io.Schema(
            node_id="Annotate",
            display_name="Annotate (ZeroConv)",
            category="ZeroConv",
            description="Makes a hint from a picture.",
            inputs=[
                io.Image.Input("image"),
                io.Combo.Input("annotator", options=[annotator.name for annotator in ANNOTATORS]),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=0,
                    max=8192,
                    step=8,
                    tooltip="Short side of the hint in pixels; 0 keeps the image's own size.",
                ),
                *parameters,
                io.Mask.Input("mask", optional=True, tooltip="The hint is kept where this is white, black elsewhere."),
                PoseKeypoint.Input("pose_keypoints", optional=True, tooltip="Handed on with the hint."),
            ],
            outputs=[io.Image.Output(display_name="hint"), PoseKeypoint.Output(display_name="pose_keypoints")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        image: torch.Tensor,
        annotator: str,
        resolution: int,
        mask: torch.Tensor | None = None,
        pose_keypoints: Any = None,
        **parameters: float,
    ) -> io.NodeOutput:
        from ..annotators.images import resize_short_side

        (chosen,) = (entry for entry in ANNOTATORS if entry.name == annotator)
        annotate = chosen.load()
        own = {p.name: parameters[f"{annotator}_{p.name}"] for p in chosen.parameters}
        hints = []
        for picture in steps(image[..., :3].cpu().numpy(), cls.hidden.unique_id):
            hints.append(annotate(resize_short_side(picture, resolution), **own))
        hint = torch.from_numpy(np.stack(hints))
        if mask is not None:
            rows = mask.reshape(-1, 1, *mask.shape[-2:])
            hint = hint * torch.nn.functional.interpolate(rows, size=hint.shape[1:3], mode="bilinear").movedim(1, -1)
        return io.NodeOutput(hint, pose_keypoints or [], ui=ui.PreviewImage(hint, cls=cls))
