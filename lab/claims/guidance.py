"""Claim: without a prompt, control in both halves of guidance undoes it, in one it is too strong (section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...controlnet_core.dosing.strength import Guidance
from ..evaluate import held_out
from ..pipeline import LabModel
from ..sheet import contact_sheet
from . import runs
from .claim import Findings, Work, table
from .sampling import Sampled, judged, sample, shown

SCENES = 32
SCALES = (3.0, 7.0)
WAYS: dict[str, Guidance] = {
    "control in both halves": "both",
    "in the conditional half": "cond_only",
    "the same, weighted by resolution": "cfg_resolution",
}


def measure(_: Work) -> Findings:
    """The shipped depth and canny control under the empty prompt, at the lab's guidance scale and a high one."""
    model, segmenter = LabModel.load(("depth", "canny")), runs.parts()[1]
    scenes = held_out(SCENES)
    empty = [""] * SCENES
    rows, sheets = [], {"render": shown(scenes.images, 6)}

    def add(control: str, way: str, scale: float | None, found: Sampled) -> None:
        rows.append(
            [
                control,
                way,
                None if scale is None else f"{scale:g}",
                found.figure,
                found.solids,
                found.mean,
                *looks(found.pictures),
            ]
        )
        if control == "depth":
            sheets[way if scale is None else f"{_SHORT[way]}, {scale:g}"] = shown(found.pictures, 6)

    add("-", "renders", None, judged(segmenter, scenes, scenes.images))
    for control in ("depth", "canny"):
        hints = {control: scenes.hints[control]}
        add(control, "no guidance", 1, sample(model, segmenter, scenes, empty, hints, 1.0))
        for way, guidance in WAYS.items():
            for scale in SCALES:
                add(control, way, scale, sample(model, segmenter, scenes, empty, hints, scale, guidance))
    head = ["control", "guidance", "scale", "figure", "solids", "mean", "saturation", "contrast", "clipped"]
    return Findings(table(head, rows), {"guidance": contact_sheet(sheets)})


_SHORT = {"no guidance": "none", **dict(zip(WAYS, ("both", "cond only", "weighted"), strict=True))}


def looks(pictures: Tensor) -> tuple[float, float, float]:
    """How strong pictures (N,3,H,W) look: mean saturation, standard deviation of the grey, share of clipped values.

    All in 0..1, means over the pictures. Saturation is that of HSV: (max - min) / max.
    """
    high, low = pictures.amax(1), pictures.amin(1)
    grey = torch.einsum("bchw,c->bhw", pictures, pictures.new_tensor([0.299, 0.587, 0.114]))
    return (
        ((high - low) / high.clamp(min=1e-3)).mean().item(),
        grey.flatten(1).std(1).mean().item(),
        ((pictures <= 0) | (pictures >= 1)).float().mean().item(),
    )
