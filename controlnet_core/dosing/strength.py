"""How much of a control acts, where and when: strength, window, schedule, block weights, guidance half, mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..networks.residuals import Residuals
from .block_weights import BlockWeights
from .schedule import Schedule, step_of

Unit = Literal["percent", "step"]
Guidance = Literal["both", "cond_only", "cfg_resolution"]
UNITS: tuple[Unit, ...] = ("percent", "step")
GUIDANCE: tuple[Guidance, ...] = ("both", "cond_only", "cfg_resolution")


class StrengthError(ValueError):
    """A strength or a window that cannot be meant."""


@dataclass(frozen=True)
class Window:
    """The part of sampling in which a control acts.

    In percent, 0..1 of the model's noise schedule: from the sigma of `start` down to that of `end`, both included. In
    steps: start <= k < end with k counted from 0 in the run's own sigmas; an `end` of -1 means to the last step.
    """

    start: float = 0.0
    end: float = 1.0
    unit: Unit = "percent"

    def __post_init__(self) -> None:
        if self.unit == "percent":
            if not (0.0 <= self.start <= 1.0 and 0.0 <= self.end <= 1.0):
                raise StrengthError(
                    f"a window in percent lies between 0 and 1, found {self.start:g} to {self.end:g}: "
                    "set unit to step if steps are meant"
                )
        elif self.unit == "step":
            if self.start != int(self.start) or self.end != int(self.end) or self.start < 0 or self.end < -1:
                raise StrengthError(
                    "a window in steps takes whole numbers, a start from 0 and an end from 0, or -1 for the last step; "
                    f"found {self.start:g} to {self.end:g}: set unit to percent if a part of 1 is meant"
                )
        else:
            raise StrengthError(f"the unit of a window is one of {', '.join(UNITS)}, found {self.unit!r}")

    def contains(
        self, sigma: float, sigmas: Sequence[float] | None, percent_to_sigma: Callable[[float], float]
    ) -> bool:
        """Whether control acts at `sigma` of a run over `sigmas` (its whole schedule, needed for steps alone)."""
        if self.unit == "percent":
            return percent_to_sigma(self.end) <= sigma <= percent_to_sigma(self.start)
        if sigmas is None:
            raise StrengthError("this sampler does not tell its sigmas, so steps cannot be counted: use unit percent")
        k = step_of(sigma, sigmas)
        return self.start <= k and (self.end == -1 or k < self.end)


@dataclass(frozen=True)
class Strength:
    """The weight of each residual, all over a run.

    `value` multiplies all of them, `schedule` over time and for each picture of a batch, `block_weights` block by
    block. `guidance` is "both" halves of classifier-free guidance, "cond_only", or "cfg_resolution": the conditional
    half with every residual times 64/h (paper, section 3.4), h being relative to the latent, so that the weights are
    1, 2, 4, 8 from the top level down at every picture size. `mask` (B,1,H,W) in 0..1 is resized to each residual.
    """

    value: float = 1.0
    window: Window = Window()
    guidance: Guidance = "both"
    mask: Tensor | None = None
    schedule: Schedule | None = None
    block_weights: BlockWeights | None = None

    def __post_init__(self) -> None:
        if self.guidance not in GUIDANCE:
            raise StrengthError(f"guidance is one of {', '.join(GUIDANCE)}, found {self.guidance!r}")

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
    def counts_steps(self) -> bool:
        """Whether `now` needs the run's sigmas."""
        return self.window.unit == "step" or (self.schedule is not None and self.schedule.unit == "step")

    def now(self, sigma: float, sigmas: Sequence[float] | None, percent_to_sigma: Callable[[float], float]) -> float:
        """The value at `sigma`: 0 outside the window, else `value` times the schedule's.

        `sigmas` is the run's whole schedule of noise (steps need it), `percent_to_sigma` the model's.
        """
        if not self.window.contains(sigma, sigmas, percent_to_sigma):
            return 0.0
        if self.schedule is None:
            return self.value
        return self.value * self.schedule.value(sigma, sigmas, percent_to_sigma, self.window)

    def dose(self, now: float, skips: int, latent_height: int, mask: Tensor | None = None) -> Dose:
        """What is left to multiply at one moment, when the value is `now`, for a UNet with so many `skips`.

        `mask` (B,1,H,W) is the run's, batched like the residuals.
        """
        weights = (1.0,) * (skips + 1) if self.block_weights is None else self.block_weights.weights(skips)
        resolution = latent_height if self.guidance == "cfg_resolution" else None
        return Dose(tuple(now * weight for weight in weights), resolution, mask)


@dataclass(frozen=True)
class Dose:
    """A strength at one moment: a weight for each block (the middle's comes last), and a mask (B,1,H,W).

    With `resolution`, the latent's height, each residual is also multiplied by that over its own height.
    """

    weights: tuple[float, ...]
    resolution: int | None = None
    mask: Tensor | None = None
    _fitted: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def weigh(self, i: int, residual: Tensor) -> Tensor | None:
        """`residual` (B,C,h,w) of block i times its weight, a fresh tensor; `None` where that is 0."""
        weight = self.weights[i]
        if self.resolution is not None:
            weight *= self.resolution / residual.shape[2]
        if weight == 0:
            return None
        weighed = residual * weight
        if self.mask is None:
            return weighed
        size = tuple(residual.shape[2:])  # the same for many: a ControlLLLite has over a hundred layers
        if size not in self._fitted:
            self._fitted[size] = F.interpolate(self.mask.to(residual), size=size, mode="area")
        return weighed * self._fitted[size]

    def apply(self, residuals: Residuals) -> Residuals:
        """All of `residuals` weighed."""
        if len(residuals) != len(self.weights):
            raise StrengthError(f"{len(residuals)} residuals need as many block weights, found {len(self.weights)}")
        return residuals.mapped(self.weigh)
