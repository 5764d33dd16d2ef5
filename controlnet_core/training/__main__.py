"""Train from a terminal, with one process or many: python -m controlnet_core.training CONFIG.toml."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import cv2
import torch
from einops import rearrange
from torch import Tensor

from ..data import encoders, sources
from ..data.config import MODEL, Making, dashed
from ..data.dataset import Batch, Dataset
from ..data.encoders import EncoderError, decoder, read_prompts
from ..data.manifest import DatasetError
from ..data.pictures import PictureError
from ..data.sources import SourceError
from ..data.uncached import Uncached
from ..files.base import Base, read_base
from ..files.loading import LoadError, load_control, read_weights
from ..files.lock import LockedError, locked
from ..files.saving import SaveError
from ..networks.controlnet import BaseMismatch
from ..networks.network import ControlNetwork
from . import checkpoint, config
from .config import ConfigError, Run
from .distributed import DistributedError, Process, joined
from .log import Log, LogError, written_to
from .loop import Progress, TrainingStopped, train
from .memory import Examples, fitted, is_out_of_memory
from .options import MEANINGS, OptionsError, TrainingOptions
from .plot import HEIGHT, WIDTH, plot
from .validation import framed
from .writer import CHECKPOINTS, newest_control, next_steps

EXPECTED = (
    BaseMismatch,
    ConfigError,
    DatasetError,
    DistributedError,
    EncoderError,
    LoadError,
    LockedError,
    LogError,
    OptionsError,
    PictureError,
    SaveError,
    SourceError,
    TrainingStopped,
)
"""What is no fault of the program: said in one sentence, without a traceback."""

PATHS = {"output": "folder of the run", "dataset": "folder of a cached dataset"}
"""What may be named in place of the file's own, relative to the working folder, beside the base."""

FAILED = 1
"""Among the signals of `Stop`: the first process cannot show what happens, as on a full disk."""

PERIOD = 5.0
"""Seconds between lines on the terminal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the arguments say; gives the exit code: 0, 1 after an error, 128 and the signal when it was stopped."""
    given = vars(_parser().parse_args(dashed(sys.argv[1:] if arguments is None else arguments)))
    if given.pop("defaults"):
        print(config.defaults(), end="")
        return 0
    path: Path | None = given.pop("config")
    rank = int(os.environ.get("RANK", "0"))
    try:
        with joined() as process:
            logging.basicConfig(level=logging.WARNING if process.rank else logging.INFO, format="%(message)s")
            return run(config.read(path, given), process)
    except EXPECTED as error:
        print(f"process {rank}: {error}" if rank else str(error), file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def run(run: Run, process: Process) -> int:
    """Train until the end or until a signal asks to stop; gives the exit code."""
    with locked(run.output) if process.rank == 0 else nullcontext():
        return _run(run, process)


def _run(run: Run, process: Process) -> int:
    dataset = Dataset.open(run.dataset) if run.making is None else _uncached(run, run.making)
    base = read_base(run.base, run.loras)
    run = _predicting(run, base)
    saved = checkpoint.options_of(run.output / CHECKPOINTS)
    options, said = fitted(run.options, base.unet.config, Examples.of(dataset, len(run.prompts)), process, saved)
    run = replace(run, options=options)
    if said:
        _say(process, said)
    begin = None if run.control is None else _begin(run.control)
    decode = dataset.enlarged_preview
    if run.vae is not None and process.rank == 0:
        decode = decoder(run.vae, base.unet.config.adm_in_channels is not None, process.device)
    prompts = _prompts(run, dataset)
    watch = Watch(run, dataset, decode, prompts) if process.rank == 0 else None
    progresses = train(
        run.options,
        base.unet.state_dict(),
        base.unet.config,
        base.alphas,
        dataset,
        run.output,
        process=process,
        begin=begin,
        prompts=prompts,
    )
    del base, begin  # the training lets go of them, too, once it has its own
    # Closing the training writes a checkpoint, also when the watch finds no room for what it writes.
    with Stop(alone=process.world == 1) as stop, closing(progresses), closing(watch) if watch else nullcontext():
        for progress in progresses:
            failure = _failure(watch, progress) if watch else None
            # All of them end after the same step: each may have a part of what is kept.
            asked = max(process.gather(FAILED if failure else stop.signal))
            if failure:
                raise failure
            if asked and progress.step < progress.steps:
                break
        else:
            asked = 0
    if asked:
        so_far = newest_control(run.output)
        _say(
            process,
            f"stopped after step {progress.step} of {progress.steps}: the same command goes on from there"
            + (f"; {so_far} is the control so far, for ComfyUI's controlnet folder" if so_far else ""),
        )
        return 128 + asked
    if process.rank == 0:
        logging.info("%s", next_steps(run.output))
    _say(process, f"done: {run.output / 'control.safetensors'}")
    return 0


def _uncached(run: Run, making: Making) -> Dataset:
    """The pictures that a run reads themselves, with the encoders of its base."""
    found = encoders.read(run.base, making.tokenizer, making.vae, run.loras)
    source = sources.read(making.folder)
    for skipped in source.skipped:
        logging.warning("left out: %s", skipped)
    return Uncached.of(making.folder, source.items, found.pictures, found.prompt, making.options, making.prompts)


def _predicting(run: Run, base: Base) -> Run:
    """The run with what its base predicts, unless the run says that itself; raises ConfigError where it cannot be."""
    said = run if run.prediction_given else run.predicting(base.prediction)
    if not run.prediction_given:
        logging.getLogger(__name__).info("%s predicts %s: %s", run.base.name, base.prediction, base.why)
    if base.alphas[-1] == 0 and said.options.prediction == "eps":
        raise ConfigError(f"{run.base.name} has zero terminal SNR, where no noise can be told: choose prediction v")
    return said


def _begin(path: Path) -> ControlNetwork:
    """The control that a training begins with."""
    if not path.is_file():
        raise LoadError(f"{path}: there is no such file: give the path of the control to begin with")
    return load_control(*read_weights(path), name=path.name).control


def _prompts(run: Run, dataset: Dataset) -> tuple[Batch, ...]:
    """What is sampled beside the held-out pictures; a text encoder is read where the dataset lacks a prompt."""
    encoder = cache(lambda: read_prompts(run.base, run.tokenizer, run.loras))
    return tuple(each.batch(dataset, lambda prompt: encoder()(prompt)) for each in run.prompts)


def _failure(watch: Watch, progress: Progress) -> Exception | None:
    """What went wrong while a step was shown, if anything did."""
    try:
        watch.see(progress)
    except Exception as error:  # noqa: BLE001  (raised once all processes know of it)
        return error
    return None


def _say(process: Process, text: str) -> None:
    if process.rank == 0:
        print(text, flush=True)


class Stop:
    """Makes SIGINT (Ctrl-C) and SIGTERM ask for an end after the step, as `signal`; a second one stops at once.

    Among many processes a second one says nothing: a terminal and a launcher each hand the same Ctrl-C on.
    """

    def __init__(self, alone: bool):
        self.signal = 0
        self._alone = alone

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._asked) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, _frame: Any) -> None:
        if self.signal and self._alone:
            raise KeyboardInterrupt
        if not self.signal and self._alone:
            os.write(2, b"stopping after this step; once more stops at once and loses it\n")  # print may be interrupted
        self.signal = number


class Watch:
    """What the terminal and the run's folder show of a training."""

    def __init__(self, run: Run, dataset: Dataset, decode: Callable[[Tensor], Tensor], prompts: Sequence[Batch] = ()):
        self._run, self._dataset, self._decode, self._prompts = run, dataset, decode, prompts
        self._log: Log | None = None
        self._said = 0.0

    def see(self, progress: Progress) -> None:
        """Log a step, with its samples as a picture where it has some."""
        folder, pictures = self._run.output, None
        if self._log is None:
            facts = {"base": str(self._run.base), "dataset": str(self._run.dataset), **self._run.options.as_dict()}
            self._log = Log.open(folder, progress.step - 1, facts, self._run.trackers)
        log = self._log
        if progress.samples is not None or progress.prompted:
            pictures = self._pictures(progress)
        with written_to(folder):
            if pictures is not None:
                _write(folder / "samples" / f"step-{progress.step:08d}.png", pictures)
            log.add(progress, pictures)
            if progress.fidelity is not None or progress.step == progress.steps:
                drawn = plot(log.losses, log.fidelity, progress.converged, WIDTH, HEIGHT, log.validation)
                _write(folder / "plot.png", drawn)
        now = time.monotonic()
        if now - self._said > PERIOD or progress.fidelity is not None or progress.step == progress.steps:
            print(log.describe(progress), flush=True)
            self._said = now

    def close(self) -> None:
        """Write what the log still has in memory."""
        if self._log is not None:
            self._log.close()

    def _pictures(self, progress: Progress) -> Any:
        """Hints above pictures above samples (3h,w,3) uint8; the user's own prompts come last, without one."""
        columns = []
        if progress.samples is not None:
            held = self._dataset.read(progress.held)
            columns.append([held.hints, self._decoded(held.latents), self._decoded(progress.samples)])
        for own, samples in zip(self._prompts, progress.prompted):
            columns.append([own.hints, torch.zeros_like(own.hints), self._decoded(samples)])
        height, width = columns[0][0].shape[-2:]
        sheet = torch.cat([framed(torch.stack(rows), height, width) for rows in columns], dim=1)
        return (rearrange(sheet, "rows b c h w -> (rows h) (b w) c") * 255).round().byte().numpy()

    def _decoded(self, latents: Tensor) -> Tensor:
        """Pictures of latents, without a VAE from the time on that memory does not suffice for it."""
        try:
            return self._decode(latents)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        logging.warning("out of memory for the VAE: samples are shown in the small colours of the dataset from now on")
        self._decode = self._dataset.enlarged_preview
        return self._decode(latents)


def _write(path: Path, picture: Any) -> None:
    """Write a picture (H,W,3) uint8 as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", picture[..., ::-1])[1].tobytes())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m controlnet_core.training",
        allow_abbrev=False,
        description="Train a control on a cached dataset. A run that was stopped goes on from its newest checkpoint. "
        "Under torchrun or accelerate launch, all processes train one control together.",
    )
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.toml", help="the file that describes the run")
    parser.add_argument("--defaults", action="store_true", help="print such a file with all options, and end")
    options = parser.add_argument_group("options, in place of those of the file")
    for name, meaning in {**PATHS, **{name: MODEL[name][1] for name in ("base", "vae")}}.items():
        options.add_argument(f"--{name}", type=Path, default=argparse.SUPPRESS, help=meaning, metavar="PATH")
    kinds = get_type_hints(TrainingOptions)
    for field in fields(TrainingOptions):
        flag, meaning = f"--{field.name.replace('_', '-')}", MEANINGS[field.name].replace("%", "%%")
        kind: dict[str, Any] = {"type": kinds[field.name], "metavar": str(field.default)}
        if kinds[field.name] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        options.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, help=meaning, **kind)
    return parser


if __name__ == "__main__":
    sys.exit(main())
