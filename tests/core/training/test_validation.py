"""The user's own prompts and hints are sampled beside the held-out pictures, and change nothing of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from zeroconv.controlnet_core.data.dataset import Dataset
from zeroconv.controlnet_core.data.pictures import PictureError
from zeroconv.controlnet_core.training import __main__ as command
from zeroconv.controlnet_core.training import config
from zeroconv.controlnet_core.training.config import ConfigError
from zeroconv.controlnet_core.training.validation import ValidationPrompt, framed

from .tiny import dataset, encode_prompt, fit, losses, quick, write_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return dataset(tmp_path_factory.mktemp("data"))


def flag(width: int = 64, height: int = 16) -> np.ndarray:
    """Red on the left, blue on the right."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, : width // 2, 0] = picture[:, width // 2 :, 2] = 255
    return picture


def unasked(prompt: str) -> Any:
    pytest.fail(f"{prompt!r} was encoded")


# -- what is sampled --------------------------------------------------------------------------------------------------


def test_a_prompt_of_the_dataset_needs_no_encoder(data: Dataset):
    batch = ValidationPrompt("squares", flag()).batch(data, unasked)
    (index,) = [i for i, prompt in enumerate(data.prompts) if prompt == "squares"]
    same = next(i for i in range(len(data)) if data.read([i]).prompts.item() == index)
    assert torch.equal(batch.context, data.read([same]).context)
    assert (batch.latents.shape, batch.hints.shape) == ((1, 4, 2, 8), (1, 3, 16, 64))
    assert torch.equal(batch.hint_bytes[0].movedim(0, -1), torch.from_numpy(flag()))
    assert batch.pooled is None and batch.sizes is None


def test_other_prompts_are_encoded_and_hints_come_to_the_size_of_a_bucket(data: Dataset, tmp_path: Path):
    Image.fromarray(flag(300, 300)).save(tmp_path / "flag.png")
    batch = ValidationPrompt("a flag", tmp_path / "flag.png").batch(data, encode_prompt)
    assert torch.equal(batch.context[0], encode_prompt("a flag")[0])
    assert torch.equal(batch.hint_bytes[0].movedim(0, -1), torch.from_numpy(flag(32, 32)))
    with pytest.raises(PictureError, match=r"none.png cannot be read as a picture"):
        ValidationPrompt("", tmp_path / "none.png").batch(data, encode_prompt)


def test_they_are_sampled_as_held_out_pictures_are(data: Dataset, tmp_path: Path):
    options = quick(steps=2, held_out=1, sample_every=2, ema=0.9)
    ((held,), _) = data.split(1, options.seed)
    of_held = data.read([held])
    prompt = data.prompts[of_held.prompts.item()]
    hint = of_held.hint_bytes[0].movedim(0, -1).contiguous().numpy()
    own = [ValidationPrompt(*each).batch(data, unasked) for each in ((prompt, hint), ("", flag()))]
    found = fit(options, data, tmp_path / "run", prompts=own)
    for progress in (found[0], found[-1]):
        first, second = progress.prompted
        assert progress.samples is not None
        assert torch.equal(first, progress.samples)
        assert second.shape == (1, 4, 2, 8) and second.isfinite().all()
    assert found[1].prompted == ()
    assert losses(found) == losses(fit(options, data, tmp_path / "without"))


def test_without_held_out_pictures_they_are_sampled_alone(data: Dataset, tmp_path: Path):
    own = [ValidationPrompt("", flag()).batch(data, unasked)]
    found = fit(quick(steps=2, held_out=0, sample_every=1), data, tmp_path, prompts=own)
    assert [len(progress.prompted) for progress in found] == [1, 1, 1]
    assert [(progress.samples, progress.fidelity) for progress in found] == [(None, None)] * 3


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_pictures_of_other_sizes_fit_into_a_frame():
    pictures = torch.arange(2 * 3 * 4 * 8.0).reshape(1, 2, 3, 4, 8)
    assert torch.equal(framed(pictures, 4, 8), pictures)
    found = framed(torch.ones(2, 3, 4, 16), 8, 8)
    assert found.shape == (2, 3, 8, 8)
    assert found[..., :2, :].eq(1).all() and not found[..., 2:, :].any()
    assert framed(torch.ones(5, 1, 3, 8, 4), 16, 16)[..., :8].eq(1).all()


def test_the_sheet_of_a_run_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset(tmp_path / "data")
    Image.fromarray(flag()).save(tmp_path / "flag.png")
    asked: list[str] = []

    def encode(prompt: str) -> tuple[Tensor, None]:
        asked.append(prompt)
        return encode_prompt(prompt)

    monkeypatch.setattr(command, "read_prompts", lambda *_: encode)
    file = write_config(tmp_path, tmp_path / "data", steps=2, sample_every=2)
    assert command.main([str(file), "--output", str(tmp_path / "without")]) == 0
    with file.open("a", encoding="utf-8") as text:
        for prompt in ("squares", "a flag"):
            text.write(f'\n[[validation]]\nprompt = "{prompt}"\nhint = "flag.png"\n')
    assert command.main([str(file)]) == 0
    assert asked == ["a flag"]
    sheets = []
    for run in ("without", "run"):
        with Image.open(tmp_path / run / "samples" / "step-00000002.png") as sheet:
            sheets.append(np.asarray(sheet))
    without, found = sheets
    assert found.shape == (96, 128, 3)
    assert np.array_equal(found[:, :64], without)
    for own in (found[:, 64:96], found[:, 96:]):
        hint, picture, sample = own[:32], own[32:64], own[64:]
        assert np.array_equal(hint[:8], flag(32, 8))
        assert not hint[8:].any() and not picture.any() and not sample[8:].any()
        assert sample[:8].any()


@pytest.mark.parametrize(
    "sections",
    [
        '[validation]\nhint = "a.png"',
        '[[validation]]\nprompt = "no hint"',
        "[[validation]]\nhint = 3",
        '[[validation]]\nhint = "a.png"\nseed = "1"',
    ],
)
def test_sections_that_say_something_else_are_refused(tmp_path: Path, sections: str):
    file = write_config(tmp_path, tmp_path / "data")
    file.write_text(f"{file.read_text()}\n{sections}\n")
    with pytest.raises(ConfigError, match=r"expected sections \[\[validation\]\], each with a hint and a prompt"):
        config.read(file, {})


def test_paths_of_hints_are_relative_to_the_file(tmp_path: Path):
    file = write_config(tmp_path, tmp_path / "data")
    file.write_text(f'{file.read_text()}\n[[validation]]\nhint = "hints/a.png"\n')
    assert config.read(file, {}).prompts == (ValidationPrompt("", tmp_path / "hints" / "a.png"),)
