"""A hint or a mask at the size that the latent asks for."""

from __future__ import annotations

from typing import Literal

import comfy.utils
import torch.nn.functional as F
from torch import Tensor

Resize = Literal["crop", "stretch", "pad"]
RESIZES: tuple[Resize, ...] = ("crop", "stretch", "pad")


def resize(image: Tensor, height: int, width: int, how: Resize, smooth: bool = False) -> Tensor:
    """`image` (B,C,H,W) as (B,C,height,width), untouched when it has that size already.

    "crop" is the host's own rule, the middle of the picture by nearest-exact; "stretch" ignores the aspect; "pad" fits
    the whole picture in and leaves the rest 0. `smooth` interpolates, for masks.
    """
    if tuple(image.shape[2:]) == (height, width):
        return image
    method = "bilinear" if smooth else "nearest-exact"
    if how == "crop":
        return comfy.utils.common_upscale(image, width, height, method, "center")
    if how == "stretch":
        return comfy.utils.common_upscale(image, width, height, method, "disabled")
    scale = min(height / image.shape[2], width / image.shape[3])
    inner_height, inner_width = (max(1, round(n * scale)) for n in image.shape[2:])
    inner = comfy.utils.common_upscale(image, inner_width, inner_height, method, "disabled")
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    return F.pad(inner, (left, width - inner_width - left, top, height - inner_height - top))
