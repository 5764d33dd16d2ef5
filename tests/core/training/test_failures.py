"""What can go wrong in a training stops it with the reason, the checkpoint that is kept, and what to do."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zeroconv.controlnet_core.data.dataset import Batch, Dataset
from zeroconv.controlnet_core.data.manifest import DatasetError
from zeroconv.controlnet_core.files import saving
from zeroconv.controlnet_core.files.saving import SaveError
from zeroconv.controlnet_core.training import checkpoint, objective, step
from zeroconv.controlnet_core.training.controlled_unet import ControlledUNet
from zeroconv.controlnet_core.training.loop import TrainingStopped
from zeroconv.controlnet_core.training.memory import advice
from zeroconv.controlnet_core.training.options import OptionsError

from .tiny import dataset, fit, losses, quick, training


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return dataset(tmp_path_factory.mktemp("data"))


def newest(folder: Path) -> checkpoint.Checkpoint:
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None
    return found


def at_call(function: Any, number: int, what: Any) -> Any:
    """`function`, but at its `number`-th call `what` happens instead."""
    calls = 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return what(*arguments, **named) if calls == number else function(*arguments, **named)

    return counted


def raising(error: BaseException) -> Any:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise error

    return fail


# -- numbers that are none --------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read = Dataset.read

    def poisoned(self: Dataset, indices: list[int]) -> Batch:
        batch = read(self, indices)
        return replace(batch, latents=batch.latents * float("nan"))

    monkeypatch.setattr(Dataset, "read", at_call(read, 4, poisoned))
    steps = training(quick(steps=9), data, tmp_path)
    with pytest.raises(TrainingStopped) as stopped:
        for _ in steps:
            pass
    said = str(stopped.value)
    assert said.startswith("the loss of step 4 is nan, its gradient nan: numbers have grown beyond fp32.")
    assert "step-00000002.safetensors is kept, and training goes on from it." in said
    assert said.endswith("Lower learning_rate, or choose precision fp32 or bf16.")
    kept = newest(tmp_path)
    assert kept.step == 2
    assert all(tensor.isfinite().all() for tensor in kept.tensors.values())
    assert not (tmp_path / "control.safetensors").exists()


@pytest.mark.parametrize("every", [1, 2])
def test_a_checkpoint_that_would_end_in_the_same_way_is_set_aside(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
):
    pass_loss, options = step.pass_loss, quick(steps=4, save_every=every, accumulation=1)

    def ends(number: int) -> str:
        with monkeypatch.context() as patched:
            patched.setattr(step, "pass_loss", at_call(pass_loss, number, lambda *each: pass_loss(*each) / 0))
            with pytest.raises(TrainingStopped) as stopped:
                fit(replace(options, steps=9), data, tmp_path)
        return str(stopped.value)

    said = ends(3)
    assert said.endswith(" step-00000002.safetensors, after which that came, is set aside as "
                         "step-00000002.safetensors.not-finite.")  # fmt: skip
    assert ("step-00000001.safetensors is kept" if every == 1 else "training begins anew") in said
    left = sorted(path.name for path in (tmp_path / "controls").iterdir() if path.is_file())
    assert left == ["step-00000001.safetensors"] * (every == 1) + ["step-00000002.safetensors.not-finite"]
    assert fit(options, data, tmp_path)[-1].step == 4
    said = ends(1)  # of a run before, with which another precision may be the reason
    assert "step-00000004.safetensors is kept" in said
    assert said.endswith(" Where that does not help, delete step-00000004.safetensors: training then goes on from the "
                         "one before.")  # fmt: skip


def test_a_gradient_that_is_no_number_stops(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Explodes(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient * float("inf")

    loss = objective.loss
    monkeypatch.setattr(objective, "loss", lambda *arguments: Explodes.apply(loss(*arguments)))
    with pytest.raises(
        TrainingStopped, match=r"the loss of step 1 is \d.*, its gradient nan.*No checkpoint was written"
    ):
        fit(quick(), data, tmp_path)


# -- data that is gone ------------------------------------------------------------------------------------------------


def test_a_picture_that_is_gone_loses_no_step(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    straight = losses(fit(quick(sample_every=0), data, tmp_path / "straight"))
    with monkeypatch.context() as patched:
        patched.setattr(Dataset, "read", at_call(Dataset.read, 4, raising(DatasetError("c.png is gone"))))
        with pytest.raises(DatasetError, match="c.png is gone"):
            fit(quick(sample_every=0, save_every=100), data, tmp_path / "run")
    kept = newest(tmp_path / "run").step
    assert kept == 3
    assert losses(fit(quick(sample_every=0), data, tmp_path / "run")) == straight[kept:]


# -- no room ----------------------------------------------------------------------------------------------------------


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_stops_and_leaves_the_checkpoint_before(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fit(quick(steps=2), data, tmp_path)
    steps = training(quick(steps=9), data, tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingStopped) as stopped:
        for _ in steps:
            pass
    said = str(stopped.value)
    assert said.startswith("step 4 cannot be kept: step-00000004.safetensors cannot be written into")
    assert "No space left on device" in said
    assert "make room there" in said
    assert said.endswith("step-00000002.safetensors is kept, and training goes on from it.")
    assert isinstance(stopped.value.__cause__, SaveError)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002.safetensors"]
    monkeypatch.undo()
    again = fit(quick(steps=9), data, tmp_path)
    assert [progress.step for progress in again] == list(range(3, 10))


def test_a_disk_that_is_full_at_the_end_loses_no_step(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = saving.write

    def no_control(path: Path, *arguments: Any) -> None:
        if path.name == "control.safetensors":
            raise SaveError("control.safetensors cannot be written")
        write(path, *arguments)

    monkeypatch.setattr(saving, "write", no_control)
    with pytest.raises(SaveError, match="control.safetensors cannot be written"):
        fit(quick(), data, tmp_path)
    monkeypatch.undo()
    assert fit(quick(), data, tmp_path) == []
    assert (tmp_path / "control.safetensors").exists()


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_says_what_to_lower(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
):
    monkeypatch.setattr(ControlledUNet, "forward", at_call(ControlledUNet.forward, 4, raising(error)))
    with pytest.raises(TrainingStopped) as stopped:
        fit(quick(), data, tmp_path)
    assert str(stopped.value) == (
        "out of memory at step 4 with batch_size 2. step-00000002.safetensors is kept, and training goes on from it. "
        "Set batch_size 1 and accumulation 2, which trains the same, and resume."
    )
    assert stopped.value.__cause__ is error


def test_out_of_memory_while_the_base_is_sampled(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ControlledUNet, "predict", raising(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(TrainingStopped, match="out of memory.*No checkpoint was written yet"):
        fit(quick(sample_every=1), data, tmp_path)


def test_out_of_memory_while_pictures_are_sampled_keeps_the_step(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    full = raising(torch.OutOfMemoryError("CUDA out of memory"))
    steps = training(quick(steps=9, sample_every=3, save_every=9), data, tmp_path)
    next(steps)
    monkeypatch.setattr(ControlledUNet, "predict", at_call(ControlledUNet.predict, 4, full))
    with pytest.raises(TrainingStopped) as stopped:
        list(steps)
    assert str(stopped.value) == (
        "out of memory while pictures were sampled after step 3. step-00000003.safetensors is kept, and "
        "training goes on from it. Set held_out 1 in a new run, or sample_every 0 and resume."
    )
    monkeypatch.undo()
    assert [progress.step for progress in fit(quick(steps=5), data, tmp_path)] == [4, 5]


def test_networks_that_do_not_fit(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nn.Module, "to", raising(torch.OutOfMemoryError("CUDA out of memory")))
    monkeypatch.setattr("zeroconv.controlnet_core.training.loop.build", lambda *_: nn.Linear(1, 1))
    with pytest.raises(TrainingStopped, match="the networks alone do not fit into the memory of cpu"):
        fit(quick(), data, tmp_path)


def test_other_errors_are_not_taken_for_memory(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ControlledUNet, "forward", raising(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        fit(quick(), data, tmp_path)


def test_advice_is_the_mildest_that_is_left():
    assert advice(quick(batch_size=6, accumulation=2)).startswith("Set batch_size 3 and accumulation 4")
    one: dict[str, Any] = {"batch_size": 1}
    assert advice(quick(batch_size=9, accumulation=2)).startswith("Set batch_size 3 and accumulation 6")
    assert advice(quick(batch_size=3)).startswith("Set batch_size 1 and accumulation 3")
    assert advice(quick(**one)) == "Turn gradient_checkpointing on and resume."
    one |= {"gradient_checkpointing": True}
    assert "adamw8bit and resume, or kind control_lora in a new run" in advice(quick(**one))
    last = advice(quick(**one, optimizer="adamw8bit"))
    assert last == "Choose kind control_lora, or a dataset of a lower resolution."


def test_advice_leaves_each_process_an_example():
    assert advice(quick(batch_size=8), world=2).startswith("Set batch_size 4 and accumulation 2")
    assert advice(quick(batch_size=6), world=2).startswith("Set batch_size 2 and accumulation 3")
    assert advice(quick(batch_size=2), world=2) == "Turn gradient_checkpointing on and resume."


def test_advice_where_pictures_are_sampled():
    assert advice(quick(held_out=4), sampling=True) == "Set held_out 2 in a new run, or sample_every 0 and resume."
    assert advice(quick(held_out=1), sampling=True) == "Set sample_every 0 and resume."


# -- damage -----------------------------------------------------------------------------------------------------------


def test_after_a_damaged_checkpoint_training_goes_on_from_the_one_before(
    data: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    whole = fit(quick(steps=6), data, tmp_path / "whole")
    run = tmp_path / "run"
    fit(quick(steps=4), data, run)
    damaged = checkpoint.files(run / "checkpoints")[-1]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    again = fit(quick(steps=6), data, run)
    assert "step-00000004.safetensors: the file is truncated" in caplog.text
    assert [(progress.step, progress.loss) for progress in again] == [
        (progress.step, progress.loss) for progress in whole[3:]
    ]
    assert newest(run).step == 6


def test_what_a_killed_process_left_half_written_is_removed(data: Dataset, tmp_path: Path):
    left = [
        tmp_path / ".control.safetensors.ab.tmp",
        tmp_path / "checkpoints" / ".step-00000002.safetensors.cd.tmp",
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    fit(quick(), data, tmp_path)
    assert not any(path.exists() for path in left)


def test_other_held_out_pictures_are_refused(data: Dataset, tmp_path: Path):
    fit(quick(steps=2, sample_every=0), data, tmp_path)
    fit(quick(steps=3, sample_every=1), data, tmp_path)  # samples can be turned on later
    with pytest.raises(OptionsError, match=r"another choice of held-out pictures \(held_out\): give"):
        fit(quick(steps=4, held_out=1), data, tmp_path)
