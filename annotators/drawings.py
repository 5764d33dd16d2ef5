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
AROUND = 30.0
"""Pixels of the Gaussian that says how much contrast there is about a place."""
UNDER_MEAN = 10
"""Grey levels of 255 that a pixel must be below the mean around it to be black: more than paper's grain."""
CONTRAST = 48 / 255
"""Contrast, as a standard deviation, below which a place is faint: about that of a photograph's ordinary parts."""


def scribble(image: np.ndarray) -> np.ndarray:
    """A drawing with dark strokes on light ground as a scribble: (H,W,3) float32, white where it is dark.

    `image` is RGB (H,W,3), float 0..1 or uint8. Dark is below 127 of 255 in any channel, as the scribble controls were
    trained (lllyasviel/ControlNet gradio_scribble2image.py). Fannovel16/comfyui_controlnet_aux gives the inverse, black
    strokes on white, which no published control was trained on.
    """
    return _white_where(to_bytes(image).min(axis=2) < 127)


def scribble_xdog(image: np.ndarray, threshold: int = 32, balance: float = 3.0) -> np.ndarray:
    """Thick scribbles of a photograph: (H,W,3) float32, white where it is darker than what lies around it.

    The difference of Gaussians of 5 and 0.5 pixels, its least channel, twice that above `threshold`
    (Mikubill/sd-webui-controlnet scribble_xdog, which works in bytes and loses differences from 128 to 128 +
    threshold / 2 to their overflow; here they are kept). Where contrast is faint, as in a cat's face, differences count
    up to `balance` times; 1 is as published.
    """
    import cv2

    pixels = to_bytes(image).astype(np.float32)
    around, here = (cv2.GaussianBlur(pixels, (0, 0), sigma) for sigma in (5.0, 0.5))
    darker = (around - here).min(axis=2) * _raised(pixels / 255, balance)
    lighter = (255 - darker).clip(0, 255).astype(int)
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


def cartoon_lines(
    image: np.ndarray, width: float = 1.4, smoothing: float = 0.1, threshold: float = 0.01, balance: float = 3.0
) -> np.ndarray:
    """The lines of a drawing in flat colours, (H,W,3) float32 0..1, soft at their rims.

    `image` is RGB (H,W,3), float 0..1 or uint8.
    A bilateral filter flattens what differs by less than about `smoothing` of the full range: hatching, grain, shading.
    Then a line, or the darker side of a border between two colours, is where any channel is darker than its
    surroundings by more than `threshold`; `width` is the Gaussian's in pixels, and about half of a line's. Where
    contrast is faint, what is darker counts up to `balance` times. The paper's cartoon drawings came from a learned
    extractor; this one has no weights.
    """
    import cv2

    height, across = image.shape[:2]
    # OpenCV 5's bilateral filter writes beyond its memory where a side is shorter than its kernel reaches.
    margin = ((0, max(0, SHORTEST - height)), (0, max(0, SHORTEST - across)), (0, 0))
    flat = np.pad(to_bytes(image).astype(np.float32) / 255, margin, mode="edge")
    for _ in range(FLATTENING_PASSES):
        flat = cv2.bilateralFilter(flat, d=9, sigmaColor=smoothing, sigmaSpace=4.0)
    around, here = (cv2.GaussianBlur(flat, (0, 0), sigma) for sigma in (XDOG_RATIO * width, width))
    darker = (around - here).max(axis=2) * _raised(flat, balance)
    lines = np.tanh(LINE_SHARPNESS * np.maximum(darker - threshold, 0))
    return np.repeat(lines[:height, :across, None], 3, axis=2)


def invert(image: np.ndarray) -> np.ndarray:
    """A drawing (H,W,3), 0..1, dark on light, as lineart controls want it: (H,W,3) float32, light on dark.

    Its shades stay (Mikubill/sd-webui-controlnet invert); `scribble` gives black and white.
    """
    return 1 - image


def threshold(image: np.ndarray, level: int = 100, around: int = 0) -> np.ndarray:
    """Black and white, (H,W,3) float32: white where the grey picture is above `level` of 255.

    0 lets Otsu's method choose the level (Fannovel16/comfyui_controlnet_aux binary). With `around` each pixel has a
    level of its own instead: UNDER_MEAN below the mean of that many pixels around it, weighed by a Gaussian, so that
    uneven light on a page does no harm (OpenCV adaptiveThreshold).
    """
    import cv2

    grey = cv2.cvtColor(to_bytes(image), cv2.COLOR_RGB2GRAY)
    if around > 0:
        side = 2 * max(around // 2, 1) + 1
        how = cv2.ADAPTIVE_THRESH_GAUSSIAN_C
        return _white_where(cv2.adaptiveThreshold(grey, 255, how, cv2.THRESH_BINARY, side, UNDER_MEAN) > 0)
    mode = cv2.THRESH_BINARY | (cv2.THRESH_OTSU if level == 0 else 0)
    return _white_where(cv2.threshold(grey, level, 255, mode)[1] > 0)


def _raised(picture: np.ndarray, most: float) -> np.ndarray:
    """By how much to raise differences at each pixel (H,W) of a picture (H,W,3), 0..1.

    Up to `most` where contrast is faint, else 1.
    """
    import cv2

    grey = picture.mean(axis=2)
    mean, square = (cv2.GaussianBlur(values, (0, 0), AROUND) for values in (grey, grey * grey))
    spread = np.sqrt(np.maximum(square - mean * mean, 0))
    return CONTRAST / np.clip(spread, CONTRAST / most, CONTRAST)


def _white_where(marked: np.ndarray) -> np.ndarray:
    """(H,W) bool as (H,W,3) float32."""
    return np.repeat(marked[:, :, None].astype(np.float32), 3, axis=2)


_BALANCE = Parameter(
    "balance", "Where contrast is faint, differences count up to so many times; 1 treats all alike.", 1.0, 10.0, 0.1
)

RECORDS = (
    Annotator("scribble", scribble),
    Annotator("invert", invert),
    Annotator(
        "scribble_xdog",
        scribble_xdog,
        (Parameter("threshold", "Lower draws more strokes.", 1, 64, 1), _BALANCE),
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
            _BALANCE,
        ),
    ),
    Annotator(
        "threshold",
        threshold,
        (
            Parameter("level", "Grey levels above this become white; 0 chooses the level by itself.", 0, 255, 1),
            Parameter("around", "Above 0: each pixel has a level of its own, from so many pixels around.", 0, 1000, 1),
        ),
    ),
)
