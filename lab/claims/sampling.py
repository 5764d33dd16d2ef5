"""Held-out scenes sampled under a setting and judged: what all measurements on finished controls share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...controlnet_core.dosing.strength import Guidance
from ..evaluate import HeldOut, judge
from ..pipeline import GUIDANCE_SCALE, LabModel, scene_noise
from ..segmenter import Segmenter

BATCH = 16


@dataclass(frozen=True)
class Sampled:
    """Pictures (N,3,H,W) in [0,1], and the mean IoU of figure and solids with the exact segments."""

    pictures: Tensor
    figure: float
    solids: float

    @property
    def mean(self) -> float:
        """The mean of figure and solids."""
        return (self.figure + self.solids) / 2


def sample(
    model: LabModel,
    segmenter: Segmenter,
    scenes: HeldOut,
    prompts: Sequence[str],
    hints: Mapping[str, Tensor],
    guidance_scale: float = GUIDANCE_SCALE,
    guidance: Guidance = "both",
) -> Sampled:
    """Every scene from the noise of its seed, with its prompt and its hints, by the lab's 20 steps of DDIM in bf16."""
    pictures = []
    for start in range(0, len(scenes.seeds), BATCH):
        chunk = slice(start, start + BATCH)
        with torch.autocast(model.place.type, torch.bfloat16):
            made = model.sample(
                prompts[chunk],
                scene_noise(scenes.seeds[chunk]),
                {name: hint[chunk] for name, hint in hints.items()},
                guidance_scale=guidance_scale,
                guidance=guidance,
            )
        pictures.append(made.float().cpu())
    return judged(segmenter, scenes, torch.cat(pictures))


def judged(segmenter: Segmenter, scenes: HeldOut, pictures: Tensor) -> Sampled:
    """Pictures with what the judge finds in them."""
    figure, solids = judge(segmenter, pictures, scenes.segments, BATCH).nanmean(0).tolist()
    return Sampled(pictures, figure, solids)


def shown(pictures: Tensor, count: int) -> np.ndarray:
    """The first pictures as a column of a contact sheet, (count,H,W,3)."""
    return pictures[:count].permute(0, 2, 3, 1).numpy()
