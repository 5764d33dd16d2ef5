"""A hint or a mask at the size that the latent asks for, and the part of a mask that goes with a part of a hint."""

from __future__ import annotations

from typing import Literal

import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from .given import GivenError

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
        check_crop(image, height, width)
        return comfy.utils.common_upscale(image, width, height, method, "center")
    if how == "stretch":
        return comfy.utils.common_upscale(image, width, height, method, "disabled")
    scale = min(height / image.shape[2], width / image.shape[3])
    inner_height, inner_width = (max(1, round(n * scale)) for n in image.shape[2:])
    inner = comfy.utils.common_upscale(image, inner_width, inner_height, method, "disabled")
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    return F.pad(inner, (left, width - inner_width - left, top, height - inner_height - top))


def check_crop(image: Tensor, height: int, width: int) -> None:
    """Raise GivenError where the middle of `image` (B,C,H,W) in the shape of height x width has no pixel."""
    rows, columns = image.shape[2:]
    # As the host rounds what it cuts off on each side.
    kept = [side - 2 * round((side - min(side, fitting)) / 2) for side, fitting in (
        (rows, columns * height / width), (columns, rows * width / height)
    )]  # fmt: skip
    if min(kept) < 1:
        raise GivenError(
            f"a picture of {columns}x{rows} has no pixel left when its middle is cut to the shape of {width}x{height}: "
            "choose resize stretch or pad, or a picture of another shape"
        )


POSITIONS = 2
"""Channels that say where a pixel of a hint lies."""


def with_positions(hint: Tensor) -> Tensor:
    """`hint` (B,C,H,W) with two channels more: where each pixel lies, x and y, from -1 to 1 over the picture.

    Whoever cuts, enlarges or rolls the hint does the same to them, and so tells what it did.
    """
    height, width = hint.shape[2:]
    x, y = ((torch.arange(n, device=hint.device) * 2 + 1) / n - 1 for n in (width, height))
    places = torch.stack([x.expand(height, width), y[:, None].expand(height, width)]).to(hint.dtype)
    told = torch.cat([hint, places.expand(len(hint), -1, -1, -1)], dim=1)
    # Kept in the order of the hint's own pixels: another one makes convolutions round in another way.
    channels_last = hint.is_contiguous(memory_format=torch.channels_last)
    return told.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def at_positions(mask: Tensor, positions: Tensor) -> Tensor:
    """What `mask` (B or 1,1,H,W) has at `positions` (B or 1,2,h,w) as `with_positions` wrote them: (B,1,h,w)."""
    batch = max(len(mask), len(positions))
    grid = positions.to(mask).movedim(1, -1).expand(batch, -1, -1, -1)
    return F.grid_sample(mask.expand(batch, -1, -1, -1), grid, padding_mode="border", align_corners=False)
