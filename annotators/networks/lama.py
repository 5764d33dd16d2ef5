"""LaMa, which fills holes in pictures: Suvorov et al., "Resolution-robust Large Mask Inpainting" (advimman/lama)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import nn

from ..images import AnnotatorError
from . import scripted

MULTIPLE = 8
"""LaMa halves a picture three times."""


def build(path: Path) -> nn.Module:
    """Big-LaMa of its TorchScript: eval, fp32, on the CPU. Raises AnnotatorError."""
    return scripted.build(path)


@torch.inference_mode()
def filled(network: nn.Module, image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """A picture (H,W,3) float32, 0..1, with something likely in its hole (H,W), bool; sides are multiples of 8.

    Raises AnnotatorError for an answer that is not finite.
    """
    place = next(network.parameters())
    pixels = rearrange(torch.from_numpy(np.ascontiguousarray(image)), "h w c -> 1 c h w")
    where = torch.from_numpy(np.ascontiguousarray(hole))[None, None]
    answer = scripted.run(network, pixels.to(place.device, place.dtype), where.to(place.device, place.dtype)).float()
    if not answer.isfinite().all():
        raise AnnotatorError("the network answered with numbers that are not finite: run it in fp32, or fetch it again")
    return rearrange(answer, "1 c h w -> h w c").clamp(0, 1).cpu().numpy()
