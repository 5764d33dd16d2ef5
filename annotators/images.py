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
