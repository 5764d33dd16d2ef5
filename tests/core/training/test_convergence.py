"""The mark of sudden convergence on hundreds of made-up curves, and on some written out; the running average."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan

import numpy as np
import pytest

from zeroconv.controlnet_core.training import convergence
from zeroconv.controlnet_core.training.convergence import (
    LEVEL,
    Average,
    ConvergenceError,
    best,
    has_fallen,
    smoothed,
    sudden_convergence,
)

EVERY = 250
"""Steps between two measurements."""
SEEDS = 100

Curve = Callable[[np.random.Generator], tuple[np.ndarray, int]]
"""(generator) -> scores (n,), and the place of the first one at or beyond half of the jump."""


def mark(scores: np.ndarray | list[float], least: float = 0.05) -> int | None:
    """The place of the mark among `scores`."""
    steps = [EVERY * i for i in range(len(scores))]
    found = sudden_convergence(steps, [float(score) for score in scores], least)
    return None if found is None else found // EVERY


# -- curves with a jump -----------------------------------------------------------------------------------------------


def jump(
    low: float, high: float, noise: float, width: float = 0.0, drift: float = 0.0, outliers: int = 0, related: float = 0
) -> Curve:
    """12 to 40 scores that rise from `low` to `high` as a sigmoid: from 10 to 90 % in the part `width` of the run.

    `drift` is what they rise beside, in parts of the jump, over the run; `related` the noise's correlation.
    """

    def make(generator: np.random.Generator) -> tuple[np.ndarray, int]:
        count = int(generator.integers(12, 41))
        at = np.arange(count)
        centre = generator.uniform(max(3, 0.2 * count), count - 4 - width * count)
        rise = at >= centre if width == 0 else 1 / (1 + np.exp(-(at - centre) * 4.394 / (width * count)))
        scores = low + (high - low) * (rise + drift * at / count) + noise * correlated(generator, count, related)
        for place in generator.integers(1, count, outliers):
            scores[place] += generator.choice([-1, 1]) * generator.uniform(0.2, 1) * (high - low)
        return scores, int(np.ceil(centre))

    return make


def correlated(generator: np.random.Generator, count: int, related: float) -> np.ndarray:
    noise = generator.normal(size=count)
    for i in range(1, count):
        noise[i] = related * noise[i - 1] + (1 - related**2) ** 0.5 * noise[i]
    return noise


JUMPS = {
    "at once": (jump(0.2, 0.85, 0.05), 97),
    "steep": (jump(0.2, 0.85, 0.03, width=0.05), 97),
    "in a tenth of the run": (jump(0.2, 0.85, 0.025, width=0.1), 97),
    "low scores": (jump(0.02, 0.15, 0.01), 97),
    "high noise": (jump(0.2, 0.85, 0.08), 95),
    "related noise": (jump(0.2, 0.85, 0.04, width=0.05, related=0.6), 97),
    "a slow rise beside it": (jump(0.2, 0.7, 0.025, width=0.05, drift=0.3), 95),
    "two outliers": (jump(0.2, 0.85, 0.03, outliers=2), 95),
    "no noise": (jump(0.2, 0.85, 0.0, width=0.05), 97),
}


@pytest.mark.parametrize("name", JUMPS)
def test_jumps_are_found_to_within_one_measurement(name: str):
    make, least = JUMPS[name]
    found = 0
    for seed in range(SEEDS):
        scores, truth = make(np.random.default_rng(seed))
        place = mark(scores)
        found += place is not None and abs(place - truth) <= 1
    assert found >= least, f"{found} of {SEEDS}"


# -- curves without one -----------------------------------------------------------------------------------------------


def curve(shape: Callable[[np.ndarray], np.ndarray], noise: float, related: float = 0.0) -> Curve:
    """8 to 40 scores of a shape over 0..1."""

    def make(generator: np.random.Generator) -> tuple[np.ndarray, int]:
        count = int(generator.integers(8, 41))
        return shape(np.arange(count) / count) + noise * correlated(generator, count, related), 0

    return make


def heavy(generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """Noise with long tails."""
    return 0.2 + 0.05 * generator.standard_t(3, size=int(generator.integers(8, 41))), 0


def high(where: int, count: int, on: Curve) -> Curve:
    """A curve with `count` high scores at `where`, or anywhere for -1; 0 is its end."""

    def make(generator: np.random.Generator) -> tuple[np.ndarray, int]:
        scores, _ = on(generator)
        place = len(scores) - count if where == 0 else int(generator.integers(1, len(scores) - count))
        scores[place : place + count] += generator.uniform(0.1, 0.7)
        return scores, 0

    return make


LEVEL_02 = curve(lambda t: np.full_like(t, 0.2), 0.02)

NO_JUMPS = {
    "little noise": (curve(lambda t: np.full_like(t, 0.2), 0.003), 1),
    "much noise": (curve(lambda t: np.full_like(t, 0.5), 0.15), 1),
    "related noise": (curve(lambda t: np.full_like(t, 0.2), 0.05, related=0.5), 2),
    "noise with long tails": (heavy, 2),
    "follows from the start": (curve(lambda t: np.full_like(t, 0.85), 0.03), 1),
    "a ramp": (curve(lambda t: 0.2 + 0.7 * t, 0.01), 1),
    "a noisy ramp": (curve(lambda t: 0.2 + 0.7 * t, 0.05), 2),
    "a low ramp": (curve(lambda t: 0.2 + 0.2 * t, 0.02), 2),
    "a parabola": (curve(lambda t: 0.2 + 0.6 * t**2, 0.02), 2),
    "a square root": (curve(lambda t: 0.2 + 0.6 * t**0.5, 0.02), 2),
    "an exponential": (curve(lambda t: 0.8 - 0.6 * np.exp(-t / 0.3), 0.03), 2),
    "a sigmoid as wide as the run": (curve(lambda t: 0.2 + 0.6 / (1 + np.exp(-(t - 0.5) / 0.15)), 0.02), 2),
    "a late ramp that goes on": (curve(lambda t: 0.2 + np.maximum(t - 0.3, 0), 0.01), 2),
    "a fall": (curve(lambda t: 0.6 - 0.4 * (t > 0.5), 0.03), 1),
    "one outlier": (high(-1, 1, LEVEL_02), 1),
    "an outlier on a ramp": (high(-1, 1, curve(lambda t: 0.2 + 0.5 * t, 0.02)), 3),
    "two neighbouring outliers": (high(-1, 2, LEVEL_02), 1),
    "a high end": (high(0, 1, LEVEL_02), 0),
    "two high at the end": (high(0, 2, LEVEL_02), 1),
}


@pytest.mark.parametrize("name", NO_JUMPS)
def test_nothing_is_marked_where_nothing_jumps(name: str):
    make, most = NO_JUMPS[name]
    marked = sum(mark(make(np.random.default_rng(1000 + seed))[0]) is not None for seed in range(SEEDS))
    assert marked <= most, f"{marked} of {SEEDS}"


# -- written out ------------------------------------------------------------------------------------------------------

BEFORE = [0.21, 0.20, 0.22, 0.20, 0.21, 0.19]
AFTER = [0.84, 0.86, 0.85, 0.86]


def test_the_mark_is_the_first_score_beyond_half():
    assert mark([*BEFORE, *AFTER]) == 6
    assert mark([*BEFORE, 0.45, *AFTER]) == 7
    assert mark([*BEFORE, 0.60, *AFTER]) == 6
    assert sudden_convergence(range(0, 1000, 100), [*BEFORE, *AFTER]) == 600


def test_the_mark_waits_for_the_new_level():
    assert LEVEL == 3
    assert mark([*BEFORE, *AFTER[:2]]) is None
    assert mark([*BEFORE, *AFTER[:3]]) == 6
    assert mark([*BEFORE * 6, *AFTER[:2], *BEFORE]) is None


def test_trainings_in_the_world_of_the_lab():
    """A score every 20 steps: with zero convolutions it jumps, with Gaussian ones it creeps."""
    zero = [0.207, 0.205, 0.208, 0.207, 0.207, 0.283, 0.473, 0.591, 0.636, 0.690, 0.709, 0.718, 0.726, 0.745, 0.761,
            0.762, 0.774, 0.774, 0.774, 0.777, 0.777]  # fmt: skip
    gaussian = [0.215, 0.211, 0.238, 0.247, 0.311, 0.460, 0.486, 0.543, 0.586, 0.614, 0.608, 0.635, 0.680, 0.682,
                0.690, 0.693, 0.697, 0.704, 0.705, 0.702, 0.703]  # fmt: skip
    assert sudden_convergence(range(0, 420, 20), zero) == 120
    assert sudden_convergence(range(0, 420, 40), zero[::2]) == 120
    assert sudden_convergence(range(0, 420, 60), zero[::3]) == 120
    assert sudden_convergence(range(0, 420, 20), gaussian) is None


def test_a_jump_right_after_the_start_is_one():
    assert mark([0.2, 0.85, 0.86, 0.85, 0.84, 0.85, 0.86, 0.85]) == 1
    assert mark([0.2, 0.21, 0.85, 0.86, 0.85, 0.84, 0.85, 0.86]) == 2


def test_a_mark_never_moves():
    """Later scores, a collapse and a second jump among them, change nothing."""
    marked = 0
    for seed in range(20):
        scores, _ = jump(0.2, 0.6, 0.03, width=0.05)(np.random.default_rng(seed))
        scores = np.concatenate([scores, np.full(4, 0.2), np.full(4, 0.9)])
        marks = [mark(scores[:count]) for count in range(len(scores) + 1)]
        first = next((i for i, found in enumerate(marks) if found is not None), len(marks))
        marked += len(set(marks[first:])) == 1
        assert len(set(marks[first:])) <= 1
        assert first >= len(marks) or first >= marks[first] + LEVEL
    assert marked >= 19


def test_the_scale_of_scores_does_not_matter():
    scores, truth = jump(0.2, 0.85, 0.03)(np.random.default_rng(0))
    assert mark(scores) == mark(100 * scores - 50, least=5.0) == mark(0.01 * scores, least=0.0005) == truth
    assert mark(0.01 * scores) is None  # 0.0065 high, and 0.05 is asked for
    assert mark([0.2] * 6 + [0.2001] * 6) is None
    assert mark([0.2] * 6 + [0.2001] * 6, least=0.0) == 6


def test_measurements_need_not_be_evenly_spaced():
    steps = [0, 10, 20, 50, 100, 150, 400, 500, 900, 1000]
    assert sudden_convergence(steps, [*BEFORE, *AFTER]) == 400


@pytest.mark.parametrize("scores", [[], [0.2], [0.2, 0.9], [0.2, 0.2, 0.2, 0.9, 0.9], [0.5] * 40, [nan] * 10])
def test_too_little_to_tell(scores: list[float]):
    assert mark(scores) is None


def test_what_is_not_finite_is_left_out():
    assert mark([*BEFORE, nan, *AFTER[:2], inf, *AFTER[2:]]) == 7


def test_what_is_no_curve():
    with pytest.raises(ConvergenceError, match=r"found 2 scores for the steps 0\.\.\.: expected one for each"):
        sudden_convergence([0], [0.1, 0.2])
    with pytest.raises(ConvergenceError, match="steps that rise"):
        sudden_convergence([0, 100, 100], [0.1, 0.2, 0.3])


def test_least_squares_are_right():
    """The running sums give the same curve as a fit by the textbook, through the same ramps."""
    generator = np.random.default_rng(3)
    x, y = np.sort(generator.uniform(size=14)), generator.normal(size=14)
    first, last = convergence._ramps(14)
    assert len(first) == len(set(zip(first, last)))
    assert (first < last).all()
    assert {(0, 13), (12, 13), (4, 5), (4, 12)} <= set(zip(first.tolist(), last.tolist()))
    best = inf
    for a, b in zip(first, last):
        ramp = np.clip((x - x[a]) / (x[b] - x[a]), 0, 1)
        best = min(best, np.linalg.lstsq(np.stack([np.ones(14), ramp], 1), y, rcond=None)[1][0])
    found = convergence._fits(x, y, first, last)
    assert found.unexplained.min() == pytest.approx(best, rel=1e-9)


# -- the running average ----------------------------------------------------------------------------------------------


def test_average_in_numbers():
    assert smoothed([4.0, 2.0], half_life=1) == pytest.approx([4.0, (0.25 * 4 + 0.5 * 2) / 0.75])
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)  # no lean to 0
    after = smoothed([1.0] * 5000 + [0.0] * 50, half_life=50)
    assert after[-1] == pytest.approx(0.5, abs=1e-9)


def test_average_step_by_step():
    average, values = Average(10), np.random.default_rng(0).lognormal(size=100).tolist()
    assert average.value is None
    assert [average.add(value) for value in values] == smoothed(values, 10)
    assert average.value == smoothed(values, 10)[-1]


def test_average_leaves_out_what_is_not_finite():
    assert smoothed([1.0, nan, inf, 1.0]) == pytest.approx([1.0, 1.0, 1.0, 1.0])
    assert np.isnan(smoothed([nan, 2.0])[0])
    assert smoothed([nan, 2.0])[1] == 2.0


# -- the best, and a fall from it -------------------------------------------------------------------------------------


def test_the_best_is_the_first_of_the_highest_after_the_base():
    assert best([]) is None
    assert best([(0, 0.9)]) is None
    assert best([(0, 0.9), (5, 0.2), (10, float("nan")), (15, 0.4), (20, 0.4)]) == (15, 0.4)


@pytest.mark.parametrize(
    ("scores", "fallen"),
    [
        ([0.1, 0.8], False),
        ([0.8, 0.6, 0.6], False),  # it may be noise
        ([0.8, 0.6, 0.6, 0.6], True),
        ([0.8, 0.6, 0.79, 0.6], False),
        ([0.8, 0.73, 0.73, 0.73], False),  # less than a tenth
        ([0.2, 0.16, 0.16, 0.16], False),  # less than 0.05
        ([0.8, 0.6, 0.6, 0.6, 0.9], False),
    ],
)
def test_a_lasting_fall(scores: list[float], fallen: bool):
    assert has_fallen([(step + 1, score) for step, score in enumerate(scores)]) is fallen
