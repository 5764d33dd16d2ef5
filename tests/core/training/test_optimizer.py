"""Learning rates, AdamW's groups and the average of the weights, in numbers."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import nn

from zeroconv.controlnet_core.training.optimizer import average, factor, make, share
from zeroconv.controlnet_core.training.options import OptionsError

from .tiny import quick


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


def test_average_written_out():
    averages, parameters = {"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}
    average(averages, parameters, share(0.5, step=1))  # decay 1/11, as early steps have it
    assert averages["w"].item() == pytest.approx(10 / 11)
    average(averages, {"w": torch.tensor([3.0])}, share(0.5, step=1000))
    assert averages["w"].item() == pytest.approx(0.5 * 10 / 11 + 0.5 * 3)
    assert parameters["w"].item() == 1
