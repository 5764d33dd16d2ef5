"""The training of a control: one straight loop, from the options and a cached dataset to a control's file."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.dataset import Batches, Dataset
from ..errors import ZeroConvError
from ..files.saving import SaveError
from ..keys import State
from ..networks.unet import UNetConfig
from . import checkpoint, memory, optimizer
from .controlled_unet import ControlledUNet, build
from .distributed import ALONE, DistributedError, Process
from .fidelity import HeldOut, Score, structure
from .inputs import Ahead, Passes, check_text_embeddings
from .options import OptionsError, TrainingOptions
from .state import TrainingState
from .step import CudaGraphs, Steps

log = logging.getLogger(__name__)


class TrainingStopped(ZeroConvError, RuntimeError):
    """Training cannot go on; the message says why, what is kept and what to do."""


@dataclass(frozen=True)
class Progress:
    """A training after `step` optimizer steps.

    `loss` is the step's mean over all its examples, before the weights changed, and `gradient_norm` that of all
    gradients before clipping; both `None` at step 0, which only measures the base. `seconds` is the time in training
    steps since step 0, over all resumes, and `memory` the most GPU memory in use in bytes. `fidelity` and `samples`
    (latents (B,4,h,w) of the held-out items, on the CPU) are there where they were measured. `converged` is the step at
    which fidelity jumped, once that is seen.
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


def train(
    options: TrainingOptions,
    base: State,
    config: UNetConfig,
    alphas: Tensor,
    dataset: Dataset,
    folder: Path,
    score: Score = structure,
    process: Process = ALONE,
) -> Generator[Progress, None, None]:
    """Train a control and leave it in `folder/control.safetensors`; yields after every optimizer step.

    `base` holds the whole UNet of `config`, ldm keys without prefix; `alphas` (1000,) is its noise schedule
    (`diffusion.alphas_cumprod`). It goes on from the newest checkpoint in `folder/checkpoints`, with the losses of a
    run that was never interrupted: on the CPU bit for bit. Closing the generator stops after the step and keeps
    everything. Raises TrainingStopped, OptionsError, SaveError; what was trained up to the last checkpoint is kept.
    """
    device = process.device
    if options.batch_size % process.world:
        raise OptionsError(
            f"batch_size {options.batch_size} cannot be shared by {process.world} processes: choose a multiple"
        )
    check_text_embeddings(dataset, config)
    held, learned = dataset.split(options.held_out, options.seed)
    batches = Batches(dataset, learned, options.batch_size, options.seed)
    passes = Passes(dataset, batches, options, process, len(alphas))

    controlled = build(options, base, config, dataset.hint_channels)
    try:
        controlled = controlled.to(device)
    except torch.cuda.OutOfMemoryError as error:
        raise TrainingStopped(
            f"the networks alone do not fit into the memory of {device}. Free what else is there, or choose kind "
            "control_lora."
        ) from error
    alphas = alphas.to(device)
    held_out = HeldOut(dataset, held, alphas, options, score)
    state = TrainingState(
        {name: p for name, p in controlled.named_parameters() if p.requires_grad},
        optimizer.make(options, controlled.control, controlled.unet),
        torch.amp.GradScaler(device.type, enabled=options.precision == "fp16"),
        options.ema,
    )
    network: nn.Module = controlled
    if process.world > 1:
        network = DistributedDataParallel(controlled, gradient_as_bucket_view=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    checkpoints = folder / "checkpoints"
    facts = {
        "base": checkpoint.fingerprint(base),
        "data": dataset.fingerprint,
        "held": held,
        "options": options.as_dict(),
    }
    del base  # the controlled UNet has its own
    _resume(state, checkpoints, options, facts, process)
    ahead = Ahead(passes, options.steps * options.accumulation)
    steps = Steps(network, state, ahead, alphas, options, process, CudaGraphs() if options.graphs else None)

    try:
        if state.step == 0:
            yield _report(state, options, held_out, controlled)
        while state.step < options.steps:
            started = time.monotonic()
            value, norm = steps.take()
            if not isfinite(value) or not (isfinite(norm) or state.scaler.is_enabled()):
                raise TrainingStopped(
                    f"the loss of step {state.step} is {value}, its gradient {norm}: numbers have grown beyond "
                    f"{options.precision}. {checkpoint.kept(checkpoints)} Lower learning_rate, or choose precision "
                    "fp32 or bf16."
                )
            state.seconds += time.monotonic() - started

            try:
                yield _report(state, options, held_out, controlled, value, norm)
            except BaseException:  # closed by the caller, or sampling failed or was cancelled; the step itself is sound
                _save(state, checkpoints, options, facts, process)
                raise
            # After the caller has seen the step: what a checkpoint holds is in the caller's log as well.
            if state.step % options.save_every == 0 or state.step == options.steps:
                _save(state, checkpoints, options, facts, process)
    except RuntimeError as error:
        if not memory.is_out_of_memory(error):
            raise
        raise TrainingStopped(
            f"out of memory at step {state.step + 1} with batch_size {options.batch_size}. "
            f"{checkpoint.kept(checkpoints)} {memory.advice(options)}"
        ) from error
    finally:
        ahead.close()
    if process.rank == 0:
        state.use_averages()
        checkpoint.write_control(folder, controlled, options, state.step)


def _report(
    state: TrainingState,
    options: TrainingOptions,
    held_out: HeldOut,
    controlled: ControlledUNet,
    loss: float | None = None,
    norm: float | None = None,
) -> Progress:
    """How far the training is, with samples of the held-out pictures and their score where they are due."""
    fidelity, samples = None, None
    if held_out.is_due(state.step):
        fidelity, samples = held_out.measure(controlled)
        state.add_fidelity(fidelity)
    device = next(controlled.parameters()).device
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
    )


def _resume(
    state: TrainingState, checkpoints: Path, options: TrainingOptions, facts: dict[str, Any], process: Process
) -> None:
    """Bring `state` to the newest checkpoint, if there is one; raises OptionsError where it is of another training."""
    if process.rank == 0:
        checkpoint.clean(checkpoints.parent)
        checkpoint.clean(checkpoints)
    saved = checkpoint.newest(checkpoints)
    if saved is not None:
        checkpoint.check(saved, options, facts)
        state.restore(saved)
        log.info("goes on from step %d", state.step)
    if len(found := set(process.gather(state.step))) > 1:
        raise DistributedError(
            f"the processes found checkpoints of different steps in {checkpoints} ({sorted(found)}): give a folder "
            "that all machines share"
        )


def _save(
    state: TrainingState, checkpoints: Path, options: TrainingOptions, facts: dict[str, Any], process: Process
) -> None:
    """Write a checkpoint, in the first of the processes."""
    if process.rank:
        return
    try:
        checkpoint.save(checkpoints, state.to_checkpoint(facts), options.keep)
    except SaveError as error:
        raise TrainingStopped(f"step {state.step} cannot be kept: {error}. {checkpoint.kept(checkpoints)}") from error
