"""The trainings that the claims are about: one setting of everything, from which each differs in one thing."""

from __future__ import annotations

import csv
import logging
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ...controlnet_core.data.caching import CachingOptions, make
from ...controlnet_core.data.dataset import Batch, Dataset
from ...controlnet_core.data.sources import Item
from ...controlnet_core.diffusion import alphas_cumprod
from ...controlnet_core.files.loading import load_control, read_weights
from ...controlnet_core.networks.controlnet import ControlNet
from ...controlnet_core.networks.lite import ControlNetLite
from ...controlnet_core.training.checkpoint import newest
from ...controlnet_core.training.convergence import sudden_convergence
from ...controlnet_core.training.log import Log
from ...controlnet_core.training.loop import train
from ...controlnet_core.training.options import TrainingOptions
from ..autoencoder import LATENT_SCALE
from ..dataset import HELD_OUT, load_shards, render_arrays, render_shards
from ..evaluate import HeldOut, held_out, judge
from ..models import SIZE, UNET, load_weights
from ..pipeline import LabModel
from ..scene import describe, random_scene
from ..segmenter import Segmenter
from ..vocabulary import END, START, TOKEN_IDS
from .claim import Work

log = logging.getLogger(__name__)

HINT = "depth"
SCENES = 12_000
WATCHED = 16
"""Held-out scenes that a training is measured on."""

TELL_EVERY = 10.0
"""Seconds between lines of the log."""

SEEDS = (0, 1, 2)
"""Each training is run from each: order of the data, noise, timesteps and the first weights of the hint encoder."""

OPTIONS = TrainingOptions(
    steps=400,
    batch_size=24,
    learning_rate=1e-3,
    schedule="cosine",
    warmup=50,
    timesteps="cubic",
    precision="bf16",
    recompute="off",
    save_every=100,
    sample_every=20,
    held_out=WATCHED,
    sample_steps=20,
    guidance_scale=3.0,
)
"""What all trainings have in common."""


@dataclass(frozen=True)
class Run:
    """A training: what differs from OPTIONS, and how many of the scenes it learns from; their mirror images count."""

    title: str
    options: dict[str, Any] = field(default_factory=dict)
    pictures: int = 2 * SCENES


RUNS = {
    "zero": Run("zero convolutions"),
    "gaussian": Run("Gaussian convolutions", {"connections": "gaussian"}),
    "lite": Run("ControlNet-lite", {"kind": "lite"}),
    "10000": Run("10,000 pictures", pictures=10_000),
    "1000": Run("1,000 pictures", pictures=1_000),
    "100": Run("100 pictures", pictures=100),
}


@dataclass(frozen=True, eq=False)
class Scenes(Dataset):
    """The lab's scenes as a dataset: watched are held-out scenes alone, learnt the first `pictures` of the others.

    First come all pictures as they are, then their mirror images.
    """

    pictures: int = 2 * SCENES

    def split(self, held_out: int, seed: int) -> tuple[list[int], list[int]]:  # noqa: ARG002 - no chance in it
        """(the first `held_out` of the held-out scenes in the order of their seeds, the scenes to learn from)."""
        at = {(place.name, place.mirrored): index for index, place in enumerate(self.places)}
        names = [name_of(seed) for seed in range(SCENES)]
        learnt = [at[name, mirrored] for mirrored in (False, True) for name in names if (name, mirrored) in at]
        return [at[name_of(HELD_OUT + i), False] for i in range(held_out)], learnt[: self.pictures]


def name_of(seed: int) -> str:
    """What a scene is called in the dataset."""
    return f"scene {seed}"


@cache
def parts() -> tuple[LabModel, Segmenter]:
    """The embedded model without controls, and the judge."""
    model = LabModel.load(())
    return model, load_weights(Segmenter(), "segmenter").to(model.place)


def dataset(work: Work) -> Scenes:
    """All scenes and their mirror images, and the held-out scenes, encoded; made where it is not there."""
    folder = work.path("dataset")
    if not (folder / "finished").exists():
        told = time.monotonic()
        for progress in make(
            folder,
            _items(work),
            lambda pictures: encode(pictures).cpu(),
            lambda prompt: (parts()[0].encode([prompt])[0].cpu(), None),
            annotate=None,
            options=CachingOptions(resolution=SIZE, mirror=True, hints=HINT, batch_size=64),
        ):
            if time.monotonic() > told + TELL_EVERY:
                told = time.monotonic()
                log.info("dataset: %d of %d pictures and prompts encoded", progress.step, progress.steps)
        (folder / "finished").touch()
    found = Dataset.open(folder)
    return Scenes(found.folder, found.manifest, found.places)


def _items(work: Work) -> list[Item]:
    arrays = load_shards(render_shards(work.scenes, SCENES, SIZE), ("image", "tokens", HINT))
    items = [
        Item(name_of(seed), arrays["image"][seed], words(arrays["tokens"][seed].tolist()), arrays[HINT][seed])
        for seed in range(SCENES)
    ]
    for seed in range(HELD_OUT, HELD_OUT + WATCHED):
        scene = render_arrays(seed, SIZE)
        items.append(Item(name_of(seed), scene["image"], describe(random_scene(seed)), scene[HINT]))
    return items


def words(tokens: list[int]) -> str:
    """The prompt of a scene's tokens."""
    text = {token: word for word, token in TOKEN_IDS.items()}
    return " ".join(text[token] for token in tokens if token not in (START, END)).replace(" ,", ",")


@torch.no_grad()
def encode(pictures: Tensor) -> Tensor:
    """Latents (B,4,H/8,W/8) as the UNet sees them of pictures (B,3,H,W) in [0,1]; fp32."""
    model = parts()[0]
    return model.autoencoder.encode(pictures.to(model.place) * 2 - 1).float() * LATENT_SCALE


def decode(latents: Tensor) -> Tensor:
    """Pictures (B,3,H,W) in [0,1] of latents as the UNet sees them."""
    model = parts()[0]
    return model.decode(latents.to(model.place, torch.float32)).cpu()


@cache
def watched() -> HeldOut:
    """The scenes that a training is measured on."""
    return held_out(WATCHED)


def score(samples: Tensor, _: Batch) -> float:
    """The lab's fidelity: mean IoU of figure and solids that the judge finds in the samples, with the exact ones."""
    return judge(parts()[1], decode(samples), watched().segments).nanmean(0).mean().item()


# -- training ---------------------------------------------------------------------------------------------------------


def folder_of(work: Work, name: str, seed: int) -> Path:
    """Where the training of a name and a seed lies."""
    return work.path("runs", f"{name}-{seed}")


def finished(work: Work, name: str, seed: int) -> bool:
    """Whether a training has come to its end."""
    return (folder_of(work, name, seed) / "control.safetensors").exists()


def run(work: Work, name: str, seed: int) -> None:
    """Train one of RUNS to its end, from where it was left."""
    if finished(work, name, seed):
        return
    chosen, folder = RUNS[name], folder_of(work, name, seed)
    data = replace(dataset(work), pictures=chosen.pictures)
    options = replace(OPTIONS, seed=seed, **chosen.options)
    model = parts()[0]
    steps = train(options, model.unet.state_dict(), UNET, alphas_cumprod(), data, folder, score)
    with closing(steps) as training:  # type: ignore[type-var]
        book: Log | None = None
        told = time.monotonic()
        for progress in training:
            if book is None:
                book = Log.open(folder, progress.step - 1)
            sheet = None if progress.samples is None else in_a_row(decode(progress.samples))
            book.add(progress, sheet)
            if sheet is not None:
                save_samples(folder, progress.step, sheet)
                log.info("%s step %d: fidelity %.3f", folder.name, progress.step, progress.fidelity)
            elif time.monotonic() > told + TELL_EVERY:
                told = time.monotonic()
                log.info("%s step %d: loss %.4f", folder.name, progress.step, progress.loss)


def in_a_row(pictures: Tensor) -> np.ndarray:
    """Pictures (B,3,H,W) in [0,1] side by side, (H,B*W,3) uint8."""
    return (rearrange(pictures, "b c h w -> h (b w) c") * 255).round().byte().numpy()


def save_samples(folder: Path, step: int, sheet: np.ndarray) -> None:
    """Keep the pictures of the watched scenes at a step, side by side in one file."""
    from PIL import Image

    path = folder / "samples" / f"step-{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(sheet).save(path)


def samples(work: Work, name: str, seed: int, step: int) -> np.ndarray | None:
    """The pictures (B,H,W,3) in [0,1] of the watched scenes at a step of a training, None where none were kept."""
    from PIL import Image

    path = folder_of(work, name, seed) / "samples" / f"step-{step:08d}.png"
    if not path.exists():
        return None
    return rearrange(np.asarray(Image.open(path), dtype=np.float32) / 255, "h (b w) c -> b h w c", b=WATCHED)


def control(work: Work, name: str, seed: int) -> ControlNet | ControlNetLite:
    """The control of a finished training, in fp32 and ready for inference."""
    path = folder_of(work, name, seed) / "control.safetensors"
    network = load_control(*read_weights(path), name=path.name).control
    assert isinstance(network, ControlNet | ControlNetLite)
    return network.eval().requires_grad_(False).to(parts()[0].place)


def curve(work: Work, name: str, seed: int) -> tuple[list[int], list[float]]:
    """Steps and fidelity of a training; they are in its checkpoint, as whole as it."""
    saved = newest(folder_of(work, name, seed) / "checkpoints")
    assert saved is not None, f"{name} has no checkpoint"
    steps, scores = zip(*saved.facts["measured"])
    return list(steps), list(scores)


def losses(work: Work, name: str, seed: int) -> tuple[list[int], list[float]]:
    """Steps and losses of a training."""
    with (folder_of(work, name, seed) / "losses.csv").open(newline="", encoding="utf-8") as file:
        rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file) if row["loss"]]
    return [step for step, _ in rows], [loss for _, loss in rows]


def converged(work: Work, name: str, seed: int) -> int | None:
    """The step at which a training began to follow its hints, None where it did not suddenly."""
    return sudden_convergence(*curve(work, name, seed))
