"""What annotators agree on about pictures: (H,W,3) RGB, float in 0..1 or uint8."""

from __future__ import annotations

import numpy as np


class AnnotatorError(ValueError):
    """An annotator was given something that it cannot read."""


def to_bytes(image: np.ndarray) -> np.ndarray:
    """The picture as contiguous uint8 (H,W,3); floats are rounded. Raises AnnotatorError for another shape or type."""
    if image.ndim != 3 or image.shape[2] != 3:
        raise AnnotatorError(f"image has shape {image.shape}; an annotator reads RGB of shape (height, width, 3)")
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if not np.issubdtype(image.dtype, np.floating):
        raise AnnotatorError(f"image is {image.dtype}; give float in 0..1 or uint8 in 0..255")
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def resize_short_side(image: np.ndarray, resolution: int) -> np.ndarray:
    """The picture (H,W,3) with its shorter side at `resolution` pixels, aspect kept; 0 keeps it as it is.

    Lanczos when it grows and area averages when it shrinks, as the published preprocessors do.
    """
    height, width = image.shape[:2]
    if resolution == 0 or min(height, width) == resolution:
        return image
    import cv2

    scale = resolution / min(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    resized = cv2.resize(image, size, interpolation=cv2.INTER_LANCZOS4 if scale > 1 else cv2.INTER_AREA)
    return np.clip(resized, 0, 255 if image.dtype == np.uint8 else 1)
