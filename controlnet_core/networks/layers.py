"""Building blocks of the LDM-layout SD UNet, shared by the UNet and its trainable copy.

Attribute names are state-dict keys of published weights (CompVis/stable-diffusion, Stability-AI/generative-models)
and keep the ldm spelling exactly. `operations` is a namespace with `Linear`, `Conv2d`, `GroupNorm` and `LayerNorm`:
`torch.nn` by default, the host's offloading layers inside ComfyUI. It may bring its own `multi_head_attention` too.

The halves of classifier-free guidance are the same up to their texts. So x, emb and context need not have as many
samples: where one with R meets one with a multiple of R, sample i of the latter goes with i % R, and is computed for
itself from there on. In SD that is the first attention to the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .recompute import recomputed


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of `timesteps` (B,), fp32, (B, dim): cosines first, then sines (ldm order)."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    args = timesteps[:, None].float() * freqs[None]
    return torch.cat([args.cos(), args.sin()], dim=-1)


def repeated(x: Tensor, samples: int) -> Tensor:
    """x (R, ...) over and over, for so many samples: sample i is x's i % R. x itself where it has as many."""
    return x if len(x) >= samples else x.repeat(samples // len(x), *[1] * (x.ndim - 1))


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b, where the one with fewer samples counts as `repeated` for those of the other; it is not copied."""
    if len(a) < len(b):
        a, b = b, a
    return a + b if len(a) == len(b) else (a.unflatten(0, (-1, len(b))) + b).flatten(0, 1)


class ResBlock(nn.Module):
    """Residual block with a timestep shift: (B, channels, H, W), (B, emb_channels) -> (B, out_channels, H, W).

    `recomputing` keeps less of it for the backward pass, as `recomputed` says; so it is in every layer that has it.
    """

    recomputing = True

    def __init__(self, channels: int, emb_channels: int, out_channels: int, *, operations: Any = nn, **place: Any):
        super().__init__()
        self.in_layers = nn.Sequential(
            operations.GroupNorm(32, channels, **place),
            nn.SiLU(),
            operations.Conv2d(channels, out_channels, 3, padding=1, **place),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), operations.Linear(emb_channels, out_channels, **place))
        self.out_layers = nn.Sequential(
            operations.GroupNorm(32, out_channels, **place),
            nn.SiLU(),
            nn.Identity(),  # ldm's dropout holds index 2
            operations.Conv2d(out_channels, out_channels, 3, padding=1, **place),
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else operations.Conv2d(channels, out_channels, 1, **place)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = add(recomputed(self.in_layers, x, self.recomputing), self.emb_layers(emb)[:, :, None, None])
        return add(self.skip_connection(x), recomputed(self.out_layers, h, self.recomputing))


def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, precision: torch.dtype | None) -> Tensor:  # noqa: ARG001
    """Attention of q (B, N, dim) over k and v (B, T, dim), cut into `heads`: (B, N, dim), by torch's own kernels.

    `precision` is the dtype that the model asks for in the products of q and k, `None` where theirs will do. Kernels
    that hold these products in q's dtype need it; torch's sum in fp32 anyhow.
    """
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=heads) for t in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


def attention_of(operations: Any) -> Callable[[Tensor, Tensor, Tensor, int, torch.dtype | None], Tensor]:
    """The `multi_head_attention` that `operations` bring, else torch's."""
    return getattr(operations, "multi_head_attention", multi_head_attention)


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, N, dim) over `context` (B, T, context_dim); over itself when that is None."""

    def __init__(
        self,
        dim: int,
        context_dim: int,
        heads: int,
        *,
        precision: torch.dtype | None = None,
        operations: Any = nn,
        **place: Any,
    ):
        super().__init__()
        self.heads, self.precision = heads, precision
        self.attend = attention_of(operations)
        self.to_q = operations.Linear(dim, dim, bias=False, **place)
        self.to_k = operations.Linear(context_dim, dim, bias=False, **place)
        self.to_v = operations.Linear(context_dim, dim, bias=False, **place)
        self.to_out = nn.Sequential(operations.Linear(dim, dim, **place), nn.Identity())

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = repeated(self.to_q(x), len(context)), self.to_k(context), self.to_v(context)
        return self.to_out(self.attend(q, k, v, self.heads, self.precision))


class GEGLU(nn.Module):
    """Linear layer gated by GELU: (..., dim) -> (..., inner)."""

    def __init__(self, dim: int, inner: int, *, operations: Any = nn, **place: Any):
        super().__init__()
        self.proj = operations.Linear(dim, inner * 2, **place)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    recomputing = True

    def __init__(self, dim: int, *, operations: Any = nn, **place: Any):
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(dim, dim * 4, operations=operations, **place),
            nn.Identity(),  # ldm's dropout holds index 1
            operations.Linear(dim * 4, dim, **place),
        )

    def forward(self, x: Tensor) -> Tensor:
        return recomputed(self.net, x, self.recomputing)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward; each with a residual connection."""

    def __init__(
        self,
        dim: int,
        context_dim: int,
        heads: int,
        *,
        precision: torch.dtype | None = None,
        operations: Any = nn,
        **place: Any,
    ):
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads, precision=precision, operations=operations, **place)
        self.ff = FeedForward(dim, operations=operations, **place)
        self.attn2 = CrossAttention(dim, context_dim, heads, precision=precision, operations=operations, **place)
        self.norm1 = operations.LayerNorm(dim, **place)
        self.norm2 = operations.LayerNorm(dim, **place)
        self.norm3 = operations.LayerNorm(dim, **place)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = add(x, self.attn2(self.norm2(x), context))
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of (B, C, H, W); projections are 1x1 convolutions in SD1.x, linear later."""

    def __init__(
        self,
        dim: int,
        context_dim: int,
        heads: int,
        depth: int,
        linear: bool,
        *,
        precision: torch.dtype | None = None,
        operations: Any = nn,
        **place: Any,
    ):
        super().__init__()
        self.linear = linear
        project = operations.Linear if linear else operations.Conv2d
        kernel = () if linear else (1,)
        self.norm = operations.GroupNorm(32, dim, eps=1e-6, **place)
        self.proj_in = project(dim, dim, *kernel, **place)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(dim, context_dim, heads, precision=precision, operations=operations, **place)
            for _ in range(depth)
        )
        self.proj_out = project(dim, dim, *kernel, **place)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        size = {"h": x.shape[2], "w": x.shape[3]}
        h = self.norm(x)
        if self.linear:
            h = self.proj_in(rearrange(h, "b c h w -> b (h w) c"))
        else:
            h = rearrange(self.proj_in(h), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.linear:
            h = rearrange(self.proj_out(h), "b (h w) c -> b c h w", **size)
        else:
            h = self.proj_out(rearrange(h, "b (h w) c -> b c h w", **size))
        return add(x, h)


class Downsample(nn.Module):
    """Stride-2 convolution: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2))."""

    def __init__(self, channels: int, *, operations: Any = nn, **place: Any):
        super().__init__()
        self.op = operations.Conv2d(channels, channels, 3, stride=2, padding=1, **place)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement to `size`, the size of the next skip connection, then a convolution."""

    def __init__(self, channels: int, *, operations: Any = nn, **place: Any):
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, 3, padding=1, **place)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Block(nn.Sequential):
    """One entry of `input_blocks`, `middle_block` or `output_blocks`: hands each part what it takes.

    `checkpointing` keeps only a block's input for the backward pass, and computes the block again there: less memory
    for more time, in training.
    """

    checkpointing = False

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, context: Tensor, size: tuple[int, int] | None = None
    ) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run, x, emb, context, size, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]
        return self._run(x, emb, context, size)

    def _run(self, x: Tensor, emb: Tensor, context: Tensor, size: tuple[int, int] | None) -> Tensor:
        for part in self:
            if isinstance(part, ResBlock):
                x = part(x, emb)
            elif isinstance(part, SpatialTransformer):
                x = part(x, context)
            elif isinstance(part, Upsample):
                x = part(x, size)
            else:
                x = part(x)
        return x
