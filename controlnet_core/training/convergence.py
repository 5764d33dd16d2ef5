"""When a training begins to follow its hints: the sudden jump of the held-out fidelity; and losses made readable."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from math import isfinite, log
from typing import NamedTuple

import numpy as np

from ..errors import ZeroConvError

LEVEL = 3
"""Measurements on the new level, the first on it included, before a jump counts."""
FEWEST = 6
"""Measurements before which there is too little to tell a jump from noise."""
SLOW = 3.0
"""A rise that takes no longer than the time until its first higher score is sudden; this many times that, slow.

What lies between is neither: it is too like a sudden one to be a reason against it.
"""
NOISES = 4.5
"""Standard deviations of the noise that a jump is high at least; more where the noise is known from few scores."""
EVIDENCE = 8.0
"""Twice the logarithm of how much likelier a sudden rise makes the scores than the others do; at least."""
OUTLIER = 4.0
"""Standard deviations of the noise beyond both neighbours from which on a single score is taken for an outlier."""


class ConvergenceError(ZeroConvError):
    """Measurements that are no curve."""


def sudden_convergence(steps: Sequence[int], scores: Sequence[float], least: float = 0.05) -> int | None:
    """The step at which held-out fidelity jumps to a higher level; None while, and where, it never does.

    A ControlNet does not learn its hint gradually: fidelity stays at that of the base model, then rises suddenly
    (paper, section 3.3). `scores` were measured after `steps` optimizer steps, which rise; those that are not finite
    are left out. The mark is the first of these steps whose score is at or beyond half of the jump.

    It is a change-point test, repeated for each beginning of the curve: of all curves that are level, rise in a
    straight line and are level again, the best of those that rise suddenly and have come to their new level (`LEVEL`)
    must be much likelier than no rise, a slow one (`SLOW`) and one that is still going on (`EVIDENCE`). It must be
    `least` high, in units of the scores, and stand clear of the noise (`NOISES`), which is measured on the same curve
    once single outliers are taken out. Nothing else depends on the scale of the scores.

    So a mark never moves: adding measurements changes None into a step, and no step into anything else. It comes
    `LEVEL` - 1 measurements after the rise has ended, later in noise, and after `FEWEST` measurements at the
    earliest. A jump that falls back after three measurements or more is marked too: nothing told it from the real one.

    Raises ConvergenceError where the two differ in length or the steps do not rise.
    """
    if len(steps) != len(scores) or any(a >= b for a, b in pairwise(steps)):
        raise ConvergenceError(
            f"found {len(scores)} scores for the steps {', '.join(map(str, steps[:8]))}...: expected one for each of "
            "them, and steps that rise"
        )
    known = [(step, score) for step, score in zip(steps, scores) if isfinite(score)]
    for count in range(FEWEST, len(known) + 1):
        x, y = np.array(known[:count], dtype=np.float64).T
        mark = _jump((x - x[0]) / (x[-1] - x[0]), _without_outliers(y), least)
        if mark is not None:
            return known[mark][0]
    return None


def _jump(x: np.ndarray, y: np.ndarray, least: float) -> int | None:
    """The place in `x` (0..1) where `y` jumps, if its last value is part of the proof."""
    count = len(y)
    first, last = _ramps(count)
    fits = _fits(x, y, first, last)
    # The quiet ends with the first measurement that is higher; a rise of one measurement is the shortest to be seen.
    length, quiet = x[last] - x[first], x[first + 1]
    wanted = (length <= quiet) & (last <= count - LEVEL) & (fits.height >= least)
    against = (length > SLOW * quiet) | (last == count - 1)
    if not wanted.any():
        return None
    best = int(np.argmin(np.where(wanted, fits.unexplained, np.inf)))
    height = fits.height[best]
    # Scores without any noise do not make a curve infinitely likely: none is true to more than a thousandth.
    floor = count * (0.001 * height) ** 2
    error = fits.unexplained[best] + floor
    freedom = count - 4  # two levels, a beginning and an end are fitted
    if height < NOISES * (1 + 3 / freedom) * (error / freedom) ** 0.5:
        return None
    other = min(((y - y.mean()) ** 2).sum(), fits.unexplained[against].min()) + floor
    if (count - 2) * log(other / error) < EVIDENCE:  # every curve has its two levels
        return None
    half = fits.low[best] + height / 2
    if (y[-LEVEL:] < half).any():  # two outliers side by side, and then the old level again
        return None
    return int(first[best] + 1 + np.argmax(y[first[best] + 1 :] >= half))


class Fits(NamedTuple):
    """For each ramp its lower level, its height, and the sum of squares that it leaves unexplained."""

    low: np.ndarray
    height: np.ndarray
    unexplained: np.ndarray


def _fits(x: np.ndarray, y: np.ndarray, first: np.ndarray, last: np.ndarray) -> Fits:
    """Least squares of a + b r for ramps r that are 0 up to x[first], 1 from x[last] on and straight between.

    By running sums, so that a curve of hundreds of measurements costs milliseconds.
    """
    count, mean = len(y), y.mean()
    y = y - mean

    def between(values: np.ndarray) -> np.ndarray:
        running = np.cumsum(values)
        return running[last] - running[first]

    start, length, inside, beyond = x[first], x[last] - x[first], last - first, count - 1 - last
    sum_x, sum_y = between(x), between(y)
    sum_r = (sum_x - start * inside) / length + beyond
    sum_rr = (between(x * x) - 2 * start * sum_x + start**2 * inside) / length**2 + beyond
    sum_ry = (between(x * y) - start * sum_y) / length - np.cumsum(y)[last]  # all of y sums to 0
    height = sum_ry / (sum_rr - sum_r**2 / count)
    return Fits(mean - height * sum_r / count, height, np.maximum(0, y @ y - height * sum_ry))


@lru_cache(maxsize=256)
def _ramps(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the rises that are tried begin and end: of any length up to 8, of some beyond, of all to the last score."""
    lengths = {*range(1, 9), *(round(2 ** (k / 2)) for k in range(7, 60))}
    pairs = {(i, i + length) for length in lengths for i in range(count - length)}
    first, last = np.array(sorted(pairs | {(i, count - 1) for i in range(count - 1)})).T
    return first, last


def _without_outliers(scores: np.ndarray) -> np.ndarray:
    """`scores` with those that stand out from both neighbours brought to the middle of the three.

    A rise has no such scores, however steep. The last one has a single neighbour and stays.
    """
    middle = np.median(np.stack([scores[:-2], scores[1:-1], scores[2:]]), axis=0)
    # The median absolute difference of neighbours, as the standard deviation that Gaussian noise would have.
    noise = 1.4826 / 2**0.5 * np.median(np.abs(np.diff(scores)))
    inner = scores[1:-1]
    return np.concatenate([scores[:1], np.where(np.abs(inner - middle) > OUTLIER * noise, middle, inner), scores[-1:]])


def best(measured: Sequence[tuple[int, float]]) -> tuple[int, float] | None:
    """The first (step, score) of the highest score; None before one is there. The base's own, at step 0, is none."""
    trained = [(step, score) for step, score in measured if step > 0 and isfinite(score)]
    return max(trained, key=lambda each: each[1], default=None)


def has_fallen(measured: Sequence[tuple[int, float]], least: float = 0.05) -> bool:
    """Whether the last `LEVEL` scores are all lower than the best one before them, by `least` and by a tenth of it."""
    top = best(measured[:-LEVEL])
    return top is not None and all(score < top[1] - max(least, 0.1 * top[1]) for _, score in measured[-LEVEL:])


class Average:
    """A running average in which a loss `half_life` steps old weighs half as much as the newest.

    Unlike a plain exponential average it does not lean to where it began: after n losses it is their weighted mean.
    """

    def __init__(self, half_life: float = 50.0):
        self._decay = 0.5 ** (1 / half_life)
        self._sum = self._weight = 0.0

    def add(self, value: float) -> float:
        """The average with `value` as the newest; what is not finite is left out."""
        if isfinite(value):
            self._sum = self._decay * self._sum + (1 - self._decay) * value
            self._weight = self._decay * self._weight + (1 - self._decay)
        return self._sum / self._weight if self._weight else value

    @property
    def value(self) -> float | None:
        """The average so far; None before the first loss."""
        return self._sum / self._weight if self._weight else None


def smoothed(values: Iterable[float], half_life: float = 50.0) -> list[float]:
    """The running `Average` after each of `values`."""
    average = Average(half_life)
    return [average.add(value) for value in values]
