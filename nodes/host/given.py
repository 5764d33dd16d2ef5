"""What other nodes hand on as a hint or a mask: refused where nothing can be made of it, before anything is sampled."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ...controlnet_core.errors import ZeroConvError
from ...controlnet_core.keys import times
from ...controlnet_core.limits import PEOPLE, PIXEL, SIDE

log = logging.getLogger(__name__)


class GivenError(ZeroConvError):
    """A picture or a mask that no control can act by."""


def hint(image: Tensor, channels: int, name: str) -> Tensor:
    """`image` (B,C,H,W) as a hint of so many channels for the control `name`.

    What has those channels stays as it is. For a hint of 3, grey becomes its red, green and blue, and of a picture with
    transparency what can be seen of it over black, where most hints say nothing. A hint of 1 is any of them: its mean
    is taken later. Says so in the log where it changes anything. Raises GivenError.
    """
    _check(image, f"the hint of {name}", "image")
    found = image.shape[1]
    if found == channels or (channels == 1 and found == 3):
        return image
    if found == 4 and channels in (1, 3):
        log.info("%s: the hint has transparency, which lies on black", name)
        return image[:, :3] * image[:, 3:]
    if found == 1 and channels == 3:
        log.info("%s: the hint is grey, and its one channel is taken for red, green and blue", name)
        return image.repeat(1, 3, 1, 1)
    raise GivenError(
        f"{name} takes a hint of {channels} channels, found an image of {found}: connect the hint that it was made for"
    )


def mask(given: Tensor | None, name: str = "mask") -> Tensor | None:
    """A MASK (B,H,W) or (H,W) as (B,1,H,W); raises GivenError for an empty one, and for numbers that are none."""
    if given is None:
        return None
    if given.ndim < 2 or given.numel() == 0:
        raise GivenError(f"the {name} is {times(given.shape)}, expected a mask with pixels: connect another")
    made = given.reshape(-1, 1, *given.shape[-2:])
    _check(made, f"the {name}", name)
    return made


def picture(image: Tensor | None, name: str) -> None:
    """Raise GivenError for an IMAGE (B,H,W,C) of the input `name` without pixels, or with a side that is too long."""
    if image is not None and (image.ndim != 4 or image.numel() == 0 or max(image.shape[1:3]) > SIDE):
        raise GivenError(
            f"{name} is {times(image.shape)} (pictures x height x width x channels), expected at least one picture "
            f"with pixels, and no side over {SIDE}: connect another"
        )


def people(frames: list[Any] | None) -> list[Any] | None:
    """POSE_KEYPOINT frames as they are; raises GivenError for one with more people than can be drawn in a while."""
    for frame in frames or ():
        found = frame.get("people") if isinstance(frame, Mapping) else None
        if isinstance(found, (list, tuple)) and len(found) > PEOPLE:
            raise GivenError(
                f"a frame of pose_keypoints has {len(found)} people, expected at most {PEOPLE}: leave some out"
            )
    return frames


def _check(image: Tensor, what: str, kind: str) -> None:
    """Raise unless `image` (B,C,H,W) has pixels, not too many in a row, whose numbers are those of a picture."""
    if image.ndim != 4 or image.numel() == 0 or max(image.shape[2:]) > SIDE:
        raise GivenError(
            f"{what} is {times(image.shape)} (pictures x channels x height x width), expected at least one picture "
            f"with pixels, and no side over {SIDE}: connect another {kind}"
        )
    low, high = (float(number) for number in torch.aminmax(image.float()))
    if not (-PIXEL <= low <= high <= PIXEL):  # NaN is no number between others
        found = f"up to {max(-low, high):g}" if isfinite(low) and isfinite(high) else "that are not finite"
        raise GivenError(f"{what} has numbers {found}, expected 0 to 1: look at the node that made it, or scale them")
