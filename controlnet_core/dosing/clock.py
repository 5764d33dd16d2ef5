"""When in a run of sampling a call of the UNet is: its step, and its percent of the model's noise schedule.

A sigma alone is no position: schedules may rise (unsampling), rise in between (re-noising) or repeat, and samplers may
nudge what they evaluate. The clock is built once a run and answers for all controls in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from ..errors import ZeroConvError

PercentToSigma = Callable[[float], float]
"""The model's noise schedule: percent of sampling, 0..1, to sigma; it falls."""

CLOSE = 1e-5
"""Relative difference at which a sigma is one of the schedule's: samplers come back to it through logarithms."""

AHEAD = 2
"""Steps that samplers look ahead of the one that they take: Heun's corrector one, heunpp2's two."""


class ClockError(ZeroConvError):
    """A run in which steps cannot be told."""


class Clock:
    """The clock of one run.

    `percent_to_sigma` is the model's. `sigmas` are the run's whole schedule, n + 1 of them for n steps; `None` where a
    sampler does not tell. `starts` are the sigmas at which the steps are begun, where the sampler nudges them
    (`churned`); without them those of the schedule.

    In a schedule that falls all the way, or rises all the way, step k is the interval from sigmas[k] on, sigmas[k + 1]
    left out. In any other, and in one that is nudged, a sigma may belong to several steps: there the sampler must say
    how far it is, by `begun`.
    """

    def __init__(
        self,
        percent_to_sigma: PercentToSigma,
        sigmas: Sequence[float] | None = None,
        starts: Sequence[float] | None = None,
    ):
        self._percent_to_sigma = percent_to_sigma
        self._sigmas = None if sigmas is None else tuple(sigmas)
        self._starts = self._sigmas[:-1] if self._sigmas and starts is None else tuple(starts or ())
        self._begun: int | None = None
        self._percents: dict[float, float] = {}  # of sigmas
        self._limits: dict[float, float] = {}  # sigmas of percents

    # -- steps -----------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps in the run. Raises ClockError where its sigmas are not known."""
        if self._sigmas is None:
            raise ClockError("this sampler does not tell its sigmas, so steps cannot be counted: use unit percent")
        return len(self._starts)

    def begun(self, steps: int) -> None:
        """The sampler has evaluated the beginning of so many steps; a run that reports says 0 before its first."""
        self._begun = steps

    @cached_property
    def monotone(self) -> bool:
        """Whether a sigma has one place in the schedule: it falls all the way, or rises all the way, as it is."""
        pairs = list(pairwise(self._sigmas or ()))
        regular = all(a > b for a, b in pairs) or all(a < b for a, b in pairs)
        return regular and self._starts == (self._sigmas or ())[:-1]

    def check_steps(self) -> None:
        """Raise ClockError, before sampling, unless steps can be told in this run."""
        if self.steps and not self.monotone and self._begun is None:
            raise ClockError(
                "the sigmas of this run rise and fall, and its sampler does not tell which step it is at, so steps "
                "cannot be counted: use unit percent"
            )

    def step(self, sigma: float) -> int:
        """The step, from 0, of a call at `sigma` now; the number of steps once sigma is that of the end or beyond."""
        self.check_steps()
        exact = [k for k, start in enumerate(self._starts) if math.isclose(sigma, start, rel_tol=CLOSE)]
        if self.monotone:
            return min(exact, key=lambda k: abs(self._starts[k] - sigma)) if exact else self._interval(sigma)
        assert self._begun is not None
        # A step's beginning is evaluated once, and what is evaluated then lies within it or is what comes next.
        ahead = [k for k in exact if k >= self._begun] or [k for k in self._holding(sigma) if k >= self._begun - 1]
        found = min(ahead, default=max(exact, default=self._begun))
        if found > self._begun + AHEAD:
            raise ClockError(
                f"the sampler is at step {found} of a schedule that rises and falls, and has told of {self._begun}, so "
                "steps cannot be counted: use unit percent"
            )
        return found

    def _interval(self, sigma: float) -> int:
        """The interval of a monotone schedule that holds `sigma`: the first for what lies before it, n for beyond."""
        assert self._sigmas is not None
        falls = self._sigmas[0] >= self._sigmas[-1]
        reached = sum(edge >= sigma if falls else edge <= sigma for edge in self._sigmas)
        return max(0, reached - 1)

    def _holding(self, sigma: float) -> list[int]:
        """The steps whose interval holds `sigma`, both ends left out."""
        assert self._sigmas is not None
        return [
            k
            for k, (start, end) in enumerate(zip(self._starts, self._sigmas[1:]))
            if min(start, end) < sigma < max(start, end)
        ]

    # -- percent ---------------------------------------------------------------------------------------------------

    def sigma_at(self, percent: float) -> float:
        """The sigma of a percent; the model is asked once a run."""
        if percent not in self._limits:
            self._limits[percent] = self._percent_to_sigma(percent)
        return self._limits[percent]

    def percent(self, sigma: float) -> float:
        """The percent, 0..1, whose sigma this is, to six digits; computed once a run and sigma."""
        if sigma not in self._percents:
            self._percents[sigma] = self._percent(sigma)
        return self._percents[sigma]

    def _percent(self, sigma: float) -> float:
        if sigma >= self.sigma_at(0.0):
            return 0.0
        if sigma <= self.sigma_at(1.0):
            return 1.0
        low, high = 0.0, 1.0
        while high - low > 1e-7:
            middle = (low + high) / 2
            if self._percent_to_sigma(middle) >= sigma:
                low = middle
            else:
                high = middle
        return round(low, 6)

    # -- both ------------------------------------------------------------------------------------------------------

    def at(self, sigma: float) -> Moment:
        """The moment of a call of the UNet at `sigma`, now."""
        try:
            return Moment(sigma, self.step(sigma), self)
        except ClockError as error:
            return Moment(sigma, None, self, str(error))


@dataclass(frozen=True)
class Moment:
    """When in its run a call of the UNet is: at `sigma`, in `step`; `None` where steps cannot be told, for `why`."""

    sigma: float
    step: int | None
    clock: Clock = field(repr=False, compare=False)
    why: str = field(default="", repr=False, compare=False)

    @property
    def counted_step(self) -> int:
        """The step. Raises ClockError where it cannot be told."""
        if self.step is None:
            raise ClockError(self.why)
        return self.step

    @property
    def percent(self) -> float:
        """How far sampling is in the model's noise schedule, 0..1, to six digits."""
        return self.clock.percent(self.sigma)

    def between(self, start: float, end: float) -> bool:
        """Whether it lies within two percents, both included, by the sigmas that the model has there."""
        return self.clock.sigma_at(end) <= self.sigma <= self.clock.sigma_at(start)


def churned(sigmas: Sequence[float], churn: float, lowest: float, highest: float) -> tuple[float, ...]:
    """The sigmas at which the steps over `sigmas` begin when a sampler adds noise before each one.

    s_churn, s_tmin and s_tmax of Karras et al., 2022, algorithm 2 (arXiv:2206.00364), as k-diffusion has it.
    """
    starts = sigmas[:-1]
    gamma = min(churn / max(1, len(starts)), 2**0.5 - 1)
    return tuple(sigma * (1 + gamma) if lowest <= sigma <= highest else sigma for sigma in starts)
