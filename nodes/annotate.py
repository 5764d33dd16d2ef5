"""`Annotate`: a picture becomes a hint."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..annotators import ANNOTATORS
from ..annotators.images import AnnotatorError, resize_short_side
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
                optional=True,  # a workflow in API format that was saved before an annotator came stays valid
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
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The hint is kept where this is white, black elsewhere; inpaint: white is painted anew.",
                ),
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
        (chosen,) = (entry for entry in ANNOTATORS if entry.name == annotator)
        if chosen.reads_mask and mask is None:
            raise AnnotatorError(f"{annotator} needs a mask, found none: connect one, white where to paint anew")
        annotate = chosen.load()
        own = {p.name: parameters.get(f"{annotator}_{p.name}", p.default) for p in chosen.parameters}
        pictures = [resize_short_side(picture, resolution) for picture in image[..., :3].cpu().numpy()]
        masks = None if mask is None else _fit(mask, pictures)
        hints = []
        for i, picture in enumerate(steps(pictures, cls.hidden.unique_id)):
            reads = {"mask": masks[i].numpy()} if masks is not None and chosen.reads_mask else {}
            hints.append(annotate(picture, **reads, **own))
        hint = torch.from_numpy(np.stack(hints))
        if masks is not None and not chosen.reads_mask:
            hint = hint * masks[..., None]
        # What marks the masked pixels need not be a colour: the picture that is shown is clamped, the hint is not.
        return io.NodeOutput(hint, pose_keypoints or [], ui=ui.PreviewImage(hint.clamp(0, 1), cls=cls))


def _fit(mask: torch.Tensor, pictures: list[np.ndarray]) -> torch.Tensor:
    """A mask (H,W) or (B,H,W), one or as many as there are pictures, as (B,H,W) at their size on the CPU."""
    rows = mask.reshape(-1, 1, *mask.shape[-2:]).cpu().float()
    if len(rows) not in (1, len(pictures)):
        raise AnnotatorError(
            f"{len(pictures)} images came with {len(rows)} masks: connect one mask for all or one for each"
        )
    fitted = torch.nn.functional.interpolate(rows, size=pictures[0].shape[:2], mode="bilinear")
    return fitted[:, 0].expand(len(pictures), -1, -1)
