"""The user's own prompts and hints, of which samples are made beside those of the held-out pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..data.dataset import Batch, Dataset
from ..data.pictures import Crop, bucket, hint_of, size_of
from ..data.writer import EncodePrompt


@dataclass(frozen=True)
class ValidationPrompt:
    """A prompt, and a hint: its file, or (H,W,3) uint8."""

    prompt: str
    hint: Path | np.ndarray

    def batch(self, dataset: Dataset, encode: EncodePrompt) -> Batch:
        """What is sampled of it, a batch of one, in the size of the dataset's that is nearest to the hint's shape.

        Its latents are zeros, for there is no picture. `encode` is asked for a prompt that the dataset does not have.
        Raises PictureError for a hint that cannot be read.
        """
        full = size_of(self.hint)
        crop = Crop(full, bucket(*full, dataset.manifest.options["resolution"]))
        pixels = torch.from_numpy(hint_of(self.hint, crop))
        width, height = crop.size
        context, pooled = dataset.text_embedding(self.prompt) or encode(self.prompt)
        return Batch(
            latents=torch.zeros(1, 4, height // 8, width // 8),
            context=context[None].float().cpu(),
            pooled=None if pooled is None else pooled[None].float().cpu(),
            sizes=torch.tensor([crop.sizes], dtype=torch.int32) if dataset.has_pooled else None,
            hint_bytes=rearrange(pixels, "h w c -> 1 c h w").contiguous(),
            prompts=torch.zeros(1, dtype=torch.int64),
        )


def framed(pictures: Tensor, height: int, width: int) -> Tensor:
    """Pictures (...,3,h,w) as large as they fit into `height` x `width`, on black: for a sheet of all sizes."""
    own = pictures.shape[-2:]
    if own == (height, width):
        return pictures
    scale = min(height / own[0], width / own[1])
    size = round(own[0] * scale), round(own[1] * scale)
    fitted = F.interpolate(pictures.reshape(-1, *pictures.shape[-3:]), size, mode="area")
    padded = F.pad(fitted, (0, width - size[1], 0, height - size[0]))
    return padded.reshape(*pictures.shape[:-2], height, width)
