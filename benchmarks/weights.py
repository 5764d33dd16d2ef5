"""Seeded random weights of the published networks, as files with the published names, keys and precision.

They come out of controlnet-aux's networks, which load the published files strictly: what loads these loads those. It
has no MangaLines: that one is ours, whose keys and shapes are its authors' (tests/annotators/test_manga.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def seeded(network: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Random weights for a network, the same for the same seed, that keep its activations at about the same size."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, value in network.state_dict().items():
        if value.dim() == 4:
            weights[key] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        elif key.endswith("running_var"):
            weights[key] = 0.5 + torch.rand(value.shape, generator=generator)
        elif value.dim() == 1:
            around = 1.0 if key.endswith("weight") else 0.0
            weights[key] = around + 0.1 * torch.randn(value.shape, generator=generator)
        else:
            weights[key] = value
    return weights


def _hed() -> dict[str, Tensor]:
    from controlnet_aux.hed import ControlNetHED_Apache2

    weights = seeded(ControlNetHED_Apache2())
    # Logits of hundreds would make every edge black or white.
    weights |= {key: value * 0.03 for key, value in weights.items() if "projection" in key}
    return {key: value.half() for key, value in weights.items()}


def _lineart(seed: int) -> dict[str, Tensor]:
    from controlnet_aux.lineart import Generator

    return seeded(Generator(3, 1, 3), seed)


def anime_generator() -> nn.Module:
    """Their anime generator, built as their detector builds it."""
    from controlnet_aux.lineart_anime import UnetGenerator

    norm: Any = nn.InstanceNorm2d
    return UnetGenerator(3, 1, 8, 64, norm_layer=norm)


def _anime() -> dict[str, Tensor]:
    return {f"module.{key}": value for key, value in seeded(anime_generator()).items()}


def _mlsd() -> dict[str, Tensor]:
    from controlnet_aux.mlsd.models.mbv2_mlsd_large import MobileV2_MLSD_Large

    weights = seeded(MobileV2_MLSD_Large())
    bias = weights["block23.conv3.bias"].clone()
    bias[7] -= 12.0  # so that some scores are above the threshold and some below
    return weights | {"block23.conv3.bias": bias}


def _teed() -> dict[str, Tensor]:
    from controlnet_aux.teed.ted import TED

    weights = seeded(TED())
    # As for HED: what becomes a logit is small.
    last = ("up_block_1.features.2", "up_block_2.features.2", "up_block_3.features.5", "block_cat")
    return weights | {key: value * 0.1 for key, value in weights.items() if key.startswith(last)}


def manga() -> dict[str, Tensor]:
    """Those of the manga lines: blocks that add little to what they read, and an answer about the middle of 0..255."""
    from ..annotators.networks.manga import MangaLines

    weights = seeded(MangaLines())
    weights |= {key: 0.3 * value for key, value in weights.items() if ".residual." in key and value.dim() == 4}
    last = "conv15.model.2."
    return weights | {f"{last}weight": 7e-4 * weights[f"{last}weight"], f"{last}bias": weights[f"{last}bias"] + 244}


FILES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "ControlNetHED.pth": _hed,
    "sk_model.pth": functools.partial(_lineart, 0),
    "sk_model2.pth": functools.partial(_lineart, 1),
    "netG.pth": _anime,
    "mlsd_large_512_fp32.pth": _mlsd,
    "5_model.pth": _teed,
    "Anyline/MTEED.pth": _teed,
    "erika.pth": manga,
}


def write(folder: Path, names: list[str] | None = None) -> None:
    """Write the files of these names, or all, into a folder. Needs controlnet-aux."""
    for name in FILES if names is None else names:
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save(FILES[name](), folder / name)
