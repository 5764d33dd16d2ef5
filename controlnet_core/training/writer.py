"""What a training leaves on disk while it goes on: its checkpoints, the control of each, and the best control."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import Dataset
from ..files.loading import read_weights
from ..files.saving import SaveError
from ..keys import State, Weights
from . import checkpoint, pictures
from .controlled_unet import ControlledUNet
from .distributed import ALONE, Process
from .memory import state_bytes
from .options import PRECISIONS, TrainingOptions
from .state import TrainingState

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""In a run's folder: what the training goes on from, step-<step>.safetensors."""

CONTROLS = "controls"
"""In a run's folder: the control of each checkpoint, named as that is; in `unet` below it, an unlocked decoder's."""

BEST = "control-best.safetensors"
"""In a run's folder: the control of the step with the highest fidelity."""

BEST_UNET = "unet-best.safetensors"
"""In a run's folder: the UNet that goes with it, where its decoder is trained too."""


class Writer:
    """Writes the files of the run in `folder`, one at a time, in a thread beside the training.

    What is written is copied at once, so that the training may go on and change it; the next waits until it is on the
    disk. What goes wrong in the thread is raised by the next call, and `step` is then the one that could not be kept.
    """

    def __init__(
        self,
        folder: Path,
        controlled: ControlledUNet,
        dataset: Dataset,
        options: TrainingOptions,
        facts: Mapping[str, Any],
        process: Process = ALONE,
    ):
        """`facts` say of which training it is; of several processes the first one writes."""
        self._folder, self._controlled, self._dataset = folder, controlled, dataset
        self._options, self._facts = options, facts
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._going: Future[None] | None = None
        self._process, self._writes = process, process.rank == 0
        self.checkpoints, self.step = folder / CHECKPOINTS, 0
        for each in (folder, folder / CHECKPOINTS, folder / CONTROLS, folder / CONTROLS / "unet"):
            if self._writes:
                checkpoint.clean(each)

    def save(self, state: TrainingState) -> None:
        """Write the checkpoint of now and its control, and that as the best one where it is.

        All processes call it after the same step: each may have a part of what is written.
        """
        self.wait()  # before there is a second copy
        best, made = is_best(state), state.to_checkpoint(self._facts, self._process)
        if not self._writes:
            return
        made = replace(made, tensors=copied(made.tensors))
        self._begin(made.step, lambda: self._write(made, best))

    def save_best(self, state: TrainingState) -> None:
        """Write the control of now as the best one, where it is; where not, only look whether all went well."""
        if self._writes and is_best(state):
            self.wait()
            result, step = copied(state.result), state.step
            self._begin(step, lambda: self._write_best(result, step))
        elif self._going is not None and self._going.done():
            self.wait()

    def wait(self) -> None:
        """Return when all is on the disk; raises SaveError where it is not."""
        going, self._going = self._going, None
        if going is not None:
            going.result()

    def finish(self, state: TrainingState) -> None:
        """Write the checkpoint of now, whatever became of the last one, and return when it is on the disk."""
        self.rest()
        self._going = None
        self.save(state)
        self.wait()

    def set_aside(self, step: int) -> str:
        """Take the checkpoint of `step`, from which training cannot go on, from among the others; what is to be said.

        One that this run has not written may be of other options, with which it is good: that is left to the user.
        """
        self.rest()
        name = f"step-{step:08d}.safetensors"
        found = self.checkpoints / name
        if not (self._writes and found.is_file()):
            return ""
        if self.step != step:
            return f" Where that does not help, delete {name}: training then goes on from the one before."
        try:
            for each in (found, self._folder / CONTROLS / name, self._folder / CONTROLS / "unet" / name):
                if each.is_file():
                    each.replace(each.with_name(f"{name}{checkpoint.ASIDE}"))
        except OSError as error:  # somebody else may hold the file
            return f" {name} is of no use, delete it ({error})."
        return f" {name}, after which that came, is set aside as {name}{checkpoint.ASIDE}."

    def rest(self) -> None:
        """Return when nothing is being written; what went wrong is left for the next call."""
        wait([] if self._going is None else [self._going])

    def close(self) -> None:
        """End the thread, after what it has begun."""
        self._thread.shutdown()

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _begin(self, step: int, job: Callable[[], None]) -> None:
        self.step = step
        try:
            self._going = self._thread.submit(job)
        except RuntimeError:  # the interpreter ends, with a training that nobody closed, and no thread begins anything
            job()

    def _write(self, made: checkpoint.Checkpoint, best: bool) -> None:
        result = {**made.part("model."), **made.part("average.")}
        if best:  # first: once the checkpoint is there, this step is not measured again
            self._write_best(result, made.step)
        path = checkpoint.save(self._folder / CHECKPOINTS, made, self._options.keep)
        pictures.note(self._folder, self._dataset)  # after it: until then the run goes on from what was noted before
        control, unet = self._folder / CONTROLS / path.name, self._folder / CONTROLS / "unet" / path.name
        self._write_result(control, unet, result, made.step)
        for each in (control, unet):
            checkpoint.keep_newest(each, self._options.keep_controls)

    def _write_best(self, result: State, step: int) -> None:
        try:
            self._write_result(self._folder / BEST, self._folder / BEST_UNET, result, step)
        except SaveError as error:  # somebody else may hold the file; the training goes on without it
            log.warning("the best control, of step %d, is not kept: %s", step, error)

    def _write_result(self, control: Path, unet: Path, result: State, step: int) -> None:
        parts = {
            prefix: {key.removeprefix(prefix): tensor for key, tensor in result.items() if key.startswith(prefix)}
            for prefix in ("control.", "unet.")
        }
        options, networks = self._options, self._controlled
        if parts["unet."]:
            whole = {**networks.unet.state_dict(), **parts["unet."]}
            checkpoint.write_unet(unet, whole, options.control_dtype)
        checkpoint.write_control(control, networks.control, parts["control."], options, step, options.control_dtype)


def is_best(state: TrainingState) -> bool:
    """Whether the fidelity of this very step is the highest so far."""
    return state.best is not None and state.best[0] == state.step == state.measured[-1][0]


def copied(tensors: State) -> Weights:
    """Copies on the CPU; of tensors on a GPU in pinned memory, into which they go all at once."""
    copies = {name: _room(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        copies[name].copy_(tensor.detach(), non_blocking=True)
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)
    return copies


def _room(tensor: Tensor) -> Tensor:
    try:
        return torch.empty_like(tensor, device="cpu", requires_grad=False, pin_memory=tensor.is_cuda)
    except RuntimeError:  # the system gives no more of it
        return torch.empty_like(tensor, device="cpu", requires_grad=False)


# -- what there is ----------------------------------------------------------------------------------------------------


def newest_control(folder: Path) -> Path | None:
    """The control of the newest checkpoint of the run in `folder`, or the last before it; None before the first.

    Later ones are of a run whose checkpoints were deleted to begin again.
    """
    newest = max((path.name for path in checkpoint.files(folder / CHECKPOINTS)), default="")
    return max((path for path in checkpoint.files(folder / CONTROLS) if path.name <= newest), default=None)


def next_steps(folder: Path) -> str:
    """What to do with a run that has come to its end, in words."""
    best = ""
    if (folder / BEST).is_file():
        step = read_weights(folder / BEST)[1].get("trained_steps", "?")
        best = f" Fidelity was highest at step {step}: {BEST} is the control of then."
    return (
        f"Next: put control.safetensors into ComfyUI's controlnet folder, or raise steps to train on.{best} {CONTROLS} "
        "has earlier ones."
    )


# -- how much it will be ----------------------------------------------------------------------------------------------


def plan(folder: Path, state: TrainingState, controlled: ControlledUNet, options: TrainingOptions) -> str:
    """How much room the run in `folder` takes at most, and how much it will write until its end, in words.

    The optimizer's state is that of all weights that are trained, whether they have been stepped yet or not. Where the
    decoder is trained, each control has the whole UNet beside it.
    """
    held = (*state.weights.values(), *state.averages.values())
    trained = [weight for weight in state.weights.values() if weight.requires_grad]
    each = sum(tensor.nbytes for tensor in held) + sum(state_bytes(options.optimizer, weight) for weight in trained)
    written_out = controlled if options.unlock_decoder else controlled.control
    numbers = sum(p.numel() for p in written_out.parameters())
    control, last = numbers * PRECISIONS[options.control_dtype].itemsize, numbers * 4
    left = max(0, options.steps - state.step)
    count = math.ceil(left / options.save_every)
    kept = each * (min(options.keep, count) + 1) + control * (min(options.keep_controls, count) + 1) + last
    written = count * (each + control) + last
    existing = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    there = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) if folder.is_dir() else 0
    free = shutil.disk_usage(existing).free
    said = (
        f"{folder} will take up to {_size(kept)}: {options.keep} checkpoints of {_size(each)}, {options.keep_controls} "
        f"controls of {_size(control)}, the best and the last one; {_size(written)} will be written in all, "
        f"{_size(free)} are free"
    )
    if kept - there > free:
        said += ". That is not enough: make room, or lower keep and keep_controls, or raise save_every"
    return said


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
