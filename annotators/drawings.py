"""Drawings without a network: scribbles, line art and black-and-white, all as white strokes on black."""

from __future__ import annotations

import numpy as np

from . import Annotator, Parameter
from .images import to_bytes

FLATTENING_PASSES = 3
SHORTEST = 16
"""Pixels of a side that the bilateral filter is given at least."""
XDOG_RATIO = 1.6
"""Of the two Gaussians, nearest to the Laplacian; it and the soft step are from XDoG (Winnemoeller et al., 2012)."""
LINE_SHARPNESS = 30.0


def scribble(image: np.ndarray) -> np.ndarray:
    """A drawing with dark strokes on light ground as a scribble: (H,W,3) float32, white where it is dark.

    `image` is RGB (H,W,3), float 0..1 or uint8. Dark is below 127 of 255 in any channel
    (lllyasviel/ControlNet gradio_scribble2image.py).
    """
    return _white_where(to_bytes(image).min(axis=2) < 127)


def scribble_xdog(image: np.ndarray, threshold: int = 32) -> np.ndarray:
    """Thick scribbles of a photograph: (H,W,3) float32, white where it is darker than what lies around it.

    The difference of Gaussians of 5 and 0.5 pixels, its least channel, twice that above `threshold`
    (Mikubill/sd-webui-controlnet scribble_xdog, which works in bytes and loses differences from 128 to 128 +
    threshold / 2 to their overflow; here they are kept).
    """
    import cv2

    pixels = to_bytes(image).astype(np.float32)
    around, here = (cv2.GaussianBlur(pixels, (0, 0), sigma) for sigma in (5.0, 0.5))
    lighter = (255 - (around - here).min(axis=2)).clip(0, 255).astype(int)
    return _white_where(2 * (255 - lighter) > threshold)


def lineart_standard(image: np.ndarray, sigma: float = 6.0, threshold: int = 8) -> np.ndarray:
    """Soft line art: (H,W,3) float32 0..1, the brighter the darker a pixel is than the `sigma` pixels around it.

    The scale is such that the median of the differences above `threshold` (of 255), but no less than 16, becomes a
    middle grey (Mikubill/sd-webui-controlnet lineart_standard).
    """
    import cv2

    pixels = to_bytes(image).astype(np.float32)
    darker = (cv2.GaussianBlur(pixels, (0, 0), sigma) - pixels).min(axis=2).clip(0, 255)
    marked = darker[darker > threshold]
    middle = max(16.0, float(np.median(marked))) if marked.size else 16.0
    return np.repeat(np.minimum(darker * (127 / 255 / middle), 1)[:, :, None], 3, axis=2)


def cartoon_lines(image: np.ndarray, width: float = 1.4, smoothing: float = 0.1, threshold: float = 0.01) -> np.ndarray:
    """The lines of a drawing in flat colours, (H,W,3) float32 0..1, soft at their rims.

    `image` is RGB (H,W,3), float 0..1 or uint8.
    A bilateral filter flattens what differs by less than about `smoothing` of the full range: hatching, grain, shading.
    Then a line, or the darker side of a border between two colours, is where any channel is darker than its
    surroundings by more than `threshold`; `width` is the Gaussian's in pixels, and about half of a line's. The paper's
    cartoon drawings came from a learned extractor; this one has no weights.
    """
    import cv2

    height, across = image.shape[:2]
    # OpenCV 5's bilateral filter writes beyond its memory where a side is shorter than its kernel reaches.
    margin = ((0, max(0, SHORTEST - height)), (0, max(0, SHORTEST - across)), (0, 0))
    flat = np.pad(to_bytes(image).astype(np.float32) / 255, margin, mode="edge")
    for _ in range(FLATTENING_PASSES):
        flat = cv2.bilateralFilter(flat, d=9, sigmaColor=smoothing, sigmaSpace=4.0)
    around, here = (cv2.GaussianBlur(flat, (0, 0), sigma) for sigma in (XDOG_RATIO * width, width))
    darker = (around - here).max(axis=2)
    lines = np.tanh(LINE_SHARPNESS * np.maximum(darker - threshold, 0))
    return np.repeat(lines[:height, :across, None], 3, axis=2)


def threshold(image: np.ndarray, level: int = 100) -> np.ndarray:
    """Black and white, (H,W,3) float32: white where the grey picture is above `level` of 255.

    0 lets Otsu's method choose the level (Fannovel16/comfyui_controlnet_aux binary).
    """
    import cv2

    grey = cv2.cvtColor(to_bytes(image), cv2.COLOR_RGB2GRAY)
    mode = cv2.THRESH_BINARY | (cv2.THRESH_OTSU if level == 0 else 0)
    return _white_where(cv2.threshold(grey, level, 255, mode)[1] > 0)


def _white_where(marked: np.ndarray) -> np.ndarray:
    """(H,W) bool as (H,W,3) float32."""
    return np.repeat(marked[:, :, None].astype(np.float32), 3, axis=2)


RECORDS = (
    Annotator("scribble", scribble),
    Annotator(
        "scribble_xdog",
        scribble_xdog,
        (Parameter("threshold", "Lower draws more strokes.", 1, 64, 1),),
    ),
    Annotator(
        "lineart_standard",
        lineart_standard,
        (
            Parameter("sigma", "How far around a pixel is looked, in pixels: higher is softer.", 0.1, 100.0, 0.1),
            Parameter("threshold", "Differences up to this do not count when brightness is set.", 0, 16, 1),
        ),
    ),
    Annotator(
        "cartoon_lines",
        cartoon_lines,
        (
            Parameter("width", "Half a line's width, in pixels.", 0.5, 10.0, 0.1),
            Parameter("smoothing", "Colours that differ by less become one. Higher drops more detail.", 0.01, 1.0),
            Parameter("threshold", "How much darker than its surroundings a line is.", 0.0, 0.5),
        ),
    ),
    Annotator(
        "threshold",
        threshold,
        (Parameter("level", "Grey levels above this become white; 0 chooses the level by itself.", 0, 255, 1),),
    ),
)
