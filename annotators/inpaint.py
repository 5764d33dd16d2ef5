"""Inpaint hints: the picture with what is to be painted anew marked by a number, or filled by LaMa."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import Annotator, Parameter
from .images import AnnotatorError, fit_mask, pad_to_multiple, resize_short_side, resized

if TYPE_CHECKING:
    from torch import nn


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


def inpaint_lama(network: nn.Module, image: np.ndarray, mask: np.ndarray, detail: int = 512) -> np.ndarray:
    """The picture (H,W,3) float32 0..1 where the mask (H,W), 0..1, is black, and what LaMa fills in where it is white.

    It looks at the picture with a short side of `detail` pixels, or its own size if that is less, or `detail` is 0;
    whatever the mask touches is a hole. In greys of the mask both are mixed. It was trained at 256 pixels, at which
    Mikubill/sd-webui-controlnet shows it pictures (inpaint_only+lama), and stays good at several times that.
    """
    from .networks.lama import MULTIPLE, filled

    height, width = image.shape[:2]
    if not mask.any():
        return image.astype(np.float32)
    looked = resize_short_side(image, min(detail, height, width))
    high, wide = looked.shape[:2]
    hole = fit_mask(mask > 0, high, wide) > 0
    padded = pad_to_multiple(looked, MULTIPLE), pad_to_multiple(hole[:, :, None], MULTIPLE)[:, :, 0]
    found = resized(filled(network, *padded)[:high, :wide], height, width)
    share = mask[:, :, None]
    return (image * (1 - share) + found * share).astype(np.float32)


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
    Annotator(
        "inpaint_lama",
        inpaint_lama,
        (
            Parameter(
                "detail",
                "Short side in pixels at which the network looks: 256 is steadiest in large holes; 0: its own.",
                0,
                2048,
                8,
            ),
        ),
        networks=("lama",),
        reads_mask=True,
    ),
)
