"""What annotators agree on about pictures: (H,W,3) RGB, float in 0..1 or uint8."""

from __future__ import annotations

import numpy as np

PADDED = 64
"""Convolutional networks see pictures whose sides are multiples of this, as the published preprocessors show them."""


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
    import cv2

    values = image.astype(np.float32, copy=False)
    if not values.min(initial=0) >= 0:
        values = values.clip(0)
    return cv2.convertScaleAbs(values, alpha=255)  # rounds, and stops at 255


def to_picture(image: np.ndarray) -> np.ndarray:
    """Any picture as (H,W,3) float32 RGB in 0..1, only to be read: one that is so already is given back.

    Reads (H,W), (H,W,1), (H,W,3) and (H,W,4); float in 0..1 (clipped), uint8 or uint16. Transparent pixels lie on
    white, as in the published preprocessors (lllyasviel/ControlNet annotator/util.py). Raises AnnotatorError for
    anything else, for a picture without pixels, and for numbers that are none.
    """
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise AnnotatorError(
            f"image has shape {np.shape(image)}; an annotator reads (height, width, channels) with 1, 3 or 4 channels "
            "and at least one pixel"
        )
    if array.dtype in (np.uint8, np.uint16):
        picture = np.divide(array, np.iinfo(array.dtype).max, dtype=np.float32)
    elif np.issubdtype(array.dtype, np.floating):
        picture = array.astype(np.float32, copy=False)
        ends = picture.min(), picture.max()
        if not np.isfinite(ends).all():
            raise AnnotatorError(
                f"image has {int((~np.isfinite(picture)).sum())} numbers that are not finite: look at the node that "
                "made it, an overflow in half precision is the usual cause"
            )
        if ends[0] < 0 or ends[1] > 1:
            picture = picture.clip(0, 1)
    else:
        raise AnnotatorError(f"image is {array.dtype}; give float in 0..1, uint8 or uint16")
    if picture.shape[2] == 4:
        alpha = picture[:, :, 3:]
        picture = picture[:, :, :3] * alpha + (1 - alpha)
    return np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else np.ascontiguousarray(picture)


def grey(values: np.ndarray) -> np.ndarray:
    """A map (...,H,W) of numbers as a hint (...,H,W,3) float32 whose three channels are the same."""
    import cv2

    rows = values.reshape(-1, values.shape[-1]).astype(np.float32, copy=False)
    return cv2.cvtColor(rows, cv2.COLOR_GRAY2RGB).reshape(*values.shape, 3)


def pad_to_multiple(image: np.ndarray, multiple: int = PADDED) -> np.ndarray:
    """The picture (H,W,C), continued to the right and below until both sides are multiples of `multiple`.

    By reflection: a last row that is repeated looks like lines to a network, and to its neighbourhood like an edge.
    """
    height, width = image.shape[:2]
    if height % multiple == width % multiple == 0:
        return image
    return np.pad(image, ((0, -height % multiple), (0, -width % multiple), (0, 0)), mode="reflect")


def resize_short_side(image: np.ndarray, resolution: int) -> np.ndarray:
    """The picture (H,W,3), `resized` to a shorter side of `resolution` pixels, aspect kept; 0 keeps it as it is."""
    scale = resolution / min(image.shape[:2]) if resolution else 1.0
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return resized(image, height, width)


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture (H,W,3), 0..1 or uint8, in another size: cubic where it grows, area averages where it shrinks.

    As the preprocessors of Mikubill/sd-webui-controlnet and Fannovel16/comfyui_controlnet_aux; those of lllyasviel/
    ControlNet and controlnet-aux take Lanczos, which rings, where it grows.
    """
    if image.shape[:2] == (height, width):
        return image
    import cv2

    grows = height * width > image.shape[0] * image.shape[1]
    how = cv2.INTER_CUBIC if grows else cv2.INTER_AREA
    return np.asarray(cv2.resize(image, (width, height), interpolation=how)).clip(
        0, 255 if image.dtype == np.uint8 else 1
    )


def fit_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask (H,W) in 0..1 (clipped) at another size: averaged where it shrinks, interpolated where it grows.

    Raises AnnotatorError for numbers that are none.
    """
    import cv2

    values = np.asarray(mask, np.float32)
    if not np.isfinite(values).all():
        raise AnnotatorError("the mask has numbers that are not finite: look at the node that made it")
    smaller = height * width < values.size
    how = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(values, (width, height), interpolation=how)).clip(0, 1)
