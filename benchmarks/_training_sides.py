"""The sides of the training bench: what is trained, by our loop and as diffusers' published examples do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
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


def layout(setting: Setting) -> dict[str, Any]:
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
    unet = unets.UNet2DConditionModel(**layout(setting))
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


SIDES = {"ours, cached": ours, "diffusers": encoding, "diffusers, cached": cached}
