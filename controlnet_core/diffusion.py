"""The noise schedule of SD and a DDIM sampler: what the core needs to train and apply a control with no host."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
"""(noisy latent (B,4,H,W), timestep (B,)) -> prediction, guidance included."""


def alphas_cumprod(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Signal power left at each timestep, (steps,) fp32: SD's "scaled linear" schedule (ldm, make_beta_schedule)."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def zero_terminal_snr(alphas: Tensor) -> Tensor:
    """The schedule `alphas` (T,) moved so that its last timestep holds noise alone (Lin et al., 2023, algorithm 1)."""
    root = alphas.double().sqrt()
    return (((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2).float()


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas: Tensor) -> Tensor:
    """Noisy latents at `timesteps` (B,): sqrt(a) x + sqrt(1 - a) e."""
    a = alphas[timesteps][:, None, None, None].to(latents)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def velocity(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas: Tensor) -> Tensor:
    """The target of v-prediction models: sqrt(a) e - sqrt(1 - a) x (Salimans and Ho, 2022)."""
    a = alphas[timesteps][:, None, None, None].to(latents)
    return a.sqrt() * noise - (1 - a).sqrt() * latents


@torch.no_grad()
def sample_ddim(predict: Predict, noise: Tensor, alphas: Tensor, steps: int = 20, prediction: str = "eps") -> Tensor:
    """Latents from `noise` (B,4,H,W) by deterministic DDIM (Song et al., 2021) with evenly spaced timesteps.

    `prediction` is what `predict` gives: "eps", the noise, or "v", the velocity.
    """
    timesteps = torch.linspace(len(alphas) - 1, 0, steps + 1).round().long().tolist()
    x = noise
    for t, following in pairwise(timesteps):
        found = predict(x, torch.full((len(x),), t, device=x.device))
        a, b = alphas[t].item(), alphas[following].item() if following > 0 else 1.0
        if prediction == "v":
            clean, eps = a**0.5 * x - (1 - a) ** 0.5 * found, a**0.5 * found + (1 - a) ** 0.5 * x
        else:
            clean, eps = (x - (1 - a) ** 0.5 * found) / a**0.5, found
        x = b**0.5 * clean + (1 - b) ** 0.5 * eps
    return x


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: uncond + scale (cond - uncond)."""
    return uncond + scale * (cond - uncond)
