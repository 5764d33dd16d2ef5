"""Two processes that share a training give what one gives on the same examples, and end together."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zeroconv.controlnet_core.files.loading import read_weights
from zeroconv.controlnet_core.training import __main__ as command
from zeroconv.controlnet_core.training import checkpoint
from zeroconv.controlnet_core.training.distributed import ALONE, DistributedError, Process, from_environment, joined

from .tiny import base, dataset, write_config

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    dataset(folder)
    return folder


def torchrun(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Two processes of this machine, over the loopback interface."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, env=environment, timeout=timeout
    )


def losses(run: Path) -> list[list[float]]:
    """Step, loss and gradient norm of each row."""
    rows = [line.split(",") for line in (run / "losses.csv").read_text().splitlines()[1:]]
    return [[float(row[i]) for i in (0, 1, 4)] for row in rows]


# -- one among others -------------------------------------------------------------------------------------------------


def test_alone_nothing_is_set_up():
    assert from_environment({}) == ALONE
    with joined({}) as process:
        assert process == Process(0, 1, torch.device("cpu"))
        assert not torch.distributed.is_initialized()
        assert process.gather(7) == [7]
        number = torch.tensor(2.5)
        assert process.mean(number) is number


def test_each_takes_its_share_of_the_examples():
    assert [list(range(6))[Process(rank, 3).share(6)] for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert list(range(6))[ALONE.share(6)] == list(range(6))


def test_what_a_launcher_says(monkeypatch: pytest.MonkeyPatch):
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert from_environment(environment) == Process(3, 4, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert from_environment(environment) == Process(3, 4, torch.device("cuda", 1))
    with pytest.raises(DistributedError, match="process 2 of this machine finds 2 GPUs: start no more processes"):
        from_environment({**environment, "LOCAL_RANK": "2"})


def test_a_launcher_that_gives_no_address_is_told_of(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    said = r"process 0 of 2 was left alone \(.*MASTER_ADDR.*start all of them"
    with pytest.raises(DistributedError, match=said), joined({"RANK": "0", "WORLD_SIZE": "2"}):
        pass


# -- two processes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_give_the_losses_of_one(data: Path, tmp_path: Path, accumulation: int):
    options = {"steps": 6, "batch_size": 4, "accumulation": accumulation, "sample_every": 3, "save_every": 4}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert command.main([str(write_config(tmp_path / "one", data, **options))]) == 0
    done = torchrun("-m", "controlnet_core.training", str(write_config(tmp_path / "two", data, **options)))
    assert done.returncode == 0, done.stderr
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"

    expected, found = torch.tensor(losses(one)), torch.tensor(losses(two))
    assert expected.shape == (6, 3)
    assert expected[:, 1].unique().numel() == 6
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    weights, same = (read_weights(run / "control.safetensors")[0] for run in (one, two))
    assert weights.keys() == same.keys()
    # Adam makes every gradient the same size, also one that cancels to rounding errors: those of biases in front of a
    # norm of one channel a group. So single numbers differ by a part of the 6 steps of 1e-3 that they move.
    assert max((same[key] - weights[key]).abs().max().item() for key in weights) < 2e-4
    moved, apart = (
        torch.cat([(tensors[key] - other[key]).flatten() for key in weights if key in base()]).norm()
        for tensors, other in ((weights, base()), (weights, same))
    )
    assert moved > 0.1
    assert apart < 1e-3 * moved

    # one process alone speaks and writes
    assert done.stdout.count("done: ") == 1
    assert done.stdout.count("step 0/6 | fidelity") == 1
    assert len(list((two / "samples").iterdir())) == 3
    assert [path.name for path in checkpoint.files(two / "checkpoints")] == [
        "step-00000004.safetensors",
        "step-00000006.safetensors",
    ]
    assert not list(two.rglob("*.tmp"))


def test_two_processes_with_all_that_saves_memory_give_the_losses_of_one(data: Path, tmp_path: Path):
    """Each rounds its weights by the same chances, and none sends the locked base, which gloo could not in fp8."""
    options = {"steps": 3, "base_weights": "fp8", "control_weights": "bf16", "precision": "bf16", "ema": 0.9}
    options["optimizer_in_ram"] = True
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert command.main([str(write_config(tmp_path / "one", data, **options))]) == 0
    done = torchrun("-m", "controlnet_core.training", str(write_config(tmp_path / "two", data, **options)))
    assert done.returncode == 0, done.stderr
    one, two = (torch.tensor(losses(tmp_path / name / "run")) for name in ("one", "two"))
    torch.testing.assert_close(two[:, 1], one[:, 1], rtol=1e-2, atol=0)


SHARDED = {"batch_size": 4, "ema": 0.9, "sample_every": 3, "held_out": 3, "save_every": 3, "shard_optimizer": True}


def test_an_optimizer_divided_among_processes_is_the_whole_one(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """And its checkpoints are those of one process: either goes on from what the other has written."""
    caplog.set_level("INFO")
    folders = alone, divided, rejoined = [tmp_path / name for name in ("alone", "divided", "rejoined")]
    for folder in folders:
        folder.mkdir()
    files = {folder: str(write_config(folder, data, steps=6, **SHARDED)) for folder in folders}
    assert command.main([files[alone]]) == 0
    assert "the optimizer's state is not divided: one process alone has nobody to share it with" in caplog.text
    done = torchrun("-m", "controlnet_core.training", files[divided], "--steps", "3")
    assert done.returncode == 0 and "is not divided" not in done.stderr, done.stderr
    kept, whole = ({key: x.shape for key, x in read_weights(third(folder))[0].items()} for folder in (divided, alone))
    assert kept == whole and any(key.startswith("optimizer.exp_avg.") for key in kept)
    assert command.main([files[divided]]) == 0
    assert command.main([files[rejoined], "--steps", "3"]) == 0
    done = torchrun("-m", "controlnet_core.training", files[rejoined])
    assert done.returncode == 0 and "goes on from step 3" in done.stderr, done.stderr

    expected = torch.tensor(losses(alone / "run"))
    weights = read_weights(alone / "run" / "control.safetensors")[0]
    for folder in (divided, rejoined):
        torch.testing.assert_close(torch.tensor(losses(folder / "run")), expected, rtol=2e-6, atol=0)
        same = read_weights(folder / "run" / "control.safetensors")[0]
        assert max((same[key] - weights[key]).abs().max().item() for key in weights) < 2e-4
        for name in ("fidelity.csv", "validation.csv"):  # each of two processes has sampled some of three pictures
            ours, theirs = (table(each / "run" / name) for each in (folder, alone))
            assert [row[0] for row in ours] == [0, 3, 6]
            assert [row[1] for row in ours] == pytest.approx([row[1] for row in theirs], abs=1e-4)


def third(folder: Path) -> Path:
    """The checkpoint of step 3."""
    return folder / "run" / "checkpoints" / "step-00000003.safetensors"


def table(file: Path) -> list[list[float]]:
    """The first two columns of a log."""
    return [[float(x) for x in line.split(",")[:2]] for line in file.read_text().splitlines()[1:]]


FAILS = """
import runpy, sys
runpy.run_path({root!r} + "/dev.py")
import os, signal
from zeroconv.controlnet_core.training import __main__ as command
from zeroconv.controlnet_core.training import step
passes = 0
fit = step.objective.loss
def loss(*arguments):
    global passes
    passes += 1
    if passes == 3 and os.environ["RANK"] == "1":
        {what}
    return fit(*arguments)
step.objective.loss = loss
sys.exit(command.main(sys.argv[1:]))
"""


def test_when_one_fails_all_end_and_say_why(data: Path, tmp_path: Path):
    script = tmp_path / "fails.py"
    script.write_text(FAILS.format(root=ROOT.as_posix(), what='raise RuntimeError("out of memory: simulated")'))
    done = torchrun(str(script), str(write_config(tmp_path, data)))
    assert done.returncode != 0
    # Whether it finds the checkpoint that process 0 is writing just then is a matter of time.
    assert "process 1: out of memory at step 3 with batch_size 2. " in done.stderr
    assert "was left alone" in done.stderr
    assert checkpoint.files(tmp_path / "run" / "checkpoints")[-1].name == "step-00000002.safetensors"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals between processes")
def test_a_signal_to_one_stops_all_after_the_same_step(data: Path, tmp_path: Path):
    script = tmp_path / "stops.py"
    script.write_text(FAILS.format(root=ROOT.as_posix(), what="os.kill(os.getpid(), signal.SIGTERM)"))
    done = torchrun(str(script), str(write_config(tmp_path, data, save_every=100)))
    assert done.returncode != 0  # the launcher's own: its processes ended with 143
    assert "stopped after step 3 of 4: the same command goes on from there" in done.stdout
    assert re.search(r"exitcode +: 143", done.stderr)
    assert [row[0] for row in losses(tmp_path / "run")] == [1, 2, 3]
    assert checkpoint.files(tmp_path / "run" / "checkpoints")[-1].name == "step-00000003.safetensors"


FULL = """
import os, runpy, sys
runpy.run_path({root!r} + "/dev.py")
from zeroconv.controlnet_core.training import __main__ as command
from zeroconv.controlnet_core.training.log import LogError
from zeroconv.controlnet_core.training.optimizer import local
from zeroconv.controlnet_core.training.state import TrainingState
see, keep = command.Watch.see, TrainingState.to_checkpoint
def fails(self, progress):
    see(self, progress)
    if progress.step == 3:
        raise LogError("the disk is full: simulated")
def tells(self, *arguments):
    print(f"part {{os.environ['RANK']}}: {{len(local(self.optimizer).state)}}", flush=True)
    return keep(self, *arguments)
command.Watch.see, TrainingState.to_checkpoint = fails, tells
sys.exit(command.main(sys.argv[1:]))
"""


def test_when_the_first_has_no_room_for_its_log_all_keep_that_step(data: Path, tmp_path: Path):
    """A divided optimizer is written by all of them together, so that all have to end after the same step."""
    script = tmp_path / "full.py"
    script.write_text(FULL.format(root=ROOT.as_posix()))
    done = torchrun(str(script), str(write_config(tmp_path, data, save_every=100, shard_optimizer=True)), timeout=120)
    assert done.returncode != 0
    assert "the disk is full: simulated" in done.stderr
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert saved is not None and saved.step == 3
    trained = saved.part("optimizer.exp_avg.").keys()
    assert trained == saved.part("optimizer.step.").keys() >= {"control.zero_convs.0.0.bias"}
    parts = {rank: int(count) for rank, count in re.findall(r"part (\d): (\d+)", done.stdout)}
    assert parts.keys() == {"0", "1"} and all(parts.values()) and sum(parts.values()) == len(trained)
