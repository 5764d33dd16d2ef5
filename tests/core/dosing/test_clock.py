"""When a call of the UNet is, on schedules that fall, rise, rise in between and repeat, and on nudged ones."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from zeroconv.controlnet_core.dosing.clock import Clock, ClockError, churned
from zeroconv.controlnet_core.dosing.schedule import CURVES, Schedule
from zeroconv.controlnet_core.dosing.strength import Strength
from zeroconv.controlnet_core.dosing.window import Window

FALLING = [14.6, 8.0, 4.0, 1.0, 0.0]
RISING = [0.1, 1.0, 4.0, 8.0]
AGAIN = [14.0, 7.0, 3.0, 8.0, 4.0, 1.0, 0.0]


def percent_to_sigma(percent: float) -> float:
    """A schedule that falls from 10 to 0; like the host's, percent 0 is beyond every sigma."""
    return 1e9 if percent == 0.0 else 10.0 * (1.0 - percent)


def steps_of(calls: list[list[float]], sigmas: list[float], starts: tuple[float, ...] | None = None) -> list[list[int]]:
    """The steps of a sampler's calls, those of each of its steps in a list; it tells when each beginning is done."""
    clock = Clock(percent_to_sigma, sigmas, starts)
    clock.begun(0)
    found = []
    for k, (first, *others) in enumerate(calls):
        steps = [clock.at(first).step]
        clock.begun(k + 1)
        found.append(steps + [clock.at(sigma).step for sigma in others])
    return found


# -- one way ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma", "step"), [(99.0, 0), (14.6, 0), (9.0, 0), (8.0, 1), (4.0001, 1), (4.0, 2), (0.5, 3), (0.0, 4)]
)
def test_a_falling_schedule(sigma: float, step: int):
    assert Clock(percent_to_sigma, FALLING).at(sigma).step == step


@pytest.mark.parametrize(
    ("sigma", "step"), [(0.01, 0), (0.1, 0), (0.5, 0), (1.0, 1), (3.9, 1), (4.0, 2), (7.9, 2), (8.0, 3), (99.0, 3)]
)
def test_a_rising_schedule(sigma: float, step: int):
    """FlipSigmas and unsampling: the first steps are those of the least noise."""
    assert Clock(percent_to_sigma, RISING).at(sigma).step == step


@pytest.mark.parametrize(("window", "acts"), [((0, 2), [0, 1]), ((2, -1), [2]), ((0, -1), [0, 1, 2])])
def test_a_window_in_a_rising_schedule(window: tuple[int, int], acts: list[int]):
    clock = Clock(percent_to_sigma, RISING)
    found = [k for k, sigma in enumerate(RISING[:-1]) if Window(*window, "step").contains(clock.at(sigma))]
    assert found == acts


def test_a_sigma_that_came_back_through_logarithms_is_the_schedules():
    """dpmpp_2s_ancestral: its middle evaluation is the next sigma, but for rounding; either way it is the next step."""
    clock = Clock(percent_to_sigma, FALLING)
    assert [clock.at(4.0 * factor).step for factor in (1 - 3e-6, 1 + 3e-6, 1 + 3e-5)] == [2, 2, 1]


# -- to and fro -------------------------------------------------------------------------------------------------------


def test_rising_in_between():
    """Re-noising: each of the sigmas is its own step, and a middle evaluation belongs to the step that makes it."""
    assert steps_of([[s] for s in AGAIN[:-1]], AGAIN) == [[0], [1], [2], [3], [4], [5]]
    assert steps_of([[14, 10], [7, 5], [3, 5], [8, 5], [4, 2], [1, 0.5]], AGAIN) == [[k, k] for k in range(6)]


def test_heuns_corrector_is_at_the_next_step():
    calls = [[a, b] for a, b in pairwise(AGAIN[:-1])]
    assert steps_of(calls, AGAIN) == [[k, k + 1] for k in range(5)]


def test_repeated_sigmas():
    repeated = [14.0, 7.0, 7.0, 3.0, 7.0, 3.0, 0.0]
    assert steps_of([[s] for s in repeated[:-1]], repeated) == [[k] for k in range(6)]
    assert steps_of([[14, 7], [7, 7], [7, 3], [3, 7], [7, 3], [3]], repeated) == [
        [0, 1],
        [1, 2],
        [2, 3],
        [3, 4],
        [4, 5],
        [5],
    ]


def test_both_halves_of_guidance_in_calls_of_their_own():
    clock = Clock(percent_to_sigma, AGAIN)
    clock.begun(0)
    assert [clock.at(14.0).step, clock.at(14.0).step] == [0, 0]
    clock.begun(1)
    assert [clock.at(7.0).step, clock.at(7.0).step] == [1, 1]


def test_a_sampler_that_does_not_tell_is_refused_before_it_begins():
    with pytest.raises(ClockError, match="rise and fall, and its sampler does not tell which step it is at"):
        Clock(percent_to_sigma, AGAIN).check_steps()
    Clock(percent_to_sigma, FALLING).check_steps()
    Clock(percent_to_sigma, RISING).check_steps()


def test_a_sampler_that_stops_telling_is_found_out():
    clock = Clock(percent_to_sigma, AGAIN)
    clock.begun(0)
    moment = clock.at(1.0)
    assert moment.step is None
    with pytest.raises(ClockError, match="at step 5 of a schedule that rises and falls, and has told of 0"):
        assert moment.counted_step
    assert Window(0.0, 0.95).contains(moment)  # percents need no steps


def test_no_sigmas_no_steps():
    moment = Clock(percent_to_sigma).at(5.0)
    assert moment.step is None
    assert moment.percent == 0.5
    with pytest.raises(ClockError, match="does not tell its sigmas"):
        assert moment.counted_step


# -- nudged -----------------------------------------------------------------------------------------------------------


def test_churn_is_karras_algorithm_2():
    """gamma = min(S_churn / N, sqrt(2) - 1) where S_tmin <= sigma <= S_tmax."""
    assert churned(FALLING, 1.0, 2.0, 10.0) == (14.6, 8.0 * 1.25, 4.0 * 1.25, 1.0)
    assert churned(FALLING, 100.0, 0.0, math.inf)[0] == pytest.approx(14.6 * 2**0.5)


@pytest.mark.parametrize("churn", [0.4, 1.0, 100.0])
def test_a_nudged_sampler_is_at_the_step_that_it_begins(churn: float):
    starts = churned(FALLING, churn, 0.0, math.inf)
    assert steps_of([[s] for s in starts], FALLING, starts) == [[0], [1], [2], [3]]


def test_a_middle_evaluation_of_a_nudged_sampler():
    """dpm_2: half of the way, in logarithms, from the nudged sigma to the next one."""
    starts = churned(FALLING, 0.4, 0.0, math.inf)
    middles = [math.sqrt(a * b) for a, b in zip(starts, FALLING[1:-1])]
    calls = [[a, b] for a, b in zip(starts, middles)]
    assert steps_of(calls, FALLING, starts) == [[k, k] for k in range(3)]


# -- what it costs ----------------------------------------------------------------------------------------------------


def test_the_model_is_asked_once_a_run_for_what_is_constant():
    asked = []

    def counted(percent: float) -> float:
        asked.append(percent)
        return percent_to_sigma(percent)

    clock = Clock(counted, FALLING)
    strengths = [
        Strength(window=Window(0.1, 0.9)),
        Strength(window=Window(0.1, 0.9), schedule=Schedule(CURVES["fade out"])),
        Strength(window=Window(0.2, 0.7), schedule=Schedule(CURVES["bell"], "percent")),
    ]
    values = [[strength.at(clock.at(sigma)) for strength in strengths] for sigma in FALLING[:-1]]
    for _ in range(3):  # halves, tiles and windows of the same steps
        assert values == [[strength.at(clock.at(sigma)) for strength in strengths] for sigma in FALLING[:-1]]
    limits = {0.0, 1.0, 0.1, 0.9, 0.2, 0.7}
    assert all(asked.count(percent) == 1 for percent in limits)
    inside = sum(9.0 >= sigma >= 1.0 for sigma in FALLING[:-1])
    assert len(asked) <= len(limits) + inside * 24  # one bisection to 1e-7 for each sigma, however many ask


def test_all_of_sampling_asks_nothing():
    def never(percent: float) -> float:
        raise AssertionError(f"asked for {percent}")

    assert Strength(0.5).at(Clock(never, FALLING).at(4.0)) == 0.5
    assert Strength(0.5, Window(0, -1, "step")).at(Clock(never).at(4.0)) == 0.5
    assert Strength().steady
    assert not Strength(window=Window(0.0, 0.9)).steady
    assert not Strength(schedule=Schedule(CURVES["constant"])).steady


@pytest.mark.parametrize(
    ("strength", "counts"),
    [
        (Strength(), False),
        (Strength(window=Window(0, -1, "step")), False),
        (Strength(window=Window(1, -1, "step")), True),
        (Strength(schedule=Schedule(CURVES["bell"])), False),
        (Strength(window=Window(0, -1, "step"), schedule=Schedule(CURVES["bell"])), True),
        (Strength(window=Window(0, -1, "step"), schedule=Schedule(CURVES["bell"], "percent")), False),
        (Strength(schedule=Schedule(CURVES["constant"], "step")), True),
    ],
)
def test_who_needs_steps(strength: Strength, counts: bool):
    assert strength.counts_steps == counts
