"""M-LSD, which sees straight lines (Gu et al., "Towards light-weight and real-time line segment detection")."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from . import learned

MOST_LINES = 200
CELL = 2
"""The network's maps have one cell for so many pixels in each direction."""
CENTRE, MOVES = slice(0, 1), slice(1, 5)
"""Which maps say where lines have their middle, and how far their two ends are from there: x, y, x, y in cells."""


class Convolution(nn.Sequential):
    """MobileNet's convolution, normalization and ReLU6; with stride 2 it pads right and bottom only, as TensorFlow."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        padding = 0 if stride == 2 else kernel // 2
        conv = nn.Conv2d(channels, width, kernel, stride, padding, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(width), nn.ReLU6(inplace=True))
        self.stride = stride

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(F.pad(features, (0, 1, 0, 1)) if self.stride == 2 else features)


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen by `expansion`, filter each channel, narrow; what came in is added where it fits."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        widen = () if expansion == 1 else (Convolution(channels, hidden, 1),)
        narrow = (nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width))
        self.conv = nn.Sequential(*widen, Convolution(hidden, hidden, 3, stride, hidden), *narrow)
        self.adds = stride == 1 and channels == width

    def forward(self, features: Tensor) -> Tensor:
        return features + self.conv(features) if self.adds else self.conv(features)


class Backbone(nn.Module):
    """MobileNetV2 up to its 96 channels: (B,4,H,W) to five maps of H/2, H/4, H/8, H/16, H/16."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))
    TAPS = (1, 3, 6, 10, 13)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [Convolution(4, 32, 3, 2)]
        channels = 32
        for expansion, width, count, stride in self.STAGES:
            for i in range(count):
                layers.append(InvertedResidual(channels, width, 1 if i else stride, expansion))
                channels = width
        self.features = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> list[Tensor]:
        taps, features = [], image
        for i, layer in enumerate(self.features):
            features = layer(features)
            if i in self.TAPS:
                taps.append(features)
        return taps


def _conv(channels: int, width: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    padding = kernel // 2 * dilation
    conv = nn.Conv2d(channels, width, kernel, padding=padding, dilation=dilation)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


class Join(nn.Module):
    """A finer and a coarser map, 64 channels each after a 1x1 convolution, side by side at the finer one's size."""

    def __init__(self, fine: int, coarse: int) -> None:
        super().__init__()
        self.conv1 = _conv(coarse, 64, 1)
        self.conv2 = _conv(fine, 64, 1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        fine, coarse = self.conv2(fine), self.conv1(coarse)
        if coarse.shape != fine.shape:
            coarse = F.interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=True)
        return torch.cat([fine, coarse], 1)


class Refine(nn.Module):
    """128 channels to 64, with a residual convolution before."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = _conv(128, 128, 3)
        self.conv2 = _conv(128, 64, 3)

    def forward(self, features: Tensor) -> Tensor:
        return self.conv2(features + self.conv1(features))


class Predict(nn.Module):
    """64 channels to the 16 maps of which the last nine matter to us."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = _conv(64, 64, 3, dilation=5)
        self.conv2 = _conv(64, 64, 3)
        self.conv3 = nn.Conv2d(64, 16, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.conv3(self.conv2(self.conv1(features)))


class MLSD(nn.Module):
    """Nine maps (B,9,H/2,W/2) of RGB and a plane of ones (B,4,H,W), in -1..1; keys as in mlsd_large_512_fp32.pth.

    Map 0 has the logits of a line's middle, maps 1 to 4 the moves to its ends. Sides are multiples of 16. Source:
    navervision/mlsd; its PyTorch port lihaoweicv/mlsd_pytorch, models/mbv2_mlsd_large.py.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.block15, self.block16 = Join(64, 96), Refine()
        self.block17, self.block18 = Join(32, 64), Refine()
        self.block19, self.block20 = Join(24, 64), Refine()
        self.block21, self.block22 = Join(16, 64), Refine()
        self.block23 = Predict()

    def forward(self, image: Tensor) -> Tensor:
        half, quarter, eighth, sixteenth, deep = self.backbone(image)
        features = self.block16(self.block15(sixteenth, deep))
        features = self.block18(self.block17(eighth, features))
        features = self.block20(self.block19(quarter, features))
        features = self.block22(self.block21(half, features))
        return self.block23(features)[:, 7:]


def build(path: Path) -> nn.Module:
    """M-LSD with the weights of mlsd_large_512_fp32.pth. Raises AnnotatorError for another file."""
    return learned.build(MLSD, path)


@torch.inference_mode()
def lines(network: nn.Module, image: np.ndarray, score_threshold: float, dist_threshold: float) -> list[np.ndarray]:
    """The lines (N,4) of each of RGB images (B,H,W,3), or of one, whose sides are multiples of 64: see `segments`."""
    picture = learned.to_tensor(image, network) * 255
    planes = F.pad(picture, (0, 0, 0, 0, 0, 1), value=1.0) / 127.5 - 1
    planes = planes.contiguous(memory_format=torch.channels_last)  # faster by a fifth on a CPU
    maps = network(planes).float().cpu()
    return [segments(one[None], score_threshold, dist_threshold) for one in maps]


def segments(maps: Tensor, score_threshold: float, dist_threshold: float) -> np.ndarray:
    """The lines (N,4) in pixels, x, y of one end and x, y of the other, best first, of M-LSD's maps (1,9,h,w)."""
    score = maps[:, CENTRE].sigmoid()
    peaks = score * (F.max_pool2d(score, 3, stride=1, padding=1) == score)
    best, places = peaks.flatten().topk(min(MOST_LINES, peaks.numel()))
    x, y = places % maps.shape[-1], places // maps.shape[-1]
    moves = rearrange(maps[0, MOVES], "ends h w -> (h w) ends")[places]
    length = (moves[:, :2] - moves[:, 2:]).norm(dim=1)
    ends = torch.stack([x, y, x, y], 1) + moves.double()
    return (CELL * ends)[(best > score_threshold) & (length > dist_threshold)].numpy()
