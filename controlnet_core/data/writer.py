"""Writing a cached dataset: rows are held until they fill a shard, and the manifest names only what is on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..files import checksum
from ..files.saving import write
from ..files.writing import sweep
from ..keys import times
from .manifest import NAME, DatasetError, Entry, Manifest, PromptFile, Shard, damage, read_manifest, write_manifest
from .pictures import Crop
from .rows import opened
from .sources import Item, Skipped

EncodePictures = Callable[[Tensor], Tensor]
"""Pictures (B,3,H,W) in [0,1] -> latents (B,4,H/8,W/8), scaled as the UNet sees them."""

EncodePrompt = Callable[[str], tuple[Tensor, Tensor | None]]
"""A prompt -> context (T,C) and, for SDXL alone, pooled (D,); PromptError for one that it does not take."""

SHARD_BYTES = 64 << 20
"""Bytes of a shard: little enough to be lost by a killed process, enough for a thousand small pictures."""

SHARD_ITEMS = 1024
"""Items of a shard."""

FILE_PROMPTS = 256
"""Prompts of a file: whoever reads one of them reads the names of all."""

SAME_ENCODER = 0.05
"""Latents or contexts that differ by more than this, relative to their size, are another encoder's. The same one
differs by less between a GPU's half precision and a CPU."""


@dataclass(frozen=True)
class CachingOptions:
    """What a dataset is made with, and does not change while it grows.

    `resolution` is the side of the square that a bucket has the area of. `mirror` adds the mirror image of each item.
    `hints` says where hints come from: "given", or an annotator's name, which looked at pictures whose short side was
    `hint_resolution` (0: as they are cached). `batch_size` is how many pictures are encoded at once; it may change.
    `crops` is how many parts of each picture are taken, the first of them its centre. Of each caption there are
    `caption_variants`, the first of them itself, the others as `captions.forms` makes them.
    """

    resolution: int = 512
    mirror: bool = False
    hints: str = "given"
    hint_resolution: int = 0
    batch_size: int = 8
    crops: int = 1
    caption_variants: int = 1
    tag_dropout: float = 0.1
    keep_tags: int = 1


@dataclass(frozen=True)
class View:
    """A part of a picture, or its mirror image: `picture` and `hint` (H,W,3) uint8 at the size of the bucket."""

    crop: Crop
    number: int
    mirrored: bool
    picture: np.ndarray
    hint: np.ndarray


@dataclass(frozen=True)
class Prepared:
    """An item ready to be encoded: all its views, and the forms of its caption; as many for each item."""

    item: Item
    stamp: str
    prompts: tuple[str, ...]
    views: tuple[View, ...]


@dataclass(frozen=True)
class Row:
    """What a shard holds of one item, or of its mirror image."""

    entry: Entry
    tensors: dict[str, Tensor]


class Writer:
    """A dataset that grows: rows are held until they fill a shard, which is written before the manifest names it.

    A latent pixel takes `latent_bytes` on disk, a prompt of the model's own length `prompt_bytes`.
    """

    def __init__(
        self, folder: Path, encode_pictures: EncodePictures, encode_prompt: EncodePrompt, options: CachingOptions
    ):
        self._folder, self._options = folder, options
        self._encode_pictures, self._encode_prompt = encode_pictures, encode_prompt
        self.added = 0
        self._rows: list[Row] = []
        self._texts: dict[str, tuple[Tensor, Tensor | None]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for names in ("shard-*", "prompts-*", NAME):
            sweep(folder, names)
        probe, (context, pooled) = latents_of(encode_pictures, probe_picture())[0], encode_prompt("")
        fixed = described(options, probe, context, pooled)
        found = read_manifest(folder)
        if found is None:
            width = probe.shape[0] + 1
            self._manifest = Manifest(fixed, tuple(probe.flatten().tolist()), ((0.0,) * (width + 3),) * width)
            self._texts[""] = context, pooled
        else:
            self._manifest = found
            self._check(fixed, probe)
            self._repair()
            self._check_context(context)
        self._moments = np.array(self._manifest.moments)
        self.latent_bytes = probe.shape[0] * probe.element_size()
        self.prompt_bytes = 2 * (context.numel() + (0 if pooled is None else pooled.numel()))
        texts = [prompt for file in self._manifest.prompts for prompt in file.prompts] or [""]
        self._numbers = {prompt: number for number, prompt in enumerate(texts)}

    # -- what is there -----------------------------------------------------------------------------------------------

    def _check(self, fixed: dict[str, Any], probe: Tensor) -> None:
        for name, value in fixed.items():
            before = self._manifest.options.get(name, getattr(CachingOptions, name, None))  # of an earlier version
            if before != value:
                raise DatasetError(
                    f"{self._folder} was made with {name.replace('_', ' ')} {before}, found {value}: choose another "
                    "name for the new dataset, or give the same as before"
                )
        if relative_error(probe.flatten(), torch.tensor(self._manifest.probe)) > SAME_ENCODER:
            raise DatasetError(f"{self._folder} was made with another VAE: {_CHOOSE}")

    def _check_context(self, context: Tensor) -> None:
        with opened(self._folder / self._manifest.prompts[0].file) as file:
            before = file.tensor("context.0").float()
        if before.shape != context.shape or relative_error(context, before) > SAME_ENCODER:
            raise DatasetError(f"{self._folder} was made with another text encoder: {_CHOOSE}")

    def _repair(self) -> None:
        """Encode the prompts of damaged files again, and forget the items of damaged shards."""
        files, start = [], 0
        for file in self._manifest.prompts:
            if damage(self._folder, file):
                encoded = {prompt: self._encode_prompt(prompt) for prompt in file.prompts}
                file = self._write_prompts(file.file, start, encoded)
            files.append(file)
            start += len(file.prompts)
        shards = tuple(shard for shard in self._manifest.shards if not damage(self._folder, shard))
        self._manifest = replace(self._manifest, prompts=tuple(files), shards=shards)

    def keep_only(self, stamps: Mapping[str, str]) -> set[str]:
        """Set aside what is cached of other items than these; gives the names of those that are cached."""
        shards = []
        for shard in self._manifest.shards:
            live = [stamps.get(entry.name) == entry.stamp for entry in shard.entries]
            entries = tuple(replace(entry, live=now) for entry, now in zip(shard.entries, live))
            shards.append(replace(shard, entries=entries))
        self._manifest = replace(self._manifest, shards=tuple(shards))
        entries = [entry for shard in shards for entry in shard.entries]
        self.unused = len({(entry.name, entry.stamp) for entry in entries if not entry.live})
        self.flush_prompts()
        write_manifest(self._folder, self._manifest)
        return {entry.name for entry in entries if entry.live}

    # -- prompts -----------------------------------------------------------------------------------------------------

    def unknown(self, prompts: Iterable[str]) -> list[str]:
        """Those of `prompts` that have not been encoded, each once."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._numbers]

    def add_prompt(self, prompt: str) -> None:
        """Encode a prompt that is not known yet."""
        self._texts[prompt] = self._encode_prompt(prompt)
        self._numbers[prompt] = len(self._numbers)
        if len(self._texts) >= min(FILE_PROMPTS, SHARD_BYTES / (2 * self._texts[prompt][0].numel())):
            self.flush_prompts()

    def flush_prompts(self) -> None:
        """Write the prompts that are encoded, if there are any."""
        texts, self._texts = self._texts, {}
        if texts:
            start = sum(len(file.prompts) for file in self._manifest.prompts)
            file = self._write_prompts(_next("prompts", self._manifest.prompts), start, texts)
            self._manifest = replace(self._manifest, prompts=(*self._manifest.prompts, file))
            write_manifest(self._folder, self._manifest)

    def _write_prompts(self, file: str, start: int, texts: Mapping[str, tuple[Tensor, Tensor | None]]) -> PromptFile:
        tensors = {}
        for number, (context, pooled) in enumerate(texts.values(), start=start):
            tensors[f"context.{number}"] = context.to("cpu", torch.float16)
            if pooled is not None:
                tensors[f"pooled.{number}"] = pooled.to("cpu", torch.float16)
        size, found = self._write(file, tensors)
        return PromptFile(file, size, tuple(texts), found)

    # -- pictures ----------------------------------------------------------------------------------------------------

    def add(self, prepared: Sequence[Prepared]) -> list[Skipped]:
        """Encode items of one bucket; gives those of which the encoder made no numbers."""
        if not prepared:
            return []
        views = zip(*(each.views for each in prepared))
        encoded = [latents_of(self._encode_pictures, np.stack([view.picture for view in column])) for column in views]
        skipped = []
        for each, latents in zip(prepared, zip(*encoded)):
            if not all(latent.isfinite().all() for latent in latents):
                skipped.append(Skipped(each.item.name, "the VAE made numbers of it that are not finite"))
                continue
            self._rows += [self._row(each, view, latent) for view, latent in zip(each.views, latents)]
            self.added += 1
            size = sum(tensor.nbytes for tensor in self._rows[-1].tensors.values())
            if len(self._rows) >= min(SHARD_ITEMS, SHARD_BYTES / size):
                self.flush()
        return skipped

    def _row(self, prepared: Prepared, view: View, latents: Tensor) -> Row:
        self._moments += moments(latents, view.picture)
        numbers = [self._numbers[prompt] for prompt in prepared.prompts]
        tensors = {
            "latents": latents,
            "hints": rearrange(torch.from_numpy(view.hint.copy()), "h w c -> c h w"),
            "prompts": torch.tensor(numbers if len(numbers) > 1 else numbers[0]),
        }
        if self._manifest.options["pooled_channels"]:
            tensors["sizes"] = torch.tensor(view.crop.sizes, dtype=torch.int32)
        return Row(Entry(prepared.item.name, prepared.stamp, view.mirrored, crop=view.number), tensors)

    def flush(self) -> None:
        """Write the rows that are held as a shard, and the manifest that names it."""
        rows, self._rows = self._rows, []
        if not rows:
            return
        tensors = {key: torch.stack([row.tensors[key] for row in rows]) for key in rows[0].tensors}
        hints = tensors["hints"]
        if (hints == hints[:, :1]).all():
            tensors["hints"] = hints[:, :1]
        file = _next("shard", self._manifest.shards)
        size, found = self._write(file, tensors)
        height, width = hints.shape[-2:]
        shard = Shard(file, size, height, width, tuple(row.entry for row in rows), found)
        moments = tuple(map(tuple, self._moments.tolist()))
        self._manifest = replace(self._manifest, moments=moments, shards=(*self._manifest.shards, shard))
        write_manifest(self._folder, self._manifest)

    def _write(self, file: str, tensors: dict[str, Tensor]) -> tuple[int, str]:
        """Write a file of the dataset; gives its size in bytes and its checksum."""
        write(self._folder / file, tensors)
        return (self._folder / file).stat().st_size, checksum.of_file(self._folder / file)


def described(options: CachingOptions, probe: Tensor, context: Tensor, pooled: Tensor | None) -> dict[str, Any]:
    """What stands in a manifest about a dataset as a whole; `probe` (4,h,w) is a latent."""
    shuffled = {"tag_dropout": options.tag_dropout, "keep_tags": options.keep_tags}
    return {
        "resolution": options.resolution,
        "mirror": options.mirror,
        "hints": options.hints,
        "hint_resolution": options.hint_resolution,
        "crops": options.crops,
        "caption_variants": options.caption_variants,
        **({} if options.caption_variants == 1 else shuffled),
        "latent_channels": probe.shape[0],
        "context_channels": context.shape[-1],
        "pooled_channels": 0 if pooled is None else pooled.shape[-1],
    }


def latents_of(encode_pictures: EncodePictures, pictures: np.ndarray) -> Tensor:
    """Of pictures (B,H,W,3) uint8 the latents (B,4,H/8,W/8), fp32 on the CPU."""
    given = rearrange(torch.from_numpy(pictures).float() / 255, "b h w c -> b c h w")
    latents = encode_pictures(given).to("cpu", torch.float32)
    height, width = (side // 8 for side in given.shape[-2:])
    if latents.shape[0] != len(given) or latents.shape[1:] != (4, height, width):
        raise DatasetError(
            f"the VAE makes latents {times(latents.shape[1:])} of pictures {times(given.shape[1:])}, expected "
            f"4x{height}x{width}: connect the VAE of an SD1.x, SD2.x or SDXL model"
        )
    return latents


_CHOOSE = "one dataset holds what one encoder makes: choose another name, or connect the same as before"


def _next(kind: str, files: Sequence[Shard | PromptFile]) -> str:
    """The first name that the manifest does not hold; a file of that name is one that no manifest came to name."""
    last = max((int(file.file.split(".")[0].removeprefix(f"{kind}-")) for file in files), default=-1)
    return f"{kind}-{last + 1:05d}.safetensors"


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The difference relative to what is expected."""
    return ((found.float().cpu() - expected).norm() / expected.norm()).item()


def probe_picture() -> np.ndarray:
    """A picture (1,64,64,3) uint8 by which encoders are told apart: two ramps and a pattern of squares."""
    ramp = np.arange(0, 256, 4, dtype=np.uint8)
    across, down = np.meshgrid(ramp, ramp)
    squares = np.uint8(255) * ((across // 64 + down // 64) % 2)
    return np.stack([across, down, squares], axis=-1)[None]


def moments(latents: Tensor, picture: np.ndarray) -> np.ndarray:
    """Sums over latent pixels, (C+1, C+1+3): of (latent, 1) times itself, and times its pixels' mean colour."""
    x = rearrange(latents.double(), "c h w -> (h w) c").numpy()
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    colours = rearrange(picture / 255, "(h y) (w x) c -> (h w) (y x) c", y=8, x=8).mean(axis=1)
    return x.T @ np.concatenate([x, colours], axis=1)
