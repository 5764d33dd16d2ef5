"""How a control's strength changes over sampling: keyframes and named curves."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ..errors import ZeroConvError
from ..limits import FACTOR, KEYFRAMES, NUMBERS, STEPS, WRITTEN
from .clock import Moment
from .window import Window

Interpolation = Literal["linear", "ease", "hold"]
ScheduleUnit = Literal["window", "percent", "step"]
INTERPOLATIONS: tuple[Interpolation, ...] = ("linear", "ease", "hold")
SCHEDULE_UNITS: tuple[ScheduleUnit, ...] = ("window", "percent", "step")


class ScheduleError(ZeroConvError):
    """Keyframes that cannot be meant, or that cannot be read."""


@dataclass(frozen=True)
class Keyframe:
    """A strength at a position of sampling; `interpolation` says how the value goes on to the next keyframe.

    "linear": in a straight line; "ease": slowly away and slowly in, 3u^2 - 2u^3 of the way; "hold": not at all, the
    next keyframe's value comes in one step.
    """

    position: float
    value: float
    interpolation: Interpolation = "linear"

    def __post_init__(self) -> None:
        if not 0 <= self.value <= FACTOR:
            raise ScheduleError(
                f"the strength of a keyframe is a number from 0, found {self.value:g} at {self.position:g}: write one "
                f"up to {FACTOR:g}"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ScheduleError(
                f"a keyframe goes on to the next one by {', '.join(INTERPOLATIONS)}, found {self.interpolation!r}"
            )


@dataclass(frozen=True)
class Schedule:
    """A factor on a control's strength that changes over sampling, and one for each picture of a batch.

    Positions are measured in `unit`. "window": 0 at the start of the control's own window, 1 at its end (in a window of
    steps, at its first and at its last step). "percent": 0..1 of the model's noise schedule. "step": the run's own
    steps, counted from 0. Before the first keyframe and after the last one their values hold. `per_image` has one
    factor for each picture (or frame) of the batch; empty, all pictures are alike.
    """

    keyframes: tuple[Keyframe, ...]
    unit: ScheduleUnit = "window"
    per_image: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.unit not in SCHEDULE_UNITS:
            raise ScheduleError(f"the unit of a schedule is one of {', '.join(SCHEDULE_UNITS)}, found {self.unit!r}")
        if not self.keyframes:
            raise ScheduleError('a schedule has at least one keyframe, found none: write one such as "0: 1"')
        if len(self.keyframes) > KEYFRAMES or len(self.per_image) > NUMBERS:
            raise ScheduleError(
                f"a schedule has at most {KEYFRAMES} keyframes and strengths of {NUMBERS} pictures, found "
                f"{len(self.keyframes)} and {len(self.per_image)}: leave some out, values between keyframes follow"
            )
        for keyframe in self.keyframes:
            self._check_position(keyframe.position)
        for a, b in pairwise(self.keyframes):
            if a.position >= b.position:
                raise ScheduleError(
                    f"the positions of keyframes rise, found {a.position:g} before {b.position:g}: "
                    "put the keyframes in order, one for each position"
                )
        for factor in self.per_image:
            if not 0 <= factor <= FACTOR:
                raise ScheduleError(
                    f"the strength of a picture is a number from 0, found {factor:g}: write one up to {FACTOR:g}"
                )

    def _check_position(self, position: float) -> None:
        if self.unit == "step":
            if not math.isfinite(position) or position < 0 or position != int(position):
                raise ScheduleError(
                    f"a keyframe in steps lies at a whole number from 0, found {position:g}: "
                    "set unit to window or percent if a part of 1 is meant"
                )
            if position > STEPS:
                raise ScheduleError(f"a keyframe lies at step {position:g}, expected at most {STEPS}: write its step")
        elif not 0.0 <= position <= 1.0:
            raise ScheduleError(
                f"a keyframe in {self.unit} lies between 0 and 1, found {position:g}: "
                "set unit to step if a step is meant"
            )

    def at(self, position: float) -> float:
        """The factor at a position, in this schedule's unit."""
        i = bisect_right([keyframe.position for keyframe in self.keyframes], position)
        if i == 0:
            return self.keyframes[0].value
        if i == len(self.keyframes):
            return self.keyframes[-1].value
        a, b = self.keyframes[i - 1], self.keyframes[i]
        if a.interpolation == "hold":
            return a.value
        u = (position - a.position) / (b.position - a.position)
        if a.interpolation == "ease":
            u = u * u * (3 - 2 * u)
        return a.value + (b.value - a.value) * u

    def position(self, moment: Moment, window: Window) -> float:
        """Where a moment lies, in our unit; `window` is the control's own."""
        if self.unit == "percent":
            return moment.percent
        return float(moment.counted_step) if self.unit == "step" else window.position(moment)

    def value(self, moment: Moment, window: Window) -> float:
        """The factor at a moment. Raises ClockError where steps are asked for and cannot be told."""
        return self.at(self.position(moment, window))


def parse(text: str) -> tuple[Keyframe, ...]:
    """Keyframes from text, one a line or between commas: "0: 1", "0.5: 0.3 ease", "1: 0 hold"."""
    if len(text) > WRITTEN:
        raise ScheduleError(f"the keyframes have {len(text)} characters, at most {WRITTEN} are read: leave some out")
    pieces = [piece.strip() for line in text.splitlines() for piece in line.split(",")]
    keyframes = tuple(_keyframe(piece) for piece in pieces if piece)
    if not keyframes:
        raise ScheduleError('the keyframes are empty: write one a line, position and strength, such as "0: 1"')
    return keyframes


def _keyframe(piece: str) -> Keyframe:
    position, colon, rest = piece.partition(":")
    words = rest.split()
    try:
        if not colon or len(words) not in (1, 2):
            raise ValueError
        return Keyframe(float(position), float(words[0]), *words[1:])  # type: ignore[arg-type]
    except ScheduleError:
        raise
    except ValueError:
        raise ScheduleError(
            f'a keyframe is "position: strength", and then {", ".join(INTERPOLATIONS)} if it is not linear, '
            f'such as "0.5: 0.3 ease"; found "{piece}"'
        ) from None


CURVES: dict[str, tuple[Keyframe, ...]] = {
    "constant": (Keyframe(0, 1),),
    "fade out": (Keyframe(0, 1), Keyframe(1, 0)),
    "fade in": (Keyframe(0, 0), Keyframe(1, 1)),
    "ease out": (Keyframe(0, 1, "ease"), Keyframe(1, 0)),
    "ease in": (Keyframe(0, 0, "ease"), Keyframe(1, 1)),
    "early half": (Keyframe(0, 1, "hold"), Keyframe(0.5, 0)),
    "late half": (Keyframe(0, 0, "hold"), Keyframe(0.5, 1)),
    "bell": (Keyframe(0, 0, "ease"), Keyframe(0.5, 1, "ease"), Keyframe(1, 0)),
    "dip": (Keyframe(0, 1, "ease"), Keyframe(0.5, 0, "ease"), Keyframe(1, 1)),
}
"""Curves over 0..1 by the name that a user picks."""
