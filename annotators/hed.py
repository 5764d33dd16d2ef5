"""Soft edges by HED and TEED, the scribbles that are made of them, and AnyLine's mixture with fine lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import Annotator, Parameter
from .drawings import lineart_standard
from .images import PADDED, grey

if TYPE_CHECKING:
    from torch import nn

SAFE_STEPS = 2
"""Safe edges have this many levels above black, so that no texture can hide in them."""
LINES = (
    ((0, 0, 0), (1, 1, 1), (0, 0, 0)),
    ((0, 1, 0), (0, 1, 0), (0, 1, 0)),
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0, 0, 1), (0, 1, 0), (1, 0, 0)),
)
"""Neighbours across an edge, in four directions."""
SCRIBBLE_SIGMA = 3.0
"""Pixels by which edges are smoothed before they are thinned, and lines after."""
SCRIBBLE_REACH = 4
"""A smoothed line is part of the scribble where it is above this, of 255: a pen about 13 pixels wide."""
FINE_SIGMA, FINE_THRESHOLD = 2.0, 3
"""Of the fine lines of AnyLine, as `lineart_standard` reads them."""


def hed(network: nn.Module, image: np.ndarray, safe: bool = True) -> np.ndarray:
    """Soft edges, white on black, (B,H,W,3) float32 0..1, of RGB images (B,H,W,3), or of one, with sides of 64 n.

    `safe` rounds them down to black, grey and white. Source: lllyasviel/ControlNet-v1-1-nightly, annotator/hed and
    annotator/util.py (safe_step). Raises AnnotatorError for other sizes.
    """
    from .networks.hed import edges

    return grey(_levels(edges(network, image), safe))


def teed(network: nn.Module, image: np.ndarray, safe: bool = True) -> np.ndarray:
    """Soft edges by TEED, thinner and with more detail than those of `hed`; shapes, `safe` and errors as there."""
    from .networks.teed import edges

    return grey(_levels(edges(network, image), safe))


def scribble_hed(network: nn.Module, image: np.ndarray, safe: bool = True, threshold: float = 127.0) -> np.ndarray:
    """White strokes of a thick pen on black, (B,H,W,3) float32 0..1, along the soft edges that `hed` finds.

    Edges are smoothed, thinned to their ridges and kept where above `threshold` (0..255), then drawn anew. Source:
    lllyasviel/ControlNet-v1-1-nightly, gradio_scribble.py and annotator/util.py (nms). Raises as `hed`.
    """
    soft = hed(network, image, safe)
    return np.stack([_strokes(one, threshold) for one in soft]) if soft.ndim == 4 else _strokes(soft, threshold)


def anyline(network: nn.Module, image: np.ndarray, smallest: int = 12) -> np.ndarray:
    """Soft edges by TEED and the picture's own fine dark lines on one sheet, white on black, (B,H,W,3) float32 0..1.

    Of RGB images (B,H,W,3), or of one, with sides of 64 n. Lines of fewer than `smallest` pixels are left out. Source:
    TheMistoAI/ComfyUI-Anyline, which counts 36 pixels, in three channels. Raises AnnotatorError for other sizes.
    """
    from .networks.teed import edges

    soft = _levels(edges(network, image), safe=True)
    fine = [_fine_lines(one, smallest) for one in image.reshape(-1, *image.shape[-3:])]
    return grey(1 - (1 - soft) * (1 - np.stack(fine).reshape(soft.shape)))


def _fine_lines(image: np.ndarray, smallest: int) -> np.ndarray:
    """Lines (H,W), 0..1, darker than what lies around them, of `smallest` connected pixels at least."""
    import cv2

    # In bytes, as published: what is less than one is no line.
    lines = np.floor(lineart_standard(image, FINE_SIGMA, FINE_THRESHOLD)[:, :, 0] * 255)
    _, labels, found, _ = cv2.connectedComponentsWithStats((lines > 0).astype(np.uint8), connectivity=4)
    enough = np.asarray(found)[:, cv2.CC_STAT_AREA] >= smallest
    return lines * enough[np.asarray(labels, np.intp)] / 255


def _levels(edges: np.ndarray, safe: bool) -> np.ndarray:
    """The edges, or with `safe` their levels: black, grey and white."""
    return (np.floor(edges * (SAFE_STEPS + 1)) / SAFE_STEPS).clip(max=1) if safe else edges


def _strokes(soft: np.ndarray, threshold: float) -> np.ndarray:
    """The scribble (H,W,3) of soft edges (H,W,3)."""
    import cv2

    # In bytes, as published: which pixels are ridges hangs on the rounding.
    edges = (soft[:, :, 0] * 255).astype(np.uint8)
    smooth = cv2.GaussianBlur(edges.astype(np.float32), (0, 0), SCRIBBLE_SIGMA)
    ridge = np.any([cv2.dilate(smooth, np.array(line, np.uint8)) == smooth for line in LINES], axis=0)
    lines = np.where(ridge & (smooth > threshold), 255, 0).astype(np.uint8)
    strokes = cv2.GaussianBlur(lines, (0, 0), SCRIBBLE_SIGMA) > SCRIBBLE_REACH
    return grey(strokes)


_SAFE = Parameter("safe", "Soft edges of black, grey and white alone: no faint texture comes through.")

RECORDS = (
    Annotator("hed", hed, (_SAFE,), networks=("hed",), multiple=PADDED, batched=True),
    Annotator(
        "scribble_hed",
        scribble_hed,
        (_SAFE, Parameter("threshold", "Only soft edges brighter than this get a stroke.", 0.0, 255.0, 1.0)),
        networks=("hed",),
        multiple=PADDED,
        batched=True,
    ),
    Annotator("teed", teed, (_SAFE,), networks=("teed",), multiple=PADDED, batched=True),
    Annotator(
        "anyline",
        anyline,
        (Parameter("smallest", "Fine lines of fewer pixels are left out: grain and dust.", 0, 1000, 1),),
        networks=("mteed",),
        multiple=PADDED,
        batched=True,
    ),
)
