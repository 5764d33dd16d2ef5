"""The training of a control: one straight loop, from the options and a cached dataset to a control's file."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.dataset import Batch, Batches, Dataset, to_device
from ..data.manifest import DatasetError
from ..errors import ZeroConvError
from ..files.kinds import kind_of
from ..files.saving import SaveError
from ..keys import State
from ..networks.network import ControlNetwork
from ..networks.unet import UNetConfig
from . import checkpoint, memory, objective, optimizer, pictures
from .checkpoint import Checkpoint
from .controlled_unet import ControlledUNet, build
from .distributed import ALONE, DistributedError, Process
from .fidelity import HeldOut, Score, structure
from .inputs import FIXED, Ahead, Passes, check_text_embeddings, fixed
from .options import NUMBERS, OptionsError, TrainingOptions
from .state import TrainingState
from .step import CudaGraphs, Steps, pass_loss
from .writer import CHECKPOINTS, Writer, plan

log = logging.getLogger(__name__)


class TrainingStopped(ZeroConvError, RuntimeError):
    """Training cannot go on; the message says why, what is kept and what to do."""


@dataclass(frozen=True)
class Progress:
    """A training after `step` optimizer steps.

    `loss` is the step's mean over all its examples, before the weights changed, and `gradient_norm` that of all
    gradients before clipping; both `None` at step 0, which only measures the base. `seconds` is the time in training
    steps since step 0, over all resumes, and `memory` the most GPU memory in use in bytes.

    Where the held-out items `held` were looked at, there are `fidelity`, `samples` (latents (B,4,h,w), on the CPU) and
    `validation`, their loss at fixed timesteps from fixed noise: all of what would be saved now, the averages of the
    weights where there are any. `converged` is the step at which fidelity jumped, once that is seen, `best` the one
    at which it was highest, with that fidelity, and `fallen` whether it is well below since. `pauses` are the seconds
    that sampling and saving will still take. `notes` say what is new since the run was stopped. `prompted` are
    samples of the user's own prompts and hints, latents (1,4,h,w) each, on the CPU.
    """

    step: int
    steps: int
    loss: float | None
    learning_rate: float
    gradient_norm: float | None
    seconds: float
    examples: int
    fidelity: float | None
    samples: Tensor | None
    converged: int | None
    memory: int | None
    validation: float | None = None
    best: tuple[int, float] | None = None
    fallen: bool = False
    pauses: float = 0.0
    held: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    prompted: tuple[Tensor, ...] = ()


def train(
    options: TrainingOptions,
    base: State,
    config: UNetConfig,
    alphas: Tensor,
    dataset: Dataset,
    folder: Path,
    score: Score = structure,
    process: Process = ALONE,
    begin: ControlNetwork | None = None,
    prompts: Sequence[Batch] = (),
) -> Generator[Progress, None, None]:
    """Train a control and leave it in `folder/control.safetensors`; yields after every optimizer step.

    `base` holds the whole UNet of `config`, ldm keys without prefix; `alphas` (1000,) is its noise schedule
    (`diffusion.alphas_cumprod`). It goes on from the newest checkpoint in `folder/checkpoints`, with the losses of a
    run that was never interrupted: on the CPU bit for bit. A run that has none yet begins with the control `begin`, or
    with a fresh one. Each checkpoint has its control in `folder/controls`, and that of the highest fidelity is
    `folder/control-best.safetensors`. `prompts` are the user's own, batches of one item, sampled with the held-out
    pictures. Closing the generator stops after the step and keeps everything; many processes close theirs after the
    same one. Of them the first alone reports samples and what they show. Raises TrainingStopped, OptionsError,
    SaveError, BaseMismatch; what was trained up to the last checkpoint is kept.
    """
    device = process.device
    if options.batch_size % process.world:
        raise OptionsError(
            f"batch_size {options.batch_size} cannot be shared by {process.world} processes: choose a multiple"
        )
    check_text_embeddings(dataset, config)
    checkpoints = folder / CHECKPOINTS
    saved = checkpoint.newest(checkpoints)
    held, learned = pictures.split(dataset, options, saved)
    batches = Batches(dataset, learned, options.batch_size, options.seed)
    passes = Passes(dataset, batches, options, process, len(alphas))
    facts: dict[str, Any] = {
        "base": checkpoint.fingerprint(base),
        "data": dataset.fingerprint,
        "held": held,
        "pictures": pictures.names(dataset, held),
        "options": options.as_dict(),
        "begun": "" if begin is None else begin.kind,
    }
    notes = []
    if saved is not None:
        checkpoint.check(saved, options, facts)
        notes = _changed(saved, options, facts, folder, dataset)
        facts["begun"] = saved.facts.get("begun", "")
        begin = checkpoint.control_of(saved) if facts["begun"] else None

    controlled = build(options, base, config, dataset.hint_channels, begin)
    try:
        controlled = controlled.to(device)
        if options.graphs and device.type == "cuda":  # a tenth of such a step is what convolutions lose otherwise
            controlled = controlled.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    except torch.cuda.OutOfMemoryError as error:
        raise TrainingStopped(
            f"the networks alone do not fit into the memory of {device}. Free what else is there, or choose kind "
            "control_lora."
        ) from error
    facts["control"] = kind_of(controlled.control).metadata(controlled.control)
    alphas = objective.noise_schedule(options, alphas).to(device)
    held_out = HeldOut(dataset, held, alphas, options, score, prompts, process)
    state = TrainingState(
        {name: p for name, p in controlled.named_parameters() if p.requires_grad or name.startswith("control.")},
        optimizer.make(options, controlled.control, controlled.unet, process),
        torch.amp.GradScaler(device.type, enabled=options.precision == "fp16"),
        options.ema,
    )
    network: nn.Module = controlled
    if process.world > 1:
        network = DistributedDataParallel(controlled, gradient_as_bucket_view=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if saved is not None:
        state.restore(saved, optimizer=saved.facts["options"]["optimizer"] == options.optimizer)
        log.info("goes on from step %d", state.step)
    _check_alike(state, checkpoints, process)
    # The controlled UNet has its own. What is mapped of a checkpoint would keep Windows from deleting it.
    del base, begin, saved
    report = Reports(state, options, held_out, controlled, tuple(notes))
    writer = Writer(folder, controlled, dataset, options, facts, process)
    # A CPU has no core to spare: a second thread that computes makes torch's own rest between any two operations.
    ahead = None if device.type == "cpu" else Ahead(passes, options.steps * options.accumulation)
    steps = Steps(network, state, ahead or passes, alphas, options, process, CudaGraphs() if options.graphs else None)
    if state.step < options.steps and process.rank == 0:
        log.info("%s", plan(folder, state, controlled, options))

    with closing(ahead) if ahead else nullcontext(), closing(writer), _failures(report, writer, process):
        if state.step == 0:
            started = time.monotonic()
            yield report()
            report.sampling = time.monotonic() - started
        while state.step < options.steps:
            started = time.monotonic()
            with _data_that_may_fail(state, writer):
                reading = steps.take()
                if state.step < options.steps and not held_out.is_due(state.step):  # which needs the room of gradients
                    steps.begin()  # what is seen and kept of this step is this step's: no weight has changed since
            value, norm = reading.wait()
            if not isfinite(value) or not (isfinite(norm) or state.scaler.is_enabled()):
                # The weights of this loss are those of the step before: what is kept of that one would end here again.
                spoilt = writer.set_aside(state.step - 1)
                raise TrainingStopped(
                    f"the loss of step {state.step} is {value}, its gradient {norm}: numbers have grown beyond "
                    f"{options.precision}. {checkpoint.kept(checkpoints)} Lower learning_rate, or choose precision "
                    f"fp32 or bf16.{spoilt}"
                )
            ended = time.monotonic()
            state.seconds += ended - started

            try:
                yield report(value, norm)
            except BaseException as error:  # closed by the caller, or sampling failed; the step itself is sound
                # What fails in one process alone leaves no others to give their part of the optimizer's state.
                if isinstance(error, GeneratorExit) or not state.is_sharded:
                    writer.finish(state)
                raise
            if held_out.is_due(state.step):
                report.sampling = time.monotonic() - ended
            # After the caller has seen the step: what a checkpoint holds is in the caller's log as well.
            ended = time.monotonic()
            if state.step % options.save_every == 0 or state.step == options.steps:
                writer.save(state)
                report.saving = time.monotonic() - ended
            else:
                writer.save_best(state)
        writer.wait()
    if process.rank == 0:
        control = {key.removeprefix("control."): x for key, x in state.result.items() if key.startswith("control.")}
        checkpoint.write_control(
            folder / "control.safetensors", controlled.control, control, options, state.step, "fp32"
        )
        state.use_averages()
        if options.unlock_decoder:
            checkpoint.write_unet(folder / "unet.safetensors", controlled.unet.state_dict())


@contextmanager
def _data_that_may_fail(state: TrainingState, writer: Writer) -> Iterator[None]:
    """What cannot be read of the dataset ends a training, and loses no step: no weight has changed since the last."""
    try:
        yield
    except DatasetError:
        if state.step and not state.is_sharded:  # else the others would have to give their part
            writer.finish(state)
        raise


@contextmanager
def _failures(report: Reports, writer: Writer, process: Process) -> Iterator[None]:
    """What ends a training within it becomes a TrainingStopped that says what is kept, and what to do."""
    try:
        yield
    except SaveError as error:
        raise TrainingStopped(
            f"step {writer.step} cannot be kept: {error}. {checkpoint.kept(writer.checkpoints)}"
        ) from error
    except RuntimeError as error:
        if not memory.is_out_of_memory(error):
            raise
        writer.rest()
        state, options, sampling = report.state, report.options, report.is_looking
        when = f"at step {state.step + 1} with batch_size {options.batch_size}"
        if sampling:
            when = f"while pictures were sampled after step {state.step}"
        raise TrainingStopped(
            f"out of memory {when}. {checkpoint.kept(writer.checkpoints)} "
            f"{memory.advice(options, process.world, sampling)}"
        ) from error


@dataclass
class Reports:
    """Says how far a training is; `sampling` and `saving` are the seconds that each took the last time.

    `is_looking` while held-out pictures are looked at, and where that failed.
    """

    state: TrainingState
    options: TrainingOptions
    held_out: HeldOut
    controlled: ControlledUNet
    notes: tuple[str, ...]
    sampling: float = 0.0
    saving: float = 0.0
    is_looking: bool = False

    def __call__(self, loss: float | None = None, norm: float | None = None) -> Progress:
        """The report of this step, with a look at the held-out pictures where it is due."""
        state, options, held_out = self.state, self.options, self.held_out
        fidelity, samples, validation, prompted = None, None, None, ()
        self.is_looking = held_out.is_due(state.step)
        if self.is_looking:
            with state.averaged():
                if held_out.items:
                    fidelity, samples = held_out.measure(self.controlled)
                    validation = held_out_loss(self.controlled, held_out)
                prompted = held_out.sample_prompts(self.controlled)
            if fidelity is not None:
                state.add_fidelity(fidelity)
        self.is_looking = False
        device = next(self.controlled.parameters()).device
        going = state.step < options.steps
        saves = going * (math.ceil(options.steps / options.save_every) - state.step // options.save_every)
        return Progress(
            step=state.step,
            steps=options.steps,
            loss=loss,
            learning_rate=float(state.optimizer.param_groups[0]["lr"]),
            gradient_norm=norm,
            seconds=state.seconds,
            examples=state.step * options.batch_size * options.accumulation,
            fidelity=fidelity,
            samples=samples,
            converged=state.converged,
            memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            validation=validation,
            best=state.best,
            fallen=state.has_fallen,
            pauses=self.sampling * held_out.times_due(state.step) + self.saving * saves,
            held=tuple(held_out.items),
            notes=self.notes,
            prompted=prompted,
        )


@torch.no_grad()
def held_out_loss(controlled: ControlledUNet, held_out: HeldOut) -> float | None:
    """The loss of the held-out pictures with their prompts, always at the same timesteps and from the same noise.

    Many processes take turns, and the first alone is told.
    """
    alphas, options = held_out.alphas, held_out.options

    def losses(own: range) -> Iterator[Tensor]:
        for number, inputs in enumerate(fixed(held_out.dataset, held_out.items, options, len(alphas))):
            if number in own:
                yield pass_loss(controlled, to_device(inputs, alphas.device), alphas, options)

    found = held_out.process.divided(len(FIXED), losses)
    return torch.stack([loss.cpu() for loss in found]).mean().item() if found else None


def _changed(
    saved: Checkpoint, options: TrainingOptions, facts: dict[str, Any], folder: Path, dataset: Dataset
) -> list[str]:
    """What is new since the checkpoint and no reason to refuse, in words."""
    notes = []
    if saved.facts.get("data", facts["data"]) != facts["data"]:
        notes.append(
            f"the dataset has changed since step {saved.step} ({pictures.changes(folder, dataset)}): training goes on "
            f"with the {len(dataset)} that are there"
        )
    before = saved.facts["options"]["optimizer"]
    if before != options.optimizer:
        notes.append(f"the optimizer was {before} and is {options.optimizer}: what it has seen begins anew")
    for name in NUMBERS:
        before, now = saved.facts["options"].get(name), getattr(options, name)
        if before not in (None, now):
            notes.append(f"{name} was {before} and is {now}: what is trained from now on differs by that")
    if facts["begun"] and not saved.facts.get("begun"):
        notes.append(f"the control to begin with is not read: this run goes on from its own step {saved.step}")
    for note in notes:
        log.warning("%s", note)
    return notes


def _check_alike(state: TrainingState, checkpoints: Path, process: Process) -> None:
    if len(found := set(process.gather(state.step))) > 1:
        raise DistributedError(
            f"the processes found checkpoints of different steps in {checkpoints} ({sorted(found)}): give a folder "
            "that all machines share"
        )
