"""A network that sees the ink lines of manga and leaves screens and shades out: Li, Liu and Wong, "Deep Extraction of
Manga Structural Lines" (ljsabc/MangaLineExtraction_PyTorch): residual blocks down to a sixteenth, and up again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..images import to_bytes
from . import learned

WIDTHS, DEPTHS = (24, 48, 96, 192, 384), (2, 3, 5, 7, 12)
"""Channels and blocks at each size, from the picture's own to a sixteenth."""


class Convolution(nn.Module):
    """A convolution of what is normed and rectified: (B,C,H,W) to (B,width,H/stride,W/stride), or doubled."""

    def __init__(self, channels: int, width: int, size: int = 3, stride: int = 1, doubles: bool = False) -> None:
        super().__init__()
        first = (nn.BatchNorm2d(channels, eps=1e-3), nn.LeakyReLU(0.2))
        layers = (*first, nn.Conv2d(channels, width, size, stride, size // 2))
        self.model = nn.Sequential(*layers, *_doubled(doubles))

    def forward(self, features: Tensor) -> Tensor:
        """As the class says."""
        return self.model(features)


class Shortcut(nn.Module):
    """What comes in as it must be to be added: the same, or by a convolution of one pixel."""

    def __init__(self, channels: int, width: int, stride: int, doubles: bool) -> None:
        super().__init__()
        same = channels == width and stride == 1
        layers = () if same else (nn.Conv2d(channels, width, 1, stride), *_doubled(doubles))
        self.model = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """As the class says."""
        return self.model(features)


class Block(nn.Module):
    """Two convolutions, added to what they read."""

    def __init__(self, channels: int, width: int, stride: int = 1, doubles: bool = False) -> None:
        super().__init__()
        self.conv1 = Convolution(channels, width, stride=stride, doubles=doubles)
        self.residual = Convolution(width, width)
        self.shortcut = Shortcut(channels, width, stride, doubles)

    def forward(self, features: Tensor) -> Tensor:
        """From (B,C,H,W) to (B,width,H/stride,W/stride), or doubled."""
        return self.shortcut(features) + self.residual(self.conv1(features))


class Stage(nn.Module):
    """Blocks one after the other."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.model = nn.Sequential(*blocks)

    def forward(self, features: Tensor) -> Tensor:
        """From one size and width to the next."""
        return self.model(features)


class MangaLines(nn.Module):
    """Dark lines on light (B,1,H,W) of a grey picture (B,1,H,W) with sides of 16 n, both about 0..255.

    Keys as in the published erika.pth.
    """

    def __init__(self) -> None:
        super().__init__()
        self.block0 = Stage([Block(1, WIDTHS[0]), Block(WIDTHS[0], WIDTHS[0])])
        for level in (1, 2, 3, 4):
            self.add_module(f"block{level}", _halving(WIDTHS[level - 1], WIDTHS[level], DEPTHS[level]))
            self.add_module(f"block{9 - level}", _doubling(WIDTHS[level], WIDTHS[level - 1], DEPTHS[level - 1]))
        self.block9 = Stage([Block(WIDTHS[0], 16), Block(16, 16)])
        self.conv15 = Convolution(16, 1, size=1)

    def forward(self, image: Tensor) -> Tensor:
        """As the class says."""
        found = [self.block0(image)]
        for level in (1, 2, 3, 4):
            found.append(self.get_submodule(f"block{level}")(found[-1]))
        features = found.pop()
        for level in (5, 6, 7, 8):
            features = found.pop() + self.get_submodule(f"block{level}")(features)
        return self.conv15(self.block9(features))


def _halving(channels: int, width: int, depth: int) -> Stage:
    """The last block halves."""
    widths = [channels] + [width] * (depth - 1)
    return Stage([Block(one, width, stride=1 + (i == depth - 1)) for i, one in enumerate(widths)])


def _doubling(channels: int, width: int, depth: int) -> Stage:
    """The first block doubles."""
    return Stage([Block(channels, width, doubles=True), *(Block(width, width) for _ in range(depth - 1))])


def _doubled(doubles: bool) -> tuple[nn.Module, ...]:
    return (nn.Upsample(scale_factor=2, mode="nearest"),) if doubles else ()


def build(path: Path) -> nn.Module:
    """The network with the weights of its erika.pth. Raises AnnotatorError for another file."""
    return learned.build(MangaLines, path)


@torch.inference_mode()
def ink(network: nn.Module, image: np.ndarray) -> np.ndarray:
    """Dark lines on light (B,H,W) float32, 0..1, of RGB images (B,H,W,3), or of one, whose sides are multiples of 64.

    The network was shown grey bytes. Raises AnnotatorError for other sizes.
    """
    import cv2

    pictures = image.reshape(-1, *image.shape[-3:])
    greys = np.stack([cv2.cvtColor(to_bytes(one), cv2.COLOR_RGB2GRAY) for one in pictures])
    seen = learned.to_tensor(np.repeat(greys[..., None], 3, axis=3), network)[:, :1]
    return learned.to_maps((network(seen * 255) / 255).clamp(0, 1), image)
