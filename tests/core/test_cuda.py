"""The core on a GPU: the same numbers as on the CPU, in three precisions, and at SD1.5's full width."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from zeroconv.controlnet_core.diffusion import add_noise, alphas_cumprod, sample_ddim
from zeroconv.controlnet_core.networks.controlnet import ControlNet, copy_encoder
from zeroconv.controlnet_core.networks.unet import SD15, UNet
from zeroconv.controlnet_core.training.distributed import Process

from .small import SMALL, TINY, assert_within, inputs, randomise_zeros, relative_change, seeded, tensors
from .training.tiny import dataset, fit, quick

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def full_fp32() -> Iterator[None]:
    """Without TensorFloat-32, which keeps ten bits of fp32's mantissa."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", SMALL)
@torch.no_grad()
def test_small_networks_agree_with_the_cpu(layout: str, dtype: torch.dtype, tolerance: dict):
    config = SMALL[layout]
    numbers = inputs(config)
    unet, control = seeded(UNet, config), randomise_zeros(seeded(ControlNet, config))
    plain, expected_residuals = numbers.predict(unet), numbers.control(control)
    expected = numbers.predict(unet, expected_residuals)
    assert relative_change(plain, expected) >= 0.05

    unet, control, numbers = unet.to("cuda", dtype), control.to("cuda", dtype), numbers.to("cuda", dtype)
    residuals = numbers.control(control)
    output = numbers.predict(unet, residuals)
    assert (output.device.type, output.dtype) == ("cuda", dtype)
    for residual, reference in zip(tensors(residuals), tensors(expected_residuals), strict=True):
        assert_within(residual, reference, tolerance[dtype]["rtol"])
    assert_within(output, expected, tolerance[dtype]["rtol"])


@torch.no_grad()
def test_full_width_in_three_precisions(tolerance: dict):
    numbers = inputs(SD15, 64, 64).to("cuda", torch.float32)
    unet, control = seeded(UNet, SD15, device="cuda"), seeded(ControlNet, SD15, device="cuda")
    copy_encoder(control, unet.state_dict())
    plain = numbers.predict(unet)
    assert torch.equal(numbers.predict(unet, numbers.control(control)), plain)
    randomise_zeros(control)
    expected = numbers.predict(unet, numbers.control(control))
    assert relative_change(plain, expected) >= 0.05

    weights = unet.state_dict(), control.state_dict()
    for dtype in (torch.float16, torch.bfloat16):
        halved = numbers.to("cuda", dtype)
        unet, control = (build(SD15, device="cuda", dtype=dtype) for build in (UNet, ControlNet))
        for network, trained in zip((unet, control), weights, strict=True):
            network.load_state_dict(trained)
        fresh = ControlNet(SD15, device="cuda", dtype=dtype)
        copy_encoder(fresh, unet.state_dict())
        assert torch.equal(halved.predict(unet, halved.control(fresh)), halved.predict(unet))
        output = halved.predict(unet, halved.control(control))
        assert output.dtype == dtype and output.shape == (2, 4, 64, 64)
        assert_within(output, expected, tolerance[dtype]["rtol"])


def test_zero_convolutions_learn_first():
    numbers = inputs(TINY).to("cuda", torch.float32)
    unet, control = seeded(UNet, TINY).cuda().requires_grad_(False), seeded(ControlNet, TINY).cuda()
    copy_encoder(control, unet.state_dict())
    step = torch.optim.SGD(control.parameters(), lr=1.0)
    target = torch.randn_like(numbers.x)
    for copy_learns in (False, True):
        step.zero_grad()
        F.mse_loss(numbers.predict(unet, numbers.control(control)), target).backward()
        grads = {key: p.grad for key, p in control.named_parameters()}
        assert all(grad is not None and grad.any() for key, grad in grads.items() if key.startswith("zero_convs"))
        copied = [grad for key, grad in grads.items() if key.startswith("input_blocks") and key.endswith("weight")]
        assert [bool(grad is not None and grad.any()) for grad in copied] == [copy_learns] * len(copied)
        step.step()


def test_noise_and_sampling_stay_on_the_gpu():
    alphas = alphas_cumprod().cuda()
    clean, noise = torch.randn(2, 2, 4, 8, 8, device="cuda")
    noisy = add_noise(clean, noise, torch.tensor([10, 900], device="cuda"), alphas)
    assert noisy.device.type == "cuda"

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = alphas[t][:, None, None, None]
        return (x - a.sqrt() * clean) / (1 - a).sqrt()

    torch.testing.assert_close(sample_ddim(predict, noise, alphas, 5), clean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp32"},
        {"precision": "bf16", "gradient_checkpointing": True, "ema": 0.9},
        {"precision": "fp16", "unlock_decoder": True, "accumulation": 2},
        {"precision": "bf16", "kind": "control_lora", "rank": 4},
        {"precision": "fp16", "kind": "lite", "middle_only": True},
    ],
    ids=str,
)
def test_a_training_is_that_of_the_cpu_and_goes_on(options: dict[str, Any], tmp_path: Path):
    data, gpu = dataset(tmp_path / "data"), Process(device=torch.device("cuda"))
    usual = quick(**{"learning_rate": 1e-4, "sample_every": 2, **options, "precision": "fp32"})
    expected = fit(usual, data, tmp_path / "cpu")

    chosen = {**usual.as_dict(), **options}
    found = fit(quick(**{**chosen, "steps": 2}), data, tmp_path / "gpu", process=gpu)
    found += fit(quick(**chosen), data, tmp_path / "gpu", process=gpu)
    assert [progress.step for progress in found] == [0, 1, 2, 3, 4]
    tolerance = 1e-4 if options["precision"] == "fp32" else 0.02
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.loss == (theirs.loss and pytest.approx(theirs.loss, rel=tolerance))
        assert ours.fidelity == (theirs.fidelity and pytest.approx(theirs.fidelity, abs=0.02))
        assert ours.memory
    assert (tmp_path / "gpu" / "control.safetensors").is_file()
