"""Keyframes, curves and positions in sampling, in written-out numbers."""

import pytest

from zeroconv.controlnet_core.dosing.clock import Clock, ClockError, Moment
from zeroconv.controlnet_core.dosing.schedule import (
    CURVES,
    Keyframe,
    Schedule,
    ScheduleError,
    parse,
)
from zeroconv.controlnet_core.dosing.window import Window

SIGMAS = [14.6, 8.0, 4.0, 1.0, 0.5, 0.0]
ALL = Window(0.0, 1.0)


def percent_to_sigma(percent: float) -> float:
    """A schedule that falls from 10 to 0; like the host's, percent 0 is beyond every sigma."""
    return 1e9 if percent == 0.0 else 10.0 * (1.0 - percent)


CLOCK = Clock(percent_to_sigma, SIGMAS)


def at(sigma: float) -> Moment:
    """The moment of a run that does not tell its steps."""
    return Clock(percent_to_sigma).at(sigma)


def schedule(text: str, unit: str = "window", per_image: tuple[float, ...] = ()) -> Schedule:
    return Schedule(parse(text), unit, per_image)  # type: ignore[arg-type]


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interpolation", "values"),
    [
        ("linear", [2.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0]),
        # 3u^2 - 2u^3 at u = 1/4, 1/2, 3/4 is 10/64, 1/2, 54/64
        ("ease", [2.0, 2.0, 1.6875, 1.0, 0.3125, 0.0, 0.0]),
        ("hold", [2.0, 2.0, 2.0, 2.0, 2.0, 0.0, 0.0]),
    ],
)
def test_interpolation_between_two_keyframes_and_the_ends_hold(interpolation: str, values: list[float]):
    made = schedule(f"0.2: 2 {interpolation}, 0.6: 0")
    assert [made.at(p) for p in (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0)] == pytest.approx(values)


def test_each_keyframe_says_how_its_own_value_goes_on():
    made = schedule("0: 1 hold, 0.5: 0.5, 1: 0")
    assert [made.at(p) for p in (0.0, 0.49, 0.5, 0.75, 1.0)] == pytest.approx([1.0, 1.0, 0.5, 0.25, 0.0])


def test_one_keyframe_is_a_constant():
    assert [schedule("0.5: 0.7").at(p) for p in (0.0, 0.5, 1.0)] == [0.7, 0.7, 0.7]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("fade out", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("fade in", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("ease out", [1.0, 0.84375, 0.5, 0.15625, 0.0]),
        ("ease in", [0.0, 0.15625, 0.5, 0.84375, 1.0]),
        ("early half", [1.0, 1.0, 0.0, 0.0, 0.0]),
        ("late half", [0.0, 0.0, 1.0, 1.0, 1.0]),
        ("bell", [0.0, 0.5, 1.0, 0.5, 0.0]),
        ("dip", [1.0, 0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_curves(name: str, values: list[float]):
    assert [Schedule(CURVES[name]).at(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx(values)
    assert len(CURVES) == 9


# -- where a sigma lies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma", "percent"), [(99.0, 0.0), (10.0, 0.0), (7.5, 0.25), (7.0, 0.3), (5.0, 0.5), (1.0, 0.9), (0.0, 1.0)]
)
def test_percent_of_is_the_inverse_of_the_hosts_function(sigma: float, percent: float):
    assert at(sigma).percent == percent


def test_step_of_counts_intervals():
    assert [CLOCK.at(s).step for s in (99.0, 14.6, 9.0, 8.0, 0.5, 0.1)] == [0, 0, 0, 1, 4, 4]


def test_percent_is_the_hosts_whatever_the_window():
    made = schedule("0: 1, 1: 0", "percent")
    assert made.position(at(7.0), Window(0.5, 1.0)) == 0.3
    assert made.value(at(7.0), Window(1, 2, "step")) == pytest.approx(0.7)


def test_steps_are_the_runs_whatever_the_window():
    made = schedule("1: 1, 3: 0", "step")
    values = [made.value(CLOCK.at(s), Window(2, 3, "step")) for s in SIGMAS[:-1]]
    assert values == [1.0, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("start", "end", "sigma", "position"),
    [(0.0, 1.0, 2.5, 0.75), (0.2, 0.7, 5.5, 0.5), (0.2, 0.7, 9.0, 0.0), (0.2, 0.7, 1.0, 1.0), (0.5, 0.5, 5.0, 0.0)],
)
def test_window_in_percent_runs_from_0_to_1(start: float, end: float, sigma: float, position: float):
    made = schedule("0: 1")
    assert made.position(at(sigma), Window(start, end)) == pytest.approx(position)


@pytest.mark.parametrize(
    ("start", "end", "positions"),
    [
        (0, -1, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (0, 5, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (0, 99, [0.0, 0.25, 0.5, 0.75, 1.0]),  # a window that outlasts the run ends with it
        (1, 4, [0.0, 0.0, 0.5, 1.0, 1.0]),
        (3, -1, [0.0, 0.0, 0.0, 0.0, 1.0]),
        (2, 3, [0.0] * 5),  # a single step
        (2, 2, [0.0] * 5),
    ],
)
def test_window_in_steps_is_0_at_its_first_and_1_at_its_last(start: int, end: int, positions: list[float]):
    made = schedule("0: 1")
    window = Window(start, end, "step")
    assert [made.position(CLOCK.at(s), window) for s in SIGMAS[:-1]] == positions


@pytest.mark.parametrize(("unit", "window"), [("step", ALL), ("window", Window(0, 2, "step"))])
def test_steps_need_the_samplers_sigmas(unit: str, window: Window):
    with pytest.raises(ClockError, match="does not tell its sigmas"):
        schedule("0: 1", unit).value(at(1.0), window)


# -- what cannot be meant ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "unit", "says"),
    [
        ("0: 1, 2: 0", "window", "between 0 and 1, found 2: set unit to step"),
        ("-0.1: 1", "percent", "found -0.1"),
        ("0.5: 1", "step", "whole number from 0, found 0.5: set unit to window or percent"),
        ("-1: 1", "step", "whole number from 0, found -1"),
        ("inf: 1", "step", "whole number from 0, found inf"),
        ("nan: 1", "window", "found nan"),
        ("0.5: 1, 0.5: 0", "window", "found 0.5 before 0.5: put the keyframes in order"),
        ("0.7: 1, 0.5: 0", "window", "found 0.7 before 0.5"),
        ("0: 1", "sigma", "window, percent, step, found 'sigma'"),
    ],
)
def test_keyframes_that_cannot_be_meant_are_refused(text: str, unit: str, says: str):
    with pytest.raises(ScheduleError, match=says):
        schedule(text, unit)


def test_no_keyframes_are_refused():
    with pytest.raises(ScheduleError, match="at least one keyframe"):
        Schedule(())


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf")])
def test_strengths_of_pictures_are_numbers_from_0(factor: float):
    assert schedule("0: 1", per_image=(1.0, 0.0, 2.0)).per_image == (1.0, 0.0, 2.0)
    with pytest.raises(ScheduleError, match="of a picture is a number from 0, found"):
        schedule("0: 1", per_image=(1.0, factor))


# -- text -------------------------------------------------------------------------------------------------------------


def test_keyframes_are_read_from_lines_and_commas():
    assert parse(" 0: 1\n\n0.5:0.3 ease , 1 : 0 hold\n") == (
        Keyframe(0.0, 1.0, "linear"),
        Keyframe(0.5, 0.3, "ease"),
        Keyframe(1.0, 0.0, "hold"),
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        (" \n ,", "empty"),
        ("0: 1, half", 'found "half"'),
        ("0 1", 'found "0 1"'),
        ("0: one", 'found "0: one"'),
        ("0: 1 ease out", 'found "0: 1 ease out"'),
        ("0:", 'found "0:"'),
        ("0: 1 smooth", "linear, ease, hold, found 'smooth'"),
        ("0: -1", "a number from 0, found -1 at 0"),
        ("0: inf", "a number from 0, found inf"),
    ],
)
def test_text_that_cannot_be_read_is_refused_with_the_piece(text: str, says: str):
    with pytest.raises(ScheduleError, match=says):
        parse(text)
