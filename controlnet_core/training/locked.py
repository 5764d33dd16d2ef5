"""Layers of a locked network: gradients pass through them, and they keep as little as that needs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_input

Linear, GroupNorm, LayerNorm = nn.Linear, nn.GroupNorm, nn.LayerNorm  # torch's own keep no more than they need


class Conv2d(nn.Conv2d):
    """A convolution that is never trained.

    torch's own keeps its input for the gradient of its weight, even where the weight gets none; in a UNet's decoder
    that is a third of what the backward pass needs.
    """

    def forward(self, input: Tensor) -> Tensor:
        return _Convolution.apply(input, self.weight, self.bias, self.stride, self.padding)  # type: ignore[return-value]


class _Convolution(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.stride, ctx.padding = x.shape, stride, padding
        return conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return conv2d_input(ctx.shape, weight, gradient, ctx.stride, ctx.padding), None, None, None, None
