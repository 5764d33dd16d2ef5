"""Hints that keep colour or brightness and give up detail: tile, blur, recolor, palette and shuffle."""

from __future__ import annotations

import numpy as np

from . import Annotator, Parameter
from .images import to_bytes

PALETTE_CELL = 64
SHUFFLE_CELL = 256
FLAT = 0.01
"""Variance, of 0..1, below which the guided filter takes a place for flat (He, Sun, Tang 2010)."""


def tile(image: np.ndarray, halvings: int = 3) -> np.ndarray:
    """The picture (H,W,3), 0..1, at a size 2^`halvings` times smaller, and smoothly enlarged again: (H,W,3) float32.

    Area averages, then OpenCV's pyrUp, as in Mikubill/sd-webui-controlnet tile_resample, whose hints tile controls are
    used with (lllyasviel/ControlNet-v1-1-nightly hands its picture on as it is). pyrUp puts an average where the first
    of its pixels was, so that their hint lies half a cell (3.5 pixels at the default) to the upper left of its picture:
    here cells begin half a cell before the picture, and nothing moves by more than half a pixel. Newer Fannovel16/
    comfyui_controlnet_aux moves the hint back in the end, which leaves its upper and left rims to a reflection.
    """
    import cv2

    height, width = image.shape[:2]
    cell = 2**halvings
    sides = [(cell // 2, cell - 1 - (side + cell // 2 - 1) % cell) for side in (height, width)]
    padded = np.pad(image, (*sides, (0, 0)), mode="edge")
    small = (padded.shape[1] // cell, padded.shape[0] // cell)
    hint = cv2.resize(padded, small, interpolation=cv2.INTER_AREA)
    for _ in range(halvings):
        hint = cv2.pyrUp(hint)
    return hint[:height, :width].clip(0, 1)


def blur(image: np.ndarray, sigma: float = 9.0, kind: str = "gaussian") -> np.ndarray:
    """The picture (H,W,3), 0..1, without its detail, (H,W,3) float32; `sigma` in pixels says how much of it goes.

    "gaussian" is a Gaussian of that deviation (Mikubill/sd-webui-controlnet blur_gaussian). "guided" and "median" look
    as far, at a square of 2 sigma + 1, and keep borders of things: the guided filter (He, Sun, Tang 2010), as tile
    controls for SDXL were trained with, and the median, which has no in-between colours.
    """
    import cv2

    side = 2 * round(sigma) + 1
    if kind == "gaussian":
        return cv2.GaussianBlur(image, (0, 0), sigma).clip(0, 1)
    elif kind == "median":
        return cv2.medianBlur(to_bytes(image), side).astype(np.float32) / 255
    import torch
    from kornia.filters import guided_blur

    picture = torch.from_numpy(image).movedim(-1, 0)[None]
    blurred = guided_blur(picture, picture, side, FLAT, border_type="replicate")
    return blurred[0].movedim(0, -1).numpy().clip(0, 1)


def luminance(image: np.ndarray, gamma: float = 1.0) -> np.ndarray:
    """The lightness of CIE Lab of an RGB picture (H,W,3), 0..1, to the power `gamma`, as grey (H,W,3) float32 0..1.

    For recolor controls, which were trained on black-and-white pictures. Mikubill/sd-webui-controlnet and Fannovel16/
    comfyui_controlnet_aux recolor_luminance read RGB as BGR, so that their reds are dark and their blues bright; here
    they are as seen. Of a picture without colour both are the same.
    """
    import cv2

    lightness = cv2.cvtColor(image, cv2.COLOR_RGB2Lab)[:, :, :1] / 100
    return np.repeat(lightness.clip(0, 1) ** np.float32(gamma), 3, axis=2)


def intensity(image: np.ndarray, gamma: float = 1.0) -> np.ndarray:
    """The largest channel (the V of HSV) of a picture (H,W,3), 0..1, to the power `gamma`, as grey (H,W,3) float32.

    Mikubill/sd-webui-controlnet recolor_intensity.
    """
    return np.repeat(image.max(axis=2, keepdims=True) ** np.float32(gamma), 3, axis=2)


def color(image: np.ndarray) -> np.ndarray:
    """A grid of plain colours, one for each 64 pixels of a side, of a picture (H,W,3), 0..1: (H,W,3) float32.

    Cubic to the grid and nearest back, as T2I-Adapter's color adapter was trained (Fannovel16/comfyui_controlnet_aux
    color).
    """
    import cv2

    height, width = image.shape[:2]
    grid = (max(1, width // PALETTE_CELL), max(1, height // PALETTE_CELL))
    cells = cv2.resize(image, grid, interpolation=cv2.INTER_CUBIC).clip(0, 1)
    return cv2.resize(cells, (width, height), interpolation=cv2.INTER_NEAREST)


def shuffle(image: np.ndarray, seed: int = 0) -> np.ndarray:
    """A picture (H,W,3), 0..1, with its content pushed about in waves of about 256 pixels: (H,W,3) float32.

    Each pixel is read from a place that two smooth noises give, one for x and one for y, both stretched over the whole
    picture (lllyasviel/ControlNet-v1-1-nightly annotator/shuffle). Fannovel16/comfyui_controlnet_aux gives the same for
    the same seed above 0, of pictures whose sides are multiples of 64: others it shuffles with a margin.
    """
    import cv2

    height, width = image.shape[:2]
    generator = np.random.default_rng(seed)
    from_x, from_y = (_smooth_noise(height, width, generator) * (side - 1) for side in (width, height))
    return cv2.remap(image, from_x.astype(np.float32), from_y.astype(np.float32), cv2.INTER_LINEAR)


def _smooth_noise(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Noise (height,width) from 0 to 1 whose waves are 256 pixels long."""
    import cv2

    cell = SHUFFLE_CELL
    noise = generator.uniform(size=(height // cell + 2, width // cell + 2))
    noise = cv2.resize(noise, (width + 2 * cell, height + 2 * cell), interpolation=cv2.INTER_CUBIC)
    noise = noise[cell : cell + height, cell : cell + width]
    noise = noise - noise.min()
    # A single pixel has no range; any place in it is the right one.
    return noise / max(float(noise.max()), 1e-12)


RECORDS = (
    Annotator(
        "tile",
        tile,
        (Parameter("halvings", "How many times the picture is halved before it is enlarged again.", 1, 6, 1),),
    ),
    Annotator(
        "blur",
        blur,
        (
            Parameter("sigma", "Radius of the blur, in pixels.", 0.1, 64.0, 0.1),
            Parameter("kind", "guided and median keep borders.", choices=("gaussian", "guided", "median")),
        ),
    ),
    Annotator(
        "luminance",
        luminance,
        (Parameter("gamma", "Above 1 darkens the middle greys, below 1 brightens them.", 0.1, 2.0),),
    ),
    Annotator(
        "intensity",
        intensity,
        (Parameter("gamma", "Above 1 darkens the middle greys, below 1 brightens them.", 0.1, 2.0),),
    ),
    Annotator("color", color),
    Annotator(
        "shuffle",
        shuffle,
        (Parameter("seed", "Another number pushes the picture about in another way.", 0, 2147483647, 1),),
    ),
)
