"""DINOv2, the transformer that networks of depth and normals begin with, under the keys of facebookresearch/dinov2."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

PATCH, PATCHES = 14, 37
"""DINOv2 sees patches of 14 pixels, and has learned the places of 37x37."""
HEAD_WIDTH = 64
POSITION_OFFSET = 0.1
"""DINOv2 stretches its places by a little more than the patches ask for, and was trained so."""


class Attention(nn.Module):
    """Self-attention of DINOv2; `normed`, of queries and keys that are normed first, as Depth Anything 3 has it."""

    def __init__(self, width: int, normed: bool = False):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (nn.LayerNorm(HEAD_WIDTH) if normed else nn.Identity() for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, angles: Tensor | None = None) -> Tensor:
        """From (B,N,C) to (B,N,C); with angles (N,64) queries and keys are turned by them."""
        query, key, value = rearrange(self.qkv(tokens), "b n (three h c) -> three b h n c", three=3, c=HEAD_WIDTH)
        query, key = self.q_norm(query), self.k_norm(key)
        if angles is not None:
            query, key = turned(query, angles), turned(key, angles)
        found = F.scaled_dot_product_attention(query, key, value)
        return self.proj(rearrange(found, "b h n c -> b n (h c)"))


class MLP(nn.Module):
    """The two linear layers of a transformer block."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """From (B,N,C) to (B,N,C)."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """From (B,N,C) to (B,N,C)."""
        return tokens * self.gamma


class Block(nn.Module):
    """A transformer block of DINOv2."""

    def __init__(self, width: int, normed: bool = False):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width, eps=1e-6), Attention(width, normed), LayerScale(width)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(width, eps=1e-6), MLP(width), LayerScale(width)

    def forward(self, tokens: Tensor, angles: Tensor | None = None) -> Tensor:
        """From (B,N,C) to (B,N,C)."""
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens), angles))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))


class PatchEmbed(nn.Module):
    """Pixels to tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, stride=PATCH)

    def forward(self, pixels: Tensor) -> Tensor:
        """From (B,3,14h,14w) to (B,h*w,C)."""
        return rearrange(self.proj(pixels), "b c h w -> b (h w) c")


class DINOv2(nn.Module):
    """The transformer, with the keys of facebookresearch/dinov2."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + PATCHES**2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.patch_embed = PatchEmbed(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """The normed tokens (B,1+h*w,C), the class token first, after each of `layers`, of pixels (B,3,14h,14w)."""
        rows, columns = pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
        patches = self.patch_embed(pixels)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.places(rows, columns)
        found = []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            if index in layers:
                found.append(self.norm(tokens))
        return found

    def places(self, rows: int, columns: int) -> Tensor:
        """What tells tokens their places, (1,1+h*w,C)."""
        return places(self.pos_embed, rows, columns)


def places(learned: Tensor, rows: int, columns: int) -> Tensor:
    """The places (1,1+37*37,C) that were learned, that of the class token first, for other patches: (1,1+h*w,C)."""
    if rows == columns == PATCHES:
        return learned
    known = rearrange(learned[:, 1:].float(), "b (h w) c -> b c h w", h=PATCHES)
    scale = ((rows + POSITION_OFFSET) / PATCHES, (columns + POSITION_OFFSET) / PATCHES)
    fitted = rearrange(F.interpolate(known, scale_factor=scale, mode="bicubic"), "b c h w -> b (h w) c")
    return torch.cat([learned[:, :1], fitted.to(learned.dtype)], dim=1)


def turned(features: Tensor, angles: Tensor) -> Tensor:
    """Features (...,N,C) turned by angles (N,C): in each half of C, the second quarter with the first."""
    first, second = rearrange(features, "... (halves two c) -> two ... halves c", halves=2, two=2)
    beside = rearrange(torch.stack([-second, first]), "two ... halves c -> ... (halves two c)")
    return features * angles.cos() + beside * angles.sin()


def view(rows: int, columns: int, aspect: float) -> Tensor:
    """Where each pixel centre is, (2,rows,columns): across and down, the half diagonal being 1."""
    diagonal = math.hypot(1, aspect)
    across = torch.linspace(-1, 1, columns) * (aspect / diagonal * (columns - 1) / columns)
    down = torch.linspace(-1, 1, rows) * (1 / diagonal * (rows - 1) / rows)
    return torch.stack([across.expand(rows, -1), down[:, None].expand(-1, columns)])
