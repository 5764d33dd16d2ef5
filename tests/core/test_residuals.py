"""Residuals: their order, their weights, their sum."""

from __future__ import annotations

import pytest
import torch

from zeroconv.controlnet_core.residuals import Residuals


def residuals(*values: float | None) -> Residuals:
    """One-number residuals; the last is the middle."""
    return Residuals.of(None if value is None else torch.full((1, 1, 1, 1), value) for value in values)


def values(given: Residuals) -> list[float | None]:
    return [None if tensor is None else tensor.item() for tensor in given]


def test_the_middle_comes_last():
    given = residuals(1, 2, 3)
    assert given.middle is not None and given.middle.item() == 3
    assert len(given) == 3 and len(given.skips) == 2
    assert values(given) == [1, 2, 3]
    assert all(a is b for a, b in zip(Residuals.of(given), given, strict=True))


def test_weights_multiply_and_zero_drops():
    given = residuals(1, 2, None, 4)
    assert values(given.weighted([0.5, 0.0, 1.0, 2])) == [0.5, None, None, 8]
    assert values(given.weighted([0, 1, 1, 0])) == [None, 2, None, None]
    assert values(given) == [1, 2, None, 4]


def test_weighted_residuals_are_fresh():
    given = residuals(1, 2)
    weighted = given.weighted([1.0, 1.0])
    for new, old in zip(weighted, given, strict=True):
        assert new is not None and old is not None
        assert new.data_ptr() != old.data_ptr()


def test_a_weight_may_be_a_mask():
    given = Residuals((torch.ones(2, 3, 2, 2),), torch.ones(2, 3, 1, 1))
    mask = torch.tensor([[0.0, 1.0], [0.5, 0.0]])[None, None]
    skip, middle = given.weighted([mask, 1.0])
    assert skip is not None and middle is not None
    assert skip.shape == (2, 3, 2, 2)
    assert skip[1, 2].tolist() == [[0.0, 1.0], [0.5, 0.0]]
    dropped = given.weighted([torch.zeros(1, 1, 1, 1), 1.0]).skips[0]
    assert dropped is not None and not dropped.any()  # a tensor's values are not looked at: that would wait for the GPU


def test_weights_must_be_as_many():
    with pytest.raises(ValueError, match="3 residuals need as many weights, found 13"):
        residuals(1, 2, 3).weighted([1.0] * 13)


def test_controls_add():
    first, second = residuals(1, None, None, 4), residuals(10, 20, None, None)
    assert values(first + second) == [11, 20, None, 4]
    assert values(first) == [1, None, None, 4] and values(second) == [10, 20, None, None]
    with pytest.raises(ValueError, match="residuals of different UNets cannot be added: 4 and 2 of them"):
        _ = first + residuals(1, 2)
