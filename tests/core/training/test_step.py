"""Steps as graphs are the steps op by op: with a stand-in for capture here, with CUDA's own where there is a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from zeroconv.controlnet_core.data.dataset import Batches, Dataset
from zeroconv.controlnet_core.training import checkpoint, loop, optimizer, step
from zeroconv.controlnet_core.training.distributed import ALONE, Process
from zeroconv.controlnet_core.training.inputs import Ahead, Passes

from ... import second_device
from .tiny import dataset, fit, losses, quick, training


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return dataset(tmp_path_factory.mktemp("data"))


class StandIn:
    """Captures by keeping the function: a replay computes again, from the same tensors, what a graph would launch.

    Like a graph it reads numbers that lie in tensors alone: what the function reads besides is set to what it was.
    """

    refusal: str | None = None
    error: str | None = None

    def __init__(self) -> None:
        self.captured, self.replayed, self.inside = 0, 0, False

    def refuses(self, device: torch.device) -> str | None:
        return self.refusal

    @contextmanager
    def stream(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        assert self.inside
        if self.error:
            raise RuntimeError(self.error)
        self.captured += 1

        def replay() -> None:
            assert self.inside
            self.replayed += 1
            function()

        return replay


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The stand-in of all trainings of the test."""
    made = StandIn()
    monkeypatch.setattr(loop, "CudaGraphs", lambda: made)
    return made


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "schedule": {"schedule": "cosine", "warmup": 2},
    "average": {"ema": 0.9},
    "accumulation": {"accumulation": 3},
    "lite": {"kind": "lite"},
    "Control-LoRA": {"kind": "control_lora", "rank": 4},
    "decoder": {"unlock_decoder": True, "decoder_learning_rate": 1e-4},
    "middle": {"middle_only": True},
    "recomputed": {"gradient_checkpointing": True},
    "bf16": {"precision": "bf16"},
    "sampling": {"sample_every": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_losses_of_eager_steps(data: Dataset, tmp_path: Path, graphs: StandIn, variant: str):
    options = {"steps": 8, "connections": "gaussian", "learning_rate": 1e-4, **VARIANTS[variant]}
    eager, found = (
        fit(quick(**options, graphs=on), data, tmp_path / name) for name, on in (("eager", False), ("graphs", True))
    )
    assert losses(found) == pytest.approx(losses(eager), rel=2e-3 if variant == "bf16" else 1e-5)
    assert [each.learning_rate for each in found] == pytest.approx([each.learning_rate for each in eager], rel=1e-6)
    shapes = {data.bucket_of(Batches(data, data.split(2, 0)[1], 2, 0)[k][0]) for k in range(8)}
    assert graphs.captured == 1 + len(shapes)
    passes = 8 * options.get("accumulation", 1)
    assert graphs.replayed == (passes - len(shapes)) + (8 - 1)  # all but the first of each shape, and the first end


def test_what_changes_from_step_to_step_lies_in_tensors(data: Dataset, tmp_path: Path, graphs: StandIn, monkeypatch):
    """A graph keeps the numbers of its capture: nothing that it holds may ask for new ones."""
    asked = []
    for name in ("factor", "share", "set_rate"):
        function = getattr(optimizer, name)
        monkeypatch.setattr(optimizer, name, lambda *a, f=function: (asked.append(replaying), f(*a))[1])
    replaying = False
    capture = graphs.capture

    def watched(function: Callable[[], None]) -> Callable[[], None]:
        replay = capture(function)

        def run() -> None:
            nonlocal replaying
            replaying = True
            replay()
            replaying = False

        return run

    monkeypatch.setattr(graphs, "capture", watched)
    fit(quick(steps=6, ema=0.9, schedule="linear", graphs=True), data, tmp_path)
    assert graphs.replayed and len(asked) >= 18 and not any(asked)


def test_gradients_stay_where_they_are(data: Dataset, tmp_path: Path, graphs: StandIn):
    places = []
    running: Any = training(quick(steps=6, graphs=True), data, tmp_path)
    with closing(running):
        for progress in running:
            parameters = running.gi_frame.f_locals["state"].weights.values()
            if progress.step:
                places.append([None if each.grad is None else each.grad.data_ptr() for each in parameters])
                assert all(each.grad is None or not each.grad.any() for each in parameters)
    assert all(each == places[0] for each in places) and any(places[0])


def test_a_stopped_run_goes_on(data: Dataset, tmp_path: Path, graphs: StandIn):
    options = quick(steps=8, graphs=True, ema=0.9)
    whole = losses(fit(options, data, tmp_path / "whole"))
    with closing(training(options, data, tmp_path / "parts")) as running:
        first = [next(running).loss for _ in range(5)]
    rest = losses(fit(options, data, tmp_path / "parts"))
    assert first[1:] + rest == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "fp16"}, "fp16 waits for the device"),
        ({}, "graphs are for others"),
    ],
)
def test_where_there_are_none(
    data: Dataset, tmp_path: Path, graphs: StandIn, caplog: pytest.LogCaptureFixture, options: dict, said: str
):
    caplog.set_level(logging.INFO)
    graphs.refusal = None if options else "graphs are for others"
    found = losses(fit(quick(**options, graphs=True), data, tmp_path / "graphs"))
    assert f"no graphs: {said}" in caplog.text and not graphs.captured
    assert found == losses(fit(quick(**options), data, tmp_path / "eager"))


def test_a_capture_that_fails_is_given_up(
    data: Dataset, tmp_path: Path, graphs: StandIn, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    graphs.error = "operation not permitted\n  when stream is capturing"
    found = losses(fit(quick(steps=6, graphs=True), data, tmp_path / "graphs"))
    assert caplog.text.count("graphs are given up (operation not permitted when stream is capturing)") == 1
    assert found == pytest.approx(losses(fit(quick(steps=6), data, tmp_path / "eager")), rel=1e-5)


def test_what_was_captured_before_a_failure_is_dropped(
    data: Dataset, tmp_path: Path, graphs: StandIn, monkeypatch: pytest.MonkeyPatch
):
    """It writes gradients where those of the steps that follow no longer lie."""
    capture = graphs.capture

    def second_fails(function: Callable[[], None]) -> Callable[[], None]:
        graphs.error = "no more memory" if graphs.captured else None
        return capture(function)

    monkeypatch.setattr(graphs, "capture", second_fails)
    found = losses(fit(quick(steps=8, graphs=True), data, tmp_path / "graphs"))
    assert graphs.captured == 1 and graphs.replayed <= 1
    assert found == pytest.approx(losses(fit(quick(steps=8), data, tmp_path / "eager")), rel=1e-5)


def test_numbers_that_grow_stop_the_run(data: Dataset, tmp_path: Path, graphs: StandIn):
    options = quick(steps=12, save_every=2, graphs=True)
    with pytest.raises(loop.TrainingStopped, match="numbers have grown beyond fp32"):
        list(poisoned(training(options, data, tmp_path), after=5))
    assert losses(fit(quick(steps=6, graphs=True), data, tmp_path))  # from step 4


def poisoned(running: Any, after: int) -> Iterator[Any]:
    """A training whose weights are no numbers once it has seen a step."""
    for progress in running:
        if progress.step == after:
            for weight in running.gi_frame.f_locals["state"].weights.values():
                weight.data.fill_(float("nan"))
        yield progress


# -- numbers read late ------------------------------------------------------------------------------------------------


def test_the_device_has_the_next_passes_before_a_loss_is_read(
    data: Dataset, tmp_path: Path, graphs: StandIn, monkeypatch: pytest.MonkeyPatch
):
    """But where pictures are sampled, which needs memory, and behind the last step."""
    launched, seen = 0, []
    fit_pass, wait = step.Steps._pass, step.Reading.wait

    def passing(self: step.Steps, inputs: Any) -> None:
        nonlocal launched
        launched += 1
        fit_pass(self, inputs)

    def waiting(self: step.Reading) -> tuple[float, float]:
        seen.append(launched)
        return wait(self)

    monkeypatch.setattr(step.Steps, "_pass", passing)
    monkeypatch.setattr(step.Reading, "wait", waiting)
    options = {"steps": 6, "sample_every": 3, "ema": 0.9, "learning_rate": 1e-4}
    expected = losses(fit(quick(**options), data, tmp_path / "eager"))
    assert seen == [1, 2, 3, 4, 5, 6]
    launched = 0
    seen.clear()
    with second_device.on() as there, second_device.transfers() as moves:
        process = Process(device=there)
        found = losses(fit(quick(**options, graphs=True), data, tmp_path / "graphs", process=process))
    assert graphs.replayed and seen == [2, 3, 3, 5, 6, 6]
    assert found == pytest.approx(expected, rel=1e-5)
    assert len([move for move in moves if move.way == "read" and "step.py" in move.line]) == 2 * 6


def test_what_is_kept_of_a_step_has_nothing_of_the_next(data: Dataset, tmp_path: Path, graphs: StandIn):
    """Stopped while the device has the passes of a step that will never be made; and no checkpoint was due before."""
    options = quick(steps=9, save_every=4, graphs=True, ema=0.9)
    whole = losses(fit(quick(steps=9, ema=0.9), data, tmp_path / "whole"))
    with second_device.on() as there:
        others = {"process": Process(device=there)}
        with closing(training(options, data, tmp_path / "parts", **others)) as running:
            first = [next(running) for _ in range(6)]
        saved = checkpoint.newest(tmp_path / "parts" / "checkpoints")
        assert saved is not None and saved.step == first[-1].step == 5
        rest = losses(fit(options, data, tmp_path / "parts", **others))
    assert losses(first) + rest == pytest.approx(whole, rel=1e-4)


def test_numbers_that_grow_are_still_seen_before_the_next_step(
    data: Dataset, tmp_path: Path, graphs: StandIn, monkeypatch: pytest.MonkeyPatch
):
    passes, own = 0, step.pass_loss

    def growing(*arguments: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return own(*arguments) * (float("nan") if passes == 6 else 1)

    monkeypatch.setattr(step, "pass_loss", growing)
    running = training(
        quick(steps=12, save_every=2, graphs=True), data, tmp_path, process=Process(device=second_device.device())
    )
    with second_device.on(), pytest.raises(loop.TrainingStopped, match="the loss of step 6 is nan"):
        list(running)
    assert passes == 7
    assert [path.name for path in checkpoint.files(tmp_path / "checkpoints")] == [
        "step-00000002.safetensors",
        "step-00000004.safetensors",
    ]


# -- reading ahead ----------------------------------------------------------------------------------------------------


def passes(data: Dataset) -> Passes:
    options = quick(empty_prompts=0.5)
    return Passes(data, Batches(data, range(len(data)), 2, 0), options, ALONE, 1000)


def test_what_is_read_ahead_is_what_is_asked_for(data: Dataset):
    plain = passes(data)
    with closing(Ahead(plain, 9)) as ahead:
        for k in (0, 1, 2, 5, 6, 3, 8, 0):
            found, expected = ahead[k], plain[k]
            for name in ("latents", "noise", "timesteps", "context", "hint_bytes"):
                assert torch.equal(getattr(found, name), getattr(expected, name))


def test_the_next_pass_is_read_while_this_one_is_trained_on(data: Dataset, monkeypatch: pytest.MonkeyPatch):
    import threading

    read, own = [], Passes.__getitem__

    def watched(self: Passes, k: int) -> Any:
        read.append((k, threading.current_thread() is threading.main_thread()))
        return own(self, k)

    monkeypatch.setattr(Passes, "__getitem__", watched)
    ahead = Ahead(passes(data), 3)
    for k in range(3):
        assert ahead[k] is not None
    ahead.close()
    assert read == [(0, False), (1, False), (2, False)]  # each once, none by the one who trains, none beyond the last


def test_on_a_cpu_no_other_thread_computes(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import threading

    threads, own = set(), Passes.__getitem__

    def watched(self: Passes, k: int) -> Any:
        threads.add(threading.current_thread())
        return own(self, k)

    monkeypatch.setattr(Passes, "__getitem__", watched)
    fit(quick(steps=2), data, tmp_path)
    assert threads == {threading.main_thread()}


def test_what_cannot_be_read_is_said_by_the_pass_that_needs_it(data: Dataset, monkeypatch: pytest.MonkeyPatch):
    own = Passes.__getitem__

    def broken(self: Passes, k: int) -> Any:
        if k == 1:
            raise OSError("the disk is gone")
        return own(self, k)

    monkeypatch.setattr(Passes, "__getitem__", broken)
    with closing(Ahead(passes(data), 3)) as ahead:
        assert ahead[0] is not None
        with pytest.raises(OSError, match="the disk is gone"):
            ahead[1]


# -- CUDA -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["plain", "average", "accumulation", "decoder", "Control-LoRA", "bf16"])
def test_on_cuda(data: Dataset, tmp_path: Path, variant: str):
    process = type(ALONE)(device=torch.device("cuda", 0))
    options = {"steps": 8, "connections": "gaussian", "learning_rate": 1e-4, **VARIANTS[variant]}
    eager, found = (
        losses(fit(quick(**options, graphs=on), data, tmp_path / str(on), process=process)) for on in (False, True)
    )
    assert found == pytest.approx(eager, rel=2e-2 if variant == "bf16" else 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"optimizer_in_ram": True}])
def test_on_cuda_a_stopped_run_goes_on(data: Dataset, tmp_path: Path, options: dict[str, Any]):
    """Weights lie in channels_last there, and what is read back must lie as they do."""
    process = type(ALONE)(device=torch.device("cuda", 0))
    options = {"steps": 8, "graphs": True, "ema": 0.9, **options}
    whole = losses(fit(quick(**options), data, tmp_path / "whole", process=process))
    with closing(training(quick(**options), data, tmp_path / "parts", process=process)) as running:
        first = [next(running).loss for _ in range(5)]
    rest = losses(fit(quick(**options), data, tmp_path / "parts", process=process))
    assert first[1:] + rest == pytest.approx(whole, rel=1e-3)
