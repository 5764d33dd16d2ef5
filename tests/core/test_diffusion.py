"""The noise schedule against diffusers', and DDIM against what it must give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zeroconv.controlnet_core.diffusion import add_noise, alphas_cumprod, guide, sample_ddim, velocity


@pytest.fixture(scope="module")
def scheduler():
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def latents(seed: int = 0) -> Tensor:
    return torch.randn(3, 4, 5, 7, generator=torch.Generator().manual_seed(seed))


def test_schedule(scheduler, tolerance: dict):
    alphas = alphas_cumprod()
    assert alphas.shape == (1000,) and alphas.dtype == torch.float32
    assert alphas[0].item() == pytest.approx(0.99915, abs=1e-6)
    assert alphas[999].item() == pytest.approx(0.0046601, abs=1e-6)
    assert (alphas[1:] < alphas[:-1]).all()
    torch.testing.assert_close(alphas, scheduler.alphas_cumprod, **tolerance[torch.float32])


def test_noise_and_velocity(scheduler, tolerance: dict):
    alphas = alphas_cumprod()
    x, noise, t = latents(0), latents(1), torch.tensor([0, 421, 999])
    before = x.clone(), noise.clone(), t.clone()
    noisy, v = add_noise(x, noise, t, alphas), velocity(x, noise, t, alphas)
    torch.testing.assert_close(noisy, scheduler.add_noise(x, noise, t), **tolerance[torch.float32])
    torch.testing.assert_close(v, scheduler.get_velocity(x, noise, t), **tolerance[torch.float32])
    assert all(torch.equal(a, b) for a, b in zip((x, noise, t), before, strict=True))


def test_noise_keeps_the_latents_dtype():
    noisy = add_noise(latents().half(), latents(1).half(), torch.tensor([1, 2, 3]), alphas_cumprod())
    assert noisy.dtype == torch.float16


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_a_perfect_predictor_gives_the_picture(steps: int):
    alphas, clean, noise = alphas_cumprod(), latents(0), latents(1)
    given = noise.clone()
    seen = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (3,) and t.unique().numel() == 1
        seen.append(int(t[0]))
        a = alphas[t][:, None, None, None]
        return (x - a.sqrt() * clean) / (1 - a).sqrt()

    result = sample_ddim(predict, noise, alphas, steps)
    torch.testing.assert_close(result, clean, rtol=1e-3, atol=1e-3)
    assert len(seen) == steps
    assert torch.equal(noise, given)
    assert seen[0] == 999 and seen == sorted(set(seen), reverse=True)
    if steps == 4:
        assert seen == [999, 749, 500, 250]


def test_two_steps_written_out():
    alphas = torch.tensor([1.0, 0.64, 0.36])  # signal 1, 0.8, 0.6; noise 0, 0.6, 0.8
    result = sample_ddim(lambda x, t: torch.full_like(x, 0.5), torch.ones(1, 1, 1, 1), alphas, steps=2)
    # clean = (1 - 0.8 * 0.5) / 0.6 = 1, x = 0.8 + 0.6 * 0.5 = 1.1; clean = (1.1 - 0.6 * 0.5) / 0.8 = 1
    assert result.item() == pytest.approx(1.0)
    halfway = []
    sample_ddim(lambda x, t: halfway.append(x.item()) or 0.5 * x, torch.ones(1, 1, 1, 1), alphas, steps=2)
    assert halfway == pytest.approx([1.0, 1.1])


def test_sampling_keeps_no_gradients():
    weight = torch.ones(1, requires_grad=True)
    assert not sample_ddim(lambda x, t: x * weight, latents(), alphas_cumprod(), steps=2).requires_grad


def test_guidance():
    cond, uncond = torch.tensor([3.0]), torch.tensor([1.0])
    assert [guide(cond, uncond, scale).item() for scale in (0, 1, 7.5)] == [1.0, 3.0, 16.0]
