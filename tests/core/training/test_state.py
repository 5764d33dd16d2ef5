"""The state of a training comes back from a file as it was, and its averages begin where they are turned on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from zeroconv.controlnet_core.training import checkpoint
from zeroconv.controlnet_core.training.state import TrainingState

from .tiny import equal


def state(seed: int, decay: float = 0.0) -> TrainingState:
    """Of a layer whose norm has a buffer of whole numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    weights = network.state_dict(keep_vars=True)
    return TrainingState(weights, torch.optim.AdamW(network.parameters(), lr=0.1), decay=decay)


def step(state: TrainingState, clip: float = 0.0) -> float:
    """One step on gradients that follow from the weights; gives their norm."""
    for parameter in state.optimizer.param_groups[0]["params"]:
        parameter.grad = parameter.detach() + 1
    state.weights["1.num_batches_tracked"] += 1
    norm = state.clip_gradients(clip).item()
    state.advance()
    return norm


def test_it_comes_back_from_a_file(tmp_path: Path):
    first, again = state(1, decay=0.9), state(2, decay=0.9)
    step(first)
    first.seconds = 2.5
    first.add_fidelity(0.25)
    checkpoint.save(tmp_path, first.to_checkpoint({"base": "a base"}), keep=1)
    saved = checkpoint.newest(tmp_path)
    assert saved is not None and saved.facts["base"] == "a base"
    again.restore(saved)
    assert (again.step, again.seconds, again.measured) == (1, 2.5, [(1, 0.25)])
    for ours in (first, again):
        step(ours)
    assert equal(first.weights, again.weights)
    assert equal(first.averages, again.averages)
    assert first.weights["1.num_batches_tracked"].item() == first.averages["1.num_batches_tracked"].item() == 2


def convolution(layout: torch.memory_format) -> TrainingState:
    """Of a convolution whose weights lie in this layout, stepped by the fused AdamW."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Conv2d(4, 8, 3).to(memory_format=layout)  # type: ignore[call-overload]
    return TrainingState(
        dict(network.named_parameters()), torch.optim.AdamW(network.parameters(), lr=0.1, fused=True), decay=0.9
    )


def test_it_comes_back_in_any_layout(tmp_path: Path):
    first, again, plain = map(convolution, (torch.channels_last, torch.channels_last, torch.contiguous_format))

    def stepped(state: TrainingState) -> TrainingState:
        for parameter in state.weights.values():
            parameter.grad = parameter.detach() + 1
        state.advance()
        return state

    checkpoint.save(tmp_path, stepped(first).to_checkpoint({}), keep=1)
    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    again.restore(saved)
    for parameter, kept in again.optimizer.state.items():
        assert kept["exp_avg"].stride() == kept["exp_avg_sq"].stride() == parameter.stride()
    assert equal(stepped(first).weights, stepped(again).weights)
    assert equal(stepped(stepped(plain)).weights, first.weights)
    assert equal(plain.averages, first.averages)


def test_averages_that_are_new_begin_at_the_weights_of_the_checkpoint():
    first, again = state(1), state(2, decay=0.9)
    step(first)
    again.restore(first.to_checkpoint({}))
    assert equal(again.averages, first.weights)
    assert not first.averages


def test_the_averages_take_the_weights_place():
    ours = state(1, decay=0.9)
    for _ in range(3):
        step(ours)
    assert not equal(ours.averages, ours.weights)
    ours.use_averages()
    assert equal(ours.averages, ours.weights)
    plain = state(1)
    before = {name: weight.detach().clone() for name, weight in plain.weights.items()}
    plain.use_averages()
    assert equal(before, plain.weights)


@pytest.mark.parametrize("largest", [0.0, 0.5])
def test_gradients_are_clipped_together(largest: float):
    ours = state(1)
    parameters = ours.optimizer.param_groups[0]["params"]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    count = sum(parameter.numel() for parameter in parameters)
    assert ours.clip_gradients(largest).item() == pytest.approx(count**0.5)
    after = sum(parameter.grad.square().sum().item() for parameter in parameters) ** 0.5
    assert after == pytest.approx(largest or count**0.5, rel=1e-4)


def test_within_it_the_averages_are_the_weights_and_both_come_back_bit_for_bit():
    ours = state(1, decay=0.9)
    for _ in range(3):
        step(ours)
    weights, averages = (
        {name: tensor.detach().clone() for name, tensor in tensors.items()} for tensors in (ours.weights, ours.averages)
    )
    assert not equal(weights, averages)
    with ours.averaged():
        assert equal(ours.weights, averages)
        assert equal(ours.averages, weights)
    assert equal(ours.weights, weights)
    assert equal(ours.averages, averages)
    assert ours.result is ours.averages
    assert state(1).result is not None


def test_a_new_optimizer_begins_anew():
    first, again = state(1), state(2)
    step(first)
    again.restore(first.to_checkpoint({}), optimizer=False)
    assert equal(first.weights, again.weights)
    assert not again.optimizer.state
    assert again.step == 1


def test_a_look_at_the_averages_leaves_them_as_they_are():
    """Averages in fp32 of weights in bf16, too, which would round them."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    one = TrainingState({"w": weight}, torch.optim.SGD([weight], lr=0.1), decay=0.9)
    one.averages["w"] += 1e-4
    kept = one.averages["w"].clone()
    for _ in range(2):
        with one.averaged():
            assert torch.equal(weight, kept.bfloat16())
        assert torch.equal(one.averages["w"], kept) and torch.equal(weight, torch.ones(3, dtype=torch.bfloat16))
