"""The training of a control: one straight loop, from the options and a cached dataset to a control's file."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Generator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.dataset import Batches, Dataset
from ..data.manifest import DatasetError
from ..diffusion import add_noise
from ..files import saving
from ..keys import State
from ..networks.unet import UNetConfig
from . import checkpoint, objective, optimizer
from .checkpoint import Checkpoint
from .controlled_unet import ControlledUNet, build, contexts, moved, vector
from .convergence import sudden_convergence
from .distributed import ALONE, DistributedError, Process
from .fidelity import Score, sample, structure
from .options import OptionsError, TrainingOptions

log = logging.getLogger(__name__)


class TrainingStopped(RuntimeError):
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
    fit(config, dataset)
    held, learned = dataset.split(options.held_out, options.seed)
    batches = Batches(dataset, learned, options.batch_size, options.seed)
    controlled = build(options, base, config, dataset.hint_channels)
    try:
        controlled = controlled.to(device)
    except torch.cuda.OutOfMemoryError as error:
        raise TrainingStopped(
            f"the networks alone do not fit into the memory of {device}. Free what else is there, or choose kind "
            "control_lora."
        ) from error
    nothing = (dataset.empty[0].to(device), None if dataset.empty[1] is None else dataset.empty[1].to(device))
    alphas = alphas.to(device)
    share = options.batch_size // process.world
    mine = slice(process.rank * share, (process.rank + 1) * share)

    trained = {name: p for name, p in controlled.named_parameters() if p.requires_grad}
    names: dict[Tensor, str] = {parameter: name for name, parameter in trained.items()}
    adam = optimizer.make(options, controlled.control, controlled.unet)
    scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
    mixed = torch.autocast(device.type, options.dtype) if options.dtype != torch.float32 else nullcontext()
    shared: nn.Module = (
        controlled if process.world == 1 else DistributedDataParallel(controlled, gradient_as_bucket_view=True)
    )

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step, seconds, measured = 0, 0.0, []
    facts: dict[str, Any] = {"base": fingerprint(base), "data": dataset.fingerprint, "held": held}
    del base  # the controlled has its own
    checkpoints = folder / "checkpoints"
    if process.rank == 0:
        checkpoint.clean(folder)
        checkpoint.clean(checkpoints)
    saved = checkpoint.newest(checkpoints)
    if saved is not None:
        checkpoint.check(saved, options, facts)
        step, seconds, measured = saved.step, saved.facts["seconds"], saved.facts["measured"]
        _fill(trained, saved.part("model."))
        checkpoint.restore_optimizer(adam, saved.part("optimizer."), names)
        if saved.facts["scaler"]:
            scaler.load_state_dict(saved.facts["scaler"])
        log.info("goes on from step %d", step)
    if len(found := set(process.gather(step))) > 1:
        raise DistributedError(
            f"the processes found checkpoints of different steps in {checkpoints} ({sorted(found)}): give a folder "
            "that all machines share"
        )
    averages = {name: p.detach().clone() for name, p in trained.items()} if options.ema else {}
    if saved is not None and averages:  # where it is new, it begins from here
        _fill(averages, saved.part("average."))
    del saved  # its tensors are mapped, and on Windows a mapped file cannot be deleted when its time comes

    mark = _mark(measured)

    def one_pass(number: int) -> Tensor:
        """The loss of this process's part of pass `number`."""
        rows = batches[number]
        batch = moved(dataset.read(rows[mine]), device)
        shape = torch.Size((len(rows), *batch.latents.shape[1:]))
        draws = objective.draw(options, number, shape, len(alphas)).part(mine)
        timesteps, noise = draws.timesteps.to(device), draws.noise.to(device)
        context, pooled = contexts(batch, draws.empty.to(device), nothing)
        noisy = add_noise(batch.latents, noise, timesteps, alphas)
        with mixed:
            predicted = shared(noisy, timesteps, context, batch.hints, vector(batch, pooled))
        wanted = objective.target(options.prediction, batch.latents, noise, timesteps, alphas)
        return objective.loss(predicted, wanted, objective.weights(options, timesteps, alphas))

    def keep() -> None:
        if process.rank:
            return
        tensors = {f"model.{name}": p.detach() for name, p in trained.items()}
        tensors |= {f"optimizer.{key}": t for key, t in checkpoint.optimizer_tensors(adam, names).items()}
        tensors |= {f"average.{name}": t for name, t in averages.items()}
        state = {"options": options.as_dict(), "seconds": seconds, "measured": measured, "scaler": scaler.state_dict()}
        try:
            checkpoint.save(checkpoints, Checkpoint(step, tensors, {**facts, **state}), options.keep)
        except saving.SaveError as error:
            raise TrainingStopped(f"step {step} cannot be kept: {error}. {_kept(checkpoints)}") from error

    def progress(loss: float | None = None, norm: float | None = None) -> Progress:
        nonlocal mark
        fidelity, samples = None, None
        if due(options, step) and held and (loss is not None or step == 0):
            with mixed:
                samples = sample(controlled, moved(dataset.read(held), device), nothing, alphas, options).cpu()
            fidelity = score(samples, dataset.read(held))
            measured.append((step, fidelity))
            mark = _mark(measured)
        return Progress(
            step,
            options.steps,
            loss,
            adam.param_groups[0]["lr"],
            norm,
            seconds,
            step * options.batch_size * options.accumulation,
            fidelity,
            samples,
            mark,
            torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        )

    kept = step
    try:
        if step == 0:
            yield progress()
        while step < options.steps:
            started = time.monotonic()
            for group in adam.param_groups:
                group["lr"] = group["initial_lr"] * optimizer.factor(options, step)
            total = torch.zeros((), device=device)
            for i in range(options.accumulation):
                last = i + 1 == options.accumulation
                with nullcontext() if last or process.world == 1 else shared.no_sync():  # type: ignore[operator]
                    loss = one_pass(step * options.accumulation + i)
                    scaler.scale(loss / options.accumulation).backward()
                total += loss.detach() / options.accumulation
            scaler.unscale_(adam)
            norm = nn.utils.clip_grad_norm_(trained.values(), options.clip or float("inf")).item()
            value = process.mean(total).item()
            if not isfinite(value) or not (isfinite(norm) or scaler.is_enabled()):
                raise TrainingStopped(
                    f"the loss of step {step + 1} is {value}, its gradient {norm}: numbers have grown beyond "
                    f"{options.precision}. {_kept(checkpoints)} Lower learning_rate, or choose precision fp32 or bf16."
                )
            scaler.step(adam)
            scaler.update()
            adam.zero_grad(set_to_none=True)
            step += 1
            if averages:
                optimizer.average(averages, trained, options.ema, step)
            seconds += time.monotonic() - started
            try:
                report = progress(value, norm)
            except BaseException:  # sampling or its score failed or was cancelled; the step itself is sound
                keep()
                raise
            yield report
            # After the caller has seen the step: what a checkpoint holds is in the caller's log as well.
            if step % options.save_every == 0 or step == options.steps:
                keep()
                kept = step
    except GeneratorExit:
        if kept < step:
            keep()
        raise
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        raise TrainingStopped(
            f"out of memory at step {step + 1} with batch_size {options.batch_size}. {_kept(checkpoints)} "
            f"{advice(options)}"
        ) from error
    if process.rank == 0:
        write_control(folder, controlled, averages, options, step)


def fit(config: UNetConfig, dataset: Dataset) -> None:
    """Raise DatasetError unless the dataset's text embeddings are of the kind that this UNet takes."""
    context, pooled = dataset.empty
    if context.shape[1] != config.context_dim or (pooled is None) != (config.adm_in_channels is None):
        kind = f"{context.shape[1]} wide, {'without' if pooled is None else 'with'} a pooled vector"
        wanted = f"{config.context_dim} wide, {'without' if config.adm_in_channels is None else 'with'} a pooled vector"
        raise DatasetError(
            f"{dataset.folder} holds text embeddings {kind}; this model takes them {wanted}: make the dataset again "
            "with the model's own CLIP and VAE"
        )


@torch.no_grad()
def _fill(tensors: Mapping[str, Tensor], values: State) -> None:
    for name, value in values.items():
        tensors[name].copy_(value)


def _mark(measured: list[tuple[int, float]]) -> int | None:
    return sudden_convergence([step for step, _ in measured], [fidelity for _, fidelity in measured])


def due(options: TrainingOptions, step: int) -> bool:
    """Whether samples are made after this step."""
    return options.sample_every > 0 and (step % options.sample_every == 0 or step == options.steps)


def write_control(
    folder: Path, controlled: ControlledUNet, averages: State, options: TrainingOptions, step: int
) -> Path:
    """The trained control as `control.safetensors`, with averaged weights where there are any.

    With an unlocked decoder the whole UNet too, as `unet.safetensors` with the names of a checkpoint.
    """
    controlled.load_state_dict(dict(averages), strict=False)
    facts = {"trained_steps": str(step), "prediction": options.prediction}
    saving.write(folder / "control.safetensors", *saving.to_file(controlled.control, metadata=facts))
    if options.unlock_decoder:
        weights = {f"model.diffusion_model.{key}": tensor for key, tensor in controlled.unet.state_dict().items()}
        saving.write(folder / "unet.safetensors", weights)
    return folder / "control.safetensors"


def fingerprint(base: State) -> str:
    """What a base is recognized by: a hash over the names, the shapes and a few numbers of each tensor."""
    found = hashlib.sha256()
    for key in sorted(base):
        few = base[key].flatten()[:16].to("cpu", torch.float32)
        found.update(f"{key}{tuple(base[key].shape)}".encode() + few.numpy().tobytes())
    return found.hexdigest()[:16]


def advice(options: TrainingOptions) -> str:
    """What to lower, the mildest first."""
    if options.batch_size > 1:
        parts = next(n for n in range(2, options.batch_size + 1) if options.batch_size % n == 0)
        batch_size, accumulation = options.batch_size // parts, options.accumulation * parts
        return f"Set batch_size {batch_size} and accumulation {accumulation}, which trains the same, and resume."
    if not options.gradient_checkpointing:
        return "Turn gradient_checkpointing on and resume."
    if options.optimizer != "adamw8bit":
        return "Choose optimizer adamw8bit in a new run, or kind control_lora."
    return "Choose kind control_lora, or a dataset of a lower resolution."


def _out_of_memory(error: Exception) -> bool:
    words = str(error).lower()
    return any(said in words for said in ("can't allocate memory", "out of memory", "status_alloc_failed"))


def _kept(checkpoints: Path) -> str:
    found = checkpoint.files(checkpoints)
    return f"{found[-1].name} is kept, and training goes on from it." if found else "No checkpoint was written yet."
