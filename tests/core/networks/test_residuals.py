"""Residuals: their order, their weights, their sum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zeroconv.controlnet_core.networks.residuals import Residuals


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


def test_each_residual_is_mapped_with_the_number_of_its_block():
    given = Residuals.of(residuals(1, 2, None, 4), residuals(5, None).skips + (None, torch.tensor([7.0])))
    seen = []

    def f(i: int, tensor: Tensor) -> Tensor | None:
        seen.append((i, tensor.item()))
        return None if i == 1 else tensor * 10

    mapped = given.mapped(f)
    assert seen == [(0, 1), (1, 2), (3, 4), (0, 5), (2, 7)]
    assert values(mapped) == [10, None, None, 40]
    assert [None if t is None else t.item() for t in mapped.encoder] == [50, None, 70]
    assert values(given) == [1, 2, None, 4]


def test_there_are_as_many_encoder_residuals_as_skips_or_none():
    with pytest.raises(ValueError, match="2 skips need as many encoder residuals or none: 1"):
        Residuals((None, None), None, (None,))


def test_pooled_residuals_are_their_mean_all_over():
    given = Residuals((torch.arange(8.0).reshape(1, 2, 2, 2), None), torch.ones(1, 2, 1, 1))
    pooled = given.pooled()
    assert pooled.skips[0] is not None and pooled.skips[1] is None
    assert pooled.skips[0].tolist() == [[[[1.5, 1.5], [1.5, 1.5]], [[5.5, 5.5], [5.5, 5.5]]]]
    assert given.skips[0] is not None and given.skips[0].flatten().tolist() == list(range(8))


def test_controls_add():
    first, second = residuals(1, None, None, 4), residuals(10, 20, None, None)
    assert values(first + second) == [11, 20, None, 4]
    assert values(first) == [1, None, None, 4] and values(second) == [10, 20, None, None]
    with pytest.raises(ValueError, match="residuals of different UNets cannot be added: 4 and 2 of them"):
        _ = first + residuals(1, 2)


def test_controls_of_the_encoder_add_to_those_of_the_decoder():
    adapter = Residuals((None, None), None, (None, torch.tensor([5.0])))
    control = residuals(1, 2, 3)
    for both in (adapter + control, control + adapter):
        assert values(both) == [1, 2, 3] and both.encoder == adapter.encoder
    twice = adapter + adapter
    assert twice.encoder[0] is None and twice.encoder[1] is not None and twice.encoder[1].item() == 10
