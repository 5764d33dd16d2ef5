"""The log of a training: what is on disk, what stays of it after a crash, and the line that a user reads."""

from __future__ import annotations

import builtins
import logging
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest

from zeroconv.controlnet_core.training.convergence import smoothed
from zeroconv.controlnet_core.training.log import Log, LogError, describe, duration, remaining
from zeroconv.controlnet_core.training.loop import Progress

STEPS = 20


def progress(step: int, fidelity: float | None = None, converged: int | None = None, **changed: object) -> Progress:
    """A step's report; its numbers have many digits and depend on the step alone."""
    generator = random.Random(step)
    found = Progress(
        step=step,
        steps=STEPS,
        loss=generator.random() / 3 if step else None,
        learning_rate=1e-5 / 3,
        gradient_norm=generator.random() if step else None,
        seconds=step / 3,
        examples=4 * step,
        fidelity=fidelity,
        samples=None,
        converged=converged,
        memory=None,
    )
    return replace(found, **changed)  # type: ignore[arg-type]


def run(folder: Path, first: int = 0, last: int = STEPS, close: bool = True) -> Log:
    """Log the steps from `first` to `last`, a measurement every five; the log."""
    log = Log.open(folder, first - 1)
    for step in range(first, last + 1):
        measured = step % 5 == 0
        log.add(progress(step, 0.1 + step / 30 if measured else None, 10 if measured and step >= 15 else None))
    if close:
        log.close()
    return log


@pytest.fixture
def no_tensorboard(monkeypatch: pytest.MonkeyPatch):
    """An installation without TensorBoard."""
    usual = builtins.__import__

    def missing(name: str, *rest: object):
        if "tensorboard" in name:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return usual(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", missing)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# -- what is written --------------------------------------------------------------------------------------------------


def test_rows(tmp_path: Path, no_tensorboard: None):
    run(tmp_path)
    assert set(files(tmp_path)) == {"losses.csv", "fidelity.csv"}
    text = (tmp_path / "losses.csv").read_bytes()
    assert b"\r" not in text
    lines = text.decode().split("\n")
    assert lines[0] == "step,loss,smoothed,learning_rate,gradient_norm,seconds"
    assert len(lines) == 1 + STEPS + 1
    assert lines[-1] == ""
    losses = [progress(step).loss for step in range(1, STEPS + 1)]
    rows = [line.split(",") for line in lines[1:-1]]
    assert [float(row[1]) for row in rows] == losses  # to the last bit
    assert [float(row[2]) for row in rows] == smoothed([loss for loss in losses if loss is not None])
    assert rows[2] == [
        "3", repr(losses[2]), rows[2][2], "3.3333333333333337e-06", repr(progress(3).gradient_norm), "1.0"
    ]  # fmt: skip
    assert (tmp_path / "fidelity.csv").read_bytes() == (
        b"step,fidelity,converged\n0,0.1,\n5,0.26666666666666666,\n10,0.43333333333333335,\n15,0.6,10\n"
        b"20,0.7666666666666666,10\n"
    )


def test_each_row_is_on_disk_at_once(tmp_path: Path, no_tensorboard: None):
    log = Log.open(tmp_path)
    log.add(progress(0, 0.2))
    log.add(progress(1))
    assert (tmp_path / "losses.csv").read_bytes().count(b"\n") == 2
    assert (tmp_path / "fidelity.csv").read_bytes().endswith(b"\n0,0.2,\n")
    log.close()


def test_what_a_log_knows(tmp_path: Path, no_tensorboard: None):
    log = run(tmp_path)
    assert [step for step, _ in log.losses] == list(range(1, STEPS + 1))
    assert log.fidelity == [(step, 0.1 + step / 30) for step in range(0, STEPS + 1, 5)]
    assert log.smoothed == smoothed([loss for _, loss in log.losses])[-1]
    assert log.remaining(progress(5)) == pytest.approx(15 / 3)
    again = Log.open(tmp_path, STEPS)
    assert (again.losses, again.fidelity, again.smoothed) == (log.losses, log.fidelity, log.smoothed)
    again.close()


def test_numbers_of_other_kinds(tmp_path: Path, no_tensorboard: None):
    with Log.open(tmp_path) as log:
        log.add(progress(1, loss=float("nan"), gradient_norm=None, learning_rate=np.float64(0.5)))
        log.add(progress(2, loss=0.25, fidelity=float(np.float32(0.1))))
    lines = (tmp_path / "losses.csv").read_text().splitlines()
    assert lines[1] == "1,nan,nan,0.5,,0.3333333333333333"
    assert lines[2].startswith("2,0.25,0.25,")
    assert (tmp_path / "fidelity.csv").read_text().splitlines()[1] == "2,0.10000000149011612,"


# -- after a crash ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 4, 5, 12, 20])
@pytest.mark.parametrize("reached", [5, 13, 20])
def test_a_run_that_goes_on_has_the_files_of_one_that_never_stopped(
    tmp_path: Path, no_tensorboard: None, kept: int, reached: int
):
    run(tmp_path / "whole")
    run(tmp_path / "cut", last=reached, close=False)
    kept = min(kept, reached)
    run(tmp_path / "cut", first=kept + 1 if kept else 0)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_kill_anywhere_in_a_row(tmp_path: Path, no_tensorboard: None):
    """Whatever part of the files reached the disk, the run goes on from its checkpoint with the same files."""
    run(tmp_path)
    whole = files(tmp_path)
    losses = whole["losses.csv"]
    checkpoint = losses.index(b"\n13,")  # rows 1 to 12 were complete when the checkpoint of step 12 was written
    measured = whole["fidelity.csv"].index(b"\n15,") + 1
    for end in [*range(checkpoint + 1, len(losses), 23), len(losses) - 1]:
        (tmp_path / "losses.csv").write_bytes(losses[:end])
        (tmp_path / "fidelity.csv").write_bytes(whole["fidelity.csv"][: measured + end % 20])
        run(tmp_path, first=13)
        assert files(tmp_path) == whole, end


@pytest.mark.parametrize("rest", [b"", b"step,lo", b"step,loss,smoothed,learning_rate,gradient_norm,seconds\n1,0."])
def test_a_kill_while_the_first_line_is_written(tmp_path: Path, no_tensorboard: None, rest: bytes):
    run(tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "losses.csv").write_bytes(rest)
    run(tmp_path / "cut")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_what_a_power_cut_leaves_is_cut_away(tmp_path: Path, no_tensorboard: None):
    run(tmp_path)
    whole = files(tmp_path)
    text = whole["losses.csv"]
    (tmp_path / "losses.csv").write_bytes(text[: text.index(b"\n9,")] + b"\n" + b"\0" * 100 + b"\n9,1,1,1,1,1\n")
    log = Log.open(tmp_path, 20)
    assert [step for step, _ in log.losses] == list(range(1, 9))
    log.close()


def test_rows_that_stay_are_not_written_again(tmp_path: Path, no_tensorboard: None):
    run(tmp_path)
    before = (tmp_path / "losses.csv").stat()
    Log.open(tmp_path, STEPS).close()
    after = (tmp_path / "losses.csv").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_another_file_is_left_alone(tmp_path: Path, no_tensorboard: None):
    (tmp_path / "losses.csv").write_text("my own,table\n1,2\n")
    with pytest.raises(LogError, match="losses.csv is no log of a training: its first line is 'my own,table', expect"):
        Log.open(tmp_path)
    assert (tmp_path / "losses.csv").read_text() == "my own,table\n1,2\n"


def test_a_step_that_does_not_follow(tmp_path: Path, no_tensorboard: None):
    log = run(tmp_path, last=7, close=False)
    with pytest.raises(LogError, match=r"losses.csv ends with step 7, and step 7 comes after it: open the log again"):
        log.add(progress(7))
    log.close()


def test_a_full_disk_is_said(tmp_path: Path, no_tensorboard: None):
    log = run(tmp_path, last=3, close=False)
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    log._losses._file = full.open("w")
    with pytest.raises(LogError, match=r"the log in .* cannot be written: .*No space left.* Make room there"):
        log.add(progress(4))
    with pytest.raises(LogError, match="cannot be written"):
        Log.open(tmp_path / "losses.csv" / "inside")


# -- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_has_what_the_files_have(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log.open(tmp_path, options={"rank": 64})
    for step in range(9):
        log.add(progress(step, 0.5 if step == 4 else None), np.zeros((8, 16, 3), dtype=np.uint8) if step == 4 else None)
    log.close()
    time.sleep(1)  # TensorBoard reads its files in the order of their names, and these tell no more than the second
    # The checkpoint was that of step 6, and what came after it comes again, with another loss to tell them apart.
    log = Log.open(tmp_path, 6)
    log.add(progress(7, loss=7.0))
    log.add(progress(8, loss=8.0, fidelity=0.75), np.zeros((8, 16, 3), dtype=np.uint8))
    log.close()

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {"loss", "loss_smoothed", "learning_rate", "gradient_norm", "fidelity"}
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    wanted = [*((step, progress(step).loss) for step in range(1, 7)), (7, 7.0), (8, 8.0)]
    assert [step for step, _ in losses] == [step for step, _ in wanted]
    assert [value for _, value in losses] == pytest.approx([value for _, value in wanted])
    assert [(event.step, event.value) for event in events.Scalars("fidelity")] == [(4, 0.5), (8, 0.75)]
    assert [event.step for event in events.Images("samples")] == [4, 8]
    assert b"| rank | 64 |" in events.Tensors("options/text_summary")[0].tensor_proto.string_val[0]


def test_without_tensorboard_it_is_said_and_nothing_else_changes(
    tmp_path: Path, no_tensorboard: None, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO):
        log = Log.open(tmp_path)
        log.add(progress(1), np.zeros((8, 8, 3), dtype=np.uint8))
        log.close()
    assert [record.message for record in caplog.records] == [
        "TensorBoard is not installed: losses and fidelity are in the run's CSV files alone"
    ]
    assert not (tmp_path / "tensorboard").exists()


# -- pace and words ---------------------------------------------------------------------------------------------------


def test_pauses_do_not_spoil_the_pace():
    steady = [0.5 * i for i in range(101)]
    assert remaining(steady, 100) == pytest.approx(50)
    paused = [t + (600 if i > 50 else 0) for i, t in enumerate(steady)]
    assert remaining(paused, 100) == pytest.approx(51)
    buckets = [1.0 * i + 0.5 * (i % 2) for i in range(101)]  # steps of 1.5 and 0.5 seconds in turn
    assert remaining(buckets, 100) == pytest.approx(100)
    assert remaining(steady, 0) == 0
    assert remaining([], 5) is None
    assert remaining([1.0], 5) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"), (99, "99 s"), (100, "2 min"), (1200, "20 min"), (5990, "1 h 40 min"), (11100, "3 h 5 min"),
        (172_000, "47 h 47 min"), (187_000, "2 d 4 h"), (8_640_000, "100 d 0 h"),
    ],
)  # fmt: skip
def test_durations(seconds: float, words: str):
    assert duration(seconds) == words


def test_the_line():
    report = progress(1200, steps=5000, loss=0.12341, memory=round(9.8 * 2**30))
    assert describe(report, 0.13008, 1 / 3.1) == (
        "step 1200/5000 | loss 0.1234 (smoothed 0.1301) | 3.1 steps/s | 20 min left | 9.8 GiB"
    )
    assert describe(progress(0, 0.2)) == "step 0/20 | fidelity 0.200"
    assert describe(progress(20, 0.8, 15, loss=0.05), pace=4.25) == (
        "step 20/20 | loss 0.0500 | fidelity 0.800 | converged at step 15 | 4.2 s/step"
    )
    assert describe(progress(1200, steps=5000)).isascii()


def test_the_line_of_a_log(tmp_path: Path, no_tensorboard: None):
    log = run(tmp_path, last=10)
    assert log.describe(progress(10)) == (
        f"step 10/20 | loss {progress(10).loss:.4f} (smoothed {log.smoothed:.4f}) | 3.0 steps/s | 3 s left"
    )


# -- trackers ---------------------------------------------------------------------------------------------------------


class Tracker:
    """As accelerate's are."""

    name, requires_logging_directory = "mine", False
    made: ClassVar[list[Tracker]] = []

    def __init__(self, project: str):
        self.told: list[Any] = [project]
        self.made.append(self)

    def start(self) -> None:
        self.told.append("start")

    def store_init_configuration(self, values: dict) -> None:
        self.told.append(values)

    def log(self, values: dict, step: int) -> None:
        if step == 3:
            raise ConnectionError("the line is cut")
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("finish")


@pytest.fixture
def accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    Tracker.made.clear()
    module: Any = ModuleType("accelerate.tracking")
    module.LOGGER_TYPE_TO_CLASS = {"mine": Tracker, "far": type("Far", (Tracker,), {"start": lambda _: 1 / 0})}
    whole: Any = ModuleType("accelerate")
    whole.PartialState = object
    monkeypatch.setitem(sys.modules, "accelerate", whole)
    monkeypatch.setitem(sys.modules, "accelerate.tracking", module)


@pytest.mark.usefixtures("accelerate")
def test_trackers_are_told_and_one_that_fails_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    picture = np.zeros((4, 4, 3), np.uint8)
    with Log.open(tmp_path / "a", options={"rank": 64}, trackers=["mine"]) as log:
        log.add(progress(1, loss=0.5, fidelity=0.25), picture)
    (tracker,) = Tracker.made
    assert tracker.told[:3] == ["zeroconv", "start", {"rank": 64}] and tracker.told[4:] == ["finish"]
    assert tracker.told[3][0] == 1 and tracker.told[3][1].items() >= {"loss": 0.5, "fidelity": 0.25}.items()
    with Log.open(tmp_path / "b", trackers=["mine"]) as log:
        for step in (2, 3, 4):
            log.add(progress(step, loss=0.5))
    assert "mine is no longer told of this training: the line is cut" in caplog.text
    assert [each[0] for each in Tracker.made[1].told[3:]] == [2]
    assert [step for step, _ in log.losses] == [2, 3, 4]


@pytest.mark.usefixtures("accelerate")
def test_a_run_that_goes_on_is_the_same_to_a_tracker_that_can_be_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told = []

    class Wandb(Tracker):
        def __init__(self, project: str, **settings: str):
            super().__init__(project)
            told.append(settings)

    monkeypatch.setitem(sys.modules["accelerate.tracking"].LOGGER_TYPE_TO_CLASS, "wandb", Wandb)
    for step in (0, 2, 2, 0):  # a run that is begun, gone on with twice, and begun anew in the same folder
        Log.open(tmp_path, step, trackers=["wandb", "mine"]).close()
    first, second, third, anew = (settings["id"] for settings in told)
    assert first == second == third != anew
    assert {settings["resume"] for settings in told} == {"allow"}


@pytest.mark.usefixtures("accelerate")
def test_a_tracker_that_cannot_be_had_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(LogError, match="there is no tracker 'none': choose of mine, far; TensorBoard needs no mention"):
        Log.open(tmp_path, trackers=["none"])
    with pytest.raises(LogError, match=r"tracker far cannot be started \(division by zero\): install it, log in"):
        Log.open(tmp_path, trackers=["far"])
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "accelerate.tracking")
    with pytest.raises(LogError, match="tracker mine is reached through accelerate, which is not installed"):
        Log.open(tmp_path, trackers=["mine"])
