"""Edges by Canny's method, as the published Canny ControlNets were trained on."""

from __future__ import annotations

import numpy as np

from . import Annotator, Parameter
from .images import AnnotatorError, grey, to_bytes


def canny(image: np.ndarray, low: float = 100.0, high: float = 200.0, backend: str = "cv2") -> np.ndarray:
    """White edges on black, (H,W,3) float32 0..1, of an RGB image (H,W,3), float 0..1 or uint8.

    `low` and `high` are the hysteresis thresholds on the 0..255 gradient. OpenCV's Canny runs on all three channels
    and takes the strongest, as lllyasviel/ControlNet annotator/canny does. `backend` kornia runs on the GPU where
    torch finds one; it differs: it blurs first (Gaussian of 5 pixels, sigma 1), reads the grey picture, and measures a
    gradient by the root of the sum of squares, where OpenCV adds absolute values, so that it finds fewer edges at the
    same thresholds. Raises AnnotatorError for another shape or type, and for a picture that kornia cannot blur.
    """
    pixels = to_bytes(image)
    if backend == "kornia":
        edges = _kornia_canny(pixels, low, high)
    else:
        import cv2

        edges = cv2.Canny(pixels, low, high) / np.float32(255)
    return grey(edges)


def _kornia_canny(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Edges (H,W) float32, 0 or 1."""
    height, width = pixels.shape[:2]
    if min(height, width) < 3:
        raise AnnotatorError(
            f"image is {width}x{height}; backend kornia reads 3x3 pixels or more: use cv2, or resize it"
        )
    try:
        import torch
        from kornia.filters import canny as kornia_canny
    except ImportError as error:
        raise AnnotatorError(
            f"backend kornia cannot be loaded ({error}): install it with `python -m pip install kornia`, or use cv2"
        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.inference_mode():
        picture = torch.from_numpy(pixels).to(device).permute(2, 0, 1)[None].float() / 255
        # OpenCV takes the thresholds in either order and from 0 to any; kornia wants 0 < lower <= upper < 1.
        lower, upper = (min(max(value / 255, 1e-6), 1 - 1e-6) for value in sorted((low, high)))
        edges = kornia_canny(picture, lower, upper)[1]
    return edges[0, 0].cpu().numpy()


RECORDS = (
    Annotator(
        "canny",
        canny,
        (
            Parameter("low", "A gradient below this is no edge.", 0.0, 255.0, 1.0),
            Parameter("high", "A gradient above this always is an edge.", 0.0, 255.0, 1.0),
            Parameter(
                "backend",
                "cv2 is what published Canny controls were trained on; kornia runs on the GPU and finds fewer edges.",
                choices=("cv2", "kornia"),
            ),
        ),
    ),
)
