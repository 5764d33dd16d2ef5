"""The part of sampling in which a control acts."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal

from ..errors import ZeroConvError
from .clock import Moment

Unit = Literal["percent", "step"]
UNITS: tuple[Unit, ...] = ("percent", "step")


class WindowError(ZeroConvError):
    """A window that cannot be meant."""


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
                raise WindowError(
                    f"a window in percent lies between 0 and 1, found {self.start:g} to {self.end:g}: "
                    "set unit to step if steps are meant"
                )
        elif self.unit == "step":
            if not all(isfinite(n) and n == int(n) for n in (self.start, self.end)) or self.start < 0 or self.end < -1:
                raise WindowError(
                    "a window in steps takes whole numbers, a start from 0 and an end from 0, or -1 for the last step; "
                    f"found {self.start:g} to {self.end:g}: set unit to percent if a part of 1 is meant"
                )
        else:
            raise WindowError(f"the unit of a window is one of {', '.join(UNITS)}, found {self.unit!r}")
        if self.start > self.end != -1:
            raise WindowError(
                f"a window ends after it starts, found {self.start:g} to {self.end:g}: exchange start and end"
            )

    @property
    def everything(self) -> bool:
        """Whether it is all of sampling, of any schedule."""
        whole = (0.0, 1.0) if self.unit == "percent" else (0, -1)
        return (self.start, self.end) == whole

    def contains(self, moment: Moment) -> bool:
        """Whether control acts at this moment. Raises ClockError where steps are asked for and cannot be told."""
        if self.everything:
            return True
        if self.unit == "percent":
            return moment.between(self.start, self.end)
        return self.start <= moment.counted_step and (self.end == -1 or moment.counted_step < self.end)

    def position(self, moment: Moment) -> float:
        """How far the moment is in the window, 0..1: 0 at its start, 1 at its end or, in steps, at its last step."""
        if self.unit == "percent":
            at, start, end = moment.percent, self.start, self.end
        else:
            steps = moment.clock.steps
            last = steps if self.end == -1 else min(self.end, steps)
            at, start, end = moment.counted_step, self.start, last - 1
        return 0.0 if end <= start else min(1.0, max(0.0, (at - start) / (end - start)))
