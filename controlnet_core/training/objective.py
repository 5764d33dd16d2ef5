"""What is learned: the draws of a step, its target, and its loss (paper, equation 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..diffusion import velocity
from .options import TrainingOptions


@dataclass(frozen=True)
class Draws:
    """The chance in one pass over B examples: timesteps (B,), noise (B,4,h,w), and whose prompt is left out (B,)."""

    timesteps: Tensor
    noise: Tensor
    empty_prompts: Tensor

    def part(self, which: slice) -> Draws:
        """The draws of some of the examples."""
        return Draws(self.timesteps[which], self.noise[which], self.empty_prompts[which])


def draw(options: TrainingOptions, number: int, shape: torch.Size, timesteps: int = 1000) -> Draws:
    """The draws of pass `number` over latents of `shape` (B,4,h,w), on the CPU.

    They depend on the seed and the number alone: there is no other state of chance in a training, so that one that is
    resumed, or split over processes, draws what it would have drawn.
    """
    generator = torch.Generator().manual_seed(
        int(np.random.SeedSequence([options.seed, number]).generate_state(1, np.uint64)[0] >> 1)
    )
    u = torch.rand(shape[0], generator=generator)
    if options.timesteps == "cubic":  # most of them where the layout is decided (TencentARC/T2I-Adapter)
        u = 1 - u**3
    return Draws(
        (u * timesteps).long().clamp(max=timesteps - 1),
        torch.randn(shape, generator=generator),
        torch.rand(shape[0], generator=generator) < options.empty_prompts,
    )


def target(prediction: str, latents: Tensor, noise: Tensor, timesteps: Tensor, alphas: Tensor) -> Tensor:
    """What the UNet shall predict: the noise ("eps"), or the velocity ("v")."""
    return noise if prediction == "eps" else velocity(latents, noise, timesteps, alphas)


def weights(options: TrainingOptions, timesteps: Tensor, alphas: Tensor) -> Tensor:
    """Weight of each example's loss (B,): 1, or min-SNR's min(SNR, gamma) / SNR, for v / (SNR + 1)."""
    if options.min_snr == 0:
        return torch.ones(len(timesteps), device=timesteps.device)
    a = alphas[timesteps]
    snr = a / (1 - a)
    return snr.clamp(max=options.min_snr) / (snr if options.prediction == "eps" else snr + 1).clamp(min=1e-8)


def loss(predicted: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """The mean over the batch of each example's weighted mean squared error, in fp32."""
    return ((predicted.float() - wanted.float()).square().mean((1, 2, 3)) * weight).mean()
