"""Claim: training a ControlNet takes little more than fine-tuning the base without one: +34 % time, +23 % memory."""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ...controlnet_core.networks.unet import UNet, UNetConfig
from ...controlnet_core.training.controlled_unet import build
from ...controlnet_core.training.options import TrainingOptions
from ..models import UNET
from .claim import Findings, Work, table

ROUNDS, STEPS = 7, 2
SIDES = ("base alone", "ControlNet")
Step = Callable[[], None]


@dataclass(frozen=True)
class Size:
    """What is trained: a UNet, on a batch of latents (batch, 4, latent, latent)."""

    config: UNetConfig
    batch: int
    latent: int
    precision: str


_HALF = UNetConfig(model_channels=160, context_dim=768, num_heads=8)
SIZES = {
    "the lab's, 128x128, batch 24, bf16": Size(UNET, 24, 16, "bf16"),
    "SD1.5 at half width, 256x256, batch 1, fp32": Size(_HALF, 1, 32, "fp32"),
    "SD1.5 at half width, 512x512, batch 1, fp32": Size(_HALF, 1, 64, "fp32"),
}


def measure(_: Work) -> Findings:
    """Seconds of a step and peak memory of both, each in a process of its own, in turns."""
    rows = []
    for title, size in SIZES.items():
        with _running(size) as sides:
            facts = [_ask(side, "facts") for side in sides]
            seconds = [[_ask(side, "steps") for side in sides] for _ in range(ROUNDS)]
            memory = [_ask(side, "memory") for side in sides]
        for i, name in enumerate(SIDES):
            trained, held, work = facts[i]
            typical = statistics.median(pair[i] for pair in seconds)
            rows.append(
                [f"{title}: {name}", f"{trained / 1e6:.1f} of {held / 1e6:.1f} M", f"{work / 1e9:.0f} G", typical]
                + [f"{memory[i] / 2**20:.0f} MiB"]
            )
        ratios = sorted(ours / theirs for theirs, ours in seconds)
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.append(
            ["ControlNet / base alone", f"{facts[1][0] / facts[0][0]:.2f}", f"{facts[1][2] / facts[0][2]:.2f}", ratio]
            + [f"{memory[1] / memory[0]:.2f}"]
        )
    head = ["training", "parameters trained", "MACs a step", "seconds a step", "peak memory"]
    return Findings(table(head, rows))


def step_of(side: str, size: Size) -> tuple[Step, nn.Module]:
    """A training step on random weights and data, and the module it trains: the whole UNet, or a control beside it."""
    torch.manual_seed(0)
    options = TrainingOptions(precision=size.precision)
    base = UNet(size.config)
    if side == "ControlNet":
        model: nn.Module = build(options, base.state_dict(), size.config, 3)
        del base
    else:
        model = base
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    noisy, noise = torch.randn(2, size.batch, 4, size.latent, size.latent)
    timesteps = torch.randint(1000, (size.batch,))
    context = torch.randn(size.batch, 77, size.config.context_dim)
    inputs = [noisy, timesteps, context]
    if side == "ControlNet":
        inputs.append(torch.rand(size.batch, 3, 8 * size.latent, 8 * size.latent))
    mixed = options.autocast(noisy.device)

    def step() -> None:
        with mixed:
            predicted = model(*inputs)
        F.mse_loss(predicted.float(), noise).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)

    return step, model


def facts(step: Step, model: nn.Module) -> tuple[int, int, int]:
    """Parameters that are trained and all there are, and the multiply-accumulates of a step, forward and backward."""
    with _Counter() as counter:
        step()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters()), counter.operations // 2


class _Counter(TorchDispatchMode):
    """Counts the operations of linear layers and convolutions by torch's formulas.

    Its own FlopCounterMode watches modules too, which fails where a backward pass computes a forward one again
    (`controlnet_core/networks/recompute.py`).
    """

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


# -- two processes in turns -------------------------------------------------------------------------------------------


@contextmanager
def _running(size: Size) -> Iterator[list[Connection]]:
    """Both sides, each in a fresh process, ready to be asked."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in SIDES]
    processes = [
        context.Process(target=_serve, args=(theirs, side, size, torch.get_num_threads()), daemon=True)
        for (_, theirs), side in zip(pairs, SIDES, strict=True)
    ]
    try:
        for process, (_, theirs) in zip(processes, pairs, strict=True):
            process.start()
            theirs.close()  # so that a process that died is noticed
        yield [ours for ours, _ in pairs]
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _ask(side: Connection, question: str) -> Any:
    side.send(question)
    return side.recv()


def _serve(asked: Connection, side: str, size: Size, threads: int) -> None:
    torch.set_num_threads(threads)
    before = peak_memory()
    step, model = step_of(side, size)
    step()  # makes the optimizer's state
    while True:
        try:
            question = asked.recv()
        except EOFError:
            return
        started = time.monotonic()
        if question == "facts":
            asked.send(facts(step, model))
        elif question == "memory":
            asked.send(peak_memory() - before)
        else:
            for _ in range(STEPS):
                step()
            asked.send((time.monotonic() - started) / STEPS)


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    import resource  # not on Windows, where this measurement does not run

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
