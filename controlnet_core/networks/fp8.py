"""Layers whose locked weights lie in fp8 with one scale each: half the memory of 16 bits.

A namespace of `operations` for `layers.py`. The weight is brought to the dtype of what comes in each time a layer is
called, and again for the gradient of its input, so that no 16-bit copy of it is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..keys import State, Weights

GroupNorm, LayerNorm = nn.GroupNorm, nn.LayerNorm

STORED = torch.float8_e4m3fn


class InFp8(nn.Module):
    """A layer, locked, its weight times `weight_scale` in fp8."""

    weight: Tensor

    def __init__(self, *sizes: Any, **place: Any):
        super().__init__(*sizes, **place)
        self.register_buffer("weight_scale", torch.empty((), device=self.weight.device))

    def forward(self, input: Tensor) -> Tensor:
        return _Locked.apply(input, self)  # type: ignore[return-value]


class Linear(InFp8, nn.Linear):
    """A linear layer."""

    def run(self, x: Tensor) -> Tensor:
        """What it gives for x, as torch does it."""
        return F.linear(x, weight_of(self, x.dtype), _bias_of(self, x.dtype))

    def gradient(self, size: torch.Size, gradient: Tensor) -> Tensor:  # noqa: ARG002
        """The gradient of its input (of `size`) from that of its output."""
        return gradient @ weight_of(self, gradient.dtype)


class Conv2d(InFp8, nn.Conv2d):
    """A convolution."""

    def run(self, x: Tensor) -> Tensor:
        """What it gives for x, as torch does it."""
        return self._conv_forward(x, weight_of(self, x.dtype), _bias_of(self, x.dtype))

    def gradient(self, size: torch.Size, gradient: Tensor) -> Tensor:
        """The gradient of its input (of `size`) from that of its output."""
        weight, how = weight_of(self, gradient.dtype), (self.stride, self.padding, self.dilation, self.groups)
        return torch.nn.grad.conv2d_input(size, weight, gradient, *how)  # type: ignore[arg-type]


class _Locked(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear | Conv2d) -> Tensor:  # type: ignore[override]
        ctx.layer, ctx.size = layer, x.shape
        return layer.run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.layer.gradient(ctx.size, gradient), None


def weight_of(layer: Any, dtype: torch.dtype) -> Tensor:
    """A layer's weight in a dtype, whether it lies in fp8 or not."""
    weight = layer.weight.to(dtype)
    return weight * layer.weight_scale.to(dtype) if isinstance(layer, InFp8) else weight


def _bias_of(layer: Linear | Conv2d, dtype: torch.dtype) -> Tensor | None:
    return None if layer.bias is None else layer.bias.to(dtype)


def stored(weights: State) -> Weights:
    """`weights` as layers of this namespace take them: matrices and kernels in fp8, each with its `weight_scale`.

    The largest number comes near to fp8's largest, so that small ones do not fall below its smallest. Scales are powers
    of two, which no dtype rounds.
    """
    found: Weights = {}
    for key, tensor in weights.items():
        if tensor.ndim < 2:
            found[key] = tensor
            continue
        scale = (tensor.abs().amax().float() / torch.finfo(STORED).max).clamp(min=2**-14).log2().ceil().exp2()
        found[key] = (tensor.float() / scale).to(STORED)
        found[f"{key}_scale"] = scale
    return found
