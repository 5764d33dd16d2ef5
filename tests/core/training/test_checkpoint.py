"""Checkpoints hold a whole training, the newest few of them are kept, and a damaged one is never gone on from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from zeroconv.controlnet_core.data.dataset import Dataset
from zeroconv.controlnet_core.diffusion import alphas_cumprod
from zeroconv.controlnet_core.files import saving
from zeroconv.controlnet_core.files.loading import LoadError, read_weights
from zeroconv.controlnet_core.training import checkpoint
from zeroconv.controlnet_core.training.checkpoint import Checkpoint
from zeroconv.controlnet_core.training.loop import train
from zeroconv.controlnet_core.training.options import STRUCTURE, OptionsError

from .tiny import CONFIG, base, dataset, equal, fit, quick, training


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return dataset(tmp_path_factory.mktemp("data"))


def some(step: int) -> Checkpoint:
    return Checkpoint(step, {"model.a": torch.tensor([step, 0.5])}, {"seconds": 0.1 + 0.2, "measured": [[0, 0.25]]})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path):
    path = checkpoint.save(tmp_path, some(7), keep=2)
    assert path.name == "step-00000007.safetensors"
    found = checkpoint.load(path)
    assert (found.step, found.facts) == (7, {"seconds": 0.1 + 0.2, "measured": [[0, 0.25]]})
    assert found.tensors["model.a"].tolist() == [7, 0.5]
    assert list(found.part("model.")) == ["a"]
    assert found.part("optimizer.") == {}


def test_the_newest_few_are_kept(tmp_path: Path):
    (tmp_path / "step-notes.safetensors").write_bytes(b"")
    for step in (1, 9, 10, 100):
        checkpoint.save(tmp_path, some(step), keep=2)
    assert [path.name for path in checkpoint.files(tmp_path)] == [
        "step-00000010.safetensors",
        "step-00000100.safetensors",
    ]
    assert (tmp_path / "step-notes.safetensors").exists()
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.step == 100


def test_a_newer_checkpoint_that_cannot_be_read_costs_no_other(tmp_path: Path):
    for step in (1, 9):
        checkpoint.save(tmp_path, some(step), keep=2)
    (tmp_path / "step-00000009.safetensors").write_bytes(b"")
    checkpoint.save(tmp_path, some(5), keep=1)
    assert names(tmp_path) == ["step-00000005.safetensors", "step-00000009.safetensors"]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.step == 5


def test_a_checkpoint_that_cannot_be_deleted_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refused(path: Path, **_: bool) -> None:
        if not path.name.endswith(".tmp"):
            raise PermissionError(13, "used by another process", str(path))

    monkeypatch.setattr(Path, "unlink", refused)
    for step in (1, 2):
        checkpoint.save(tmp_path, some(step), keep=1)
    assert len(checkpoint.files(tmp_path)) == 2
    assert "step-00000001.safetensors is no longer needed and cannot be deleted" in caplog.text


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not list what is mapped")
def test_nothing_stays_mapped_of_the_checkpoint_that_a_training_goes_on_from(data: Dataset, tmp_path: Path):
    fit(quick(steps=2, ema=0.9), data, tmp_path)
    going = training(quick(ema=0.9), data, tmp_path)
    next(going)
    # Windows deletes no file that is mapped, and the training wants to when it has newer ones.
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    going.close()
    assert str(tmp_path / "checkpoints") not in mapped


def test_the_options_of_the_newest_are_in_its_header(data: Dataset, tmp_path: Path):
    assert checkpoint.options_of(tmp_path / "checkpoints") is None
    fit(quick(steps=2), data, tmp_path)
    assert checkpoint.options_of(tmp_path / "checkpoints") == quick(steps=2).as_dict()
    for step, damage in ((8, b""), (9, b"\x02\0\0\0\0\0\0\0{}")):
        (tmp_path / "checkpoints" / f"step-{step:08d}.safetensors").write_bytes(damage)
    assert checkpoint.options_of(tmp_path / "checkpoints") == quick(steps=2).as_dict()


def test_no_checkpoint_is_none(tmp_path: Path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("left", [0, 40, 100, -1])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, left: int, caplog: pytest.LogCaptureFixture):
    checkpoint.save(tmp_path, some(1), keep=9)
    damaged = checkpoint.save(tmp_path, some(2), keep=9)
    damaged.write_bytes(damaged.read_bytes()[:left])
    with caplog.at_level(logging.WARNING):
        found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "step-00000002.safetensors: " in caplog.text
    assert "the checkpoint before it is taken" in caplog.text


def test_a_bit_that_flips_anywhere_is_found_and_the_checkpoint_before_it_taken(tmp_path: Path):
    checkpoint.save(tmp_path, some(1), keep=9)
    damaged = checkpoint.save(tmp_path, some(2), keep=9)
    whole, whole_one = damaged.read_bytes(), checkpoint.load(damaged)
    for place in range(len(whole)):
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        found = checkpoint.newest(tmp_path)
        # What makes no difference is no damage: spaces behind the header, a name in the metadata that nobody reads.
        assert found is not None
        assert found.step == 1 or (found.facts == whole_one.facts and equal(found.tensors, whole_one.tensors)), place
        assert "step-0000000" + str(found.step) in checkpoint.kept(tmp_path)


def test_checkpoints_of_before_there_were_checksums_are_read(tmp_path: Path):
    made = some(3)
    facts = {"step": "3", "facts": json.dumps(made.facts)}
    saving.write(tmp_path / "step-00000003.safetensors", made.tensors, facts)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 3


@pytest.mark.parametrize("facts", ["5", "[]", '{"options": 5}', '{"measured": {}}', '{"seconds": "1"}', "[" * 100000])
def test_facts_of_another_kind_are_no_checkpoint(tmp_path: Path, facts: str):
    saving.write(tmp_path / "step-00000003.safetensors", {"a": torch.ones(1)}, {"step": "3", "facts": facts})
    with pytest.raises(LoadError, match="step-00000003.safetensors: this is no checkpoint of a training"):
        checkpoint.load(tmp_path / "step-00000003.safetensors")


def test_when_all_are_damaged_nothing_is_begun_anew(tmp_path: Path):
    for step in (1, 2):
        checkpoint.save(tmp_path, some(step), keep=2).write_bytes(b"")
    with pytest.raises(LoadError, match="none of its 2 checkpoints can be read: delete them to begin again at step 0"):
        checkpoint.newest(tmp_path)


def test_other_weights_are_no_checkpoint(tmp_path: Path):
    saving.write(tmp_path / "step-00000003.safetensors", {"a": torch.ones(1)})
    with pytest.raises(LoadError, match="step-00000003.safetensors: this is no checkpoint of a training"):
        checkpoint.load(tmp_path / "step-00000003.safetensors")


def test_temporary_files_of_a_killed_process_are_removed_and_no_others(tmp_path: Path):
    for name in (
        ".step-00000004.safetensors.1f.tmp",
        ".losses.csv.2e.tmp",
        ".hidden",
        "notes.tmp",
        "step-00000004.safetensors",
    ):
        (tmp_path / name).write_bytes(b"x")
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == [".hidden", "notes.tmp", "step-00000004.safetensors"]


def test_the_optimizers_state_comes_back(tmp_path: Path):
    def layer() -> nn.Linear:
        torch.manual_seed(1)
        return nn.Linear(3, 2)

    def step(layer: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        layer(torch.arange(3.0)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    first = layer()
    adam = torch.optim.AdamW(first.parameters(), lr=0.1, fused=True)
    step(first, adam)
    tensors = checkpoint.optimizer_tensors(adam, {p: name for name, p in first.named_parameters()})
    states = ("exp_avg", "exp_avg_sq", "step")
    assert sorted(tensors) == [f"{state}.{name}" for state in states for name in ("bias", "weight")]

    second = layer()
    second.load_state_dict(first.state_dict())
    again = torch.optim.AdamW(second.parameters(), lr=0.1, fused=True)
    checkpoint.restore_optimizer(again, tensors, {p: name for name, p in second.named_parameters()})
    kept = {name: tensor.clone() for name, tensor in tensors.items() if not name.startswith("step")}
    step(second, again)
    assert equal(kept, {name: tensors[name] for name in kept})  # what was restored is a copy
    step(first, adam)
    assert equal(dict(first.state_dict()), dict(second.state_dict()))


def test_what_a_training_keeps(data: Dataset, tmp_path: Path):
    options = quick(ema=0.9, sample_every=2, save_every=2, keep=1)
    fit(options, data, tmp_path)
    assert names(tmp_path / "checkpoints") == ["step-00000004.safetensors"]
    found = checkpoint.load(tmp_path / "checkpoints" / "step-00000004.safetensors")
    assert {key.split(".")[0] for key in found.tensors} == {"model", "optimizer", "average"}
    trained = found.part("model.")
    assert all(key.startswith("control.") for key in trained)  # the locked base is not kept with each of them
    assert sorted(found.part("average.")) == sorted(trained) == sorted(found.part("optimizer.exp_avg."))
    assert found.facts["options"] == options.as_dict()
    assert [step for step, _ in found.facts["measured"]] == [0, 2, 4]
    assert found.facts["seconds"] > 0


# -- a training that is gone on with must be the same one --------------------------------------------------------------


OTHER = {
    "seed": 1,
    "kind": "lite",
    "rank": 3,
    "connections": "gaussian",
    "hint_encoder": "paper",
    "middle_only": True,
    "unlock_decoder": True,
    "prediction": "v",
}


@pytest.fixture(scope="module")
def begun(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    fit(quick(steps=1), data, folder)
    return folder


@pytest.mark.parametrize("name", STRUCTURE)
def test_another_structure_is_refused(begun: Path, name: str):
    saved, options = checkpoint.newest(begun / "checkpoints"), quick(**{name: OTHER[name]})
    assert saved is not None
    before = getattr(quick(), name)
    with pytest.raises(OptionsError, match=f"this run began with {name} {before!r}, found {OTHER[name]!r}: give the"):
        checkpoint.check(saved, options, {"base": saved.facts["base"], "data": saved.facts["data"]})


def test_a_training_refuses_before_it_changes_anything(data: Dataset, begun: Path):
    before = (begun / "control.safetensors").read_bytes()
    with pytest.raises(OptionsError, match="this run began with seed 0, found 5"):
        next(training(quick(seed=5), data, begun))
    assert (begun / "control.safetensors").read_bytes() == before


def test_another_base_is_refused(data: Dataset, begun: Path):
    other = {**base(), "out.2.bias": base()["out.2.bias"] + 1}
    with pytest.raises(OptionsError, match="this run began with another model: give the same one again"):
        next(train(quick(), other, CONFIG, alphas_cumprod(), data, begun))


def test_what_may_change_is_said(data: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    fit(quick(steps=2), data, tmp_path)
    with caplog.at_level(logging.INFO):
        found = fit(quick(steps=3, learning_rate=0.5, ema=0.5), data, tmp_path)
    assert [progress.step for progress in found] == [3]
    assert found[0].learning_rate == 0.5
    assert "goes on from step 2" in caplog.text
    assert "learning_rate was 0.001 and is 0.5 from step 2 on" in caplog.text
    assert "steps was 2 and is 3 from step 2 on" in caplog.text


def test_an_average_that_is_turned_on_later_begins_at_the_weights_of_then(data: Dataset, tmp_path: Path):
    fit(quick(steps=2), data, tmp_path)
    then = read_weights(tmp_path / "control.safetensors")[0]["zero_convs.0.0.weight"].clone()
    fit(quick(steps=3, ema=0.9), data, tmp_path)
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None
    now = found.tensors["model.control.zero_convs.0.0.weight"]
    average = found.tensors["average.control.zero_convs.0.0.weight"]
    torch.testing.assert_close(average, then + (1 - 3 / 13) * (now - then))


def test_a_finished_training_only_leaves_its_control_again(data: Dataset, tmp_path: Path):
    fit(quick(), data, tmp_path)
    weights, metadata = read_weights(tmp_path / "control.safetensors")
    before = {key: tensor.clone() for key, tensor in weights.items()}
    (tmp_path / "control.safetensors").unlink()
    assert fit(quick(steps=2), data, tmp_path) == []  # fewer steps than it has made
    again, facts = read_weights(tmp_path / "control.safetensors")
    assert facts == metadata
    assert facts["trained_steps"] == "4"
    assert all(torch.equal(before[key], again[key]) for key in before)
