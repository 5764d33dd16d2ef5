"""The optimizers that a training chooses from, the learning rate over the steps, and the average of the weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import ALONE, Process
from .options import OptionsError, TrainingOptions
from .parts import InParts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Library:
    """An optimizer of a library that need not be there: its class, what to install, and what it is told."""

    module: str
    name: str
    install: str
    settings: Mapping[str, Any] = field(default_factory=dict)


LIBRARIES = {
    "adamw8bit": Library("bitsandbytes.optim", "AdamW8bit", "the package bitsandbytes"),
    # Its steps are the learning rate times the weights' own size, or eps where that is smaller: 1, for a zero
    # convolution has no size to begin with. Tensor by tensor, for the list of all takes copies of all.
    "adafactor": Library("torch.optim", "Adafactor", "torch 2.5", {"eps": (None, 1.0), "foreach": False}),
    "prodigy": Library("prodigyopt", "Prodigy", "the package prodigyopt"),
    "lion": Library("lion_pytorch", "Lion", "the package lion-pytorch"),
}
"""The optimizers beside torch's AdamW, by the option's value."""


def make(
    options: TrainingOptions, control: nn.Module, decoder: nn.Module, process: Process = ALONE
) -> torch.optim.Optimizer:
    """The chosen optimizer over what is to be trained of the control and of the UNet; AdamW is fused where torch can.

    Its groups remember their own learning rate as `initial_lr`. With `shard_optimizer` it steps this process's share
    of the weights and gets the others' from who steps them (torch's ZeroRedundancyOptimizer), unless that cannot be,
    which the log says. Raises OptionsError where its library is missing.
    """
    groups = [
        {"params": [p for p in module.parameters() if p.requires_grad], "lr": rate, "initial_lr": rate}
        for module, rate in ((control, options.learning_rate), (decoder, options.decoder_learning_rate))
    ]
    groups = [group for group in groups if group["params"]]
    if options.shard_optimizer:
        if not (reason := unsharded(options, process.world)):
            from torch.distributed.optim import ZeroRedundancyOptimizer  # not in every torch

            return ZeroRedundancyOptimizer(groups, lambda own: _made(options, own))  # type: ignore[arg-type]
        log.info("the optimizer's state is not divided: %s", reason)
    return _made(options, groups)


def unsharded(options: TrainingOptions, world: int) -> str:
    """Why `world` processes cannot divide the state of this optimizer, in words; empty where they can."""
    if world == 1:
        return "one process alone has nobody to share it with"
    if options.optimizer == "prodigy":
        return "prodigy needs all weights at once"
    if options.optimizer_in_ram or options.control_weights == "bf16":
        return "with optimizer_in_ram, or control_weights bf16, each process steps all weights part by part"
    return ""


def local(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What has the state of the weights that this process steps: the optimizer itself where it steps all of them."""
    return getattr(optimizer, "optim", optimizer)  # the name that ZeroRedundancyOptimizer has for it


def _made(options: TrainingOptions, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    made = _of_library(options, groups) if options.optimizer in LIBRARIES else _adamw(options, groups)
    if options.optimizer_in_ram or options.control_weights == "bf16":
        return InParts(made, options.optimizer_in_ram, options.seed)
    return made


def _adamw(options: TrainingOptions, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    try:
        return torch.optim.AdamW([dict(group) for group in groups], weight_decay=options.weight_decay, fused=True)
    except RuntimeError:  # this torch has no fused AdamW for this device
        return torch.optim.AdamW(groups, weight_decay=options.weight_decay)


def _of_library(options: TrainingOptions, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    name, library = options.optimizer, LIBRARIES[options.optimizer]
    if name == "prodigy" and len({group["lr"] for group in groups}) > 1:
        raise OptionsError(
            f"prodigy finds one step for all weights: expected decoder_learning_rate as learning_rate, "
            f"{options.learning_rate:g}, found {options.decoder_learning_rate:g}"
        )
    try:
        chosen = getattr(import_module(library.module), library.name)
    except (ImportError, AttributeError) as error:
        raise OptionsError(
            f"optimizer {name} needs {library.install}, which is not installed: install it, or choose adamw"
        ) from error
    return chosen(groups, weight_decay=options.weight_decay, **library.settings)


def counted(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """The numbers of each group that the optimizer has changed by itself, as prodigy keeps what it has found."""
    ours = ("lr", "initial_lr")
    return [
        {
            key: value
            for key, value in group.items()
            if type(value) in (int, float) and key not in ours and value != optimizer.defaults.get(key)
        }
        for group in optimizer.param_groups
    ]


def factor(options: TrainingOptions, step: int) -> float:
    """What the learning rate is multiplied by at `step` (from 0): the warmup's line up, then the schedule."""
    rise = min(1.0, (step + 1) / options.warmup) if options.warmup else 1.0
    done = min(1.0, max(0.0, (step - options.warmup) / max(1, options.steps - options.warmup)))
    if options.schedule == "cosine":
        return rise * 0.5 * (1 + math.cos(math.pi * done))
    return rise * (1 - done) if options.schedule == "linear" else rise


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Give a group of parameters a learning rate; one that lies in a tensor is written there."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def share(decay: float, step: int) -> float:
    """How much of the weights goes into their averages after `step` steps; more of early ones (Karras et al., 2022)."""
    return 1 - min(decay, step / (step + 10))


@torch.no_grad()
def average(averages: Mapping[str, Tensor], weights: Mapping[str, Tensor], share: float | Tensor) -> None:
    """Move the averages towards the weights by a `share` of the way.

    Whole numbers, as some buffers are, are taken as they are.
    """
    for name, kept in averages.items():
        weight = weights[name]
        if kept.is_floating_point():
            kept.lerp_(weight.to(kept.dtype), share)
        else:
            kept.copy_(weight)
