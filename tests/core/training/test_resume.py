"""A training that was interrupted anywhere, by anything, goes on as if it had not been: bit for bit on the CPU."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from zeroconv.controlnet_core.data.dataset import Dataset
from zeroconv.controlnet_core.training import checkpoint, objective
from zeroconv.controlnet_core.training.controlled_unet import ControlledUNet
from zeroconv.controlnet_core.training.loop import Progress

from .tiny import dataset, fit, left_alike, quick, training, write_config

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return dataset(tmp_path_factory.mktemp("data"))


def facts(found: list[Progress]) -> dict[int, tuple[Any, ...]]:
    """What does not depend on the clock; a step that was made twice counts once."""
    return {p.step: (p.loss, p.gradient_norm, p.learning_rate, p.examples, p.fidelity, p.converged) for p in found}


# -- every kind of training -------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "everything at once": {
        "accumulation": 2,
        "schedule": "cosine",
        "warmup": 2,
        "min_snr": 5.0,
        "ema": 0.99,
        "timesteps": "cubic",
        "sample_every": 2,
    },
    "bf16": {"precision": "bf16", "gradient_checkpointing": True},
    "unlocked decoder": {"unlock_decoder": True, "prediction": "v", "schedule": "linear"},
    "Control-LoRA": {"kind": "control_lora", "rank": 4, "ema": 0.9},
    "middle only": {"middle_only": True, "connections": "gaussian", "hint_encoder": "paper"},
    "lite": {"kind": "lite"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_after_any_step(data: Dataset, tmp_path: Path, kind: str):
    """Closed in turn after each number of steps, also before the first and after the last."""
    options = quick(steps=5, save_every=3, **KINDS[kind])
    whole = fit(options, data, tmp_path / "whole")
    found: list[Progress] = []
    for count in (1, 0, 2, 1, 2):
        steps = training(options, data, tmp_path / "run")
        found += [progress for _, progress in zip(range(count), steps)]
        steps.close()
    found += fit(options, data, tmp_path / "run")
    assert facts(found) == facts(whole)
    assert left_alike(tmp_path / "run", tmp_path / "whole")


class Killed(BaseException):
    """Stands for the end of the process: nothing may handle it."""


PLACES: dict[str, tuple[Any, str]] = {
    "reading": (Dataset, "read"),
    "forward": (ControlledUNet, "forward"),
    "backward": (torch.Tensor, "backward"),
    "the optimizer's step": (torch.optim.AdamW, "step"),
    "the loss": (objective, "loss"),
    "writing a checkpoint": (checkpoint, "write"),
    "deleting an old checkpoint": (Path, "unlink"),
    "renaming it": (Path, "replace"),
}


@pytest.mark.parametrize("place", PLACES)
def test_ended_in_the_midst_of_a_step(data: Dataset, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch):
    options = quick(steps=6, accumulation=2, ema=0.9, sample_every=3)
    whole = fit(options, data, tmp_path / "whole")
    owner, name = PLACES[place]
    original, left = getattr(owner, name), 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, counted)
    found: list[Progress] = []
    ends = 0
    for number in (1, 2, 3, 5, 8):
        left = number
        try:
            found.extend(training(options, data, tmp_path / "run"))
        except Killed:
            ends += 1
    assert ends >= 2
    monkeypatch.undo()
    found += fit(options, data, tmp_path / "run")
    assert facts(found) == facts(whole)
    assert left_alike(tmp_path / "run", tmp_path / "whole")


# -- kill -9 ----------------------------------------------------------------------------------------------------------

PROCESS = """
import os, runpy, sys, time
sys.modules["torch.utils.tensorboard"] = None  # not needed here, and slow to import, as is what draws a plot
runpy.run_path({root!r} + "/dev.py")
import torch
torch.set_num_threads(1)
sync = os.fsync
def slow(number):  # a disk on which a checkpoint takes its time, so that it can be hit
    time.sleep(0.05)
    sync(number)
os.fsync = slow
from zeroconv.controlnet_core.training import __main__ as command
command.plot = lambda *_: torch.zeros(9, 16, 3, dtype=torch.uint8).numpy()
sys.exit(command.main(sys.argv[1:]))
"""
PATIENCE = 1800.0


def command_line(file: Path) -> list[str]:
    return [sys.executable, "-c", PROCESS.format(root=ROOT.as_posix()), str(file)]


def rows(file: Path) -> list[list[str]]:
    """The rows of a CSV file below its header, without the time, the last column of losses.csv."""
    lines = file.read_text().splitlines()
    return [line.split(",")[:5] for line in lines[1:]]


def writing(run: Path) -> bool:
    """Whether a checkpoint is being written right now."""
    return any((run / "checkpoints").glob(".step-*.tmp"))


def kill(file: Path, moment: random.Random, within_write: bool) -> bool:
    """Start the training and end it by SIGKILL; gives whether that was within a checkpoint's writing."""
    run = file.parent / "run"
    log = run / "losses.csv"
    process = subprocess.Popen(command_line(file), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    began = time.monotonic()

    def wait_until(condition: Any) -> None:
        while not condition() and process.poll() is None:
            assert time.monotonic() - began < PATIENCE, "the training hangs"
            time.sleep(0.001)

    kept = checkpoint.files(run / "checkpoints")
    first = int(kept[-1].stem.removeprefix("step-")) if kept else 0
    before = log.read_bytes() if log.exists() else b""

    def steps_more() -> int:
        """How many rows there are beyond the checkpoint, once the log is this process's own."""
        found = log.read_bytes() if log.exists() else b""
        return -1 if found == before else found.count(b"\n") - 1 - first

    if within_write:
        # Temporary files of an earlier process are removed at the beginning, so that after a step one is our own.
        wait_until(lambda: steps_more() > 0)
        wait_until(lambda: writing(run))
    else:
        more = moment.randint(0, 5)
        wait_until(lambda: steps_more() >= more)
        time.sleep(moment.uniform(0, 0.06))
    process.kill()
    _, error = process.communicate()
    assert "Traceback" not in error, error
    return writing(run)


def finish(file: Path) -> None:
    done = subprocess.run(command_line(file), capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


def killed(data: Dataset, folder: Path, times: int, seed: int, **options: Any) -> None:
    """Kill a training `times` times, finish it, and compare it with one that was left alone."""
    whole, broken = folder / "whole", folder / "broken"
    for each in (whole, broken):
        each.mkdir()
        write_config(each, data.folder, save_every=3, **options)
    finish(whole / "config.toml")
    moment = random.Random(seed)
    hits = [kill(broken / "config.toml", moment, within_write=i % 3 == 1) for i in range(times)]
    assert sum(hits) >= max(1, times // 4), "too few of the kills fell into a checkpoint's writing"
    finish(broken / "config.toml")

    for name in ("losses.csv", "fidelity.csv"):
        assert rows(broken / "run" / name) == rows(whole / "run" / name)
    assert [row[0] for row in rows(broken / "run" / "losses.csv")] == [str(i + 1) for i in range(options["steps"])]
    assert left_alike(broken / "run", whole / "run")
    assert not list((broken / "run").rglob("*.tmp"))


def test_three_kills(data: Dataset, tmp_path: Path):
    killed(data, tmp_path, 3, seed=1, steps=24, sample_every=10, accumulation=2, ema=0.99, schedule="cosine")


@pytest.mark.slow
def test_twenty_kills(data: Dataset, tmp_path: Path):
    killed(data, tmp_path, 20, seed=2, steps=100, sample_every=50, ema=0.99, precision="bf16", schedule="linear")
