"""A control can be used at any moment of its training, and what is written is written beside the training."""

from __future__ import annotations

import re
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from zeroconv.controlnet_core.data.dataset import Dataset
from zeroconv.controlnet_core.files import saving
from zeroconv.controlnet_core.files.loading import load_control, read_weights
from zeroconv.controlnet_core.files.saving import SaveError
from zeroconv.controlnet_core.training import checkpoint, writer
from zeroconv.controlnet_core.training.loop import TrainingStopped
from zeroconv.controlnet_core.training.writer import newest_control

from .tiny import dataset, equal, fit, quick, training


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return dataset(tmp_path_factory.mktemp("data"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def half(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.half() for key, tensor in weights.items()}


# -- a control with each checkpoint -----------------------------------------------------------------------------------


def test_each_checkpoint_has_its_control(data: Dataset, tmp_path: Path):
    fit(quick(save_every=1, keep=2, keep_controls=3), data, tmp_path)
    assert names(tmp_path / "checkpoints") == [f"step-0000000{step}.safetensors" for step in (3, 4)]
    assert names(tmp_path / "controls") == [f"step-0000000{step}.safetensors" for step in (2, 3, 4)]
    newest = newest_control(tmp_path)
    assert newest is not None
    weights, metadata = read_weights(newest)
    final, said = read_weights(tmp_path / "control.safetensors")
    assert equal(weights, half(final))
    assert metadata == said
    fit(quick(steps=2), data, tmp_path / "two")
    assert equal(
        read_weights(tmp_path / "controls" / "step-00000002.safetensors")[0],
        half(read_weights(tmp_path / "two" / "control.safetensors")[0]),
    )


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_in_the_type_that_is_asked_for(data: Dataset, tmp_path: Path, name: str, dtype: torch.dtype):
    fit(quick(steps=1, control_dtype=name), data, tmp_path)
    weights, _ = read_weights(tmp_path / "controls" / "step-00000001.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}


def test_what_fp16_cannot_hold_is_written_in_fp32(data: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    fit(quick(steps=1, learning_rate=1.0, weight_decay=0.0), data, tmp_path)
    control = load_control(*read_weights(tmp_path / "control.safetensors")).control
    weights = {**control.state_dict(), "zero_convs.0.0.bias": torch.full((32,), 1e5)}
    checkpoint.write_control(tmp_path / "x.safetensors", control, weights, quick(), 1, "fp16")  # type: ignore[arg-type]
    assert equal(read_weights(tmp_path / "x.safetensors")[0], weights)
    assert "x.safetensors is written in fp32" in caplog.text


@pytest.mark.parametrize("stopped", [1, 2, 3])
def test_stopped_after_any_step_there_is_a_control(data: Dataset, tmp_path: Path, stopped: int):
    with closing(training(quick(steps=9, save_every=100, ema=0.9), data, tmp_path)) as steps:
        for progress in steps:
            if progress.step == stopped:
                break
    assert not (tmp_path / "control.safetensors").exists()
    newest = newest_control(tmp_path)
    assert newest is not None
    weights, metadata = read_weights(newest)
    assert metadata["trained_steps"] == str(stopped)
    assert load_control(weights, metadata).control.kind == "ControlNet"
    saved = checkpoint.newest(tmp_path / "checkpoints")
    assert saved is not None
    assert equal(weights, half(saved.part("average.control.")))
    # asked for fewer steps than there are, it gives what there is
    assert fit(quick(steps=1, ema=0.9), data, tmp_path) == []
    assert equal(read_weights(tmp_path / "control.safetensors")[0], saved.part("average.control."))


def test_with_an_unlocked_decoder_its_unet_lies_beside_it(data: Dataset, tmp_path: Path):
    fit(quick(unlock_decoder=True, decoder_learning_rate=1e-3), data, tmp_path)
    unet, _ = read_weights(tmp_path / "controls" / "unet" / "step-00000004.safetensors")
    assert equal(unet, half(read_weights(tmp_path / "unet.safetensors")[0]))
    assert names(tmp_path / "controls") == names(tmp_path / "controls" / "unet")


# -- a checkpoint is a control, too -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema": 0.9},
        {"kind": "control_lora", "rank": 3},
        {"kind": "lite"},
        {"middle_only": True},
        {"unlock_decoder": True, "ema": 0.9},
        {"hint_encoder": "paper"},
    ],
)
def test_a_checkpoint_is_read_as_the_control_that_it_holds(data: Dataset, tmp_path: Path, options: dict[str, Any]):
    fit(quick(steps=2, **options), data, tmp_path)
    expected = load_control(*read_weights(tmp_path / "control.safetensors")).control
    found = load_control(*read_weights(tmp_path / "checkpoints" / "step-00000002.safetensors")).control
    assert type(found) is type(expected)
    assert equal(found.state_dict(), expected.state_dict())
    assert found.config == expected.config  # type: ignore[attr-defined]


# -- the best ---------------------------------------------------------------------------------------------------------


def test_the_best_control_is_kept_aside(data: Dataset, tmp_path: Path):
    scores = iter([0.9, 0.1, 0.7, 0.2, 0.6])  # the first is the base's own
    found = fit(quick(sample_every=1, keep=1, keep_controls=1), data, tmp_path, score=lambda *_: next(scores))
    weights, metadata = read_weights(tmp_path / "control-best.safetensors")
    assert metadata["trained_steps"] == "2"
    assert [progress.best for progress in found] == [None, (1, 0.1), (2, 0.7), (2, 0.7), (2, 0.7)]
    fit(quick(steps=2), data, tmp_path / "two")
    assert equal(weights, half(read_weights(tmp_path / "two" / "control.safetensors")[0]))


# -- beside the training ----------------------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = fit(quick(steps=5), data, tmp_path / "whole")
    seen, write = threading.Event(), checkpoint.write

    def slow(*arguments: Any) -> None:
        assert seen.wait(60), "the training waits for its checkpoint"
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write", slow)
    found = []
    for progress in training(quick(steps=5), data, tmp_path / "run"):
        found.append(progress)
        if progress.step == 4:  # the checkpoint of step 2 is not on the disk yet
            assert names(tmp_path / "run" / "checkpoints") == []
            seen.set()
    assert [progress.loss for progress in found] == [progress.loss for progress in whole]
    monkeypatch.undo()
    for kept in ("step-00000004.safetensors", "step-00000005.safetensors"):
        ours, theirs = (checkpoint.load(tmp_path / run / "checkpoints" / kept) for run in ("run", "whole"))
        assert equal(ours.tensors, theirs.tensors)


def test_a_control_that_cannot_be_written_stops_and_says_which(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = saving.write

    def full(path: Path, *arguments: Any) -> None:
        if path.parent.name == "controls":
            raise SaveError(f"{path.name} cannot be written")
        write(path, *arguments)

    monkeypatch.setattr(saving, "write", full)
    with pytest.raises(TrainingStopped, match=r"step 2 cannot be kept: step-0+2.safetensors cannot be written\. step-"):
        fit(quick(steps=9), data, tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoints")]


def test_how_much_it_will_be_is_said_before(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    options = quick(steps=10, save_every=2, sample_every=5, ema=0.9, keep=2, keep_controls=3, sample_steps=1)
    with caplog.at_level("INFO"):
        steps = training(options, data, tmp_path)
        next(steps)
    (said,) = [record.message for record in caplog.records if "will take up to" in record.message]
    fit_all = list(steps)
    assert fit_all[-1].step == 10
    sizes = [float(number) for number in re.findall(r"([\d.]+) MiB", said)]
    files = [tmp_path / kind / "step-00000010.safetensors" for kind in ("checkpoints", "controls")]
    assert sizes[1:3] == pytest.approx([path.stat().st_size / 2**20 for path in files], rel=0.05)
    assert "2 checkpoints" in said
    assert "3 controls" in said
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) / 2**20
    assert taken <= sizes[0] < 2 * taken
    assert "That is not enough" not in said

    class Full:
        free = 1000

    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: Full)
    caplog.clear()
    with caplog.at_level("INFO"), closing(training(quick(steps=20), data, tmp_path / "other")) as steps:
        next(steps)
    assert "That is not enough: make room, or lower keep and keep_controls, or raise save_every" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16", "control_weights": "bf16", "ema": 0.9},
        {"optimizer": "adafactor"},
        {"unlock_decoder": True, "decoder_learning_rate": 1e-4, "ema": 0.9},
        {"kind": "control_lora", "rank": 4, "control_dtype": "fp32"},
        {"middle_only": True},
    ],
)
def test_what_is_said_is_what_is_written(
    data: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
):
    with caplog.at_level("INFO"):
        fit(quick(steps=2, **options), data, tmp_path)
    (said,) = [record.message for record in caplog.records if "will take up to" in record.message]
    sizes = [float(number) for number in re.findall(r"([\d.]+) MiB", said)]
    (kept,) = (tmp_path / "checkpoints").glob("*.safetensors")
    controls = (tmp_path / "controls").rglob("*.safetensors")
    found = [kept.stat().st_size / 2**20, sum(path.stat().st_size for path in controls) / 2**20]
    assert sizes[1:3] == pytest.approx(found, rel=0.05, abs=0.1)


def test_the_last_control_is_the_averages_of_weights_in_bf16(data: Dataset, tmp_path: Path):
    options = quick(precision="bf16", control_weights="bf16", ema=0.9, control_dtype="fp32")
    fit(options, data, tmp_path)
    assert equal(
        read_weights(tmp_path / "control.safetensors")[0],
        read_weights(tmp_path / "controls" / "step-00000004.safetensors")[0],
    )


def test_closing_writes_the_step_of_now_whatever_became_of_the_last(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save = checkpoint.save

    def fails_once(folder: Path, made: checkpoint.Checkpoint, keep: int) -> Path:
        if made.step == 2:
            raise SaveError("the disk was away for a moment")
        return save(folder, made, keep)

    monkeypatch.setattr(checkpoint, "save", fails_once)
    with closing(training(quick(), data, tmp_path)) as running:
        while next(running).step < 3:
            pass
    assert names(tmp_path / "checkpoints") == ["step-00000003.safetensors"]


def test_what_nobody_closed_is_kept_when_the_interpreter_ends(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    running = training(quick(steps=9, save_every=9), data, tmp_path)
    while next(running).step < 3:
        pass
    monkeypatch.setattr("concurrent.futures.thread._shutdown", True)  # as the end of the main thread leaves it
    running.close()  # as the end of the generator does
    assert names(tmp_path / "checkpoints") == names(tmp_path / "controls") == ["step-00000003.safetensors"]


def test_a_best_control_that_cannot_be_written_ends_nothing(
    data: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "control-best.safetensors").mkdir(parents=True)
    fit(quick(sample_every=1, save_every=1), data, tmp_path)
    assert "the best control, of step" in caplog.text
    assert (tmp_path / "control.safetensors").is_file()


def test_controls_of_a_run_that_began_again_are_not_the_newest(data: Dataset, tmp_path: Path):
    fit(quick(), data, tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    fit(quick(steps=1, kind="lite"), data, tmp_path)
    newest = newest_control(tmp_path)
    assert newest is not None and newest.name == "step-00000001.safetensors"
