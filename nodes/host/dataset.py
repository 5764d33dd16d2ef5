"""Cached datasets made with the host's VAE and text encoder, in the host's output folder."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.latent_formats
import folder_paths
import numpy as np
from torch import Tensor

from ...annotators import ANNOTATORS, pipeline
from ...annotators.images import AnnotatorError, resized, to_bytes, to_picture
from ...controlnet_core.data import caching, sources
from ...controlnet_core.data.caching import Annotate
from ...controlnet_core.data.config import GIVEN
from ...controlnet_core.data.dataset import Dataset
from ...controlnet_core.data.manifest import NAME, DatasetError
from ...controlnet_core.data.pictures import PictureError
from ...controlnet_core.data.sources import Item, Skipped
from ...controlnet_core.data.writer import CachingOptions, EncodePictures, EncodePrompt
from ...controlnet_core.files.lock import locked
from ...controlnet_core.files.saving import SaveError
from ...lab.folder import PROMPTS, render_folder
from . import annotators as host_annotators
from .models import unet_config
from .progress import bar
from .save import name_parts

PLACE = "zeroconv"
"""The folder of this pack's files in the host's output folder."""

OWN_PLACES = "control_datasets"
"""What the machine's owner calls the folders in `extra_model_paths.yaml` that datasets may be written to."""

SDXL_CONTEXT = 2048
"""Channels of SDXL's text embeddings; SD1.x has 768 and SD2.x 1024."""

MAKERS = {entry.name: entry for entry in ANNOTATORS if not (entry.reads_mask or entry.reads_pose)}
"""The annotators that need nothing but a picture."""


@dataclass(frozen=True)
class Pictures:
    """What a dataset is made of: a folder, pictures of the canvas (B,H,W,3), or both.

    `captions` are lines: one for each of `images`, or one for all pictures that have none. `hints` belong to `images`,
    one to each.
    """

    folder: str = ""
    images: Tensor | None = None
    captions: str = ""
    hints: Tensor | None = None


def make(
    name: str, vae: Any, clip: Any, pictures: Pictures, options: CachingOptions, model: Any, node_id: str | None
) -> tuple[Dataset, str]:
    """The dataset of that name and a report of what it holds; only what is new is encoded.

    `model` is the MODEL to be trained on, for latents scaled as it says, or `None` for those of the family of `clip`.
    Raises SourceError, DatasetError, AnnotatorError for networks that cannot be had, SaveError; Cancel keeps what is
    encoded.
    """
    started = time.monotonic()
    folder = folder_of(name, "datasets")
    items, skipped, layout = _items(pictures, options.hints)
    encode_pictures, encode_prompt = encoders(vae, clip, model)
    annotate = None if options.hints == GIVEN else annotator(options.hints, options.hint_resolution, node_id)
    ahead = annotate is not None and not MAKERS[options.hints].networks  # which the host moves about for the VAE
    run = caching.make(folder, items, encode_pictures, encode_prompt, annotate, options, annotate_ahead=ahead)
    with locked(folder), closing(run):  # type: ignore[type-var]
        move: Callable[[int, Any], None] | None = None
        for progress in run:
            move = move or bar(max(1, progress.steps), node_id)
            move(progress.step, None)
    dataset = Dataset.open(folder)
    report = caching.report(dataset, layout, items, replace(progress, skipped=(*skipped, *progress.skipped)))
    return dataset, f"{report}\n{time.monotonic() - started:.0f} s"


def folder_of(name: str, kind: str) -> Path:
    """The folder that `name` means: below `zeroconv/<kind>` of the host's output folder, or as it is when absolute.

    Raises SaveError for names that no system can have, and for a whole path that leads to where nobody said that nodes
    may write: below the host's output folder, or below what `extra_model_paths.yaml` names `control_datasets`.
    """
    if not Path(name.strip()).is_absolute():
        return Path(folder_paths.get_output_directory()).joinpath(PLACE, kind, *name_parts(name))
    named = folder_paths.get_folder_paths(OWN_PLACES) if OWN_PLACES in folder_paths.folder_names_and_paths else []
    folder = Path(name.strip()).resolve()
    for place in (folder_paths.get_output_directory(), *named):
        if folder.is_relative_to(Path(place).resolve()):
            return folder
    raise SaveError(
        f"{folder} lies outside of the folders that nodes may write to: give a name, which is a folder below the "
        f"output folder, or name a folder around it {OWN_PLACES} in extra_model_paths.yaml"
    )


def folder_to_read(folder: str) -> Path:
    """The folder that a user means: absolute, or below the host's input folder; quotes around it do not count."""
    return Path(folder_paths.get_input_directory()) / Path(folder.strip().strip("\"'")).expanduser()


def state_of(name: str | None, folder: str | None) -> str:
    """What changes when a picture in `folder` does, or when the dataset `name` is deleted; `None` is not known yet."""
    found = hashlib.sha256()
    if name:
        found.update(str((folder_of(name, "datasets") / NAME).is_file()).encode())
    if folder:
        for place, folders, files in os.walk(folder_to_read(folder)):
            folders.sort()
            for file in sorted(files):
                facts = Path(place, file).lstat()
                found.update(f"{place}/{file} {facts.st_size} {facts.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    return found.hexdigest()


# -- what goes in -----------------------------------------------------------------------------------------------------


def _items(pictures: Pictures, hints: str) -> tuple[list[Item], Sequence[Skipped], str]:
    """The items of folder and canvas, what the folder holds beside them, and where they come from in words."""
    lines = [line.strip() for line in pictures.captions.strip().splitlines()] or [""]
    images = () if pictures.images is None else pictures.images
    count = len(images)
    if not pictures.folder.strip() and not count:
        raise sources.SourceError("found neither folder nor images: name a folder of pictures, or connect images")
    if len(lines) not in (1, count):
        raise sources.SourceError(
            f"found {len(lines)} lines of captions for {count} images: write one line for each, or one for all"
            + (" (captions of a folder lie beside its pictures)" if pictures.folder.strip() else "")
        )
    if pictures.hints is not None and (len(pictures.hints) != count or hints != GIVEN):
        raise sources.SourceError(
            f"found {len(pictures.hints)} hints with {count} images and annotator {hints}: connect one hint to each "
            "image and choose annotator given, or connect no hints"
        )
    items: list[Item] = []
    skipped: tuple[Skipped, ...] = ()
    places = []
    if pictures.folder.strip():
        source = sources.read(folder_to_read(pictures.folder))
        only = lines[0] if len(lines) == 1 else ""
        items += [item if item.prompt else replace(item, prompt=only) for item in source.items]
        skipped = source.skipped
        places.append(f"{folder_to_read(pictures.folder)}, read as {source.layout}")
    for i in range(count):
        hint = None if pictures.hints is None else _bytes(pictures.hints[i])
        items.append(Item(f"image {i + 1}", _bytes(images[i]), lines[i % len(lines)], hint))
    places += [f"{count} images"] if count else []
    return items, skipped, " and ".join(places)


def _bytes(picture: Tensor) -> np.ndarray:
    return to_bytes(to_picture(picture.float().cpu().numpy()))


def encoders(vae: Any, clip: Any, model: Any = None) -> tuple[EncodePictures, EncodePrompt]:
    """The host's VAE and CLIP as caching takes them: scaled latents, and contexts as CLIPTextEncode gives them.

    Of the text encoder's pooled output only SDXL makes use. Raises DatasetError when `clip` is not that of `model`.
    """
    context, _ = clip.encode_from_tokens(clip.tokenize(""), return_pooled=True)
    if model is None:
        pooled = context.shape[-1] == SDXL_CONTEXT
        latent_format = comfy.latent_formats.SDXL() if pooled else comfy.latent_formats.SD15()
    else:
        config = unet_config(model.model, "a dataset", None)
        if config.context_dim != context.shape[-1]:
            raise DatasetError(
                f"the model takes text embeddings of {config.context_dim} channels, clip gives {context.shape[-1]}: "
                "connect the CLIP that belongs to the model"
            )
        pooled, latent_format = config.adm_in_channels is not None, model.model.latent_format

    def encode_pictures(pictures: Tensor) -> Tensor:
        return latent_format.process_in(vae.encode(pictures.movedim(1, -1)))

    def encode_prompt(prompt: str) -> tuple[Tensor, Tensor | None]:
        context, whole = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
        return context[0], whole[0] if pooled else None

    return encode_pictures, encode_prompt


def annotator(name: str, resolution: int, node_id: str | None) -> Annotate:
    """What makes hints with an annotator's defaults, looking at pictures of this short side (0: as they are)."""
    chosen = MAKERS[name]

    def annotate(picture: np.ndarray) -> np.ndarray:
        # Each time: the VAE runs between two pictures, and the host may have moved the networks aside for it.
        networks = host_annotators.networks(chosen.networks, node_id)
        try:
            hint, _ = pipeline.annotate(chosen, picture, resolution, networks=networks)
        except AnnotatorError as error:
            raise PictureError(str(error)) from error
        return resized(hint, *picture.shape[:2])

    return annotate


# -- scenes of the lab ------------------------------------------------------------------------------------------------


def render_scenes(name: str, count: int, seed: int, hint: str, node_id: str | None) -> Path:
    """The folder of that name with scenes of the lab, those of `seed` and the following seeds; Cancel keeps them."""
    folder = folder_of(name, "scenes")
    move = bar(count, node_id)
    for done, _ in enumerate(render_folder(folder, range(seed, seed + count), hint), start=1):
        move(done, None)
    return folder


def has_scenes(name: str) -> bool:
    """Whether scenes of that name were rendered."""
    return (folder_of(name, "scenes") / PROMPTS).is_file()
