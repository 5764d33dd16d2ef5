"""A cached dataset as training reads it: latents, text embeddings and hints from shards on disk, in a fixed order."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from math import ceil, lcm
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ..files.header import HeaderError
from .manifest import DatasetError, Manifest, PromptFile, Shard, damage, read_manifest
from .rows import Rows, opened

Record = TypeVar("Record", bound=Any)

LONGEST_CONTEXT = 12 * 77
"""Tokens up to which contexts are repeated to a common length: 1, 2, 3, 4 and 6 chunks of CLIP's 77 go together."""

TextEmbedding = tuple[Tensor, Tensor | None]
"""A prompt's context (T,C) and, for SDXL alone, pooled embedding (D,)."""


@dataclass(frozen=True)
class Batch:
    """Items of one size; `Dataset.read` gives them on the CPU.

    `latents` (B,4,h,w) fp32, scaled as the UNet sees them. `context` (B,T,C) and `pooled` (B,D) fp32, of each item's
    own prompt; `prompts` (B,) int64 says which one, 0 being the empty prompt. `sizes` (B,6) int32: height and width of
    the picture, top and left of the crop, height and width of the crop. `pooled` and `sizes` are None but for SDXL.
    `hint_bytes` (B,3,8h,8w) uint8 are the hints as they travel: a quarter of what they are as numbers.
    """

    latents: Tensor
    context: Tensor
    pooled: Tensor | None
    sizes: Tensor | None
    hint_bytes: Tensor
    prompts: Tensor

    @property
    def hints(self) -> Tensor:
        """The hints (B,3,8h,8w) fp32 in [0,1], on the device of the batch."""
        return in_unit(self.hint_bytes)


@dataclass(frozen=True)
class Place:
    """Where an item lies: row `row` of shard `file`; its pictures have `height` x `width` pixels.

    `crop` and `variant` count from 0, the centre of the picture and its caption as it was written.
    """

    name: str
    mirrored: bool
    file: str
    row: int
    height: int
    width: int
    crop: int = 0
    variant: int = 0

    @property
    def plain(self) -> bool:
        """Whether it is the picture itself with its caption, and not a form of them to learn more from."""
        return not (self.mirrored or self.crop or self.variant)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset in `folder`. Nothing is in memory but names and places; a file is checked when it is first read."""

    folder: Path
    manifest: Manifest
    places: tuple[Place, ...]

    @classmethod
    def open(cls, folder: Path) -> Dataset:
        """The dataset in `folder`, as `caching.make` wrote it.

        Raises DatasetError for a folder that holds none, one without items, and one whose files are missing or no
        longer as long as they were, naming them.
        """
        manifest = read_manifest(folder)
        if manifest is None:
            raise DatasetError(
                f"{folder} holds no dataset (no manifest.json): make one with Make Control Dataset, or with "
                "`python -m controlnet_core.data`"
            )
        wrong = [said for part in (*manifest.prompts, *manifest.shards) if (said := damage(folder, part, whole=False))]
        if wrong:
            raise _damaged(folder, "; ".join(wrong))
        places = places_of(manifest)
        if not places:
            raise DatasetError(
                f"{folder} holds a dataset without items: the command that makes it goes on with it, or says why none "
                "could be used"
            )
        return cls(folder, manifest, places)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def names(self) -> tuple[str, ...]:
        """What each item is called; mirror images, crops and variants of captions say so."""
        return tuple(
            place.name
            + (f" (crop {place.crop})" if place.crop else "")
            + (" (mirrored)" if place.mirrored else "")
            + (f" (caption {place.variant})" if place.variant else "")
            for place in self.places
        )

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """All distinct prompts; `Batch.prompts` counts them. The first is empty."""
        return tuple(prompt for file in self.manifest.prompts for prompt in file.prompts)

    def bucket_of(self, index: int) -> tuple[int, int]:
        """Height and width in pixels of an item; items of one batch have the same."""
        return self.places[index].height, self.places[index].width

    @cached_property
    def buckets(self) -> dict[tuple[int, int], list[int]]:
        """The items of each size, the size with the most items first."""
        found = defaultdict(list)
        for index in range(len(self)):
            found[self.bucket_of(index)].append(index)
        return dict(sorted(found.items(), key=lambda bucket: (-len(bucket[1]), bucket[0])))

    def split(self, held_out: int, seed: int) -> tuple[list[int], list[int]]:
        """(items to watch, items to learn from): `held_out` pictures of the largest bucket, drawn by `seed`.

        At most a quarter of the bucket is watched. Mirror images, crops and other captions are not, and those of a
        picture that is watched are not learnt from.
        """
        largest = next(iter(self.buckets.values()))
        candidates = [index for index in largest if self.places[index].plain]
        order = np.random.default_rng(seed).permutation(len(candidates))[: min(held_out, len(candidates) // 4)]
        watched = [candidates[i] for i in order]
        names = {self.places[index].name for index in watched}
        return watched, [index for index in range(len(self)) if self.places[index].name not in names]

    @cached_property
    def fingerprint(self) -> str:
        """What the dataset is recognized by: a hash over its items in their order and what they were made from."""
        said = [
            (entry.name, entry.stamp, entry.mirrored)
            for shard in self.manifest.shards
            for entry in shard.entries
            if entry.live
        ]
        return blake2b(repr((self.manifest.options, self.prompts, said)).encode(), digest_size=8).hexdigest()

    @property
    def stamps(self) -> dict[str, str]:
        """The name of each picture, with the stamp of what it was made from."""
        entries = (entry for shard in self.manifest.shards for entry in shard.entries)
        return {entry.name: entry.stamp for entry in entries if entry.live}

    @property
    def hint_channels(self) -> int:
        """Channels of the hints that `read` gives."""
        return 3

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, indices: Sequence[int]) -> Batch:
        """The items `indices`, which are of one bucket, in this order.

        Raises DatasetError for items of several sizes and for a shard that cannot be read.
        """
        sizes = {self.bucket_of(index) for index in indices}
        if len(sizes) != 1:
            raise DatasetError(
                f"{self.folder}: a batch holds items of one size, found {sorted(sizes)}: take the items of one bucket"
            )
        rows = self._rows([self.places[index] for index in indices])
        prompts = torch.stack([row["prompts"] for row in rows])
        texts = self._text_embeddings(prompts.tolist())
        pooled = [pooled for _, pooled in texts if pooled is not None]
        hints = [row["hints"].expand(3, -1, -1) for row in rows]
        return Batch(
            latents=torch.stack([row["latents"] for row in rows]),
            context=stack_contexts([context for context, _ in texts], self.empty_prompt[0]),
            pooled=torch.stack(pooled) if pooled else None,
            sizes=torch.stack([row["sizes"] for row in rows]) if self.has_pooled else None,
            hint_bytes=torch.stack(hints),
            prompts=prompts,
        )

    @cached_property
    def empty_prompt(self) -> TextEmbedding:
        """The text embedding of the empty prompt, fp32."""
        return self._text_embeddings([0])[0]

    def text_embedding(self, prompt: str) -> TextEmbedding | None:
        """The text embedding of one of the dataset's prompts, fp32; None for any other prompt."""
        return self._text_embeddings([self.prompts.index(prompt)])[0] if prompt in self.prompts else None

    def _rows(self, places: Sequence[Place]) -> list[dict[str, Tensor]]:
        rows: dict[int, dict[str, Tensor]] = {}
        names = ("latents", "hints", "prompts", *(("sizes",) if self.has_pooled else ()))
        for file in dict.fromkeys(place.file for place in places):
            with self._opened(file) as shard:
                for number, place in enumerate(places):
                    if place.file == file:
                        row = {key: shard.row(key, place.row) for key in names}
                        _check_row(row, place)
                        rows[number] = {**row, "prompts": row["prompts"].reshape(-1)[place.variant]}
        return [rows[number] for number in range(len(places))]

    def _text_embeddings(self, prompts: Sequence[int]) -> list[TextEmbedding]:
        """The text embedding of each prompt, fp32."""
        found: dict[int, TextEmbedding] = {}
        by_file = defaultdict(list)
        for prompt in sorted(set(prompts)):
            by_file[self._file_of(prompt)].append(prompt)
        for name, own in by_file.items():
            with self._opened(name) as file:
                for prompt in own:
                    pooled = file.tensor(f"pooled.{prompt}").float() if self.has_pooled else None
                    found[prompt] = file.tensor(f"context.{prompt}").float(), pooled
        return [found[prompt] for prompt in prompts]

    @property
    def has_pooled(self) -> bool:
        """Whether the text encoder gave pooled embeddings, as SDXL's UNet takes them."""
        return self.manifest.options["pooled_channels"] > 0

    @cached_property
    def _starts(self) -> list[int]:
        """The number of the first prompt of each prompt file, and the number of prompts."""
        return [0, *accumulate(len(file.prompts) for file in self.manifest.prompts)]

    def _file_of(self, prompt: int) -> str:
        if not 0 <= prompt < self._starts[-1]:
            raise _damaged(self.folder, f"prompt {prompt} of a shard is in none of its files")
        return self.manifest.prompts[bisect_right(self._starts, prompt) - 1].file

    @cached_property
    def _unseen(self) -> dict[str, Shard | PromptFile]:
        """The files that have not been read yet."""
        return {part.file: part for part in (*self.manifest.prompts, *self.manifest.shards)}

    @contextmanager
    def _opened(self, file: str) -> Iterator[Rows]:
        """A file of the dataset, open for as long as it is read: Windows deletes and replaces none that is open."""
        try:
            if unseen := self._unseen.get(file):
                if wrong := damage(self.folder, unseen):
                    raise _damaged(self.folder, wrong)
                self._unseen.pop(file, None)  # another thread may have seen it meanwhile
            with opened(self.folder / file) as rows:
                yield rows
        except (OSError, HeaderError) as error:
            raise _damaged(self.folder, f"{file} cannot be read ({' '.join(str(error).split())})") from error

    # -- looking at latents ------------------------------------------------------------------------------------------

    @cached_property
    def _colours(self) -> Tensor:
        """The linear map from a latent pixel and 1 to a colour, (C+1, 3), by least squares over the dataset."""
        moments = torch.tensor(self.manifest.moments, dtype=torch.float64)
        own, with_colours = moments[:, :-3], moments[:, -3:]
        return torch.linalg.lstsq(own, with_colours, driver="gelsd").solution.float()

    def preview(self, latents: Tensor) -> Tensor:
        """Small pictures (B,3,h,w) in [0,1] of latents (B,4,h,w), without a VAE: one colour for each latent pixel."""
        colours = self._colours.to(latents.device)
        picture = torch.einsum("bchw,cd->bdhw", latents.float(), colours[:-1]) + rearrange(colours[-1], "d -> d 1 1")
        return picture.clamp(0, 1)

    def enlarged_preview(self, latents: Tensor) -> Tensor:
        """`preview` at the size of the pictures, (B,3,8h,8w)."""
        return F.interpolate(self.preview(latents), scale_factor=8, mode="bicubic").clamp(0, 1)


def places_of(manifest: Manifest) -> tuple[Place, ...]:
    """The items of a dataset, in its order."""
    return tuple(
        Place(entry.name, entry.mirrored, shard.file, row, shard.height, shard.width, entry.crop, variant)
        for shard in manifest.shards
        for row, entry in enumerate(shard.entries)
        if entry.live
        for variant in range(manifest.options.get("caption_variants", 1))
    )


def _check_row(row: dict[str, Tensor], place: Place) -> None:
    """Raise HeaderError where a row is not what the manifest says."""
    (height, width), hint = row["latents"].shape[-2:], row["hints"].shape[-2:]
    if (8 * height, 8 * width) != (place.height, place.width) or hint != (place.height, place.width):
        raise HeaderError(f"row {place.row} is not {place.width}x{place.height}")
    if row["prompts"].numel() <= place.variant:
        raise HeaderError(f"row {place.row} has no caption {place.variant}")


def _damaged(folder: Path, what: str) -> DatasetError:
    return DatasetError(
        f"{folder} is damaged: {what}: make the dataset again into the same folder, which makes anew what these files "
        "held and keeps the rest"
    )


def in_unit(numbers: Tensor) -> Tensor:
    """Bytes as fp32 in [0,1], on all devices the same to the last bit.

    CUDA would multiply by the inverse of a plain 255; by one that lies on the device it divides.
    """
    return numbers.float() / torch.full((), 255.0, device=numbers.device)


def to_device(record: Record, device: torch.device, copy: bool = False) -> Record:
    """A dataclass of tensors, some of which may be None, on `device`; with `copy` none of them is one that is given."""
    tensors = {each.name: getattr(record, each.name) for each in fields(record)}
    moved = {name: x.to(device, non_blocking=True, copy=copy) for name, x in tensors.items() if x is not None}
    return replace(record, **moved)


def stack_contexts(contexts: Sequence[Tensor], empty: Tensor) -> Tensor:
    """Contexts (T,C) of any lengths as one (B,T',C): each is repeated to the least common multiple of the lengths.

    Attention over a context that is repeated is attention over the context. Where that would be longer than
    LONGEST_CONTEXT, as of 4, 6 and 7 chunks of text, the shorter ones are continued with `empty` (T,C), the text
    embedding of the empty prompt, to the longest (as in kohya-ss/sd-scripts and AUTOMATIC1111/stable-diffusion-webui).
    """
    longest, length = max(map(len, contexts)), lcm(*map(len, contexts))
    if length <= max(longest, LONGEST_CONTEXT):
        return torch.stack([repeat(context, "t c -> (n t) c", n=length // len(context)) for context in contexts])
    filling = repeat(empty, "t c -> (n t) c", n=ceil(longest / len(empty)))
    return torch.stack([torch.cat([context, filling[: longest - len(context)]]) for context in contexts])


class Batches:
    """An endless sequence of batches: `batches[k]` are the items of the k-th, whatever was asked before.

    Batches are full and of one bucket. Each bucket is gone through in epochs, in which every one of its `items` comes
    once; what an epoch leaves over begins the bucket's next batch, so that no picture is drawn more often than others
    because few have its shape. Items and the batches of an epoch are shuffled by `seed` and the epoch.
    """

    def __init__(self, dataset: Dataset, items: Sequence[int], batch_size: int, seed: int):
        if not items or batch_size < 1:
            raise DatasetError(f"found {len(items)} items in batches of {batch_size}: expected at least one of each")
        buckets = defaultdict(list)
        for index in items:
            buckets[dataset.bucket_of(index)].append(index)
        self._buckets = [buckets[size] for size in sorted(buckets)]
        self._batch_size, self._seed = batch_size, seed
        self._shuffled: tuple[int, list[list[int]]] = (-1, [])

    def __getitem__(self, k: int) -> list[int]:
        # The largest bucket has a batch in `batch_size` epochs at the latest.
        epoch = bisect_right(range(self._batch_size * (k + 1) + 1), k, key=self._before) - 1
        if self._shuffled[0] != epoch:
            self._shuffled = epoch, self._epoch(epoch)
        return list(self._shuffled[1][k - self._before(epoch)])

    def _before(self, epoch: int) -> int:
        """How many batches come before an epoch."""
        return sum(epoch * len(bucket) // self._batch_size for bucket in self._buckets)

    def _epoch(self, epoch: int) -> list[list[int]]:
        """The batches that become full in an epoch."""
        batches = []
        for number, bucket in enumerate(self._buckets):
            count, size = len(bucket), self._batch_size
            start, end = (each * count // size * size for each in (epoch, epoch + 1))  # in the bucket's epochs as one
            first = start // count
            drawn = [
                np.random.default_rng([self._seed, number, i]).permutation(bucket) for i in range(first, epoch + 1)
            ]
            batches += np.concatenate(drawn)[start - first * count : end - first * count].reshape(-1, size).tolist()
        return [batches[i] for i in np.random.default_rng([self._seed, epoch]).permutation(len(batches))]
