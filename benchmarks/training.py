"""How fast ControlNet training is, and how much memory it takes, beside the same written with diffusers.

Three sides take turns, each in a process of its own: our loop on a cached dataset; training as diffusers' published
examples do it (examples/controlnet/train_controlnet.py: pictures and prompts encoded at every step, the ControlNet in
fp32 under autocast, what is locked in the precision's dtype, AdamW and everything else at its defaults;
train_controlnet_sdxl.py: the same, but prompts encoded once and the VAE in fp32); and that on cached latents and text
embeddings. Same layout, batch, resolution, precision and attention kernels, random weights.

In diffusers' favour: its pictures are decoded and its batches lie ready in memory, nothing of its is logged or saved.
The VAE and the text encoder are reduced as the UNet is, to the nearest size that their norms and heads allow.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import product
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
from ..controlnet_core.networks.unet import SD15, SDXL, UNet, UNetConfig
from ..controlnet_core.training import loop
from ..controlnet_core.training.distributed import Process
from ..controlnet_core.training.memory import Examples, fitted
from ..controlnet_core.training.options import PRECISIONS, TrainingOptions
from ..devtools import DevError
from . import _report

TOKENS = 77
SCALE = 0.18215
MODELS = {"SD1.5": SD15, "SDXL": SDXL}
SDXL_NUMBERS = 6
"""Sizes and crop, each 256 wide in SDXL's vector."""


@dataclass(frozen=True)
class Setting:
    """What is trained: a model's layout at `width` channels (320 as published), VAE and text encoder likewise reduced.

    `graphs` is for our side alone.
    """

    device: str
    model: str
    width: int
    encoders: int
    batch: int
    resolution: int
    precision: str
    checkpointing: bool = False
    graphs: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def encoder_width(self, published: int, unit: int) -> int:
        """The multiple of `unit` nearest to a published width, reduced as the encoders are."""
        return unit * max(1, round(published * self.encoders / SD15.model_channels / unit))

    @property
    def config(self) -> UNetConfig:
        """The layout at this width."""
        own = MODELS[self.model]
        adm = None if self.pooled is None else self.pooled + SDXL_NUMBERS * 256
        context = self.encoder_width(own.context_dim, 64)
        return replace(own, model_channels=self.width, context_dim=context, adm_in_channels=adm)

    @property
    def pooled(self) -> int | None:
        """The width of the pooled text embedding; None for SD1.5."""
        return self.encoder_width(1280, 64) if self.model == "SDXL" else None

    def __str__(self) -> str:
        switches = {"gradient checkpointing": self.checkpointing, "our graphs": self.graphs}
        return (
            f"{self.model} at {self.width} channels of {SD15.model_channels} (VAE and text encoder as at "
            f"{self.encoders}), {self.resolution}x{self.resolution}, batch {self.batch}, {self.precision},\n"
            + ", ".join(f"{name} {'on' if on else 'off'}" for name, on in switches.items())
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
        fit_memory="propose",
        graphs=setting.graphs,
    )
    config, process = setting.config, Process(device=torch.device(setting.device))
    alphas, dataset = diffusion.alphas_cumprod(), Dataset.open(folder)
    options, _ = fitted(options, config, Examples.of(dataset), process)
    steps = loop.train(options, UNet(config).state_dict(), config, alphas, dataset, folder / "run", process=process)
    next(steps)  # reports the untrained base
    return steps


def write_dataset(folder: Path, setting: Setting, count: int) -> None:
    """A dataset of random numbers of the sizes of real ones."""
    random, side, config = np.random.default_rng(0), setting.resolution, setting.config
    pooled = None if setting.pooled is None else torch.randn(setting.pooled)
    items = []
    for i in range(count):
        picture, hint = random.integers(0, 256, (2, side, side, 3), dtype=np.uint8)
        items.append(Item(f"{i}.png", picture, f"prompt {i}", hint))
    for _ in caching.make(
        folder,
        items,
        lambda pictures: torch.randn(len(pictures), 4, *(n // 8 for n in pictures.shape[2:])),
        lambda _: (torch.randn(TOKENS, config.context_dim), pooled),
        None,
        caching.CachingOptions(resolution=side),
    ):
        pass


# -- diffusers --------------------------------------------------------------------------------------------------------


def encoding(setting: Setting, folder: Path) -> Steps:  # noqa: ARG001  (keeps its pictures in memory)
    """diffusers on pictures, and on tokens where its example is."""
    autoencoders: Any = import_module("diffusers.models.autoencoders.autoencoder_kl")
    channels = tuple(setting.encoder_width(width, 32) for width in (128, 256, 512, 512))
    vae = autoencoders.AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    dtype = torch.float32 if setting.model == "SDXL" else setting.dtype
    vae.requires_grad_(False).to(setting.device, dtype)
    prompts = _prompts(setting) if setting.model == "SDXL" else _text_encoder(setting)
    side = setting.resolution
    pictures = torch.rand(setting.batch, 3, side, side, device=setting.device) * 2 - 1

    def encode() -> tuple[Tensor, Tensor]:
        latents = vae.encode(pictures.to(dtype)).latent_dist.sample() * SCALE
        return latents.to(setting.dtype), prompts()

    return _diffusers(setting, encode)


def _text_encoder(setting: Setting) -> Callable[[], Tensor]:
    """Gives the text embeddings of a batch, which it encodes each time."""
    from transformers import CLIPTextConfig, CLIPTextModel

    width = setting.config.context_dim
    network: Any = CLIPTextModel(
        CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64)
    )
    network.requires_grad_(False).to(setting.device, setting.dtype)
    tokens = torch.randint(0, 49408, (setting.batch, TOKENS), device=setting.device)
    return lambda: network(tokens, return_dict=False)[0]


def _prompts(setting: Setting) -> Callable[[], Tensor]:
    """Gives the text embeddings of a batch, which are kept."""
    context = torch.randn(setting.batch, TOKENS, setting.config.context_dim, device=setting.device)
    return lambda: context.to(setting.dtype)


def cached(setting: Setting, folder: Path) -> Steps:  # noqa: ARG001  (keeps its latents in memory)
    """diffusers on latents and text embeddings."""
    latents = torch.randn(setting.batch, 4, *[setting.resolution // 8] * 2, device=setting.device)
    prompts = _prompts(setting)
    return _diffusers(setting, lambda: (latents.to(setting.dtype), prompts()))


def _layout(setting: Setting) -> dict[str, Any]:
    """The arguments of diffusers' UNet (the published unet/config.json of both models)."""
    config = setting.config
    given: dict[str, Any] = {
        "block_out_channels": tuple(config.model_channels * mult for mult in config.channel_mult),
        "cross_attention_dim": config.context_dim,
    }
    if setting.model == "SD1.5":
        return given
    return given | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": tuple(config.heads(channels) for channels in given["block_out_channels"]),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": config.adm_in_channels,
    }


def _diffusers(setting: Setting, encode: Any) -> Steps:
    controls: Any = import_module("diffusers.models.controlnets.controlnet")
    unets: Any = import_module("diffusers.models.unets.unet_2d_condition")
    schedulers: Any = import_module("diffusers.schedulers.scheduling_ddpm")
    device, dtype = setting.device, setting.dtype
    unet = unets.UNet2DConditionModel(**_layout(setting))
    control = controls.ControlNetModel.from_unet(unet).train().to(device)
    unet.requires_grad_(False).to(device, dtype)
    if setting.checkpointing:
        control.enable_gradient_checkpointing()
    noise_schedule = schedulers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(control.parameters(), lr=5e-6, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    hints = torch.rand(setting.batch, 3, setting.resolution, setting.resolution, device=device)
    added = None
    if setting.pooled is not None:
        sizes = torch.full((setting.batch, SDXL_NUMBERS), float(setting.resolution), device=device)
        added = {"text_embeds": torch.randn(setting.batch, setting.pooled, device=device, dtype=dtype)}
        added["time_ids"] = sizes.to(dtype)
    mixed = nullcontext() if dtype == torch.float32 else torch.autocast(torch.device(device).type, dtype)
    while True:
        latents, context = encode()
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (setting.batch,), device=device)
        noisy = noise_schedule.add_noise(latents, noise, timesteps)
        with mixed:
            skips, middle = control(
                noisy, timesteps, context, hints.to(dtype), added_cond_kwargs=added, return_dict=False
            )
        predicted = unet(
            noisy,
            timesteps,
            context,
            added_cond_kwargs=added,
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

SWITCH = {"off": (False,), "on": (True,), "both": (False, True)}
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
    for _ in range(3):  # the optimizer's state, and what the device sets up once; graphs are captured in the second
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
    """Bytes of GPU memory that the allocator has reserved, or in use by this process."""
    return torch.cuda.memory_reserved() if device == "cuda" else status("VmRSS")


def peak(device: str) -> int:
    """The most of what `used` gives since `forget_peak`."""
    return torch.cuda.max_memory_reserved() if device == "cuda" else status("VmHWM")


def forget_peak(device: str) -> None:
    """Let `peak` begin anew."""
    if device == "cuda":
        torch.cuda.empty_cache()
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
    """Print a table for each of the chosen settings; 0 when it is done."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="dev.py bench training", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--model", choices=MODELS, default="SD1.5")
    parser.add_argument("--width", type=int, help="channels of the UNet, a multiple of 32 (SDXL: 64); 320 as published")
    parser.add_argument("--encoders", type=int, help="the same for VAE and text encoder; left out: as the UNet")
    parser.add_argument("--batch", type=int, help="left out: 4, SDXL 1")
    parser.add_argument("--resolution", type=int, help="sides of the square pictures, a multiple of 64")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=2, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--checkpointing", choices=SWITCH, default="both", help="gradient checkpointing")
    parser.add_argument("--graphs", choices=SWITCH, help="ours as CUDA graphs; left out: both on a GPU, off on a CPU")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not cuda:
        raise DevError("torch finds no CUDA device here: choose --device cpu")
    width = given.width or (SD15.model_channels if given.device == "cuda" else 64)
    published = 1024 if given.model == "SDXL" else 512
    side = given.resolution or (published if given.device == "cuda" else 256)
    batch = (1 if given.model == "SDXL" else 4) if given.batch is None else given.batch
    unit = 64 if given.model == "SDXL" else 32
    if width % unit or side % 64 or min(width, side, batch, given.steps, given.rounds) < 1:
        raise DevError(f"--width needs a multiple of {unit}, --resolution one of 64; the other numbers at least 1")
    setting = Setting(given.device, given.model, width, given.encoders or width, batch, side, given.precision)
    print(f"python dev.py bench training {' '.join(arguments)}".rstrip())
    print(f"{machine(given.device)}; medians of {given.rounds} rounds of {given.steps} steps (lowest to highest)")
    graphs = given.graphs or ("both" if given.device == "cuda" else "off")
    for captured, checkpointing in product(SWITCH[graphs], SWITCH[given.checkpointing]):
        chosen = replace(setting, checkpointing=checkpointing, graphs=captured)
        print(f"\n{chosen}")
        print(table(measure(chosen, given.steps, given.rounds), given.device), flush=True)
    return 0
