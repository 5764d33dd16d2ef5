"""What is learned: the draws of a step, its target, and its loss (paper, equation 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..diffusion import velocity, zero_terminal_snr
from .options import OptionsError, TrainingOptions


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
    # The range is told in thousandths of the schedule, whose length is 1000 but for a small world's.
    first, end = options.min_timestep * timesteps // 1000, options.max_timestep * timesteps // 1000
    noise = torch.randn(shape, generator=generator)
    empty_prompts = torch.rand(shape[0], generator=generator) < options.empty_prompts
    if options.offset_noise:  # drawn last: without it, everything is as it was
        noise = noise + options.offset_noise * torch.randn(*shape[:2], 1, 1, generator=generator)
    return Draws((first + u * (end - first)).long().clamp(max=end - 1), noise, empty_prompts)


def noise_schedule(options: TrainingOptions, alphas: Tensor) -> Tensor:
    """The signal power (T,) that is trained with: `alphas`, or with `zero_terminal_snr` rescaled to end at 0.

    The square roots are shifted to 0 at the end and stretched so that the first stays as it is (Lin et al., 2023,
    algorithm 1). Raises OptionsError for prediction eps, which says nothing where there is noise alone.
    """
    if not options.zero_terminal_snr:
        return alphas
    if options.prediction != "v":
        raise OptionsError(
            "zero_terminal_snr goes with a model of prediction v, found eps: turn it off, or choose such a model"
        )
    return zero_terminal_snr(alphas)


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


def loss(predicted: Tensor, wanted: Tensor, weight: Tensor, huber: float = 0.0) -> Tensor:
    """The mean over the batch of each example's weighted mean squared error, in fp32.

    With `huber` c an error d counts as 2c (sqrt(d^2 + c^2) - c) in place of d^2: the same where it is small, and linear
    where it is large (kohya-ss/sd-scripts, library/train_util.py, conditional_loss, loss_type "huber").
    """
    errors = (predicted.float() - wanted.float()).square()
    if huber:
        errors = 2 * huber * ((errors + huber**2).sqrt() - huber)
    return (errors.mean((1, 2, 3)) * weight).mean()
