"""The window and the weights, in written-out numbers."""

import pytest
import torch

from zeroconv.controlnet_core.residuals import Residuals
from zeroconv.controlnet_core.strength import Strength, StrengthError, Window, step_of

SIGMAS = [14.6, 8.0, 4.0, 1.0, 0.0]


def percent_to_sigma(percent: float) -> float:
    """A schedule that falls from 10 to 0."""
    return 10.0 * (1.0 - percent)


@pytest.mark.parametrize(
    ("sigma", "step"), [(14.6, 0), (9.0, 0), (8.0, 1), (4.0001, 1), (4.0, 2), (1.0, 3), (0.5, 3), (0.0, 4), (99.0, 0)]
)
def test_step_is_the_interval_that_holds_sigma(sigma: float, step: int):
    assert step_of(sigma, SIGMAS) == step


@pytest.mark.parametrize(
    ("start", "end", "acts"), [(0, -1, [0, 1, 2, 3]), (1, 3, [1, 2]), (2, 2, []), (3, -1, [3]), (0, 1, [0]), (7, 9, [])]
)
def test_window_in_steps_holds_start_and_not_end(start: int, end: int, acts: list[int]):
    window = Window(start, end, "step")
    assert [k for k, sigma in enumerate(SIGMAS[:-1]) if window.contains(sigma, SIGMAS, percent_to_sigma)] == acts


def test_window_in_percent_holds_both_ends():
    window = Window(0.2, 0.7)
    acts = [
        sigma for sigma in (8.1, 8.0, 5.0, percent_to_sigma(0.7), 2.9) if window.contains(sigma, None, percent_to_sigma)
    ]
    assert acts == [8.0, 5.0, percent_to_sigma(0.7)]


@pytest.mark.parametrize(
    ("start", "end", "unit", "says"),
    [
        (1.0, 3.0, "percent", "set unit to step"),
        (0.0, -1.0, "percent", "between 0 and 1"),
        (0.5, 2.0, "step", "set unit to percent"),
        (-1.0, 2.0, "step", "whole numbers"),
        (0.0, -2.0, "step", "whole numbers"),
        (0.0, 1.0, "sigma", "percent, step"),
    ],
)
def test_a_window_that_cannot_be_meant_is_refused(start: float, end: float, unit: str, says: str):
    with pytest.raises(StrengthError, match=says):
        Window(start, end, unit)  # type: ignore[arg-type]


def test_steps_need_the_samplers_sigmas():
    with pytest.raises(StrengthError, match="use unit percent"):
        Window(0, 2, "step").contains(1.0, None, percent_to_sigma)


def residuals() -> Residuals:
    """Ones at the four sizes of a 16x16 latent."""
    sizes = [16, 8, 4, 2]
    return Residuals(tuple(torch.ones(2, 3, n, n) for n in sizes), torch.ones(2, 3, 2, 2))


def test_value_multiplies_every_residual_and_the_argument_stays():
    before = residuals()
    weighed = Strength(0.6).apply(before, 16)
    assert [tensor.unique().item() for tensor in weighed] == pytest.approx([0.6] * 5)
    assert all(tensor.eq(1).all() for tensor in before)


def test_cfg_resolution_is_the_papers_64_over_h():
    weighed = Strength(0.5, guidance="cfg_resolution").apply(residuals(), 16)
    assert [tensor.unique().item() for tensor in weighed] == [0.5, 1.0, 2.0, 4.0, 4.0]


@pytest.mark.parametrize(("guidance", "halves"), [("both", (True, True)), ("cond_only", (True, False))])
def test_guidance_says_which_halves_act(guidance: str, halves: tuple[bool, bool]):
    assert Strength(guidance=guidance).halves == halves  # type: ignore[arg-type]


def test_an_unknown_guidance_is_refused():
    with pytest.raises(StrengthError, match="both, cond_only, cfg_resolution"):
        Strength(guidance="uncond")  # type: ignore[arg-type]


def test_mask_is_averaged_to_the_size_of_each_residual():
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., :96] = 1.0
    weighed = Strength(2.0).apply(residuals(), 16, mask)
    assert weighed.skips[0][0, 0, 0].tolist() == [2.0] * 12 + [0.0] * 4
    assert weighed.middle[0, 0, 0].tolist() == [2.0, 1.0]


def test_strength_zero_and_an_empty_mask_are_off():
    assert Strength(0.0).off
    assert Strength(mask=torch.zeros(1, 1, 8, 8)).off
    assert not Strength(1e-6).off


def test_missing_residuals_stay_missing():
    weighed = Strength(2.0).apply(Residuals((None, torch.ones(1, 1, 2, 2)), None), 2)
    assert weighed.skips[0] is None
    assert weighed.middle is None
    assert weighed.skips[1].unique().item() == 2.0
