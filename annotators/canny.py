"""Edges by Canny's method, as the published Canny ControlNets were trained on."""

from __future__ import annotations

import numpy as np


def canny(image: np.ndarray, low: float = 100.0, high: float = 200.0) -> np.ndarray:
    """White edges on black, (H,W,3) float32 0..1, of an RGB image (H,W,3), float 0..1 or uint8.

    `low` and `high` are the hysteresis thresholds on the 0..255 gradient. OpenCV's Canny runs on all three channels
    and takes the strongest, as lllyasviel/ControlNet annotator/canny does. Raises AnnotatorError for another shape.
    """
    import cv2

    from .images import to_bytes

    edges = cv2.Canny(to_bytes(image), low, high)
    return np.repeat((edges[:, :, None] / 255.0).astype(np.float32), 3, axis=2)
