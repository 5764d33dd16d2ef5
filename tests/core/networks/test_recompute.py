"""Layers that keep only their input for the backward pass give the very gradients of those that keep everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zeroconv.controlnet_core.networks.recompute import _autocast, recomputed


def convolutions() -> list[nn.Module]:
    return [nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 6, 3, stride=2, padding=1)]


def projections() -> list[nn.Module]:
    return [nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False)]


def plain(layers: list[nn.Module], x: Tensor) -> Tensor:
    return nn.Sequential(*layers)(x)


def results(run, layers: list[nn.Module], x: Tensor, mixed: bool) -> tuple[list[Tensor | None], int]:
    """The output and the gradients of x and of all parameters, and the bytes kept for them beside the parameters."""
    own = {parameter.data_ptr() for layer in layers for parameter in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", enabled=mixed):
        y = run(layers, x)
    bytes_kept = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    y.float().square().sum().backward()
    gradients = [parameter.grad for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.zero_grad()
    return [y.detach(), x.grad, *gradients], bytes_kept


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("trained", ["all", "none", "weights"])
@pytest.mark.parametrize(("make", "shape"), [(convolutions, (2, 8, 9, 7)), (projections, (2, 5, 8))])
def test_gradients_are_those_of_torch(make, shape: tuple[int, ...], trained: str, mixed: bool):
    torch.manual_seed(0)
    layers, x = make(), torch.randn(shape)
    for layer in layers:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(trained == "all" or (trained == "weights" and name == "weight"))
    expected, _ = results(plain, layers, x, mixed)
    found, kept = results(recomputed, layers, x, mixed)
    for mine, torchs in zip(found, expected, strict=True):
        assert (mine is None) == (torchs is None)
        assert mine is None or torch.equal(mine, torchs)  # type: ignore[arg-type]
    assert found[1] is not None and found[1].any()
    assert kept == x.nbytes


def test_it_keeps_less_than_torch():
    layers, x = convolutions(), torch.randn(2, 8, 9, 7)
    assert results(recomputed, layers, x, False)[1] * 3 <= results(plain, layers, x, False)[1]


def test_without_gradients_and_with_another_last_layer_nothing_changes():
    x = torch.randn(2, 8, 9, 7)
    layers = convolutions()
    with torch.no_grad():
        assert torch.equal(recomputed(layers, x), plain(layers, x))
    pooled = [*layers, nn.MaxPool2d(2)]
    assert torch.equal(recomputed(pooled, x), plain(pooled, x))
    assert type(recomputed(pooled, x).grad_fn).__name__ == "MaxPool2DWithIndicesBackward0"


class Hosts(nn.Conv2d):
    """A host's layer, which may move or patch its weight as it runs."""


def test_a_hosts_layers_are_left_to_torch():
    layers, x = [nn.SiLU(), Hosts(8, 6, 3)], torch.randn(2, 8, 9, 7)
    assert type(recomputed(layers, x).grad_fn).__name__ == "ConvolutionBackward0"


@pytest.mark.filterwarnings("ignore:torch.*autocast:DeprecationWarning")
def test_autocast_is_the_same_where_torch_asks_for_each_device(monkeypatch: pytest.MonkeyPatch):
    with torch.autocast("cpu", torch.float16):
        found = _autocast("cpu")
        monkeypatch.delattr(torch, "get_autocast_dtype")
        assert _autocast("cpu") == found == ("cpu", torch.float16, True)
    assert _autocast("cpu")[2] is False
