"""The lab's training loop: one straight loop with a cosine schedule, an average of the weights, and checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..controlnet_core.keys import Weights
from ..controlnet_core.training import checkpoint
from ..controlnet_core.training.state import TrainingState

log = logging.getLogger(__name__)

WARMUP, LOG_EVERY, SAVE_EVERY = 100, 50, 250


def fit(
    model: nn.Module,
    loss_of_step: Callable[[torch.Generator], Tensor],
    folder: Path,
    steps: int,
    lr: float,
    ema_decay: float = 0.999,
) -> nn.Module:
    """Train `model` in place for `steps` optimizer steps and return it with averaged weights.

    `loss_of_step` draws its batch with the generator it is given. A checkpoint is written into `folder` every 250
    steps, and training goes on from it when it exists: on the same kind of device, the losses are those of an
    uninterrupted run.
    """
    place = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    state = TrainingState(model.state_dict(keep_vars=True), optimizer, decay=ema_decay)
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    checkpoint.clean(folder)
    saved = checkpoint.newest(folder)
    if saved is not None:
        state.restore(saved)
        _restore_chance(saved.part("chance."), draw, place)
        del saved  # its tensors are mapped, and on Windows a mapped file cannot be deleted when its time comes

    started, first = time.monotonic(), state.step
    while state.step < steps:
        for group in optimizer.param_groups:
            warm = min(1.0, (state.step + 1) / WARMUP)
            group["lr"] = lr * warm * (0.51 + 0.49 * math.cos(math.pi * state.step / steps))
        loss = loss_of_step(draw)
        loss.backward()
        state.clip_gradients(1.0)
        state.advance()
        if state.step % LOG_EVERY == 0:
            rate = (state.step - first) / (time.monotonic() - started)
            log.info("%s step %d/%d loss %.4f, %.2f steps/s", folder.name, state.step, steps, loss.item(), rate)
        if state.step % SAVE_EVERY == 0 or state.step == steps:
            made = state.to_checkpoint({})
            checkpoint.save(folder, replace(made, tensors={**made.tensors, **_chance(draw, place)}), keep=1)
    state.use_averages()
    return model


def _chance(draw: torch.Generator, place: torch.device) -> Weights:
    """Where the generators are that a step draws from: the loop's own, and torch's on the CPU and on `place`."""
    states = {"chance.draw": draw.get_state(), "chance.cpu": torch.get_rng_state()}
    return states if place.type == "cpu" else {**states, "chance.cuda": torch.cuda.get_rng_state(place)}


def _restore_chance(states: Weights, draw: torch.Generator, place: torch.device) -> None:
    """The inverse of `_chance`; of a run on another kind of device, what both have."""
    draw.set_state(states["draw"])
    torch.set_rng_state(states["cpu"])
    if place.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], place)
