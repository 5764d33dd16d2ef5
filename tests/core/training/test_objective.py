"""What a step draws and what its loss is, in numbers that can be computed by hand."""

from __future__ import annotations

import pytest
import torch

from zeroconv.controlnet_core.diffusion import add_noise, alphas_cumprod, velocity
from zeroconv.controlnet_core.training.objective import Draws, draw, loss, noise_schedule, target, weights
from zeroconv.controlnet_core.training.options import OptionsError

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


def test_min_snr_is_that_of_diffusers():
    """diffusers/training_utils.py, compute_snr, in the line of examples/text_to_image/train_text_to_image.py."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    timesteps = torch.arange(0, 1000, 37)
    snr = compute_snr(scheduler, timesteps)
    for prediction, divisor in (("eps", snr), ("v", snr + 1)):
        expected = torch.stack([snr, 5.0 * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / divisor
        found = weights(quick(min_snr=5.0, prediction=prediction), timesteps, alphas_cumprod())
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)


def test_v_is_that_of_diffusers():
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    random = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(3, 4, 3, 3, generator=random), torch.randn(3, 4, 3, 3, generator=random)
    timesteps = torch.tensor([10, 500, 900])
    expected = scheduler.get_velocity(latents, noise, timesteps)  # type: ignore[arg-type]
    torch.testing.assert_close(target("v", latents, noise, timesteps, alphas_cumprod()), expected)


def test_zero_terminal_snr_is_that_of_diffusers():
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = (1 - rescale_zero_terminal_snr(betas)).cumprod(0)
    usual = alphas_cumprod()
    found = noise_schedule(quick(zero_terminal_snr=True, prediction="v"), usual)
    assert (found[0], found[-1]) == (usual[0], 0)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-7)
    assert noise_schedule(quick(), usual) is usual
    with pytest.raises(OptionsError, match="goes with a model of prediction v, found eps: turn it off"):
        noise_schedule(quick(zero_terminal_snr=True), usual)


def test_at_no_signal_v_is_the_latent_and_its_weight_a_number():
    latents, noise = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    alphas, last = noise_schedule(quick(zero_terminal_snr=True, prediction="v"), alphas_cumprod()), torch.tensor([999])
    assert torch.equal(add_noise(latents, noise, last, alphas), noise)
    assert torch.equal(target("v", latents, noise, last, alphas), -latents)
    assert weights(quick(min_snr=5.0, prediction="v"), last, alphas).tolist() == [0]


def test_huber_written_out():
    predicted, wanted = torch.tensor([0.0, 0.0])[:, None, None, None], torch.tensor([0.3, 40.0])[:, None, None, None]
    each = [loss(predicted[i : i + 1], wanted[i : i + 1], torch.ones(1), 0.4).item() for i in (0, 1)]
    assert each == pytest.approx([2 * 0.4 * (0.5 - 0.4), 2 * 0.4 * ((40**2 + 0.4**2) ** 0.5 - 0.4)])
    # so small an error is its square, whatever c
    assert loss(predicted[:1], wanted[:1] / 100, torch.ones(1), 0.4).item() == pytest.approx(9e-6, rel=1e-2)
    weighted = loss(predicted, wanted, torch.tensor([1.0, 0.5]), 0.4).item()
    assert weighted == pytest.approx((each[0] + 0.5 * each[1]) / 2)


def test_huber_is_that_of_kohya():
    """kohya-ss/sd-scripts, library/train_util.py, conditional_loss: "huber", then the mean of each example."""
    random = torch.Generator().manual_seed(2)
    predicted, wanted = torch.randn(3, 4, 5, 5, generator=random), torch.randn(3, 4, 5, 5, generator=random)
    huber_c = torch.full((3, 1, 1, 1), 0.1)
    expected = 2 * huber_c * (torch.sqrt((predicted - wanted) ** 2 + huber_c**2) - huber_c)
    torch.testing.assert_close(loss(predicted, wanted, torch.ones(3), 0.1), expected.mean([1, 2, 3]).mean())


def test_offset_noise_shifts_whole_channels_and_nothing_else():
    """diffusers, examples/text_to_image: noise += noise_offset * torch.randn((B, C, 1, 1))."""
    plain, shifted = draw(quick(), 3, SHAPE), draw(quick(offset_noise=0.1), 3, SHAPE)
    assert torch.equal(plain.timesteps, shifted.timesteps)
    assert torch.equal(plain.empty_prompts, shifted.empty_prompts)
    offset = shifted.noise - plain.noise
    torch.testing.assert_close(offset, offset[..., :1, :1].expand(SHAPE), rtol=0, atol=1e-6)
    many = torch.Size((4000, 4, 1, 1))
    spread = draw(quick(offset_noise=0.1), 1, many).noise - draw(quick(), 1, many).noise
    assert spread.std().item() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("kind", ["uniform", "cubic"])
def test_a_range_of_timesteps(kind: str):
    some = torch.Size((20_000, 1, 1, 1))
    timesteps = draw(quick(timesteps=kind, min_timestep=200, max_timestep=300), 1, some).timesteps
    assert timesteps.unique().tolist() == list(range(200, 300))
    one = draw(quick(min_timestep=999), 1, some).timesteps
    assert one.unique().tolist() == [999]
    fewer = draw(quick(min_timestep=200, max_timestep=300), 1, some, timesteps=50).timesteps
    assert fewer.unique().tolist() == list(range(10, 15))
