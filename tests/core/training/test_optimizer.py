"""Learning rates, AdamW's groups and the average of the weights, in numbers."""

from __future__ import annotations

import math
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from zeroconv.controlnet_core.data.dataset import Dataset
from zeroconv.controlnet_core.training.distributed import Process
from zeroconv.controlnet_core.training.optimizer import (
    LIBRARIES,
    average,
    counted,
    factor,
    local,
    make,
    share,
    unsharded,
)
from zeroconv.controlnet_core.training.options import OPTIMIZERS, OptionsError

from . import other_optimizers
from .tiny import dataset, fit, left_alike, quick, training


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return dataset(tmp_path_factory.mktemp("data"))


def install(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The optimizer's library, or where it is missing a stand-in for it."""
    library = LIBRARIES[name]
    if find_spec(library.module.split(".")[0]) is None:
        module = ModuleType(library.module)
        setattr(module, library.name, getattr(other_optimizers, library.name))
        monkeypatch.setitem(sys.modules, library.module.split(".")[0], module)
        monkeypatch.setitem(sys.modules, library.module, module)


def factors(**options: object) -> list[float]:
    chosen = quick(**options)
    return [factor(chosen, step) for step in range(chosen.steps)]


def test_schedules_written_out():
    assert factors(steps=4) == [1, 1, 1, 1]
    assert factors(steps=4, schedule="linear") == [1, 0.75, 0.5, 0.25]
    cosine = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert factors(steps=4, schedule="cosine") == pytest.approx(cosine)
    assert cosine[2] == pytest.approx(0.5)


def test_warmup_rises_in_a_line_and_the_schedule_begins_behind_it():
    assert factors(steps=6, warmup=4) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert factors(steps=6, warmup=2, schedule="linear") == [0.5, 1, 1, 0.75, 0.5, 0.25]


def test_a_warmup_longer_than_the_run_and_a_run_behind_its_end_do():
    assert factors(steps=2, warmup=4, schedule="cosine") == [0.25, 0.5]
    assert factor(quick(steps=4, schedule="linear"), 9) == 0


def test_each_group_has_its_own_learning_rate_and_locked_parameters_are_in_none():
    control, unet = nn.Linear(2, 3), nn.Linear(3, 4)
    unet.bias.requires_grad_(False)
    options = quick(learning_rate=1e-3, decoder_learning_rate=1e-5, weight_decay=0.1)
    adam = make(options, control, unet)
    groups = [(group["initial_lr"], group["weight_decay"], len(group["params"])) for group in adam.param_groups]
    assert groups == [(1e-3, 0.1, 2), (1e-5, 0.1, 1)]
    assert adam.param_groups[1]["params"][0] is unet.weight
    unet.requires_grad_(False)
    assert len(make(options, control, unet).param_groups) == 1


def test_without_a_fused_kernel_it_is_plain(monkeypatch: pytest.MonkeyPatch):
    plain = torch.optim.AdamW

    def without(groups: list[dict[str, Any]], fused: bool | None = None, **settings: Any) -> torch.optim.Optimizer:
        if fused:
            for group in groups:
                group["fused"] = True  # as torch does before it looks at the device
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of supported devices")
        return plain(groups, fused=fused, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", without)
    layer = nn.Linear(2, 2)
    adam = make(quick(weight_decay=0.1), layer, nn.Linear(2, 2).requires_grad_(False))
    assert [(group["fused"], group["weight_decay"]) for group in adam.param_groups] == [(None, 0.1)]
    layer(torch.ones(1, 2)).sum().backward()
    before = layer.weight.clone()
    adam.step()
    assert not torch.equal(layer.weight, before)


def test_8_bit_without_bitsandbytes_is_answered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(OptionsError, match="adamw8bit needs the package bitsandbytes, which is not installed"):
        make(quick(optimizer="adamw8bit"), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lion", "lion needs the package lion-pytorch, which is not installed: install it, or choose adamw"),
        ("prodigy", "prodigy needs the package prodigyopt, which is not installed"),
        ("adafactor", "adafactor needs torch 2.5, which is not installed"),
    ],
)
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, name: str, said: str):
    monkeypatch.setitem(sys.modules, LIBRARIES[name].module, None)
    with pytest.raises(OptionsError, match=said):
        make(quick(optimizer=name), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("name", LIBRARIES)
def test_each_takes_the_learning_rates_and_the_weight_decay(monkeypatch: pytest.MonkeyPatch, name: str):
    install(monkeypatch, name)
    options = quick(optimizer=name, learning_rate=1e-3, decoder_learning_rate=1e-3, weight_decay=0.1)
    made = make(options, nn.Linear(2, 3), nn.Linear(3, 4))
    assert type(made).__name__ == LIBRARIES[name].name
    assert [(group["lr"], group["weight_decay"]) for group in made.param_groups] == [(1e-3, 0.1)] * 2
    assert set(LIBRARIES) | {"adamw"} == set(OPTIMIZERS)


def test_adafactor_moves_what_begins_at_zero_by_the_learning_rate():
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    made = make(quick(optimizer="adafactor", learning_rate=1e-3), layer, nn.Linear(2, 2).requires_grad_(False))
    layer.weight.grad = torch.ones(4, 4)
    made.step()
    torch.testing.assert_close(layer.weight, torch.full((4, 4), -1e-3))


def test_prodigy_has_one_learning_rate(monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch, "prodigy")
    options = quick(optimizer="prodigy", learning_rate=1.0, unlock_decoder=True)
    with pytest.raises(OptionsError, match="expected decoder_learning_rate as learning_rate, 1, found 2e-06"):
        make(options, nn.Linear(2, 2), nn.Linear(2, 2))


def test_what_an_optimizer_finds_by_itself_is_counted(monkeypatch: pytest.MonkeyPatch):
    adam = make(quick(), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    assert counted(adam) == [{}]
    monkeypatch.setitem(sys.modules, "prodigyopt", other_optimizers)  # type: ignore[arg-type]
    layer = nn.Linear(2, 2)
    prodigy = make(quick(optimizer="prodigy"), layer, nn.Linear(2, 2).requires_grad_(False))
    layer(torch.ones(1, 2)).sum().backward()
    prodigy.step()
    assert counted(prodigy) == [{"d": 2**-8 * 1.125, "k": 1, "d_hat": 2**-8 * 1.125 / 3}]


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_run_that_is_resumed_is_the_run_that_never_stopped(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    install(monkeypatch, name)
    options = quick(optimizer=name, learning_rate=1.0 if name == "prodigy" else 1e-3)
    whole = fit(options, data, tmp_path / "whole")
    steps = training(options, data, tmp_path / "run")
    found = [progress for _, progress in zip(range(3), steps)]
    steps.close()
    found += fit(options, data, tmp_path / "run")
    assert [progress.loss for progress in found] == [progress.loss for progress in whole]
    assert len({progress.loss for progress in whole}) == 5
    assert left_alike(tmp_path / "run", tmp_path / "whole")


def test_average_written_out():
    averages, parameters = {"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}
    average(averages, parameters, share(0.5, step=1))  # decay 1/11, as early steps have it
    assert averages["w"].item() == pytest.approx(10 / 11)
    average(averages, {"w": torch.tensor([3.0])}, share(0.5, step=1000))
    assert averages["w"].item() == pytest.approx(0.5 * 10 / 11 + 0.5 * 3)
    assert parameters["w"].item() == 1


# -- divided among processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "world", "said"),
    [
        ({}, 1, "one process alone"),
        ({"optimizer": "prodigy"}, 2, "prodigy needs all weights"),
        ({"optimizer_in_ram": True}, 2, "steps all weights part by part"),
        ({"control_weights": "bf16", "precision": "bf16"}, 2, "steps all weights part by part"),
        ({"optimizer": "lion"}, 2, "^$"),
    ],
)
def test_why_a_state_is_not_divided(options: dict[str, Any], world: int, said: str):
    assert re.search(said, unsharded(quick(**options), world))


def test_what_cannot_be_divided_is_whole_and_the_log_says_why(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    layers = nn.Linear(2, 2), nn.Linear(2, 2)
    made = make(quick(shard_optimizer=True, optimizer_in_ram=True), *layers, Process(0, 2))
    assert local(made) is made and len(made.param_groups) == 2
    assert "the optimizer's state is not divided: with optimizer_in_ram" in caplog.text
    caplog.clear()
    assert isinstance(make(quick(), *layers, Process(0, 2)), torch.optim.AdamW) and not caplog.text
