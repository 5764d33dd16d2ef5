"""HED, which sees soft edges.

The network is lllyasviel's retraining of Xie and Tu's "Holistically-Nested Edge Detection" (ControlNetHED.pth, which
reads RGB): VGG's five blocks, each with a map of edges of its own, and the mean of the five maps.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import learned


class Block(nn.Module):
    """3x3 convolutions with ReLU, and the edges that they see: (B,C,H,W) to (B,width,H,W) and logits (B,1,H,W)."""

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(nn.Conv2d(width if i else channels, width, 3, padding=1) for i in range(depth)))
        self.projection = nn.Conv2d(width, 1, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            features = F.relu(conv(features), inplace=True)
        return features, self.projection(features)


class HED(nn.Module):
    """Edge logits (B,1,H/s,W/s), s = 1, 2, 4, 8, 16, of RGB (B,3,H,W) in 0..255; keys as in ControlNetHED.pth."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.block1 = Block(3, 64, 2)
        self.block2 = Block(64, 128, 2)
        self.block3 = Block(128, 256, 3)
        self.block4 = Block(256, 512, 3)
        self.block5 = Block(512, 512, 3)

    def forward(self, image: Tensor) -> list[Tensor]:
        features, logits = self.block1(image - self.norm)
        maps = [logits]
        for block in (self.block2, self.block3, self.block4, self.block5):
            features, logits = block(F.max_pool2d(features, 2))
            maps.append(logits)
        return maps


def build(path: Path) -> nn.Module:
    """HED with the weights of ControlNetHED.pth. Raises AnnotatorError for another file."""
    return learned.build(HED, path)


@torch.inference_mode()
def edges(network: nn.Module, image: np.ndarray) -> np.ndarray:
    """Soft edges (B,H,W) float32, 0..1, of RGB images (B,H,W,3), or of one, whose sides are multiples of 64.

    Raises AnnotatorError for other sizes.
    """
    pixels = learned.to_tensor(image, network) * 255
    size = pixels.shape[-2:]
    maps = [F.interpolate(logits, size, mode="bilinear", align_corners=False) for logits in network(pixels)]
    return learned.to_maps(torch.stack(maps).mean(0).float().sigmoid(), image)
