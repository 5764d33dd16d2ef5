"""Inpaint hint: the picture with what is to be painted anew marked by a number that no picture has, or by black."""

from __future__ import annotations

import numpy as np

from . import Annotator, Parameter
from .images import AnnotatorError


def inpaint(image: np.ndarray, mask: np.ndarray, masked_value: float = -1.0) -> np.ndarray:
    """The picture as (H,W,3) float32 0..1 with `masked_value` wherever the mask is above 0.5.

    `image` is RGB (H,W,3), float 0..1 or uint8; `mask` is (H,W), 0..1. SD1.5's inpaint ControlNet was trained with -1
    (lllyasviel/ControlNet-v1-1-nightly, gradio_inpaint.py), the SDXL ones with 0 (xinsir6/ControlNetPlus). Raises
    AnnotatorError for other shapes and types.
    """
    if image.ndim != 3 or image.shape[2] != 3:
        raise AnnotatorError(f"image has shape {image.shape}; an annotator reads RGB of shape (height, width, 3)")
    if mask.shape != image.shape[:2]:
        raise AnnotatorError(f"mask has shape {mask.shape}; for this image it must be {image.shape[:2]}: resize it")
    if image.dtype == np.uint8:
        hint = image.astype(np.float32) / 255
    elif np.issubdtype(image.dtype, np.floating):
        hint = np.clip(image, 0, 1).astype(np.float32)
    else:
        raise AnnotatorError(f"image is {image.dtype}; give float in 0..1 or uint8 in 0..255")
    hint[mask > 0.5] = masked_value
    return hint


RECORDS = (
    Annotator(
        "inpaint",
        inpaint,
        (
            Parameter(
                "masked_value",
                "What the hint has where the mask is white: -1 for SD1.5's inpaint ControlNet, 0 for those of SDXL.",
                -1.0,
                1.0,
                0.5,
            ),
        ),
        reads_mask=True,
    ),
)
