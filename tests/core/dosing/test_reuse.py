"""Residuals told from those of earlier steps, in written-out numbers."""

from __future__ import annotations

import math

import pytest
import torch

from zeroconv.controlnet_core.dosing.clock import Clock, Moment
from zeroconv.controlnet_core.dosing.reuse import Reused
from zeroconv.controlnet_core.dosing.strength import Strength, StrengthError
from zeroconv.controlnet_core.networks.residuals import Residuals

SIGMAS = [math.exp(4 - k) for k in range(8)] + [0.0]
"""Eight steps, one apart in log(sigma)."""

CLOCK = Clock(lambda percent: 60 * (1 - percent), SIGMAS)


def flat(value: float) -> Residuals:
    """One residual for a skip connection and one for the encoder, none for the middle."""
    return Residuals((torch.full((1, 1, 2, 2), value),), None, (torch.full((1, 1, 2, 2), -value),))


class Asked:
    """A run whose residuals at step k are `values[k]`; `computed` are the steps at which they were computed."""

    def __init__(self, share: float, values: list[float], limit: int = 2**20):
        self.values, self.computed = values, []
        self.reused = Reused(share, limit)

    def at(self, k: int, piece: str = "all", moment: Moment | None = None) -> float:
        def compute() -> Residuals:
            self.computed.append(k)
            return flat(self.values[k])

        found = self.reused.at(piece, moment or CLOCK.at(SIGMAS[k]), compute)
        skip, encoder = found.skips[0], found.encoder[0]
        assert skip is not None and encoder is not None and found.middle is None
        assert torch.equal(skip, -encoder)
        return skip.flatten()[0].item()


@pytest.mark.parametrize(
    ("share", "computed"),
    [
        (0.0, [0, 1, 2, 3, 4, 5, 6, 7]),
        (0.5, [0, 1, 2, 4, 6]),
        (2 / 3, [0, 1, 3, 6]),
        (0.75, [0, 1, 4]),
        (0.25, [0, 1, 2, 3, 4, 6, 7]),
    ],
)
def test_the_share_of_the_steps_is_told_and_the_first_two_are_computed(share: float, computed: list[int]):
    run = Asked(share, [0.0] * 8)
    for k in range(8):
        run.at(k)
    assert run.computed == computed


def test_what_moves_in_a_straight_line_over_log_sigma_is_told_exactly():
    values = [3.0 - 0.5 * k for k in range(8)]
    run = Asked(2 / 3, values)
    assert [run.at(k) for k in range(8)] == pytest.approx(values, abs=1e-5)
    assert run.computed == [0, 1, 3, 6]


def test_the_line_is_trusted_no_farther_than_it_was_seen():
    run = Asked(0.75, [0.0, 1.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0])
    assert [run.at(k) for k in range(4)] == pytest.approx([0.0, 1.0, 2.0, 2.0], abs=1e-5)


def test_a_step_that_is_evaluated_twice_is_computed_once():
    """Heun's corrector of step k has the sigma of step k + 1, at which that begins."""
    run = Asked(0.5, [float(k) for k in range(8)])
    found = [run.at(k) for k in (0, 1, 1, 2, 2, 3, 3, 4, 4)]
    assert found == pytest.approx([0, 1, 1, 2, 2, 3, 3, 4, 4], abs=1e-5)
    assert run.computed == [0, 1, 2, 4]


def test_where_sigma_rises_again_what_was_computed_last_is_told():
    clock = Clock(lambda percent: 60 * (1 - percent), [8.0, 4.0, 6.0, 5.0, 0.0])
    run, sigmas = Asked(0.5, [1.0, 2.0, 7.0, 9.0]), [8.0, 4.0, 6.0, 5.0]
    found = []
    for k in range(4):
        clock.begun(k)
        found.append(run.at(k, moment=clock.at(sigmas[k])))
    assert run.computed == [0, 1, 2]
    assert found == [1.0, 2.0, 7.0, 7.0]


def test_pieces_of_a_run_do_not_know_of_one_another():
    run = Asked(0.5, [float(k) for k in range(8)])
    for k in range(4):
        assert run.at(k, "left") == pytest.approx(k, abs=1e-5)
        run.values = [value + 100 for value in run.values]
        assert run.at(k, "right") == pytest.approx(k + 100, abs=1e-4)
        run.values = [value - 100 for value in run.values]
    assert run.computed == [0, 0, 1, 1, 2, 2]


def test_where_steps_cannot_be_told_all_are_computed():
    unknown = Clock(lambda percent: 60 * (1 - percent))
    run = Asked(0.5, [float(k) for k in range(8)])
    assert [run.at(k, moment=unknown.at(SIGMAS[k])) for k in range(8)] == run.values
    assert run.computed == list(range(8))


def test_no_more_is_held_than_the_limit():
    one = flat(0.0).nbytes
    run = Asked(0.5, [0.0] * 8, limit=4 * one)
    for k in range(2):
        for piece in "abc":
            run.at(k, piece)
    assert sum(held.nbytes for held in run.reused._pieces.values()) <= 4 * one
    assert list(run.reused._pieces) == ["b", "c"]


def test_a_piece_that_nobody_asks_for_any_more_is_let_go():
    run = Asked(0.5, [0.0] * 8)
    for k in range(6):
        run.at(k, f"tile of step {k}")
        assert len(run.reused._pieces) <= 4


@pytest.mark.parametrize("reuse", [-0.1, 0.95, math.nan])
def test_a_share_that_cannot_be_meant_is_refused(reuse: float):
    with pytest.raises(StrengthError, match="reuse is a part of the steps"):
        Strength(reuse=reuse)
