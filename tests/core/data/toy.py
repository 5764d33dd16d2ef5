"""Pictures, prompts and encoders so small that a dataset is cached in no time, and that say how often they ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zeroconv.controlnet_core.data.caching import Annotate, CachingProgress, make
from zeroconv.controlnet_core.data.sources import Item
from zeroconv.controlnet_core.data.writer import CachingOptions

COLOURS = torch.tensor([[0.8, -0.3, 0.1], [0.2, 0.9, -0.4], [-0.5, 0.2, 0.7], [0.3, 0.3, 0.3]])
PROMPTS = ("", "a cat", "a dog beside a house")
TWO_SIZES = ((64, 64), (48, 80))
SMALL = CachingOptions(resolution=64, batch_size=2)


class Encoders:
    """A VAE whose latents are a linear map of mean colours, and a text encoder that makes longer prompts longer."""

    def __init__(self, pooled: bool = False, factor: float = 1.0):
        self.pooled, self.factor = pooled, factor
        self.pictures, self.prompts = 0, Counter[str]()

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        assert pictures.dtype == torch.float32
        assert 0 <= pictures.min() and pictures.max() <= 1
        self.pictures += len(pictures)
        return latents_of(pictures) * self.factor

    def encode_prompt(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        self.prompts[prompt] += 1
        context = context_of(prompt)
        return context, context.mean(0) if self.pooled else None


def latents_of(pictures: Tensor) -> Tensor:
    small = torch.nn.functional.avg_pool2d(pictures, 8)
    return torch.einsum("bchw,dc->bdhw", small - 0.5, COLOURS)


def context_of(prompt: str) -> Tensor:
    """(4,8), and (6,8) for prompts of more than 10 letters."""
    generator = torch.Generator().manual_seed(sum(map(ord, prompt)))
    return torch.randn(6 if len(prompt) > 10 else 4, 8, generator=generator)


def array(seed: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Squares of 8x8 pixels in random colours, uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=0).repeat(8, axis=1)


def items(count: int, sizes: Sequence[tuple[int, int]] = TWO_SIZES) -> list[Item]:
    """Items of these sizes in turn, of three prompts in turn, with hints."""
    return [
        Item(f"{i}.png", array(i, *sizes[i % len(sizes)]), PROMPTS[i % 3], array(1000 + i, *sizes[i % len(sizes)]))
        for i in range(count)
    ]


def save(path: Path, picture: np.ndarray) -> Path:
    """A picture file, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return path


def cache(
    folder: Path,
    given: Sequence[Item],
    encoders: Encoders | None = None,
    options: CachingOptions = SMALL,
    annotate: Annotate | None = None,
) -> CachingProgress:
    """A whole run of caching; gives where it ended."""
    encoders = encoders or Encoders()
    *_, last = make(folder, given, encoders.encode_pictures, encoders.encode_prompt, annotate, options)
    return last


def as_tensor(picture: np.ndarray) -> Tensor:
    """(H,W,3) uint8 as (1,3,H,W) in [0,1]."""
    return torch.from_numpy(picture.copy()).movedim(-1, 0)[None].float() / 255
