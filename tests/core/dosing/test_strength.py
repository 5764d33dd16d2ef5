"""The window and the weights, in written-out numbers."""

import pytest
import torch
import torch.nn.functional as F

from zeroconv.controlnet_core.dosing.block_weights import BlockWeights
from zeroconv.controlnet_core.dosing.clock import Clock, ClockError
from zeroconv.controlnet_core.dosing.schedule import Keyframe, Schedule
from zeroconv.controlnet_core.dosing.strength import Strength, StrengthError, averaged
from zeroconv.controlnet_core.dosing.window import Window, WindowError
from zeroconv.controlnet_core.networks.residuals import Residuals

SIGMAS = [14.6, 8.0, 4.0, 1.0, 0.0]


def percent_to_sigma(percent: float) -> float:
    """A schedule that falls from 10 to 0."""
    return 10.0 * (1.0 - percent)


CLOCK = Clock(percent_to_sigma, SIGMAS)


@pytest.mark.parametrize(
    ("sigma", "step"), [(14.6, 0), (9.0, 0), (8.0, 1), (4.0001, 1), (4.0, 2), (1.0, 3), (0.5, 3), (0.0, 4), (99.0, 0)]
)
def test_step_is_the_interval_that_holds_sigma(sigma: float, step: int):
    assert CLOCK.at(sigma).step == step


@pytest.mark.parametrize(
    ("start", "end", "acts"), [(0, -1, [0, 1, 2, 3]), (1, 3, [1, 2]), (2, 2, []), (3, -1, [3]), (0, 1, [0]), (7, 9, [])]
)
def test_window_in_steps_holds_start_and_not_end(start: int, end: int, acts: list[int]):
    window = Window(start, end, "step")
    assert [k for k, sigma in enumerate(SIGMAS[:-1]) if window.contains(CLOCK.at(sigma))] == acts


def test_window_in_percent_holds_both_ends():
    window = Window(0.2, 0.7)
    clock = Clock(percent_to_sigma)
    acts = [sigma for sigma in (8.1, 8.0, 5.0, percent_to_sigma(0.7), 2.9) if window.contains(clock.at(sigma))]
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
        (0.8, 0.2, "percent", "ends after it starts, found 0.8 to 0.2: exchange start and end"),
        (3.0, 1.0, "step", "ends after it starts, found 3 to 1"),
    ],
)
def test_a_window_that_cannot_be_meant_is_refused(start: float, end: float, unit: str, says: str):
    with pytest.raises(WindowError, match=says):
        Window(start, end, unit)  # type: ignore[arg-type]


def test_steps_need_the_samplers_sigmas():
    with pytest.raises(ClockError, match="use unit percent"):
        Window(0, 2, "step").contains(Clock(percent_to_sigma).at(1.0))


def residuals() -> Residuals:
    """Ones at the four sizes of a 16x16 latent."""
    sizes = [16, 8, 4, 2]
    return Residuals(tuple(torch.ones(2, 3, n, n) for n in sizes), torch.ones(2, 3, 2, 2))


def dosed(
    strength: Strength, given: Residuals | None = None, height: int = 16, mask: torch.Tensor | None = None
) -> Residuals:
    """`given` (the ones of `residuals`) scaled by `strength` at its full value."""
    chosen = residuals() if given is None else given
    return strength.scales(strength.value, len(chosen) - 1, height, mask).apply(chosen)


def test_value_multiplies_every_residual_and_the_argument_stays():
    before = residuals()
    weighed = dosed(Strength(0.6), before)
    assert [tensor.unique().item() for tensor in weighed] == pytest.approx([0.6] * 5)
    assert all(tensor.eq(1).all() for tensor in before)


def test_cfg_resolution_is_the_papers_64_over_h():
    weighed = dosed(Strength(0.5, guidance="cfg_resolution"))
    assert [tensor.unique().item() for tensor in weighed] == [0.5, 1.0, 2.0, 4.0, 4.0]


def test_an_unknown_guidance_is_refused():
    with pytest.raises(StrengthError, match="both, cond_only, cfg_resolution"):
        Strength(guidance="uncond")  # type: ignore[arg-type]


def test_mask_is_averaged_to_the_size_of_each_residual():
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., :96] = 1.0
    weighed = dosed(Strength(2.0), mask=mask)
    assert weighed.skips[0][0, 0, 0].tolist() == [2.0] * 12 + [0.0] * 4
    assert weighed.middle[0, 0, 0].tolist() == [2.0, 1.0]


def test_mask_entries_weigh_each_picture_its_own():
    weighed = dosed(Strength(2.0), mask=torch.tensor([0.25, 1.0]).reshape(2, 1, 1, 1))
    assert [tensor[i].unique().item() for tensor in weighed for i in (0, 1)] == [0.5, 2.0] * 5


def test_block_weights_multiply_and_zero_adds_nothing():
    weighed = dosed(Strength(0.5, block_weights=BlockWeights("custom", skips=(1, 2, 0, 0.5), middle=3)))
    assert [None if t is None else t.unique().item() for t in weighed] == [0.5, 1.0, None, 0.25, 1.5]


def test_soft_block_weights_are_the_guess_mode_of_the_paper():
    weights = Strength(2.0, guidance="cond_only", block_weights=BlockWeights("soft")).scales(2.0, 12, 64).weights
    assert weights == pytest.approx([2 * 0.825 ** (12 - i) for i in range(13)])


def test_block_weights_and_resolution_multiply():
    strength = Strength(0.5, guidance="cfg_resolution", block_weights=BlockWeights("custom", skips=(1, 1, 2, 1)))
    assert [tensor.unique().item() for tensor in dosed(strength)] == [0.5, 1.0, 4.0, 4.0, 4.0]


def test_the_encoders_residuals_have_the_weight_of_their_block():
    ones = torch.ones(1, 1, 2, 2)
    given = Residuals((None,) * 2, None, (ones, ones))
    weighed = dosed(Strength(block_weights=BlockWeights("custom", skips=(0.5, 3))), given, height=2)
    assert [tensor.unique().item() for tensor in weighed.encoder] == [0.5, 3.0]


def test_now_is_the_value_inside_the_window_and_nothing_outside():
    strength = Strength(0.7, Window(1, 3, "step"))
    assert [strength.at(CLOCK.at(sigma)) for sigma in SIGMAS[:-1]] == [0.0, 0.7, 0.7, 0.0]


def test_a_schedule_multiplies_the_value_over_the_window():
    schedule = Schedule((Keyframe(0, 1), Keyframe(1, 0.5)))
    strength = Strength(2.0, Window(0, -1, "step"), schedule=schedule)
    values = [strength.at(CLOCK.at(sigma)) for sigma in SIGMAS[:-1]]
    assert values == pytest.approx([2.0, 2 - 1 / 3, 2 - 2 / 3, 1.0])


def test_schedules_that_are_zero_all_over_are_off():
    assert Strength(schedule=Schedule((Keyframe(0, 0), Keyframe(1, 0)))).off
    assert Strength(schedule=Schedule((Keyframe(0, 1),), per_image=(0.0, 0.0))).off
    assert not Strength(schedule=Schedule((Keyframe(0, 0), Keyframe(1, 0.1)))).off


def test_strength_zero_and_an_empty_mask_are_off():
    assert Strength(0.0).off
    assert Strength(mask=torch.zeros(1, 1, 8, 8)).off
    assert not Strength(1e-6).off


def test_missing_residuals_stay_missing():
    weighed = dosed(Strength(2.0), Residuals((None, torch.ones(1, 1, 2, 2)), None), height=2)
    assert weighed.skips[0] is None
    assert weighed.middle is None
    assert weighed.skips[1].unique().item() == 2.0


@pytest.mark.parametrize("size", [(128, 128), (120, 152), (7, 5), (1, 1), (3, 200)], ids=str)
@pytest.mark.parametrize("to", [(16, 16), (15, 19), (8, 10), (4, 5), (2, 3), (1, 1)], ids=str)
def test_a_mask_is_averaged_as_torch_pools_it(size: tuple[int, int], to: tuple[int, int]):
    mask = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(4))
    found = averaged(mask, *to)
    assert found.shape == (2, 1, *to)
    torch.testing.assert_close(found, F.interpolate(mask, size=to, mode="area"), rtol=1e-5, atol=1e-6)
    assert averaged(mask.half(), *to).dtype == torch.float16


def test_averages_written_out():
    mask = torch.tensor([[[[0.0, 3.0, 6.0]]]])
    assert averaged(mask, 1, 2).flatten().tolist() == [1.5, 4.5]
    assert averaged(torch.ones(1, 1, 5, 7), 3, 2).tolist() == torch.ones(1, 1, 3, 2).tolist()
