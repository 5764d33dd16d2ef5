"""A locked network whose weights lie in fp8: what they stand for, the gradients through them, and what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from zeroconv.controlnet_core.networks import fp8
from zeroconv.controlnet_core.networks.recompute import recomputed
from zeroconv.controlnet_core.networks.unet import UNet
from zeroconv.controlnet_core.training.controlled_unet import build
from zeroconv.controlnet_core.training.options import OptionsError, TrainingOptions

from ..training.tiny import CONFIG, base, dataset, fit, quick


def pair(make) -> tuple[nn.Module, nn.Module]:
    """A layer with weights in fp8, and torch's own with the numbers that they stand for."""
    torch.manual_seed(0)
    layer, plain = make(fp8), make(nn)
    layer.load_state_dict(fp8.stored(plain.state_dict()), assign=True)
    plain.weight.data = fp8.weight_of(layer, torch.float32)
    return layer.requires_grad_(False), plain.requires_grad_(False)


LAYERS = {
    "linear": (lambda ops: ops.Linear(8, 6), (2, 5, 8)),
    "without bias": (lambda ops: ops.Linear(8, 6, bias=False), (2, 5, 8)),
    "convolution": (lambda ops: ops.Conv2d(8, 6, 3, stride=2, padding=1), (2, 8, 9, 7)),
    "1x1": (lambda ops: ops.Conv2d(8, 6, 1), (2, 8, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_torchs_with_these_weights(name: str):
    make, shape = LAYERS[name]
    layer, plain = pair(make)
    x = torch.randn(shape)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = layer(ours)
    expected = plain(theirs)
    assert torch.equal(found, expected)
    assert kept == []
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_layers_before_it_are_recomputed(name: str):
    make, shape = LAYERS[name]
    layer, plain = pair(make)
    norm = nn.GroupNorm(4, 8) if name == "convolution" else nn.LayerNorm(8)
    x = torch.randn(shape)
    results = []
    for last in (layer, plain):
        given = x.clone().requires_grad_()
        found = recomputed((norm, nn.SiLU(), last), given)
        found.square().sum().backward()
        assert type(found.grad_fn).__name__ == "_RecomputedBackward"
        results.append((found.detach(), given.grad))
    torch.testing.assert_close(results[0], results[1])


def test_weights_are_off_by_a_sixteenth_at_most_small_ones_too():
    """fp8 has 3 bits behind the leading one; without a scale, what is below 2^-6 would have fewer."""
    weight = 0.005 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    found = fp8.stored({"a.weight": weight, "a.bias": torch.ones(3)})
    assert found["a.weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(found["a.bias"], torch.ones(3))
    scale = found["a.weight_scale"]
    assert scale.log2().item() == round(scale.log2().item())
    stands_for = found["a.weight"].float() * scale
    rms = lambda x: x.square().mean().sqrt().item()  # noqa: E731
    assert rms(stands_for - weight) < 0.03 * rms(weight)
    assert rms(weight.to(torch.float8_e4m3fn).float() - weight) > 0.1 * rms(weight)
    large = weight.abs() > weight.abs().max() * 2**-13
    assert ((stands_for - weight).abs()[large] <= weight.abs()[large] / 16).all()
    assert not fp8.stored({"zero.weight": torch.zeros(2, 2)})["zero.weight"].float().any()


def test_a_whole_unet_gives_nearly_the_same():
    unet, half = UNet(CONFIG), UNet(CONFIG, operations=fp8, device="meta")
    unet.load_state_dict(base())
    half.load_state_dict(fp8.stored(base()), assign=True)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8)
    with torch.no_grad():
        full, found = unet(x, torch.tensor([5, 500]), context), half(x, torch.tensor([5, 500]), context)
    off = (found - full).norm() / full.norm()
    assert 0 < off < 0.1


@pytest.mark.parametrize("kind", ["controlnet", "control_lora"])
def test_a_control_is_trained_on_it(tmp_path: Path, kind: str):
    data = dataset(tmp_path / "data")
    full = fit(quick(kind=kind, rank=4), data, tmp_path / "full")
    found = fit(quick(kind=kind, rank=4, base_weights="fp8"), data, tmp_path / "fp8")
    assert [p.loss for p in found[1:]] == pytest.approx([p.loss for p in full[1:]], rel=0.05)
    assert [p.loss for p in found[1:]] != [p.loss for p in full[1:]]


def test_recomputing_and_checkpointing_change_no_number(tmp_path: Path):
    data = dataset(tmp_path / "data")
    runs = [
        [p.loss for p in fit(quick(base_weights="fp8", steps=3, **options), data, tmp_path / str(i))][1:]
        for i, options in enumerate(({}, {"recompute": "off"}, {"gradient_checkpointing": True}))
    ]
    assert runs[1] == pytest.approx(runs[0], rel=1e-6)
    assert runs[2] == pytest.approx(runs[0], rel=1e-6)


def test_what_is_trained_is_never_fp8():
    controlled = build(quick(base_weights="fp8", precision="bf16"), base(), CONFIG, 3)
    dtypes = {(name.split(".")[0], p.ndim > 1, p.dtype) for name, p in controlled.named_parameters()}
    assert dtypes == {
        ("unet", True, torch.float8_e4m3fn),
        ("unet", False, torch.bfloat16),
        ("control", True, torch.float32),
        ("control", False, torch.float32),
    }
    with pytest.raises(OptionsError, match="base_weights fp8 are locked, and unlock_decoder trains some"):
        TrainingOptions(base_weights="fp8", unlock_decoder=True)
