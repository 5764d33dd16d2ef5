"""Line drawings by networks: of photographs, fine or coarse, in anime style, and the lines of drawings in print."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import Annotator
from .images import PADDED, grey, to_bytes

if TYPE_CHECKING:
    from torch import nn

ANIME_MULTIPLE = 256
"""The anime generator halves a picture eight times."""


def lineart(network: nn.Module, image: np.ndarray) -> np.ndarray:
    """White lines on black, (B,H,W,3) float32 0..1, of RGB images (B,H,W,3), or of one, with sides of 64 n.

    The published lineart ControlNets read the generator's drawing inverted. Source: lllyasviel/ControlNet-v1-1-nightly,
    annotator/lineart. Raises AnnotatorError for other sizes.
    """
    from .networks.lineart import drawing

    return grey(1 - drawing(network, image))


def lineart_anime(network: nn.Module, image: np.ndarray) -> np.ndarray:
    """White lines in anime style on black, (H,W,3) float32 0..1, of an RGB image (H,W,3).

    The picture is stretched to sides that are multiples of 256, and the drawing back. Source:
    lllyasviel/ControlNet-v1-1-nightly, annotator/lineart_anime. Raises AnnotatorError for what is no picture.
    """
    import cv2

    from .networks.lineart import anime_drawing

    pixels = to_bytes(image)
    height, width = pixels.shape[:2]
    size = (width + -width % ANIME_MULTIPLE, height + -height % ANIME_MULTIPLE)
    stretched = cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC)
    lines = 1 - anime_drawing(network, stretched)
    return grey(cv2.resize(lines, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1))


def lineart_manga(network: nn.Module, image: np.ndarray) -> np.ndarray:
    """The ink lines of manga and cartoons without their screens, white on black, (B,H,W,3) float32 0..1.

    Of RGB images (B,H,W,3), or of one, with sides of 64 n. Source: ljsabc/MangaLineExtraction_PyTorch, whose lines are
    dark; the lineart controls read them light. Raises AnnotatorError for other sizes.
    """
    from .networks.manga import ink

    return grey(1 - ink(network, image))


RECORDS = (
    Annotator("lineart_realistic", lineart, networks=("lineart_realistic",), multiple=PADDED, batched=True),
    Annotator("lineart_coarse", lineart, networks=("lineart_coarse",), multiple=PADDED, batched=True),
    Annotator("lineart_anime", lineart_anime, networks=("lineart_anime",)),
    Annotator("lineart_manga", lineart_manga, networks=("lineart_manga",), multiple=PADDED, batched=True),
)
