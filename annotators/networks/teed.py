"""TEED, a tiny network that sees soft edges: Soria et al., "Tiny and Efficient Model for the Edge Detection
Generalization" (xavysp/TEED, 58,910 weights)."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import learned


class Smish(nn.Module):
    """TEED's activation: x tanh(log(1 + sigmoid(x)))."""

    def forward(self, features: Tensor) -> Tensor:
        """From any shape to the same."""
        return features * torch.log1p(features.sigmoid()).tanh()


class Block(nn.Module):
    """Two 3x3 convolutions, the first with a `stride`: (B,C,H,W) to (B,width,H/stride,W/stride)."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.smish = Smish()

    def forward(self, features: Tensor) -> Tensor:
        """Without an activation at its end."""
        return self.conv2(self.smish(self.conv1(features)))


class Dense(nn.Module):
    """The mean of (B,width,H,W) and two convolutions over (B,C,H,W)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        # The first has the margin of both.
        first, second = nn.Conv2d(channels, width, 3, padding=2), nn.Conv2d(width, width, 3)
        self.denselayer1 = nn.Sequential(OrderedDict(conv1=first, smish1=Smish(), conv2=second))
        self.smish = Smish()

    def forward(self, features: Tensor, beside: Tensor) -> Tensor:
        """From (B,C,H,W) and (B,width,H,W) to (B,width,H,W)."""
        return (self.denselayer1(self.smish(features)) + beside) / 2


class Side(nn.Module):
    """A convolution of one pixel, to another width and perhaps half the size."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 1, stride)

    def forward(self, features: Tensor) -> Tensor:
        """From (B,C,H,W) to (B,width,H/stride,W/stride)."""
        return self.conv(features)


class Enlarge(nn.Module):
    """Edge logits (B,1,2**doublings*H,2**doublings*W) of features (B,C,H,W)."""

    def __init__(self, channels: int, doublings: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        kernel = 2**doublings
        for width in [16] * (doublings - 1) + [1]:
            double = nn.ConvTranspose2d(width, width, kernel, stride=2, padding=kernel // 2 - 1)
            layers += [nn.Conv2d(channels, width, 1), Smish(), double]
            channels = width
        self.features = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """As the class says."""
        return self.features(features)


class Fusion(nn.Module):
    """One map (B,1,H,W) of three (B,3,H,W): convolutions that keep them apart, and their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.DWconv1 = nn.Conv2d(3, 24, 3, padding=1, groups=3)
        self.DWconv2 = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.smish = Smish()

    def forward(self, maps: Tensor) -> Tensor:
        """As the class says."""
        first = self.DWconv1(self.smish(maps))
        return self.smish((self.DWconv2(self.smish(first)) + first).sum(1, keepdim=True))


class TEED(nn.Module):
    """Edge logits (B,1,H,W), four, of RGB (B,3,H,W) in 0..255 with sides of 4 n; keys as in the published file."""

    def __init__(self) -> None:
        super().__init__()
        self.block_1 = Block(3, 16, stride=2)
        self.block_2 = Block(16, 32)
        self.dblock_3 = Dense(32, 48)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.side_1 = Side(16, 32, stride=2)
        self.pre_dense_3 = Side(32, 48, stride=1)
        self.up_block_1 = Enlarge(16, 1)
        self.up_block_2 = Enlarge(32, 1)
        self.up_block_3 = Enlarge(48, 2)
        self.block_cat = Fusion()
        self.smish = Smish()

    def forward(self, image: Tensor) -> list[Tensor]:
        """Those of the three blocks, and those that are made of them."""
        fine = self.smish(self.block_1(image))
        middle = self.block_2(fine)
        halved = self.maxpool(middle)
        coarse = self.dblock_3(halved + self.side_1(fine), self.pre_dense_3(halved))
        maps = [self.up_block_1(fine), self.up_block_2(middle), self.up_block_3(coarse)]
        return [*maps, self.block_cat(torch.cat(maps, dim=1))]


def build(path: Path) -> nn.Module:
    """TEED with the weights of its 5_model.pth, or of MTEED.pth. Raises AnnotatorError for another file."""
    return learned.build(TEED, path)


@torch.inference_mode()
def edges(network: nn.Module, image: np.ndarray) -> np.ndarray:
    """Soft edges (B,H,W) float32, 0..1, of RGB images (B,H,W,3), or of one, whose sides are multiples of 64.

    The mean of all four maps, as in the published preprocessors (huggingface/controlnet_aux, teed); the authors' own
    demo looks at blue, green, red, with their means taken out, and at the last map alone. Raises AnnotatorError for
    other sizes.
    """
    maps = torch.stack(network(learned.to_tensor(image, network) * 255))
    return learned.to_maps(maps.mean(0).float().sigmoid(), image)
