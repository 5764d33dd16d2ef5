"""Straight lines by M-LSD, a network that knows those of rooms, houses and furniture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import Annotator, Parameter
from .images import PADDED, grey

if TYPE_CHECKING:
    from torch import nn


def mlsd(
    network: nn.Module, image: np.ndarray, score_threshold: float = 0.1, dist_threshold: float = 0.1
) -> np.ndarray:
    """Straight lines, white and 1 pixel wide on black, (B,H,W,3) float32 0..1, of RGB images (B,H,W,3), or of one.

    Sides are multiples of 64. A line is kept with a score (0..1) above `score_threshold` and a length above
    `dist_threshold`, in units of 2 pixels. Source: lllyasviel/ControlNet-v1-1-nightly, annotator/mlsd. Raises
    AnnotatorError for other sizes.
    """
    import cv2

    from .networks.mlsd import lines

    found = lines(network, image, score_threshold, dist_threshold)
    hints = [np.zeros(image.shape[-3:-1], np.uint8) for _ in found]
    for hint, segments in zip(hints, found):
        for ends in segments:
            x1, y1, x2, y2 = (int(end) for end in ends)
            cv2.line(hint, (x1, y1), (x2, y2), 255)
    return grey(np.stack(hints).reshape(image.shape[:-1]).astype(np.float32) / 255)


RECORDS = (
    Annotator(
        "mlsd",
        mlsd,
        (
            Parameter("score_threshold", "A line of which the network is less sure than this is left out."),
            Parameter("dist_threshold", "A line shorter than this is left out: 1 is 2 pixels.", 0.0, 20.0, 0.1),
        ),
        networks=("mlsd",),
        multiple=PADDED,
        batched=True,
    ),
)
