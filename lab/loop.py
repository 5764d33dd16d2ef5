"""The lab's training loop: one straight loop with a cosine schedule, an average of the weights, and checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

WARMUP, LOG_EVERY, SAVE_EVERY = 100, 50, 250


def fit(
    model: nn.Module,
    loss_of_step: Callable[[torch.Generator], Tensor],
    checkpoint: Path,
    steps: int,
    lr: float,
    ema_decay: float = 0.999,
) -> nn.Module:
    """Train `model` in place for `steps` optimizer steps and return it with averaged weights.

    `loss_of_step` draws its batch with the generator it is given. `checkpoint` is written whole or not at all every
    250 steps, and training goes on from it when it exists: on the same kind of device, the losses are those of an
    uninterrupted run.
    """
    place = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    step = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=place, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, step = saved["average"], saved["step"]
        draw.set_state(saved["draw"].cpu())
        torch.set_rng_state(saved["noise"].cpu())
        if place.type == "cuda" and saved.get("cuda_noise") is not None:
            torch.cuda.set_rng_state(saved["cuda_noise"].cpu())

    started, first = time.monotonic(), step
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        loss = loss_of_step(draw)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(ema_decay, step / (step + 10))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                average[key].lerp_(value, 1 - decay) if value.is_floating_point() else average[key].copy_(value)
        if step % LOG_EVERY == 0:
            rate = (step - first) / (time.monotonic() - started)
            log.info("%s step %d/%d loss %.4f, %.2f steps/s", checkpoint.stem, step, steps, loss.item(), rate)
        if step % SAVE_EVERY == 0 or step == steps:
            aside = checkpoint.with_suffix(".partial")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average,
                    "step": step,
                    "draw": draw.get_state(),
                    "noise": torch.get_rng_state(),
                    "cuda_noise": torch.cuda.get_rng_state() if place.type == "cuda" else None,
                },
                aside,
            )
            aside.replace(checkpoint)
    model.load_state_dict(average)
    return model
