"""Semantic segments in the colours that the published segmentation ControlNets expect, by OneFormer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import Annotator
from .palettes import ADE20K, COCO

if TYPE_CHECKING:
    from transformers import OneFormerForUniversalSegmentation

    from .palettes import Palette

ADE20K_SIDES, COCO_SIDES = (640, 2560), (800, 1333)
"""The short side at which a network looks, and the long one that it does not exceed."""


def segments_ade20k(network: OneFormerForUniversalSegmentation, image: np.ndarray) -> np.ndarray:
    """Each pixel of a picture (H,W,3) in the colour of its ADE20K class: (H,W,3) float32 0..1."""
    return _coloured(network, image, ADE20K_SIDES, ADE20K)


def segments_coco(network: OneFormerForUniversalSegmentation, image: np.ndarray) -> np.ndarray:
    """Each pixel of a picture (H,W,3) in the colour of its COCO class: (H,W,3) float32 0..1."""
    return _coloured(network, image, COCO_SIDES, COCO)


def _coloured(
    network: OneFormerForUniversalSegmentation, image: np.ndarray, sides: tuple[int, int], palette: Palette
) -> np.ndarray:
    from .networks.oneformer import labels

    return (np.asarray(palette, np.float32) / 255)[labels(network, image, *sides)]


RECORDS = (
    Annotator("segments_ade20k", segments_ade20k, networks=("oneformer_ade20k",), packages=("scipy",)),
    Annotator("segments_coco", segments_coco, networks=("oneformer_coco",), packages=("scipy",)),
)
