"""What a step draws and what its loss is, in numbers that can be computed by hand."""

from __future__ import annotations

import pytest
import torch

from zeroconv.controlnet_core.diffusion import add_noise, alphas_cumprod, velocity
from zeroconv.controlnet_core.training.objective import Draws, draw, loss, target, weights

from .tiny import quick

SHAPE = torch.Size((6, 4, 3, 5))


def equal(a: Draws, b: Draws) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("timesteps", "noise", "empty_prompts"))


def test_draws_follow_from_seed_and_number_alone():
    options = quick(seed=3)
    before = draw(options, 7, SHAPE)
    torch.manual_seed(99)
    assert equal(before, draw(options, 7, SHAPE))
    assert not equal(before, draw(options, 8, SHAPE))
    assert not equal(before, draw(quick(seed=4), 7, SHAPE))
    assert before.timesteps.shape == before.empty_prompts.shape == (6,)
    assert before.noise.shape == SHAPE
    assert (before.timesteps.dtype, before.noise.dtype, before.empty_prompts.dtype) == (
        torch.int64,
        torch.float32,
        torch.bool,
    )


def test_large_seeds_and_numbers_do():
    assert not equal(draw(quick(seed=2**63 - 1), 10**9, SHAPE), draw(quick(seed=2**63 - 2), 10**9, SHAPE))


def test_a_part_of_the_draws_is_what_the_whole_has_there():
    whole = draw(quick(), 0, SHAPE)
    part = whole.part(slice(2, 4))
    assert torch.equal(part.noise, whole.noise[2:4])
    assert torch.equal(part.timesteps, whole.timesteps[2:4])
    assert torch.equal(part.empty_prompts, whole.empty_prompts[2:4])


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_share_of_empty_prompts(share: float):
    empty = draw(quick(empty_prompts=share), 1, torch.Size((20_000, 1, 1, 1))).empty_prompts
    assert empty.float().mean().item() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "mean", "first_half"),
    # cubic is t = T (1 - u^3): its mean is 3/4 of T, and P(t < T/2) = P(u^3 > 1/2) = 1 - 2^(-1/3)
    [("uniform", 500, 0.5), ("cubic", 750, 1 - 0.5 ** (1 / 3))],
)
def test_distribution_of_timesteps(kind: str, mean: float, first_half: float):
    timesteps = draw(quick(timesteps=kind), 1, torch.Size((50_000, 1, 1, 1))).timesteps
    assert timesteps.float().mean().item() == pytest.approx(mean, rel=0.01)
    assert (timesteps < 500).float().mean().item() == pytest.approx(first_half, abs=0.01)
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert len(timesteps.unique()) > 900


def test_targets():
    random = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 4, 3, 3, generator=random), torch.randn(2, 4, 3, 3, generator=random)
    timesteps, alphas = torch.tensor([10, 900]), alphas_cumprod()
    assert target("eps", latents, noise, timesteps, alphas) is noise
    v = target("v", latents, noise, timesteps, alphas)
    assert torch.equal(v, velocity(latents, noise, timesteps, alphas))
    # the noisy latent and v are the latent and the noise, turned by an angle
    a = alphas[timesteps][:, None, None, None]
    noisy = add_noise(latents, noise, timesteps, alphas)
    torch.testing.assert_close(a.sqrt() * noisy - (1 - a).sqrt() * v, latents)


def test_min_snr_written_out():
    # SNR = a / (1 - a): 9, 1 and 1/4
    alphas, timesteps = torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0, 1, 2])
    off = weights(quick(), timesteps, alphas)
    assert off.tolist() == [1, 1, 1]
    eps = weights(quick(min_snr=5.0), timesteps, alphas)
    torch.testing.assert_close(eps, torch.tensor([5 / 9, 1.0, 1.0]))
    v = weights(quick(min_snr=5.0, prediction="v"), timesteps, alphas)
    torch.testing.assert_close(v, torch.tensor([5 / 10, 1 / 2, 0.25 / 1.25]))


def test_min_snr_is_finite_where_no_signal_is_left():
    found = weights(quick(min_snr=5.0), torch.tensor([0]), torch.tensor([0.0]))
    assert found.isfinite().all()


def test_loss_is_the_mean_of_each_examples_weighted_square():
    predicted = torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16)
    wanted = torch.tensor([1.0, 3.0])[:, None, None, None].expand(2, 1, 2, 2)
    found = loss(predicted, wanted, torch.tensor([1.0, 0.5]))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx((1 * 1 + 0.5 * 9) / 2)
