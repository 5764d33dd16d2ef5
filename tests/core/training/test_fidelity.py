"""Samples of held-out pictures: always of the same noise, of the base at first, and scored as they are asked to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zeroconv.controlnet_core import diffusion
from zeroconv.controlnet_core.data.dataset import Dataset
from zeroconv.controlnet_core.networks.unet import UNet
from zeroconv.controlnet_core.training import fidelity

from .tiny import CONFIG, base, dataset, fit, losses, quick


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return dataset(tmp_path_factory.mktemp("data"))


def test_samples_come_from_the_same_noise_each_time_and_do_not_disturb_the_training(data: Dataset, tmp_path: Path):
    often = fit(quick(sample_every=1, held_out=2), data, tmp_path / "often")
    once = fit(quick(sample_every=4, held_out=2), data, tmp_path / "once")
    assert losses(often) == losses(once)
    first, again, last = often[0].samples, once[0].samples, often[-1].samples
    assert first is not None
    assert again is not None
    assert last is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, last)
    assert len({progress.fidelity for progress in often}) == 5


def test_a_fresh_control_samples_what_the_base_samples(data: Dataset, tmp_path: Path):
    options = quick(steps=1, sample_every=1, guidance_scale=2.0)
    first = fit(options, data, tmp_path)[0].samples
    unet = UNet(CONFIG)
    unet.load_state_dict(base())
    batch = data.read(data.split(2, 0)[0])
    noise = torch.stack(
        [torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(options.seed + i)) for i in range(2)]
    )

    def predict(x: Tensor, timesteps: Tensor) -> Tensor:
        cond = unet(x, timesteps, batch.context)
        uncond = unet(x, timesteps, data.empty_prompt[0].expand_as(batch.context))
        return diffusion.guide(cond, uncond, 2.0)

    assert first is not None
    torch.testing.assert_close(
        first, diffusion.sample_ddim(predict, noise, diffusion.alphas_cumprod(), 2), rtol=1e-4, atol=1e-4
    )


def test_structure_is_1_for_the_pictures_themselves_and_near_0_for_noise(data: Dataset):
    batch = data.read([0, 1, 2])
    assert fidelity.structure(batch.latents, batch) == pytest.approx(1)
    assert fidelity.structure(-batch.latents, batch) == pytest.approx(1)
    random = torch.Generator().manual_seed(2)
    noise = [fidelity.structure(torch.randn(3, 4, 4, 4, generator=random), batch) for _ in range(50)]
    assert abs(sum(noise) / 50) < 0.15


def test_a_score_of_ones_own_is_asked(data: Dataset, tmp_path: Path):
    asked = []

    def score(samples: Tensor, batch: Any) -> float:
        asked.append((samples.shape, batch.hints.shape))
        return float(len(asked))

    found = fit(quick(sample_every=4), data, tmp_path, score=score)
    assert asked == [((2, 4, 4, 4), (2, 3, 32, 32))] * 2
    assert [progress.fidelity for progress in found] == [1, None, None, None, 2]
