"""What a training needs is counted before it starts, and what fits is chosen and said."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from zeroconv.controlnet_core.networks.unet import SD15
from zeroconv.controlnet_core.training import memory
from zeroconv.controlnet_core.training.controlled_unet import build
from zeroconv.controlnet_core.training.distributed import Process
from zeroconv.controlnet_core.training.memory import Counter, Examples, choose, fitted, measures, state_bytes
from zeroconv.controlnet_core.training.optimizer import make
from zeroconv.controlnet_core.training.options import TrainingOptions

from . import other_optimizers
from .tiny import CONFIG, base, dataset, quick

EXAMPLES = Examples(64, 64, tokens=4)
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "nothing recomputed": {"recompute": "off", "batch_size": 4},
    "checkpointing": {"gradient_checkpointing": True, "precision": "bf16"},
    "unlocked decoder": {"unlock_decoder": True},
    "Control-LoRA": {"kind": "control_lora", "rank": 4},
    "lite": {"kind": "lite"},
    "bf16 weights": {"precision": "bf16", "control_weights": "bf16"},
    "fp8 base": {"precision": "bf16", "base_weights": "fp8"},
}


# -- counting ---------------------------------------------------------------------------------------------------------


def allocated(options: TrainingOptions) -> int:
    """The most bytes that torch's allocator gave out at once in a real pass on the CPU, beside the weights."""
    controlled = build(options, base(), CONFIG, 3)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        x, hints = torch.zeros(options.batch_size, 4, 8, 8), torch.zeros(options.batch_size, 3, 64, 64)
        context, timesteps = torch.zeros(options.batch_size, 4, 8), torch.zeros(options.batch_size, dtype=torch.int64)
        with options.autocast(torch.device("cpu")):
            predicted = controlled(x, timesteps, context, hints)
        (predicted.float() - x).square().mean().backward()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # type: ignore[attr-defined]
        most = max(most, now)
    return most


@pytest.mark.parametrize("way", WAYS)
def test_a_pass_takes_what_was_counted(way: str):
    options = quick(**WAYS[way])
    counted = Counter(CONFIG, EXAMPLES, device="cpu").passing(options, options.batch_size)
    # Kernels of the CPU take buffers of their own, which no operation gives out: of bf16 gradients most.
    assert counted == pytest.approx(allocated(options), rel=0.2 if way == "bf16 weights" else 0.1)


def test_weights_gradients_and_averages_are_those_of_the_networks():
    options = quick(ema=0.9, batch_size=1)
    controlled = build(options, base(), CONFIG, 3)
    found = Counter(CONFIG, Examples(32, 32, 1)).needs(options)
    trained = sum(p.nbytes for p in controlled.control.parameters())
    assert found.weights == trained + sum(p.nbytes for p in controlled.unet.parameters())
    assert (found.averages, found.optimizer, found.ram) == (trained, 2 * trained, 0)
    assert found.step >= trained
    in_ram = Counter(CONFIG, Examples(32, 32, 1)).needs(replace(options, optimizer_in_ram=True))
    assert (in_ram.optimizer, in_ram.ram) == (0, 2 * trained)


def test_smaller_dtypes_take_less():
    counter = Counter(CONFIG, EXAMPLES)
    plain = counter.needs(quick(precision="bf16"))
    fp8 = counter.needs(quick(precision="bf16", base_weights="fp8"))
    bf16 = counter.needs(quick(precision="bf16", control_weights="bf16"))
    matrices = sum(tensor.numel() for tensor in base().values() if tensor.ndim > 1)
    scales = 4 * sum(tensor.ndim > 1 for tensor in base().values())
    assert plain.weights - fp8.weights == matrices - scales
    trained = sum(p.numel() for p in build(quick(), base(), CONFIG, 3).control.parameters())
    assert plain.weights - bf16.weights == 2 * trained


def test_prompts_of_the_users_own_are_sampled_without_held_out_pictures_too():
    options, one = quick(held_out=0, sample_every=2), replace(EXAMPLES, prompts=1)
    assert Counter(CONFIG, EXAMPLES).sampling(options) == 0 == Counter(CONFIG, one).sampling(quick(sample_every=0))
    of_one = Counter(CONFIG, EXAMPLES).sampling(replace(options, held_out=1))
    assert (
        Counter(CONFIG, one).sampling(options) == of_one == Counter(CONFIG, replace(one, prompts=9)).sampling(options)
    )


def test_many_processes_divide_samples_and_where_asked_the_optimizers_state():
    counter, options = Counter(CONFIG, EXAMPLES), quick(held_out=3, sample_every=2, batch_size=6, shard_optimizer=True)
    assert counter.sampling(options, 2) == counter.sampling(replace(options, held_out=2)) < counter.sampling(options)
    assert counter.needs(options, 3).optimizer == counter.needs(options).optimizer // 3
    whole = replace(options, shard_optimizer=False)
    assert counter.needs(options).optimizer == counter.needs(whole).optimizer == counter.needs(whole, 3).optimizer


def test_on_cuda_norms_under_autocast_take_fp32():
    options = quick(precision="bf16", recompute="off")
    on_cuda, on_cpu = (Counter(CONFIG, Examples(256, 256), device).needs(options).step for device in ("cuda", "cpu"))
    assert on_cuda > 1.02 * on_cpu


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "prodigy"])
def test_the_state_is_what_an_optimizer_keeps(monkeypatch: pytest.MonkeyPatch, name: str):
    module = ModuleType("lion_pytorch")
    module.Lion = other_optimizers.Lion  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lion_pytorch", module)
    shapes = ((64, 32, 3, 3), (64, 32, 1, 1), (64, 32), (64,))
    layers = nn.ParameterList([torch.ones(shape) for shape in shapes])
    if name == "prodigy":  # of no stand-in: prodigyopt 1.1.2 keeps s, p0, exp_avg and exp_avg_sq
        assert state_bytes(name, layers[0]) == 4 * layers[0].nbytes
        return
    made = make(quick(optimizer=name), layers, nn.Linear(1, 1).requires_grad_(False))
    for p in layers:
        p.grad = torch.ones_like(p)
    made.step()
    for p in layers:
        kept = [value for value in made.state[p].values() if value.ndim]
        assert sum(value.nbytes for value in kept) == state_bytes(name, p)


def test_the_examples_of_a_dataset(tmp_path: Path):
    assert Examples.of(dataset(tmp_path, size=64)) == Examples(64, 64, 4, 3)


# -- choosing ---------------------------------------------------------------------------------------------------------


def bytes_of(options: TrainingOptions) -> float:
    """A training of which every measure saves as much as its name says."""
    saved = {"recompute": "on", "gradient_checkpointing": True, "optimizer_in_ram": True, "base_weights": "fp8"}
    each = sum(getattr(options, name) == value for name, value in saved.items())
    return 10 - each - 2 * (options.control_weights == "bf16") + options.batch_size


def test_the_order_of_preference():
    options, order = quick(recompute="off", precision="bf16", batch_size=6), []
    while (following := next(measures(options), None)) is not None:
        order.append({name: value for name, value in following.as_dict().items() if value != getattr(options, name)})
        options = following
    assert order == [
        {"recompute": "on"},
        {"gradient_checkpointing": True},
        {"optimizer_in_ram": True},
        {"batch_size": 3, "accumulation": 2},
        {"batch_size": 1, "accumulation": 6},
        {"base_weights": "fp8"},
        {"control_weights": "bf16"},
    ]


def test_what_does_not_go_together_is_not_chosen():
    kept = quick(gradient_checkpointing=True, batch_size=2, unlock_decoder=True, optimizer="prodigy")
    assert list(measures(kept, world=2)) == []
    assert list(measures(replace(kept, batch_size=4), world=2)) == [replace(kept, batch_size=2, accumulation=2)]
    assert next(measures(quick(gradient_checkpointing=True, optimizer="adamw8bit", batch_size=1))).base_weights == "fp8"


def test_as_little_as_does_is_chosen():
    options = quick(recompute="off", precision="bf16", batch_size=4)
    assert choose(options, 14, bytes_of) == options
    assert choose(options, 12, bytes_of) == replace(options, recompute="on", gradient_checkpointing=True)
    most = choose(options, 0, bytes_of)
    assert (most.batch_size, most.accumulation, most.control_weights) == (1, 4, "bf16")
    # where one that comes late saves so much that those before it are not needed
    alone = choose(options, 9, lambda tried: 9 if tried.optimizer_in_ram else 20)
    assert alone == replace(options, optimizer_in_ram=True)


@pytest.fixture
def small_card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A card of so many bytes, and nothing in reserve."""
    monkeypatch.setattr(memory, "RESERVE", 0)
    return lambda room: monkeypatch.setattr(memory, "available", lambda device: room)


def test_on_the_cpu_nothing_is_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Counter, "needs", lambda *_: pytest.fail("counted"))
    assert fitted(quick(), CONFIG, EXAMPLES) == (quick(recompute="off"), "")
    assert fitted(quick(recompute="on"), CONFIG, EXAMPLES) == (quick(recompute="on"), "")
    monkeypatch.setattr(memory, "available", lambda device: 1.0)
    assert fitted(quick(fit_memory="off"), CONFIG, EXAMPLES) == (quick(fit_memory="off"), "")


def test_where_all_fits_nothing_is_recomputed(small_card: Any):
    small_card(8 * memory.GB)
    options, said = fitted(quick(), CONFIG, EXAMPLES)
    assert options == quick(recompute="off")
    assert said == "this training needs about 0.0 GB of memory, 8.0 GB are free"


def test_what_fits_is_chosen_or_proposed(small_card: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "GB", 1e6)
    monkeypatch.setattr(memory, "AT_ONCE", 1000)
    counter, options = Counter(CONFIG, EXAMPLES), quick(precision="bf16", batch_size=1, recompute="off")
    in_ram = replace(options, optimizer_in_ram=True)
    small_card(counter.needs(in_ram).total + 1)
    found, said = fitted(options, CONFIG, EXAMPLES, Process())
    assert found == in_ram
    assert said == (
        "this training needs about 16.0 GB of memory, 11.7 GB are free: it is trained with optimizer_in_ram on, "
        "with which it needs about 11.7 GB and 6.6 GB of main memory"
    )
    asked = replace(options, fit_memory="propose")
    found, said = fitted(asked, CONFIG, EXAMPLES)
    assert found == asked
    assert "11.7 GB are free: set optimizer_in_ram on, with which it needs about 11.7 GB and 6.6 GB of main" in said


def test_where_nothing_fits_it_is_said_what_would(small_card: Any):
    small_card(1000.0)
    found, said = fitted(quick(precision="bf16"), CONFIG, EXAMPLES)
    assert (found.base_weights, found.control_weights, found.batch_size) == ("fp8", "bf16", 1)
    assert "That is still too much: choose kind control_lora (about 0.0 GB), or a dataset of a lower resolut" in said
    assert "choose a dataset of a lower resolution" in fitted(quick(kind="lite"), CONFIG, EXAMPLES)[1]


def test_processes_take_what_the_fullest_card_has(small_card: Any, monkeypatch: pytest.MonkeyPatch):
    small_card(8 * memory.GB)
    monkeypatch.setattr(Process, "gather", lambda self, number: [number, 1000])
    _, said = fitted(quick(precision="bf16"), CONFIG, EXAMPLES, Process(0, 2))
    assert "That is still too much" in said


AS_BEFORE: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"batch_size": 4}, {"batch_size": 2, "accumulation": 2}, {"batch_size": 2, "accumulation": 2}),
    ({"batch_size": 4}, {"batch_size": 2, "accumulation": 1}, {}),  # another batch: asked for
    ({"batch_size": 2, "accumulation": 2}, {"batch_size": 4}, {}),
    ({}, {"base_weights": "fp8", "control_weights": "bf16"}, {"base_weights": "fp8", "control_weights": "bf16"}),
    ({"precision": "fp32"}, {"base_weights": "fp8", "control_weights": "bf16"}, {"base_weights": "fp8"}),
    ({"base_weights": "fp8"}, {}, {}),
    ({}, {"gradient_checkpointing": True, "optimizer_in_ram": True}, {}),  # the same numbers, and a slower step
    ({"batch_size": 4, "fit_memory": "propose"}, {"batch_size": 2, "accumulation": 2}, {}),
]


@pytest.mark.parametrize(("asked", "saved", "kept"), AS_BEFORE)
def test_a_run_that_goes_on_keeps_its_numbers(
    small_card: Any, asked: dict[str, Any], saved: dict[str, Any], kept: dict[str, Any]
):
    small_card(8 * memory.GB)
    plain = {"precision": "bf16", "recompute": "off"}
    options = quick(**{**plain, **asked})
    found, said = fitted(options, CONFIG, EXAMPLES, saved=quick(**{**plain, **saved}).as_dict())
    assert found == replace(options, **kept)
    assert ("as before (fit_memory off takes what is asked): this training needs about" in said) == bool(kept)


def test_where_its_numbers_no_longer_fit_a_run_takes_more(small_card: Any):
    options = quick(precision="bf16", batch_size=4, recompute="off")
    before = replace(options, batch_size=2, accumulation=2)
    small_card(Counter(CONFIG, EXAMPLES).needs(replace(before, recompute="on")).total)
    found, said = fitted(options, CONFIG, EXAMPLES, saved=before.as_dict())
    assert found == replace(before, recompute="on")
    assert said.startswith("batch_size 2, accumulation 2 as before")
    assert ": it is trained with recompute on, with which it needs" in said


def test_checkpoints_of_before_these_options_are_read(small_card: Any):
    small_card(8 * memory.GB)
    assert fitted(quick(recompute="off"), CONFIG, EXAMPLES, saved={"batch_size": 2})[0] == quick(recompute="off")


@pytest.mark.slow
def test_sd15_on_a_card_of_8_gb(monkeypatch: pytest.MonkeyPatch):
    """Of which the desktop leaves 7.4; with the node's defaults."""
    monkeypatch.setattr(memory, "available", lambda device: 7.4 * memory.GB)
    options, said = fitted(TrainingOptions(warmup=500, gradient_checkpointing=True), SD15, Examples(512, 512))
    assert options == TrainingOptions(
        warmup=500, gradient_checkpointing=True, recompute="off", optimizer_in_ram=True
    ), said
    assert (
        said.startswith("this training needs about 7.") and "7.4 GB are free: it is trained with optimizer_in" in said
    )
