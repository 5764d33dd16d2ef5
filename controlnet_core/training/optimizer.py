"""AdamW as training uses it, the learning rate over the steps, and the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .options import OptionsError, TrainingOptions


def make(options: TrainingOptions, control: nn.Module, decoder: nn.Module) -> torch.optim.Optimizer:
    """AdamW over what is to be trained of the control and of the UNet, fused where torch can; 8-bit by bitsandbytes.

    Its groups remember their own learning rate as `initial_lr`. Raises OptionsError where bitsandbytes is missing.
    """
    groups = [
        {"params": [p for p in module.parameters() if p.requires_grad], "lr": rate, "initial_lr": rate}
        for module, rate in ((control, options.learning_rate), (decoder, options.decoder_learning_rate))
    ]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]
        except ImportError as error:
            raise OptionsError(
                "optimizer adamw8bit needs the package bitsandbytes, which is not installed: install it, or choose "
                "adamw"
            ) from error
        return AdamW8bit(groups, weight_decay=options.weight_decay)
    try:
        return torch.optim.AdamW([dict(group) for group in groups], weight_decay=options.weight_decay, fused=True)
    except RuntimeError:  # this torch has no fused AdamW for this device
        return torch.optim.AdamW(groups, weight_decay=options.weight_decay)


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
        kept.lerp_(weight, share) if kept.is_floating_point() else kept.copy_(weight)
