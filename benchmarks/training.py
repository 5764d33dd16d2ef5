"""How fast ControlNet training is, and how much memory it takes, beside the same written with diffusers.

Three sides take turns, each in a process of its own: our loop on a cached dataset; training as diffusers' published
example does it (examples/controlnet/train_controlnet.py: pictures and prompts encoded at every step, the ControlNet in
fp32 under autocast, what is locked in the precision's dtype, AdamW and everything else at its defaults); and that on
cached latents and text embeddings. Same layout, batch, resolution, precision and attention kernels, random weights.

In diffusers' favour: its pictures are decoded and its batches lie ready in memory, nothing of its is logged or saved.
The VAE and the text encoder are reduced as the UNet is, to the nearest size that their norms and heads allow.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..controlnet_core import diffusion
from ..controlnet_core.data import caching
from ..controlnet_core.data.dataset import Dataset
from ..controlnet_core.data.sources import Item
from ..controlnet_core.networks.unet import SD15, UNet
from ..controlnet_core.training import loop
from ..controlnet_core.training.distributed import Process
from ..controlnet_core.training.options import PRECISIONS, TrainingOptions
from ..devtools import DevError
from . import _report

TOKENS = 77
SCALE = 0.18215


@dataclass(frozen=True)
class Setting:
    """What is trained: SD1.5's layout at `width` channels (320 as published), VAE and text encoder likewise reduced."""

    device: str
    width: int
    encoders: int
    batch: int
    resolution: int
    precision: str
    checkpointing: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def encoder_width(self, published: int, unit: int) -> int:
        """The multiple of `unit` nearest to a published width, reduced as the encoders are."""
        return unit * max(1, round(published * self.encoders / SD15.model_channels / unit))

    @property
    def context_dim(self) -> int:
        return self.encoder_width(768, 64)

    def __str__(self) -> str:
        return (
            f"SD1.5 at {self.width} channels of {SD15.model_channels} (VAE and text encoder as at {self.encoders}), "
            f"{self.resolution}x{self.resolution}, batch {self.batch}, {self.precision},\ngradient checkpointing "
            f"{'on' if self.checkpointing else 'off'}"
        )


Steps = Iterator[object]
"""Does a training step each time it is asked for the next."""


# -- ours -------------------------------------------------------------------------------------------------------------


def ours(setting: Setting, folder: Path) -> Steps:
    """Our loop on a dataset on disk, all as a user runs it but for the samples."""
    options = TrainingOptions(
        steps=10**9,
        batch_size=setting.batch,
        precision=setting.precision,
        gradient_checkpointing=setting.checkpointing,
        save_every=10**9,
        sample_every=0,
    )
    config = replace(SD15, model_channels=setting.width, context_dim=setting.context_dim)
    process = Process(device=torch.device(setting.device))
    alphas, dataset = diffusion.alphas_cumprod(), Dataset.open(folder)
    steps = loop.train(options, UNet(config).state_dict(), config, alphas, dataset, folder / "run", process=process)
    next(steps)  # reports the untrained base
    return steps


def write_dataset(folder: Path, setting: Setting, count: int) -> None:
    """A dataset of random numbers of the sizes of real ones."""
    random, side = np.random.default_rng(0), setting.resolution
    items = []
    for i in range(count):
        picture, hint = random.integers(0, 256, (2, side, side, 3), dtype=np.uint8)
        items.append(Item(f"{i}.png", picture, f"prompt {i}", hint))
    for _ in caching.make(
        folder,
        items,
        lambda pictures: torch.randn(len(pictures), 4, *(n // 8 for n in pictures.shape[2:])),
        lambda _: (torch.randn(TOKENS, setting.context_dim), None),
        None,
        caching.CachingOptions(resolution=side),
    ):
        pass


# -- diffusers --------------------------------------------------------------------------------------------------------


def encoding(setting: Setting, folder: Path) -> Steps:  # noqa: ARG001  (keeps its pictures in memory)
    """diffusers on pictures and tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel

    autoencoders: Any = import_module("diffusers.models.autoencoders.autoencoder_kl")
    channels = tuple(setting.encoder_width(width, 32) for width in (128, 256, 512, 512))
    vae = autoencoders.AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    width = setting.context_dim
    text: Any = CLIPTextModel(
        CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64)
    )
    for network in (vae, text):
        network.requires_grad_(False).to(setting.device, setting.dtype)
    side = setting.resolution
    pictures = torch.rand(setting.batch, 3, side, side, device=setting.device) * 2 - 1
    tokens = torch.randint(0, 49408, (setting.batch, TOKENS), device=setting.device)

    def encode() -> tuple[Tensor, Tensor]:
        latents = vae.encode(pictures.to(setting.dtype)).latent_dist.sample() * SCALE
        return latents, text(tokens, return_dict=False)[0]

    return _diffusers(setting, encode)


def cached(setting: Setting, folder: Path) -> Steps:  # noqa: ARG001  (keeps its latents in memory)
    """diffusers on latents and text embeddings."""
    latents = torch.randn(setting.batch, 4, *[setting.resolution // 8] * 2, device=setting.device)
    context = torch.randn(setting.batch, TOKENS, setting.context_dim, device=setting.device)
    return _diffusers(setting, lambda: (latents.to(setting.dtype), context.to(setting.dtype)))


def _diffusers(setting: Setting, encode: Any) -> Steps:
    controls: Any = import_module("diffusers.models.controlnets.controlnet")
    unets: Any = import_module("diffusers.models.unets.unet_2d_condition")
    schedulers: Any = import_module("diffusers.schedulers.scheduling_ddpm")
    device, dtype = setting.device, setting.dtype
    widths = tuple(setting.width * mult for mult in SD15.channel_mult)
    unet = unets.UNet2DConditionModel(block_out_channels=widths, cross_attention_dim=setting.context_dim)
    control = controls.ControlNetModel.from_unet(unet).train().to(device)
    unet.requires_grad_(False).to(device, dtype)
    if setting.checkpointing:
        control.enable_gradient_checkpointing()
    noise_schedule = schedulers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(control.parameters(), lr=5e-6, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    hints = torch.rand(setting.batch, 3, setting.resolution, setting.resolution, device=device)
    mixed = nullcontext() if dtype == torch.float32 else torch.autocast(torch.device(device).type, dtype)
    while True:
        latents, context = encode()
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (setting.batch,), device=device)
        noisy = noise_schedule.add_noise(latents, noise, timesteps)
        with mixed:
            skips, middle = control(noisy, timesteps, context, hints.to(dtype), return_dict=False)
        predicted = unet(
            noisy,
            timesteps,
            context,
            down_block_additional_residuals=[skip.to(dtype) for skip in skips],
            mid_block_additional_residual=middle.to(dtype),
        ).sample
        loss = F.mse_loss(predicted.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(control.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the example's default
        yield loss.item()


# -- measuring --------------------------------------------------------------------------------------------------------

SIDES = {"ours, cached": ours, "diffusers": encoding, "diffusers, cached": cached}


@dataclass(frozen=True)
class Round:
    """Seconds for each step, those of them that processors worked, and the most bytes in use since the first round."""

    seconds: float
    work: float
    memory: int


def work(connection: Connection, side: str, setting: Setting, folder: Path) -> None:
    """One side's process: for each number received, take so many steps and send a `Round`."""
    from diffusers.models.controlnets import controlnet  # noqa: F401  (each side imports the same)
    from transformers import CLIPTextModel  # noqa: F401

    torch.manual_seed(0)
    before = used(setting.device)
    steps = SIDES[side](setting, folder)
    for _ in range(2):  # the optimizer's state, and what the device sets up once
        next(steps)
    gc.collect()
    forget_peak(setting.device)
    connection.send(None)
    while True:
        count = connection.recv()
        synchronize(setting.device)
        start, worked = time.perf_counter(), time.process_time()
        for _ in range(count):
            next(steps)
        synchronize(setting.device)
        seconds, work = (time.perf_counter() - start) / count, (time.process_time() - worked) / count
        connection.send(Round(seconds, work, peak(setting.device) - before))


class Worker:
    """A side's process, from its first steps on."""

    def __init__(self, side: str, setting: Setting, folder: Path):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, side, setting, folder), daemon=True)
        self._process.start()
        theirs.close()
        self._receive(side)
        self._side = side

    def run(self, steps: int) -> Round:
        """So many steps."""
        self._connection.send(steps)
        return self._receive(self._side)

    def _receive(self, side: str) -> Any:
        try:
            return self._connection.recv()
        except EOFError as error:
            raise DevError(f"{side!r} ended before it was done: see above; if memory ran out, lower --batch") from error

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # at once: our loop would save a checkpoint first
        self._process.join()


def measure(setting: Setting, steps: int, rounds: int) -> dict[str, list[Round]]:
    """The rounds of each side, which take turns, in an order that turns round each time."""
    found: dict[str, list[Round]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        write_dataset(folder, setting, 4 * setting.batch)
        # On a GPU each side has the memory to itself; on a CPU all are kept, so that turns follow closely.
        kept = {side: stack.enter_context(Worker(side, setting, folder)) for side in SIDES if setting.device == "cpu"}
        for turn in range(rounds):
            for side in list(SIDES)[:: 1 if turn % 2 == 0 else -1]:
                if kept:
                    found[side].append(kept[side].run(steps))
                else:
                    with Worker(side, setting, folder) as worker:
                        found[side].append(worker.run(steps))
    return found


def used(device: str) -> int:
    """Bytes in use: of GPU memory, or by this process."""
    return torch.cuda.memory_allocated() if device == "cuda" else status("VmRSS")


def peak(device: str) -> int:
    """The most bytes in use since `forget_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")


def forget_peak(device: str) -> None:
    """Let `peak` begin anew."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif STATUS.exists():
        STATUS.with_name("clear_refs").write_text("5")


STATUS = Path("/proc/self/status")


def status(name: str) -> int:
    """A number of bytes that Linux tells about this process; 0 on other systems."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


# -- the table --------------------------------------------------------------------------------------------------------


def table(found: dict[str, list[Round]], device: str) -> str:
    """A line for each side: medians, and ours beside it: how many times faster, and what share of the memory."""
    first, *_ = found
    head = f"{'':<17} | {'steps/s':>7} {'ours is faster':>21} {'by processor time':>21}"
    lines = [f"{head} | {'MiB':>7} {'ours takes':>21}"]
    for side, rounds in found.items():
        pairs = list(zip(found[first], rounds))
        faster = _spread([theirs.seconds / mine.seconds for mine, theirs in pairs])
        # What other programs do on the machine hardly changes this one; on a GPU it says nothing.
        by_work = _spread([theirs.work / mine.work for mine, theirs in pairs]) if device == "cpu" else "-"
        smaller = _spread([mine.memory / theirs.memory for mine, theirs in pairs]) if rounds[0].memory else "-"
        if side == first:
            faster = by_work = smaller = ""
        speed, size = 1 / median(each.seconds for each in rounds), median(each.memory for each in rounds) / 2**20
        line = f"{side:<17} | {speed:7.3f} {faster:>21} {by_work:>21} | {size:7.0f} {smaller:>21}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _spread(ratios: list[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def machine(device: str) -> str:
    """What it runs on."""
    from diffusers import __version__

    return f"{_report.machine(device)}, diffusers {__version__}"


def main(arguments: list[str]) -> int:
    """Print a table without gradient checkpointing and one with it; 0 when it is done."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="dev.py bench training", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--width", type=int, help="channels of the UNet, a multiple of 32; 320 are SD1.5's")
    parser.add_argument("--encoders", type=int, help="the same for VAE and text encoder; left out: as the UNet")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--resolution", type=int, help="sides of the square pictures, a multiple of 64")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=2, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--checkpointing", choices=("off", "on", "both"), default="both", help="gradient checkpointing")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not cuda:
        raise DevError("torch finds no CUDA device here: choose --device cpu")
    width = given.width or (SD15.model_channels if given.device == "cuda" else 64)
    side = given.resolution or (512 if given.device == "cuda" else 256)
    if width % 32 or side % 64 or min(width, side, given.batch, given.steps, given.rounds) < 1:
        raise DevError("--width needs a multiple of 32, --resolution one of 64; the other numbers at least 1")
    setting = Setting(given.device, width, given.encoders or width, given.batch, side, given.precision)
    print(f"python dev.py bench training {' '.join(arguments)}".rstrip())
    print(f"{machine(given.device)}; medians of {given.rounds} rounds of {given.steps} steps (lowest to highest)")
    for checkpointing in {"off": (False,), "on": (True,), "both": (False, True)}[given.checkpointing]:
        chosen = replace(setting, checkpointing=checkpointing)
        print(f"\n{chosen}")
        print(table(measure(chosen, given.steps, given.rounds), given.device), flush=True)
    return 0
