"""A training can begin with a control that is there: of any kind that is trained, or a checkpoint of another run."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from zeroconv.controlnet_core.data.dataset import Dataset
from zeroconv.controlnet_core.files.loading import load_control, read_weights
from zeroconv.controlnet_core.networks.controlnet import BaseMismatch, ControlNet
from zeroconv.controlnet_core.networks.network import ControlNetwork
from zeroconv.controlnet_core.training import __main__ as command
from zeroconv.controlnet_core.training import checkpoint, config
from zeroconv.controlnet_core.training.controlled_unet import build

from .tiny import CONFIG, base, dataset, equal, fit, left_alike, losses, quick, training, write_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("controlnet", "control_lora", "lite"):
        fit(quick(kind=kind, rank=3), data, folder / kind)
    return folder


def read(path: Path) -> ControlNetwork:
    return load_control(*read_weights(path)).control


@pytest.mark.parametrize("kind", ["controlnet", "control_lora", "lite"])
@pytest.mark.parametrize("file", ["control.safetensors", "checkpoints/step-00000004.safetensors"])
def test_it_begins_with_the_weights_of_the_file(runs: Path, kind: str, file: str):
    given = read(runs / kind / file)
    before = {key: tensor.clone() for key, tensor in given.state_dict().items()}
    control = build(quick(kind=kind), base(), CONFIG, 3, given).control
    assert type(control) is type(given)
    assert equal(control.state_dict(), before)
    assert all(parameter.requires_grad for parameter in control.parameters())
    for parameter in control.parameters():
        parameter.data.add_(1)
    assert equal(given.state_dict(), before)  # which stay its own


def test_a_control_lora_becomes_a_full_copy_where_one_is_trained(runs: Path):
    lora = read(runs / "control_lora" / "control.safetensors")
    control = build(quick(), base(), CONFIG, 3, lora).control
    assert type(control) is ControlNet
    assert equal(control.state_dict(), lora.merged(base()))  # type: ignore[attr-defined]


def test_what_was_learned_is_there_from_the_first_step_on(data: Dataset, runs: Path, tmp_path: Path):
    whole = losses(fit(quick(steps=6, learning_rate=0.0, weight_decay=0.0), data, tmp_path / "fresh"))
    given = read(runs / "controlnet" / "control.safetensors")
    found = losses(fit(quick(steps=6, learning_rate=0.0, weight_decay=0.0), data, tmp_path / "begun", begin=given))
    assert found != whole
    assert found == losses(
        fit(quick(steps=6, learning_rate=0.0, weight_decay=0.0), data, tmp_path / "again", begin=given)
    )


@pytest.mark.parametrize("kind", ["controlnet", "control_lora"])
def test_a_run_that_began_so_goes_on_bit_for_bit_without_the_file(
    data: Dataset, runs: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
):
    options = quick(kind=kind, rank=64, ema=0.9)  # the rank is the given control's: 3
    given = read(runs / kind / "control.safetensors")
    whole = fit(options, data, tmp_path / "whole", begin=given)
    with closing(training(options, data, tmp_path / "run", begin=given)) as steps:
        found = [progress for _, progress in zip(range(3), steps)]
    found += fit(options, data, tmp_path / "run")
    assert losses(found) == losses(whole)
    assert left_alike(tmp_path / "run", tmp_path / "whole")
    fit(replace(options, steps=5), data, tmp_path / "run", begin=given)
    assert "is not read" not in caplog.text
    fit(quick(steps=1), data, tmp_path / "fresh")
    fit(quick(steps=2), data, tmp_path / "fresh", begin=read(runs / "controlnet" / "control.safetensors"))
    assert "the control to begin with is not read: this run goes on from its own step 1" in caplog.text


@pytest.mark.parametrize(
    ("kind", "trained", "said"),
    [
        ("lite", "controlnet", "a ControlNet-lite .*: kind controlnet goes on with a ControlNet: choose kind lite"),
        ("controlnet", "control_lora", "kind control_lora goes on with a Control-LoRA: choose kind controlnet"),
    ],
)  # fmt: skip
def test_another_kind_is_refused(runs: Path, kind: str, trained: str, said: str):
    given = read(runs / kind / "control.safetensors")
    with pytest.raises(BaseMismatch, match=said):
        build(quick(kind=trained), base(), CONFIG, 3, given)


def test_other_shapes_are_refused_in_one_sentence(data: Dataset, tmp_path: Path):
    wide = ControlNet(replace(CONFIG, model_channels=64))
    said = (
        "a ControlNet cannot be trained on here: this SD1.x ControlNet has 64 channels at the top level, the SD1.x mod"
    )
    with pytest.raises(BaseMismatch, match=said):
        fit(quick(), data, tmp_path, begin=wide)
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(BaseMismatch, match="its hint has 1 channels, those of the dataset have 3"):
        build(quick(), base(), CONFIG, 3, ControlNet(CONFIG, hint_channels=1))


def test_from_a_terminal(data: Dataset, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    def run(folder: Path, control: Any) -> int:
        folder.mkdir()
        file = write_config(folder, data.folder, steps=1)
        text = file.read_text().replace("[model]", f"[model]\ncontrol = '{control}'")
        file.write_text(text)
        assert config.read(file, {}).control == Path(control)
        return command.main([str(file)])

    given = runs / "controlnet" / "checkpoints" / "step-00000004.safetensors"
    assert run(tmp_path / "a", given) == 0
    saved = checkpoint.newest(tmp_path / "a" / "run" / "checkpoints")
    assert saved is not None
    assert saved.facts["begun"] == "ControlNet"
    fit(quick(steps=1), data, tmp_path / "by_hand", begin=read(given))
    assert left_alike(tmp_path / "a" / "run", tmp_path / "by_hand")
    assert run(tmp_path / "b", tmp_path / "none.safetensors") == 1
    assert "none.safetensors: there is no such file: give the path" in capsys.readouterr().err
    assert run(tmp_path / "c", runs / "lite" / "control.safetensors") == 1
    error = capsys.readouterr().err
    assert "a ControlNet-lite cannot be trained on here: " in error
    assert len(error.splitlines()) == 1
