"""Layers in a row that keep less for the backward pass: what is cheap between them is computed again there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import fp8


def recomputed(layers: Iterable[nn.Module], x: Tensor, wanted: bool = True) -> Tensor:
    """What `layers` make of x one after the other, with the very gradients that torch would give, keeping x alone.

    The last one is costly and is not computed twice: a convolution or a linear layer. The others (norms, activations,
    gates) are computed again when gradients are asked for. Where it is not `wanted`, where there is nothing to gain, in
    sampling, or where the last layer is of another kind (a host's own, which moves or patches its weight as it runs),
    they run as they are.
    """
    *cheap, last = layers
    if wanted and torch.is_grad_enabled() and type(last) in (nn.Conv2d, nn.Linear, fp8.Conv2d, fp8.Linear):
        own = [parameter for layer in (*cheap, last) for parameter in layer.parameters()]
        return _Recomputed.apply(cheap, last, x, *own)  # type: ignore[return-value]
    return last(_run(cheap, x))


def _run(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _autocast(device: str) -> tuple[str, torch.dtype, bool]:
    """What `torch.autocast` takes to make the autocast of now again."""
    if hasattr(torch, "get_autocast_dtype"):
        return device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    if device == "cpu":  # torch before 2.4 has a question for each device
        return device, torch.get_autocast_cpu_dtype(), torch.is_autocast_cpu_enabled()
    return device, torch.get_autocast_gpu_dtype(), torch.is_autocast_enabled()


class _Recomputed(Function):
    """Parameters are handed over too, so that gradients reach them: those of the cheap layers, then the last one's."""

    @staticmethod
    def forward(ctx: Any, cheap: list[nn.Module], last: Any, x: Tensor, *parameters: Tensor) -> Tensor:  # type: ignore[override]
        ctx.cheap, ctx.last = cheap, last
        ctx.autocast = _autocast(x.device.type)
        ctx.save_for_backward(x, *parameters)
        return last(_run(cheap, x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        last, inner = ctx.last, 1 + len(parameters) - sum(1 for _ in ctx.last.parameters())
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            # A view, since a counter of operations hooks what enters a layer, and cannot where that is a leaf.
            x = x.detach().requires_grad_(needed[0]).view_as(x)
            between = _run(ctx.cheap, x)

        # Under autocast the last layer computed in the dtype of what it gave, not in that of its weight.
        weight, given = fp8.weight_of(last, gradient.dtype), between.detach().to(gradient.dtype)
        trained = last.weight.requires_grad, last.bias is not None and last.bias.requires_grad
        backward = _convolution if isinstance(last, nn.Conv2d) else _linear
        of_given, *of_last = backward(last, gradient, given, weight, trained)

        found: list[Tensor | None] = [None] * inner
        wanted = [i for i in range(inner) if needed[i]]
        if wanted:
            sources = [x if i == 0 else parameters[i - 1] for i in wanted]
            gradients = torch.autograd.grad(between, sources, of_given.to(between.dtype))
            for i, each in zip(wanted, gradients, strict=True):
                found[i] = each
        for each, parameter in zip(of_last, (last.weight, last.bias), strict=True):
            if parameter is not None:
                found.append(None if each is None else each.to(parameter.dtype))
        return (None, None, *found)


Gradients = tuple[Tensor, Tensor | None, Tensor | None]


def _convolution(layer: Any, gradient: Tensor, x: Tensor, weight: Tensor, trained: tuple[bool, bool]) -> Gradients:
    """The gradients of a convolution's input, and of its weight and bias where they are trained."""
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, [len(weight)], layer.stride, layer.padding, layer.dilation, False, [0, 0], layer.groups,
        [True, *trained],
    )  # fmt: skip


def _linear(layer: Any, gradient: Tensor, x: Tensor, weight: Tensor, trained: tuple[bool, bool]) -> Gradients:  # noqa: ARG001
    """The same of a linear layer."""
    rows = gradient.flatten(0, -2)
    of_weight = rows.T @ x.flatten(0, -2) if trained[0] else None
    return gradient @ weight, of_weight, rows.sum(0) if trained[1] else None
