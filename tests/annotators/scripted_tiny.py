"""Tiny networks with seeded random weights as TorchScript files, which ask and answer as the published ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WHOLE_POSE, LAMA = "dw-ll_ucoco_384_bs5.torchscript.pt", "big-lama.pt"


class WholePose(nn.Module):
    """DWPose without its size: five crops (5,3,384,288) to rows of cells (5,133,576) and (5,133,768)."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(3, 133, 24, stride=16, padding=4)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """As the class says; its first picture decides nothing about the others."""
        seen = self.look(crops).reshape(5, 133, 24, 18)  # five crops, no fewer
        across, down = seen.amax(2), seen.amax(3)
        return F.interpolate(across, 576, mode="linear") / 3, F.interpolate(down, 768, mode="linear") / 3


def whole_pose(folder: Path) -> Path:
    """The path of DWPose's file."""
    return _save(WholePose(), folder / WHOLE_POSE, torch.zeros(5, 3, 384, 288))


class Lama(nn.Module):
    """LaMa without its size: the picture, and in its hole what convolutions make of it at an eighth of its size."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 16, 8, stride=8)
        self.up = nn.ConvTranspose2d(16, 3, 8, stride=8)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """From (1,3,H,W) in 0..1 and (1,1,H,W), 1 in the hole, to (1,3,H,W)."""
        features = self.down(torch.cat([image * (1 - mask) * 4 - 2, mask], dim=1))
        features = (features + 4 * features.mean((2, 3), keepdim=True)).relu()  # what is around is seen everywhere
        return mask * self.up(4 * features).sigmoid() + (1 - mask) * image


def lama(folder: Path) -> Path:
    """The path of LaMa's file."""
    return _save(Lama(), folder / LAMA, torch.zeros(1, 3, 64, 64), torch.zeros(1, 1, 64, 64))


def _save(network: nn.Module, path: Path, *inputs: Any) -> Path:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            size = 1 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.1
            weight.copy_(torch.randn(weight.shape, generator=generator) * size)
    torch.jit.save(torch.jit.trace(network.eval(), inputs), path)
    return path
