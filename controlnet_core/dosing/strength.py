"""How much of a control acts, where and when: strength, window, schedule, block weights, guidance half, mask."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ..errors import ZeroConvError
from ..limits import FACTOR
from ..networks.residuals import Residuals
from .block_weights import BlockWeights
from .clock import Moment
from .schedule import Schedule
from .window import Window

Guidance = Literal["both", "cond_only", "cfg_resolution"]
GUIDANCE: tuple[Guidance, ...] = ("both", "cond_only", "cfg_resolution")

MOST_REUSED = 0.9
"""Part of the steps: of ten, one must be computed."""


class StrengthError(ZeroConvError):
    """A strength that cannot be meant, or that does not go with the residuals."""


@dataclass(frozen=True)
class Strength:
    """The weight of each residual, all over a run.

    `value` multiplies all of them, `schedule` over time and for each picture of a batch, `block_weights` block by
    block. `guidance` is "both" halves of classifier-free guidance, "cond_only", or "cfg_resolution": the conditional
    half with every residual times 64/h (paper, section 3.4), h being relative to the latent, so that the weights are
    1, 2, 4, 8 from the top level down at every picture size. `mask` (B,1,H,W) in 0..1 is resized to each residual.
    `reuse` is the part of the steps at which residuals are told from those of earlier steps (`reuse.Reused`).
    """

    value: float = 1.0
    window: Window = Window()
    guidance: Guidance = "both"
    mask: Tensor | None = None
    schedule: Schedule | None = None
    block_weights: BlockWeights | None = None
    reuse: float = 0.0

    def __post_init__(self) -> None:
        if self.guidance not in GUIDANCE:
            raise StrengthError(f"guidance is one of {', '.join(GUIDANCE)}, found {self.guidance!r}")
        if not 0.0 <= self.reuse <= MOST_REUSED:
            raise StrengthError(
                f"reuse is a part of the steps, 0 to {MOST_REUSED:g}, found {self.reuse:g}: 0.5 is every second step"
            )
        if not abs(self.value) <= FACTOR:  # NaN is not
            raise StrengthError(f"a strength is a number up to {FACTOR:g}, found {self.value:g}: 1 is the usual one")

    @cached_property
    def off(self) -> bool:
        """Whether nothing of the control can ever act."""
        schedule = self.schedule
        return (
            self.value == 0.0
            or (self.mask is not None and not bool(self.mask.any()))
            or (schedule is not None and not any(keyframe.value for keyframe in schedule.keyframes))
            or (schedule is not None and bool(schedule.per_image) and not any(schedule.per_image))
        )

    @property
    def steady(self) -> bool:
        """Whether `at` is the same at every moment."""
        return self.window.everything and self.schedule is None

    @property
    def counts_steps(self) -> bool:
        """Whether `at` needs the run's steps."""
        if self.window.unit == "step" and not self.window.everything:
            return True
        unit = "percent" if self.schedule is None else self.schedule.unit
        return (self.window.unit if unit == "window" else unit) == "step"

    def at(self, moment: Moment) -> float:
        """The value at a moment of a run: 0 outside the window, else `value` times the schedule's."""
        if not self.window.contains(moment):
            return 0.0
        return self.value if self.schedule is None else self.value * self.schedule.value(moment, self.window)

    def scales(self, value: float, skips: int, latent_height: int, mask: Tensor | None = None) -> ControlScales:
        """What multiplies the residuals at one moment, when the value is `value`, for a UNet with so many `skips`.

        `mask` (B,1,H,W) is the run's, batched like the residuals.
        """
        weights = (1.0,) * (skips + 1) if self.block_weights is None else self.block_weights.weights(skips)
        resolution = latent_height if self.guidance == "cfg_resolution" else None
        return ControlScales(weights, resolution, mask).times(value)


@dataclass(frozen=True)
class ControlScales:
    """A strength at one moment (ldm's `control_scales`): a weight for each block, the middle's last, and a mask.

    With `resolution`, the latent's height, each residual is also multiplied by that over its own height. `mask` is
    (B,1,H,W).
    """

    weights: tuple[float, ...]
    resolution: int | None = None
    mask: Tensor | None = None
    _fitted: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def times(self, value: float) -> ControlScales:
        """The same with every weight times `value`; a mask is fitted to each size once for all that come of it."""
        return replace(self, weights=tuple(value * weight for weight in self.weights))

    def scaled(self, i: int, residual: Tensor) -> Tensor | None:
        """`residual` (B,C,h,w) of block i times its weight: itself where that is 1, `None` where it is 0."""
        weight = self.weights[i]
        if self.resolution is not None:
            weight *= self.resolution / residual.shape[2]
        if weight == 0:
            return None
        scaled = residual if weight == 1 else residual * weight
        if self.mask is None:
            return scaled
        size = tuple(residual.shape[2:])  # the same for many: a ControlLLLite has over a hundred layers
        if size not in self._fitted:
            self._fitted[size] = averaged(self.mask.to(residual), *size)
        return scaled * self._fitted[size]

    def apply(self, residuals: Residuals) -> Residuals:
        """All of `residuals` scaled."""
        if len(residuals) != len(self.weights):
            raise StrengthError(f"{len(residuals)} residuals need as many block weights, found {len(self.weights)}")
        return residuals.mapped(self.scaled)


def averaged(mask: Tensor, height: int, width: int) -> Tensor:
    """`mask` (B,1,H,W) as (B,1,height,width), each number the mean of the pixels that its place covers, even in part.

    torch's adaptive pooling ("area") by two products of matrices: Apple's MPS pools only to sizes that divide.
    """
    rows, columns = (_shares(size, count, mask) for size, count in zip(mask.shape[2:], (height, width), strict=True))
    return rows @ mask @ columns.T


def _shares(size: int, count: int, like: Tensor) -> Tensor:
    """The share (count, size) of each of `size` pixels in `count` means; made where `like` is."""
    pixels, places = (torch.arange(n, device=like.device) for n in (size, count))
    first, end = places * size // count, ((places + 1) * size + count - 1) // count
    covered = (pixels >= first[:, None]) & (pixels < end[:, None])
    return (covered / covered.sum(1, keepdim=True)).to(like.dtype)
