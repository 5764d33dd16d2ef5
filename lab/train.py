"""Trains the embedded model: autoencoder, base (UNet and text encoder), segmenter, decoder, and controls.

Every stage resumes from its checkpoint in its folder below the work folder and leaves fp16 weights in `lab/weights/`.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..controlnet_core.diffusion import add_noise, alphas_cumprod
from ..controlnet_core.networks.controlnet import ControlBranch, ControlNet, copy_encoder
from ..controlnet_core.networks.layers import FeedForward, ResBlock
from ..controlnet_core.networks.unet import UNet
from .autoencoder import LATENT_SCALE, Autoencoder, scale_latents
from .dataset import load_shards, render_shards
from .loop import fit
from .models import SIZE, UNET, Module, control_name, device, load_weights, save_weights
from .segmenter import Segmenter
from .text_encoder import TextEncoder
from .vocabulary import INSUFFICIENT_PROMPT, tokenize

log = logging.getLogger(__name__)

SCENES = 12_000


def _pictures(batch: Tensor, place: torch.device) -> Tensor:
    """uint8 (B,H,W,3) to (B,3,H,W) in [0,1]."""
    return batch.to(place).permute(0, 3, 1, 2).float() / 255


def _mixed(place: torch.device) -> torch.autocast:
    return torch.autocast(place.type, torch.bfloat16)


def _keeping(network: Module) -> Module:
    """`network`, which computes nothing twice in its backward pass: at this size all that it keeps fits any memory."""
    for module in network.modules():
        if isinstance(module, (ResBlock, FeedForward, ControlBranch)):
            module.recomputing = False
    return network


def _load(work: Path, *names: str) -> list[Tensor]:
    arrays = load_shards(render_shards(work / "scenes", SCENES, SIZE), names)
    return [torch.from_numpy(arrays[name]) for name in names]


def train_autoencoder(work: Path, steps: int = 4000) -> None:
    """`_difference`; noise on the latents keeps the space smooth, a pull keeps its scale."""
    place = device()
    (images,) = _load(work, "image")
    model = Autoencoder().to(place)

    def loss_of_step(draw: torch.Generator) -> Tensor:
        x = _pictures(images[torch.randint(len(images), (16,), generator=draw)], place) * 2 - 1
        with _mixed(place):
            z = model.encode(x).float()
            y = model.decode(z + 0.05 * torch.randn_like(z)).float()
        pull = (z.mean((0, 2, 3)).square() + (z.var((0, 2, 3)) - 1).square()).mean()
        return _difference(y, x) + 0.01 * pull

    fit(model, loss_of_step, work / "autoencoder", steps, lr=2e-3, ema_decay=0.995)
    with torch.no_grad():
        sample = _pictures(images[:512], place) * 2 - 1
        scale_latents(model, (1 / LATENT_SCALE) / model.encode(sample).std().item())
    save_weights(model, "autoencoder")


def _difference(y: Tensor, x: Tensor) -> Tensor:
    """L1, squared and gradient error of pictures (B,3,H,W)."""
    across = F.l1_loss(y[..., 1:] - y[..., :-1], x[..., 1:] - x[..., :-1])
    down = F.l1_loss(y[..., 1:, :] - y[..., :-1, :], x[..., 1:, :] - x[..., :-1, :])
    return F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + across + down


def train_decoder(work: Path, steps: int = 3000) -> None:
    """The decoder further, the latents staying as they are: sharper pictures for a base that was trained already."""
    place = device()
    (images,) = _load(work, "image")
    model = load_weights(Autoencoder(), "autoencoder").to(place)
    model.decoder.requires_grad_(True)

    def loss_of_step(draw: torch.Generator) -> Tensor:
        x = _pictures(images[torch.randint(len(images), (16,), generator=draw)], place) * 2 - 1
        with _mixed(place):
            with torch.no_grad():
                z = model.encode(x).float()
            y = model.decode(z + 0.05 / LATENT_SCALE * torch.randn_like(z)).float()
        return _difference(y, x)

    fit(model.decoder, loss_of_step, work / "decoder", steps, lr=1e-3, ema_decay=0.995)
    save_weights(model, "autoencoder")


def latents(work: Path, images: Tensor) -> Tensor:
    """Latents of unit variance of all training pictures and of their mirror images, (2N,4,16,16), kept on disk."""
    path = work / "latents.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    place = device()
    model = load_weights(Autoencoder(), "autoencoder").to(place)
    with torch.no_grad(), _mixed(place):
        rows = [
            model.encode(_pictures(chunk, place) * 2 - 1).float().cpu() * LATENT_SCALE
            for mirror in (False, True)
            for chunk in (images.flip(2) if mirror else images).split(64)
        ]
    torch.save(torch.cat(rows), path)
    return torch.cat(rows)


class Base(nn.Module):
    """The UNet and the text encoder, trained together."""

    def __init__(self):
        super().__init__()
        self.unet = UNet(UNET)
        self.text = TextEncoder()


def train_base(work: Path, steps: int = 4000, batch: int = 32) -> None:
    """Noise prediction; a tenth of the prompts is empty (for guidance), a twentieth the paper's insufficient one."""
    place = device()
    images, tokens = _load(work, "image", "tokens")
    clean = latents(work, images)
    tokens = tokens.long().repeat(2, 1)
    del images
    empty, insufficient = (torch.tensor(tokenize(text)) for text in ("", INSUFFICIENT_PROMPT))
    alphas = alphas_cumprod().to(place)
    model = _keeping(Base().to(place))

    def loss_of_step(draw: torch.Generator) -> Tensor:
        rows = torch.randint(len(clean), (batch,), generator=draw)
        chance = torch.rand(batch, 1, generator=draw)
        prompts = torch.where(chance < 0.1, empty, torch.where(chance < 0.15, insufficient, tokens[rows]))
        timesteps = torch.randint(1000, (batch,), generator=draw).to(place)
        x = clean[rows].to(place)
        noise = torch.randn_like(x)
        with _mixed(place):
            context = model.text(prompts.to(place))
            predicted = model.unet(add_noise(x, noise, timesteps, alphas), timesteps, context)
        return F.mse_loss(predicted.float(), noise)

    fit(model, loss_of_step, work / "base", steps, lr=1e-3)
    save_weights(model.unet, "unet")
    save_weights(model.text, "text_encoder")


def train_control(work: Path, hint: str, steps: int = 3000, batch: int = 24) -> None:
    """A ControlNet for `hint` (canny, depth or pose) on the locked base; half of the prompts are empty (paper, 3.3)."""
    place = device()
    images, tokens, hints = _load(work, "image", "tokens", hint)
    clean = latents(work, images)[: len(images)]
    del images
    empty = torch.tensor(tokenize(""))
    alphas = alphas_cumprod().to(place)
    unet = _keeping(load_weights(UNet(UNET), "unet").to(place))
    text = load_weights(TextEncoder(), "text_encoder").to(place)
    model = _keeping(ControlNet(UNET))
    copy_encoder(model, unet.state_dict())
    model.to(place)

    def loss_of_step(draw: torch.Generator) -> Tensor:
        rows = torch.randint(len(clean), (batch,), generator=draw)
        prompts = torch.where(torch.rand(batch, 1, generator=draw) < 0.5, empty, tokens[rows].long())
        # Cubic sampling (T2I-Adapter): most steps where the picture's layout is decided.
        timesteps = ((1 - torch.rand(batch, generator=draw) ** 3) * 1000).long().clamp(max=999).to(place)
        x = clean[rows].to(place)
        noise = torch.randn_like(x)
        noisy = add_noise(x, noise, timesteps, alphas)
        with _mixed(place):
            with torch.no_grad():
                context = text(prompts.to(place))
            residuals = model(noisy, timesteps, context, model.encode_hint(_pictures(hints[rows], place)))
            predicted = unet(noisy, timesteps, context, residuals=residuals)
        return F.mse_loss(predicted.float(), noise)

    fit(model, loss_of_step, work / f"control_{hint}", steps, lr=1e-3)
    save_weights(model, control_name(hint))


def train_segmenter(work: Path, steps: int = 500) -> None:
    """The judge of the evaluation: ground, figure or solid for every pixel, from renders and their reconstructions."""
    place = device()
    images, segments = _load(work, "image", "segments")
    autoencoder = load_weights(Autoencoder(), "autoencoder").to(place)
    model = Segmenter().to(place)

    def loss_of_step(draw: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (16,), generator=draw)
        x = _pictures(images[rows], place)
        classes = segments[rows].long().clamp(max=2).to(place)
        with _mixed(place):
            with torch.no_grad():
                half = autoencoder.encode(x[8:] * 2 - 1).float()
                half = autoencoder.decode(half + 0.1 / LATENT_SCALE * torch.randn_like(half)).float().clamp(-1, 1)
            x = torch.cat([x[:8], half * 0.5 + 0.5])
            logits = model((x + 0.02 * torch.randn_like(x)).clamp(0, 1))
        return F.cross_entropy(logits.float(), classes)

    fit(model, loss_of_step, work / "segmenter", steps, lr=3e-3, ema_decay=0.99)
    save_weights(model, "segmenter")
