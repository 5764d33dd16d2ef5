"""The core on a device that is not the CPU: the same numbers, nothing mixed, and no more transfers than it needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from zeroconv.controlnet_core.diffusion import add_noise, alphas_cumprod, sample_ddim
from zeroconv.controlnet_core.dosing.strength import Strength
from zeroconv.controlnet_core.networks.controlnet import ControlNet
from zeroconv.controlnet_core.networks.residuals import Residuals
from zeroconv.controlnet_core.networks.unet import UNet
from zeroconv.controlnet_core.training.distributed import Process

from .. import second_device
from .small import SMALL, inputs, randomise_zeros, seeded, tensors
from .training.tiny import dataset, fit, losses, quick


@pytest.fixture(autouse=True)
def second() -> Iterator[torch.device]:
    with second_device.on() as device:
        yield device


# -- the device itself: it must refuse what a GPU refuses, or nothing here proves anything -----------------------------


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x, d: x + x.to(d),
        lambda x, d: torch.cat([x, x.to(d)]),
        lambda x, d: F.linear(x.to(d), x),
        lambda x, d: x[torch.tensor([0], device=d)],
        lambda x, d: x * x.to(d).sum(),
        lambda x, d: torch.where(x > 0, x.to(d), 0.0),
        lambda x, d: x.to(d).index_put_((torch.tensor([0, 1]),), x),
    ],
    ids=["add", "cat", "linear", "index", "number of the device", "where", "values"],
)
def test_tensors_of_two_devices_do_not_mix(second: torch.device, mistake: Any):
    with pytest.raises(RuntimeError, match=r"tensors of two devices|index is not|values of another device"):
        mistake(torch.ones(2, 2), second)


@pytest.mark.parametrize("inference", [True, False])
def test_moving_copies(second: torch.device, inference: bool):
    with torch.inference_mode(inference):
        x = torch.zeros(2)
        for way in (lambda: x.to(second), lambda: x.to(torch.ones(1, device=second)), lambda: x.to(second, x.dtype)):
            there = way()
            assert there.device == second and there.to(second) is there
            back = [there.cpu(), there.to("cpu"), there.to(x), torch.empty(2).copy_(there)]
            there.add_(1)
            assert there.tolist() == [1.0, 1.0]
            assert all(each.device.type == "cpu" and each.tolist() == [0.0, 0.0] for each in (x, *back))


def test_what_a_gpu_allows(second: torch.device):
    x = torch.arange(4.0, device=second).reshape(2, 2)
    assert (x * torch.tensor(2.0) + 1).device == second
    assert x[torch.tensor([1])].tolist() == [[2.0, 3.0]]
    x[0].add_(1)
    x[:, 1] = torch.tensor(9.0)
    assert x.cpu().tolist() == [[1.0, 9.0], [2.0, 9.0]]
    with pytest.raises(TypeError, match="copy it to the CPU first"):
        x.numpy()


@pytest.mark.parametrize(
    "lacking",
    [
        lambda d: torch.ones(2, dtype=torch.float64).to(d),
        lambda d: torch.ones(2, device=d).double(),
        lambda d: F.interpolate(torch.ones(1, 1, 15, 15, device=d), size=(8, 8), mode="area"),
        lambda d: F.adaptive_avg_pool2d(torch.ones(1, 1, 15, 15, device=d), 4),
    ],
    ids=["float64", "double", "area", "pool"],
)
def test_what_mps_and_directml_lack_is_refused(second: torch.device, lacking: Any):
    with pytest.raises(RuntimeError, match="MPS"):
        lacking(second)
    F.interpolate(torch.ones(1, 1, 16, 16, device=second), size=(8, 8), mode="area")


def test_transfers_are_heard(second: torch.device):
    x = torch.ones(2, device=second)
    with second_device.transfers() as moves:
        assert (x + 1).mul(2).device == second
        assert not moves
        torch.ones(3).to(second)
        torch.tensor([1, 2], device=second)
        x[torch.tensor([0])]
        x.sum().item()
        x.cpu()
    assert [move.way for move in moves] == ["upload", "upload", "upload", "read", "read"]
    assert all("test_transfers_are_heard" in move.line and not move.ours for move in moves)
    with second_device.transfers() as moves:
        Residuals.of([x, x]).mapped(lambda _, residual: residual.to("cpu"))
        add_noise(x, x, torch.zeros(2, dtype=torch.int64), torch.ones(5, device=second))
    assert [move.ours for move in moves] == [False, False, True]


# -- networks and their dose ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", SMALL)
@torch.no_grad()
def test_small_networks_are_those_of_the_cpu(second: torch.device, layout: str):
    config = SMALL[layout]
    numbers = inputs(config)
    unet, control = seeded(UNet, config), randomise_zeros(seeded(ControlNet, config))
    expected = numbers.control(control)
    output = numbers.predict(unet, expected)

    unet, control, numbers = unet.to(second), control.to(second), numbers.to(second, torch.float32)
    with second_device.transfers() as moves:
        residuals = numbers.control(control)
        found = numbers.predict(unet, residuals)
    assert not moves
    assert found.device == second and torch.equal(found.cpu(), output)
    for ours, theirs in zip(tensors(residuals), tensors(expected), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("size", [(16, 16), (15, 19)], ids=["even", "odd"])
@pytest.mark.parametrize("guidance", ["both", "cfg_resolution"])
def test_a_mask_is_fitted_where_the_residuals_are(second: torch.device, guidance: Any, size: tuple[int, int]):
    height, width = size
    mask = torch.rand(2, 1, 8 * height, 8 * width, generator=torch.Generator().manual_seed(3))
    shapes = [(height, width), (-(-height // 2), -(-width // 2)), (-(-height // 4), -(-width // 4))]
    residuals = Residuals.of([torch.ones(2, 4, *shape) for shape in shapes])
    expected = Strength(guidance=guidance, mask=mask).scales(0.5, 2, height, mask).apply(residuals)
    on_device = residuals.mapped(lambda _, residual: residual.to(second))
    found = Strength(guidance=guidance).scales(0.5, 2, height, mask.to(second)).apply(on_device)
    for ours, theirs in zip(tensors(found), tensors(expected), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_noise_and_sampling_stay_there(second: torch.device):
    alphas = alphas_cumprod().to(second)
    clean, noise = torch.randn(2, 2, 4, 8, 8).to(second)
    noisy = add_noise(clean, noise, torch.tensor([10, 900], device=second), alphas)
    assert noisy.device == second

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = alphas[t][:, None, None, None]
        return (x - a.sqrt() * clean) / (1 - a).sqrt()

    torch.testing.assert_close(sample_ddim(predict, noise, alphas, 5).cpu(), clean.cpu(), rtol=1e-3, atol=1e-3)


# -- training ---------------------------------------------------------------------------------------------------------

TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average, accumulation, recompute": {
        "ema": 0.9,
        "warmup": 2,
        "schedule": "cosine",
        "accumulation": 2,
        "clip": 0.5,
        "gradient_checkpointing": True,
    },
    "decoder, min-SNR": {"unlock_decoder": True, "min_snr": 5.0},
    "lite, middle": {"kind": "lite", "middle_only": True},
    "Control-LoRA": {"kind": "control_lora", "rank": 4},
    "bf16": {"precision": "bf16"},
    "state in main memory": {"optimizer_in_ram": True},
}
"""fp16 is left out: torch's GradScaler wants float64 of every device but MPS."""


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_is_that_of_the_cpu_and_goes_on(second: torch.device, name: str, tmp_path: Path):
    """Stopped after half of it; with samples between the steps, and a checkpoint that either device goes on from."""
    data, there = dataset(tmp_path / "data"), Process(device=second)
    chosen = {"learning_rate": 1e-4, "sample_every": 2, **TRAININGS[name]}
    # Autocast there is nobody's, so that the CPU is asked for fp32; samples go further apart than losses.
    expected = fit(quick(**{**chosen, "precision": "fp32"}), data, tmp_path / "cpu")
    found = fit(quick(**{**chosen, "steps": 2}), data, tmp_path / "second", process=there)
    found += fit(quick(**chosen), data, tmp_path / "second", process=there)
    assert [progress.step for progress in found] == [0, 1, 2, 3, 4]
    tolerance = 0.02 if "precision" in chosen else 1e-5
    assert losses(found) == pytest.approx(losses(expected), rel=tolerance)
    for ours, theirs in zip(found, expected, strict=True):
        if "precision" not in chosen:
            assert ours.fidelity == (theirs.fidelity and pytest.approx(theirs.fidelity, abs=tolerance))
        assert ours.samples is None or ours.samples.device.type == "cpu"
    assert (tmp_path / "second" / "control.safetensors").is_file()


def test_a_training_step_reads_no_more_than_its_loss_and_norm(second: torch.device, tmp_path: Path):
    data = dataset(tmp_path / "data")
    with second_device.transfers() as moves:
        fit(quick(steps=6, save_every=6, held_out=0), data, tmp_path / "run", process=Process(device=second))
    reads = [move for move in moves if move.way == "read" and "step.py" in move.line]
    assert len(reads) == 2 * 6, [move.line for move in reads]
