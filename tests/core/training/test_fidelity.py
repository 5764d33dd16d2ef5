"""Samples of held-out pictures: always of the same noise, of the base at first, and scored as they are asked to be."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from zeroconv.controlnet_core import diffusion
from zeroconv.controlnet_core.data.dataset import Dataset
from zeroconv.controlnet_core.files.loading import load_control, read_weights
from zeroconv.controlnet_core.networks.unet import UNet
from zeroconv.controlnet_core.training import fidelity, loop
from zeroconv.controlnet_core.training.controlled_unet import ControlledUNet
from zeroconv.controlnet_core.training.log import describe
from zeroconv.controlnet_core.training.loop import held_out_loss

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


# -- what is judged is what is saved ----------------------------------------------------------------------------------


def test_with_averages_the_samples_are_theirs_and_training_is_not_disturbed(data: Dataset, tmp_path: Path):
    options = quick(ema=0.9, sample_every=4, learning_rate=0.01)
    found = fit(options, data, tmp_path / "run")
    assert losses(found) == losses(fit(quick(ema=0.9, learning_rate=0.01), data, tmp_path / "unseen"))
    unet = UNet(CONFIG)
    unet.load_state_dict(base())
    for folder, same in (("run", True), ("plain", False)):
        if folder == "plain":
            fit(quick(learning_rate=0.01), data, tmp_path / folder)
        control = load_control(*read_weights(tmp_path / folder / "control.safetensors")).control
        controlled = ControlledUNet(unet, control, options)  # type: ignore[arg-type]
        held_out = fidelity.HeldOut(data, data.split(2, 0)[0], diffusion.alphas_cumprod(), options, fidelity.structure)
        score, samples = held_out.measure(controlled)
        assert (score == found[-1].fidelity) is same
        assert torch.equal(samples, found[-1].samples) is same  # type: ignore[arg-type]
        assert (held_out_loss(controlled, held_out) == found[-1].validation) is same


def test_the_held_out_loss_is_of_fixed_noise_and_falls_with_what_is_learned(data: Dataset, tmp_path: Path):
    options = quick(steps=16, sample_every=8, learning_rate=3e-3, save_every=30, sample_steps=1)
    found = fit(options, data, tmp_path)
    first, second, third = (progress.validation for progress in found if progress.validation is not None)
    assert third < second < first
    again = fit(replace(options, steps=8), data, tmp_path / "again")
    assert [progress.validation for progress in again if progress.validation is not None] == [first, second]


def test_what_is_left_counts_sampling_and_saving(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ticks = count()  # a machine that others use, too, may take longer for the last sample than for the two before it
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))

    def score(*_: Any) -> float:
        return float(sum(next(ticks) for _ in range(10)))

    options = quick(steps=10, sample_every=4, save_every=5)
    held_out = fidelity.HeldOut(data, [1], diffusion.alphas_cumprod(), options, fidelity.structure)
    due = [step for step in range(11) if held_out.is_due(step)]
    assert due == [0, 4, 8, 10]
    for step in range(11):
        assert held_out.times_due(step) == len([later for later in due if later > step])
    found = fit(options, data, tmp_path, score=score)
    assert found[0].pauses == 0
    assert found[1].pauses > found[5].pauses > found[9].pauses > 0
    assert found[10].pauses == 0


def test_a_fall_of_fidelity_is_told(data: Dataset, tmp_path: Path):
    scores = iter([0.0, 0.5, 0.9, 0.7, 0.72, 0.71, 0.95])
    found = fit(quick(steps=6, sample_every=1, sample_steps=1), data, tmp_path, score=lambda *_: next(scores))
    assert [progress.fallen for progress in found] == [False, False, False, False, False, True, False]
    assert "has fallen from 0.900 at step 2: stop and take the best control" in describe(found[5])
    assert "fidelity 0.700 (best 0.900 at step 2)" in describe(found[3])
    assert "best" not in describe(found[6])
