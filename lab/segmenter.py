"""A small network that names every pixel ground, figure or solid: the judge of the lab's evaluation.

It sees pictures alone, never a hint, and has learned from renders.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = ("ground", "figure", "solid")


def _layer(channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1), nn.GroupNorm(8, out_channels), nn.SiLU()
    )


class Segmenter(nn.Module):
    """Pictures (B,3,H,W) in [0,1], sides multiples of 16 -> logits (B,3,H,W) over `CLASSES`."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.patches = nn.PixelUnshuffle(2)
        self.first = nn.Sequential(_layer(12, width), _layer(width, width))
        self.down = nn.ModuleList(
            nn.Sequential(_layer(width, width, stride=2), _layer(width, width), _layer(width, width)) for _ in range(3)
        )
        self.up = nn.ModuleList(nn.Sequential(_layer(2 * width, width), _layer(width, width)) for _ in range(3))
        self.last = nn.Conv2d(width, 4 * len(CLASSES), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(self.patches(x * 2 - 1))
        skips = []
        for down in self.down:
            skips.append(h)
            h = down(h)
        for up in self.up:
            skip = skips.pop()
            h = up(torch.cat([F.interpolate(h, size=skip.shape[2:], mode="nearest"), skip], dim=1))
        return F.pixel_shuffle(self.last(h), 2)
