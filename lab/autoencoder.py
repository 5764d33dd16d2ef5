"""The embedded autoencoder: pictures to latents of an eighth of their size, 4 channels, and back.

Everything happens on patches of 4x4 pixels and larger, where two CPU cores are fast. Latents have SD1.x's convention:
times 0.18215 they have unit variance, which the host's SD1.5 latent format expects.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_SCALE = 0.18215
"""Latents times this have unit variance, as in SD1.x."""

PATCH = 4


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class Autoencoder(nn.Module):
    """Pictures (B,3,H,W) in [-1,1], H and W multiples of 8, to latents (B,4,H/8,W/8), and back."""

    def __init__(self, fine: int = 64, coarse: int = 128):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(PATCH),
            nn.Conv2d(3 * PATCH**2, fine, 3, padding=1),
            _Residual(fine),
            _Residual(fine),
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1),
            _Residual(coarse),
            _Residual(coarse),
            nn.Conv2d(coarse, 4, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(4, coarse, 3, padding=1),
            _Residual(coarse),
            _Residual(coarse),
            _Residual(coarse),
            nn.Upsample(scale_factor=2.0, mode="nearest"),
            nn.Conv2d(coarse, fine, 3, padding=1),
            _Residual(fine),
            _Residual(fine),
            _Residual(fine),
            nn.SiLU(),
            nn.Conv2d(fine, 3 * PATCH**2, 3, padding=1),
            nn.PixelShuffle(PATCH),
        )

    def encode(self, x: Tensor) -> Tensor:
        """The latents of pictures."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """The pictures of latents, about [-1,1]."""
        return self.decoder(z)


@torch.no_grad()
def scale_latents(model: Autoencoder, factor: float) -> None:
    """Multiply the latents by `factor` in place, the decoder undoing it: nothing that `model` reconstructs changes."""
    out, back = model.encoder[-1], model.decoder[0]
    assert isinstance(out, nn.Conv2d) and isinstance(back, nn.Conv2d)
    out.weight *= factor
    out.bias *= factor  # type: ignore[operator]
    back.weight /= factor
