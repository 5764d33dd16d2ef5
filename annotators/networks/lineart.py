"""Two generators of line drawings: informative drawings of photographs, fine or coarse, and sketches in anime style."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import learned


class Residual(nn.Module):
    """(B,C,H,W) plus what two 3x3 convolutions make of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = (nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width))
        again = (nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width))
        self.conv_block = nn.Sequential(*layers, nn.ReLU(inplace=True), *again)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.conv_block(features)


class LineartGenerator(nn.Module):
    """Dark lines on white (B,1,H,W) of RGB (B,3,H,W), both 0..1; keys as in sk_model.pth and sk_model2.pth.

    Source: Chan, Durand and Isola, "Learning to generate line drawings that convey geometry and semantics";
    carolineec/informative-drawings, model.py, with the 3 residual blocks of the published weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model0 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(3, 64, 7), *_norm_relu(64))
        self.model1 = nn.Sequential(
            *(nn.Conv2d(64, 128, 3, 2, 1), *_norm_relu(128)), *(nn.Conv2d(128, 256, 3, 2, 1), *_norm_relu(256))
        )
        self.model2 = nn.Sequential(*(Residual(256) for _ in range(3)))
        self.model3 = nn.Sequential(
            *(nn.ConvTranspose2d(256, 128, 3, 2, 1, output_padding=1), *_norm_relu(128)),
            *(nn.ConvTranspose2d(128, 64, 3, 2, 1, output_padding=1), *_norm_relu(64)),
        )
        self.model4 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(64, 1, 7), nn.Sigmoid())

    def forward(self, image: Tensor) -> Tensor:
        return self.model4(self.model3(self.model2(self.model1(self.model0(image)))))


def _norm_relu(width: int) -> tuple[nn.Module, nn.Module]:
    return nn.InstanceNorm2d(width), nn.ReLU(inplace=True)


class Level(nn.Module):
    """One level of the anime generator: halve, go through `inner`, double again, and keep what came in beside it.

    (B,outer,H,W) to (B,2*outer,H,W). The innermost level has no `inner`.
    """

    def __init__(self, outer: int, width: int, inner: Level | None) -> None:
        super().__init__()
        down = (nn.LeakyReLU(0.2), nn.Conv2d(outer, width, 4, 2, 1))
        middle = () if inner is None else (nn.InstanceNorm2d(width), inner)
        read = width if inner is None else 2 * width
        up = (nn.ReLU(inplace=True), nn.ConvTranspose2d(read, outer, 4, 2, 1), nn.InstanceNorm2d(outer))
        self.model = nn.Sequential(*down, *middle, *up)

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([features, self.model(features)], 1)


class AnimeGenerator(nn.Module):
    """Dark lines on white (B,1,H,W) of RGB (B,3,H,W), both -1..1, sides multiples of 256; keys as in netG.pth.

    Source: Mukosame/Anime2Sketch, model.py: pix2pix's U-Net of eight levels with instance normalization.
    """

    def __init__(self) -> None:
        super().__init__()
        level = None
        for outer, width in ((512, 512), (512, 512), (512, 512), (512, 512), (256, 512), (128, 256), (64, 128)):
            level = Level(outer, width, level)
        outermost = (nn.Conv2d(3, 64, 4, 2, 1), level, nn.ReLU(inplace=True), nn.ConvTranspose2d(128, 1, 4, 2, 1))
        # Wrapped as its levels are: the published keys start with "model.model.".
        self.model = nn.ModuleDict({"model": nn.Sequential(*outermost, nn.Tanh())})

    def forward(self, image: Tensor) -> Tensor:
        return self.model["model"](image)


def build(path: Path) -> nn.Module:
    """The generator with the weights of sk_model.pth (fine) or sk_model2.pth (coarse); AnnotatorError for others."""
    return learned.build(LineartGenerator, path)


def build_anime(path: Path) -> nn.Module:
    """The anime generator with the weights of netG.pth. Raises AnnotatorError for another file."""
    return learned.build(AnimeGenerator, path)


@torch.inference_mode()
def drawing(network: nn.Module, image: np.ndarray) -> np.ndarray:
    """What a generator draws, (B,H,W) float32, lines dark, of RGB images (B,H,W,3), or of one, with sides of 64 n.

    Raises AnnotatorError for other sizes.
    """
    return learned.to_maps(network(learned.to_tensor(image, network)), image)


@torch.inference_mode()
def anime_drawing(network: nn.Module, image: np.ndarray) -> np.ndarray:
    """As `drawing`, by the anime generator, of an image whose sides are multiples of 256."""
    return learned.to_maps(network(learned.to_tensor(image, network) * 2 - 1), image) / 2 + 0.5
