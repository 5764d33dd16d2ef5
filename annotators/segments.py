"""Segments: semantic ones in the colours that the published ControlNets expect, by OneFormer, and things, by SAM 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import Annotator, Parameter
from .images import AnnotatorError, grey
from .palettes import ADE20K, COCO

if TYPE_CHECKING:
    from transformers import OneFormerForUniversalSegmentation, Sam2Model

    from .palettes import Palette

ADE20K_SIDES, COCO_SIDES = (640, 2560), (800, 1333)
"""The short side at which a network looks, and the long one that it does not exceed."""
DOT = 0.25
"""From this on a mask is a dot: small ones become pale when it is reduced."""


def segments_ade20k(network: OneFormerForUniversalSegmentation, image: np.ndarray) -> np.ndarray:
    """Each pixel of a picture (H,W,3) in the colour of its ADE20K class: (H,W,3) float32 0..1."""
    return _coloured(network, image, ADE20K_SIDES, ADE20K)


def segments_coco(network: OneFormerForUniversalSegmentation, image: np.ndarray) -> np.ndarray:
    """Each pixel of a picture (H,W,3) in the colour of its COCO class: (H,W,3) float32 0..1."""
    return _coloured(network, image, COCO_SIDES, COCO)


def segments_sam2(
    network: Sam2Model,
    image: np.ndarray,
    points: int = 32,
    confidence: float = 0.8,
    colours: str = "palette",
    seed: int = 0,
) -> np.ndarray:
    """Each thing in a picture (H,W,3) in one colour, whatever it is, and black between them: (H,W,3) float32 0..1.

    Things are sought at `points` x `points` places, and kept where the network is surer than `confidence`. `colours`
    are drawn at random from `seed`, the largest thing's first, or the mean of each thing.
    """
    from .networks.sam2 import everything

    labels = everything(network, image, points, confidence)
    total = int(labels.max()) + 1
    if colours == "palette":
        table = np.random.default_rng(seed).integers(0, 256, (total, 3)) / 255
    else:
        flat = labels.ravel()
        size = np.maximum(np.bincount(flat, minlength=total), 1)
        table = np.stack([np.bincount(flat, image[:, :, c].ravel(), total) / size for c in range(3)], axis=1)
    table[0] = 0
    return table.astype(np.float32)[labels]


def mask_sam2(network: Sam2Model, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """White where the thing is that a mask (H,W) has dots on, black elsewhere: (H,W,3) float32 0..1 of a picture.

    Each dot stands for its innermost pixel, and all of them for one thing. Raises AnnotatorError for a mask without.
    """
    import cv2

    from .networks.sam2 import pointed

    dots = (mask >= DOT).astype(np.uint8)
    count, labels = cv2.connectedComponents(dots)
    if count < 2:
        raise AnnotatorError("the mask is black: paint a dot on what to mark")
    # With a margin, so that the picture ends where a dot may end.
    depth = cv2.distanceTransform(np.pad(dots, 1), cv2.DIST_L2, cv2.DIST_MASK_5)[1:-1, 1:-1]
    inner = [np.unravel_index((depth * (labels == dot)).argmax(), depth.shape) for dot in range(1, count)]
    return grey(pointed(network, image, np.array(inner)[:, ::-1] + 0.5))


def _coloured(
    network: OneFormerForUniversalSegmentation, image: np.ndarray, sides: tuple[int, int], palette: Palette
) -> np.ndarray:
    from .networks.oneformer import labels

    return (np.asarray(palette, np.float32) / 255)[labels(network, image, *sides)]


RECORDS = (
    Annotator("segments_ade20k", segments_ade20k, networks=("oneformer_ade20k",), packages=("scipy",)),
    Annotator("segments_coco", segments_coco, networks=("oneformer_coco",), packages=("scipy",)),
    Annotator(
        "segments_sam2",
        segments_sam2,
        (
            Parameter(
                "points", "Things are sought at so many places across and down: more finds smaller ones.", 4, 64, 1
            ),
            Parameter("confidence", "A thing of which the network is less sure than this is left out."),
            Parameter("colours", "Colours at random, or each thing's own mean.", choices=("palette", "mean")),
            Parameter("seed", "Which random colours.", 0, 2147483647, 1),
        ),
        networks=("sam2_tiny",),
        packages=("transformers",),
    ),
    Annotator("mask_sam2", mask_sam2, networks=("sam2_tiny",), packages=("transformers",), reads_mask=True),
)
