"""How much of a control acts, and when: the user's strength, the window, the guidance half, the mask."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from .residuals import Residuals

Unit = Literal["percent", "step"]
Guidance = Literal["both", "cond_only", "cfg_resolution"]
UNITS: tuple[Unit, ...] = ("percent", "step")
GUIDANCE: tuple[Guidance, ...] = ("both", "cond_only", "cfg_resolution")


class StrengthError(ValueError):
    """A strength or a window that cannot be meant."""


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """Index k of the interval sigmas[k] >= sigma > sigmas[k + 1] of a falling schedule; 0 above its first sigma."""
    return max(0, bisect_right([-s for s in sigmas], -sigma) - 1)


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
    """The weight of each residual.

    `value` multiplies all of them. `guidance` is "both" halves of classifier-free guidance, "cond_only", or
    "cfg_resolution": the conditional half with every residual times 64/h (paper, section 3.4), h being relative to the
    latent, so that the weights are 1, 2, 4, 8 from the top level down at every picture size. `mask` (B,1,H,W) in 0..1
    is resized to each residual.
    """

    value: float = 1.0
    window: Window = Window()
    guidance: Guidance = "both"
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.guidance not in GUIDANCE:
            raise StrengthError(f"guidance is one of {', '.join(GUIDANCE)}, found {self.guidance!r}")

    @property
    def off(self) -> bool:
        """Whether nothing of the control can ever act."""
        return self.value == 0.0 or (self.mask is not None and not bool(self.mask.any()))

    @property
    def halves(self) -> tuple[bool, bool]:
        """Whether control acts on the conditional and on the unconditional half."""
        return True, self.guidance == "both"

    def weigh(self, residual: Tensor, latent_height: int, mask: Tensor | None = None) -> Tensor:
        """`residual` (B,C,h,w) times its weight, a fresh tensor; `mask` (B,1,H,W) is the run's, batched like it."""
        weight = self.value
        if self.guidance == "cfg_resolution":
            weight *= latent_height / residual.shape[2]
        weighed = residual * weight
        if mask is None:
            return weighed
        return weighed * F.interpolate(mask.to(residual), size=residual.shape[2:], mode="area")

    def apply(self, residuals: Residuals, latent_height: int, mask: Tensor | None = None) -> Residuals:
        """All of `residuals` weighed."""
        return Residuals.of(
            None if residual is None else self.weigh(residual, latent_height, mask) for residual in residuals
        )
