"""What a training shows while it goes on: samples as pictures, their score, the plot, and the node's bar and line."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from textwrap import wrap
from typing import Any

import comfy.model_management
import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ...annotators.compare import compare
from ...annotators.measure import SCORES, kind_of
from ...controlnet_core.data.dataset import Batch, Dataset
from ...controlnet_core.data.manifest import DatasetError
from ...controlnet_core.data.pictures import PictureError
from ...controlnet_core.files import saving
from ...controlnet_core.files.loading import read_weights
from ...controlnet_core.training import pictures
from ...controlnet_core.training.fidelity import Score
from ...controlnet_core.training.log import Log, LogError, duration, written_to
from ...controlnet_core.training.loop import Progress
from ...controlnet_core.training.options import TrainingOptions
from ...controlnet_core.training.plot import plot
from ...controlnet_core.training.validation import framed
from ...lab.sheet import contact_sheet
from .dataset import annotator
from .progress import bar, say

PERIOD = 5.0
"""Seconds from one new plot on the node to the next; more where drawing takes more than 2 % of the time."""

LETTERS, LINE_HEIGHT = 22, 18
"""Of a prompt on a sheet: letters of a line, and its pixels."""

PREVIEW = 1280
"""Pixels of the width of what the node shows while it runs, at most."""


class Decoder:
    """Latents as training has them become pictures by the host's VAE; the last ones are remembered."""

    def __init__(self, vae: Any, latent_format: Any):
        self._vae, self._format = vae, latent_format
        self._last: tuple[Tensor, np.ndarray] | None = None

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> np.ndarray:
        """Pictures (B,8h,8w,3) in 0..1 of latents (B,4,h,w) that are scaled as the UNet sees them."""
        if self._last is None or self._last[0] is not latents:
            pictures = self._vae.decode(self._format.process_out(latents.cpu()))
            self._last = latents, pictures.float().clamp(0, 1).cpu().numpy()
            comfy.model_management.unload_all_models()  # training wants the memory
        return self._last[1]


def annotated(dataset: Dataset, decoder: Decoder, node_id: str | None) -> Score:
    """The score of samples by the annotator that made the dataset's hints, with `annotators.compare`.

    Raises DatasetError for hints that were given, and for those of an annotator that has no such score.
    """
    options = dataset.manifest.options
    name = options["hints"]
    measured = {known for names in SCORES.values() for known in names}
    if name not in measured or kind_of(name) == "pose":
        raise DatasetError(
            f"{dataset.folder}: fidelity by annotator needs hints that an annotator with a score made, found hints "
            f"{name}: choose fidelity structure"
        )
    annotate = annotator(name, options["hint_resolution"], node_id)

    @torch.inference_mode()
    def score(samples: Tensor, batch: Batch) -> float:
        scores = []
        for picture, hint in zip(decoder(samples), rearrange(batch.hints, "b c h w -> b h w c").cpu().numpy()):
            try:
                scores.append(compare(name, picture, annotate(picture), hint).score)
            except PictureError:  # the annotator sees nothing in this one
                scores.append(0.0)
        return float(np.mean(scores))

    return score


class Watch:
    """What the node and the run's folder show of a training; a context manager. `notes` are the training's own.

    In the folder: the core's log, `options.json` with `facts`, `plot.png`, and for each measurement a sheet of the
    held-out pictures and of the user's `own`, each with its prompt: `samples/step-<step>.png`.
    """

    def __init__(
        self,
        folder: Path,
        facts: dict[str, Any],
        dataset: Dataset,
        options: TrainingOptions,
        decoder: Decoder,
        node_id: str | None,
        own: Sequence[tuple[str, Batch]] = (),
    ):
        self._folder, self._facts, self._decoder, self._node_id = folder, facts, decoder, node_id
        self._dataset, self._own = dataset, own
        self._held: tuple[int, ...] = ()
        self.notes: tuple[str, ...] = ()
        self._move = bar(options.steps, node_id)
        self._log: Log | None = None
        self._next = 0.0

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._log is not None:
            self._log.close()

    def see(self, progress: Progress) -> None:
        """Log a step and show it; raises when the user cancels, and LogError."""
        if self._log is None:
            self._log = Log.open(self._folder, progress.step - 1, self._facts)
        sheet = None
        self._held, self.notes = progress.held, progress.notes
        if progress.samples is not None or progress.prompted:
            held = [] if progress.samples is None else [progress.samples]
            sheet = self._keep_sheet(progress.step, [*held, *progress.prompted])
        self._log.add(progress, None if sheet is None else np.asarray(sheet))
        preview = None
        started = time.monotonic()
        if sheet is not None or progress.step == progress.steps or started > self._next:
            preview = self._drawing(self._log, progress.converged)
            now = time.monotonic()
            self._next = now + max(PERIOD, 50 * (now - started))
        say("\n".join([self._log.describe(progress), *self.notes]), self._node_id)
        self._move(progress.step, preview)

    def _drawing(self, log: Log, converged: int | None) -> Image.Image:
        """The plot, kept as a file, beside the newest sheet."""
        drawn = Image.fromarray(plot(log.losses, log.fidelity, converged, validation=log.validation))
        with written_to(self._folder):
            drawn.save(self._folder / "plot.png")
        shown = drawn
        for path in sheets(self._folder)[-1:]:
            with Image.open(path) as sheet:
                beside = sheet.resize((round(sheet.width * drawn.height / sheet.height), drawn.height))
            shown = Image.new("RGB", (drawn.width + beside.width, drawn.height))
            shown.paste(drawn)
            shown.paste(beside, (drawn.width, 0))
        shown.thumbnail((PREVIEW, PREVIEW))
        return shown

    def _keep_sheet(self, step: int, samples: Sequence[Tensor]) -> Image.Image:
        """The sheet of a measurement, kept as a file: hint, picture, the sample before training and this one.

        `samples` are the latents of each of `_shown`.
        """
        newest = self._decoded(samples)  # first: the score has decoded it just now
        if step == 0:
            saving.write(self._first, dict(zip(self._latents, samples)), {"pictures": self._names})
        columns = {**self._constant, **({f"step {step}": newest} if step > 0 else {})}
        sheet = contact_sheet(columns, self._prompts(len(newest[0]) // LINE_HEIGHT))
        path = self._folder / "samples" / f"step-{step:08d}.png"
        with written_to(self._folder):
            path.parent.mkdir(exist_ok=True)  # where samples were turned on later
            sheet.save(path)
        return sheet

    @cached_property
    def _shown(self) -> list[Batch]:
        """What a sheet shows: the held-out pictures, then each of the user's own."""
        return [*([self._dataset.read(self._held)] if self._held else []), *(batch for _, batch in self._own)]

    @property
    def _latents(self) -> list[str]:
        """What the first samples of each of them are called in their file; own ones by prompt and hint."""
        said = (prompt.encode() + batch.hint_bytes.numpy().tobytes() for prompt, batch in self._own)
        own = (f"own.{blake2b(each, digest_size=8).hexdigest()}" for each in said)
        return [*(["latents"] if self._held else []), *own]

    @cached_property
    def _constant(self) -> dict[str, np.ndarray]:
        """The columns of a sheet that stay the same."""
        hints = [rearrange(batch.hints, "b c h w -> b h w c").numpy() for batch in self._shown]
        columns = {"hint": _in_frame(hints), "picture": self._decoded([batch.latents for batch in self._shown])}
        before = self._before()
        if any(latents is not None for latents in before):
            columns["before training"] = _in_frame(
                [
                    np.zeros_like(hint) if latents is None else self._decoder(latents)
                    for latents, hint in zip(before, hints)
                ]
            )
        return columns

    def _before(self) -> list[Tensor | None]:
        """The first samples of each of `_shown`; None where they were of others."""
        if not self._first.is_file():
            return []
        first, said = read_weights(self._first)
        # Where pictures are gone since, these are of others; older files do not say of which.
        same = said.get("pictures", self._names) == self._names
        found = [first.get(name) if same or name != "latents" else None for name in self._latents]
        return [
            latents if latents is not None and latents.shape == batch.latents.shape else None
            for latents, batch in zip(found, self._shown)
        ]

    def _decoded(self, latents: Sequence[Tensor]) -> np.ndarray:
        return _in_frame([self._decoder(each) for each in latents])

    def _prompts(self, lines: int) -> list[str]:
        """What is sampled with, each prompt in as many lines as there is room for."""
        held = self._dataset.read(self._held).prompts.tolist() if self._held else []
        prompts = [*(self._dataset.prompts[number] for number in held), *(prompt for prompt, _ in self._own)]
        return ["\n".join(wrap(prompt or "(no prompt)", LETTERS)[: max(1, lines)]) for prompt in prompts]

    @property
    def _names(self) -> str:
        return json.dumps(pictures.names(self._dataset, self._held))

    @property
    def _first(self) -> Path:
        """The latents of the first samples, so that a run that goes on another day still shows them."""
        return self._folder / "samples" / "first.safetensors"


def _in_frame(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures (B,h,w,3) of several sizes as one array, each as large as it fits into the size of the first ones."""
    tensors = [rearrange(torch.from_numpy(each), "b h w c -> b c h w") for each in pictures]
    height, width = tensors[0].shape[-2:]
    return rearrange(torch.cat([framed(each, height, width) for each in tensors]), "b c h w -> b h w c").numpy()


# -- what is left of a run ---------------------------------------------------------------------------------------------


def sheets(folder: Path) -> list[Path]:
    """The sheets of a run, from old to new."""
    return sorted((folder / "samples").glob("step-*.png"))


def newest_sheet(folder: Path) -> Tensor:
    """The newest sheet of a run as an IMAGE; a small black one where nothing was held out."""
    found = sheets(folder)
    return _image(found[-1]) if found else torch.zeros(1, 64, 64, 3)


def newest_plot(folder: Path) -> Tensor:
    """The plot of a run as an IMAGE; drawn from its log where the run was stopped before it was."""
    path = folder / "plot.png"
    if not path.is_file():
        rows = _rows(folder / "losses.csv")
        Image.fromarray(plot([(int(row["step"]), float(row["loss"])) for row in rows])).save(path)
    return _image(path)


def summary(folder: Path) -> str:
    """A run in a few words, from its log; raises LogError where something else is in its place."""
    try:
        return _summary(folder)
    except (OSError, LookupError, TypeError, ValueError, csv.Error) as error:
        raise LogError(
            f"the log of {folder} cannot be read ({type(error).__name__}: {error}): delete losses.csv and fidelity.csv "
            "there and train on, or choose another name"
        ) from error


def _summary(folder: Path) -> str:
    losses, measured = _rows(folder / "losses.csv"), _rows(folder / "fidelity.csv")
    says = [
        f"{last['step']} steps in {duration(float(last['seconds']))}, loss {float(last['smoothed']):.4f} (smoothed)"
        for last in losses[-1:]  # a run that was stopped in its first measurement has none
    ]
    if measured:
        before, after = (float(row["fidelity"]) for row in (measured[0], measured[-1]))
        says.append(f"fidelity {before:.3f} before training, {after:.3f} now")
        mark = measured[-1]["converged"]
        says.append(f"converged at step {mark}" if mark else "no sudden convergence was seen")
    return "\n".join(says)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _image(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255)[None]
