"""Pictures as training reads them without a cache: encoded whenever they are asked for, and nothing is written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from .caching import crops, forms_of, groups_of, stamps_of
from .dataset import Dataset, Place, TextEmbedding, places_of
from .manifest import DatasetError, Entry, Manifest, PromptFile, Shard
from .pictures import Crop, PictureError, hint_of, read
from .sources import Item, Skipped
from .writer import CachingOptions, EncodePictures, EncodePrompt, View, described, latents_of, moments, probe_picture

log = logging.getLogger(__name__)

READERS = 4
"""Pictures that are read at once."""

KEPT = 256
"""Text embeddings that stay in memory."""

PREVIEWED = 16
"""Pictures that tell which colour a latent pixel has."""


@dataclass(frozen=True, eq=False)
class Uncached(Dataset):
    """The pictures `items` as the dataset that `caching.make` would make of them; `centres` says how each is cut.

    Encoders are asked by one thread at a time.
    """

    items: Mapping[str, Item]
    centres: Mapping[str, Crop]
    options: CachingOptions
    encode_pictures: EncodePictures
    encode_prompt: EncodePrompt
    _lock: Lock = field(default_factory=Lock)

    @classmethod
    def of(
        cls,
        folder: Path,
        items: Sequence[Item],
        encode_pictures: EncodePictures,
        encode_prompt: EncodePrompt,
        options: CachingOptions,
        prompts: Sequence[str] = (),
    ) -> Uncached:
        """The pictures of `folder`, each with a hint; what is none, or lacks one, is left out, and the log names it.

        Pictures and hints are opened for their sizes alone; `prompts` are known beside theirs. Raises DatasetError
        where nothing is left.
        """
        stamps, skipped = stamps_of(items)
        skipped += [Skipped(item.name, "it has no hint") for item in items if item.hint is None]
        wanted = [item for item in items if item.name in stamps and item.hint is not None]
        groups, unreadable = groups_of(wanted, options.resolution)
        for one in skipped + unreadable:
            log.warning("left out: %s", one)
        if not groups:
            raise DatasetError(f"{folder}: none of {len(items)} pictures can be used: each needs a hint beside it")
        shards = []
        for number, group in enumerate(groups):
            (width, height), mirrored = group[0][1].size, (False, True) if options.mirror else (False,)
            entries = [
                Entry(item.name, stamps[item.name], turned, crop=crop)
                for item, _ in group
                for crop in range(options.crops)
                for turned in mirrored
            ]
            shards.append(Shard(f"bucket {number}", 0, height, width, tuple(entries)))
        found = {item.name: (item, centre) for group in groups for item, centre in group}
        own = (text for item, _ in found.values() for text in forms_of(item, options))
        texts = dict.fromkeys(["", *own, *prompts])
        probe, (context, pooled) = latents_of(encode_pictures, probe_picture())[0], encode_prompt("")
        said = described(options, probe, context, pooled)
        manifest = Manifest(said, prompts=(PromptFile("prompts", 0, tuple(texts)),), shards=tuple(shards))
        kept = {name: item for name, (item, _) in found.items()}
        centres = {name: centre for name, (_, centre) in found.items()}
        made = cls(folder, manifest, places_of(manifest), kept, centres, options, encode_pictures, encode_prompt)
        return replace(made, manifest=replace(manifest, moments=made._moments()))

    def _moments(self) -> tuple[tuple[float, ...], ...]:
        """The manifest's moments, by a few of the pictures."""
        few = self.places[:: max(1, len(self.places) // PREVIEWED)]
        pictures = [self._view(place).picture for place in few]
        sums = [moments(latents_of(self.encode_pictures, one[None])[0], one) for one in pictures]
        return tuple(map(tuple, np.sum(sums, axis=0).tolist()))

    # -- reading -----------------------------------------------------------------------------------------------------

    def _rows(self, places: Sequence[Place]) -> list[dict[str, Tensor]]:
        views = list(self._readers.map(self._view, places))
        with self._lock:
            latents = latents_of(self.encode_pictures, np.stack([view.picture for view in views]))
        return [
            {
                "latents": own,
                "hints": rearrange(torch.from_numpy(view.hint), "h w c -> c h w"),
                "prompts": torch.tensor(self._numbers[forms_of(self.items[place.name], self.options)[place.variant]]),
                "sizes": torch.tensor(view.crop.sizes, dtype=torch.int32),
            }
            for place, view, own in zip(places, views, latents)
        ]

    def _view(self, place: Place) -> View:
        item = self.items[place.name]
        crop = crops(self.centres[place.name], place.name, place.crop + 1)[place.crop]
        assert item.hint is not None
        try:
            picture = crop.of(read(item.picture), Image.Resampling.LANCZOS)
            hint = hint_of(item.hint, crop)
        except PictureError as error:
            raise DatasetError(
                f"{place.name}: {error}: mend it or take it away; the same command then goes on without it"
            ) from error
        if place.mirrored:
            picture, hint = (np.ascontiguousarray(each[:, ::-1]) for each in (picture, hint))
        return View(crop, place.crop, place.mirrored, picture, hint)

    def _text_embeddings(self, prompts: Sequence[int]) -> list[TextEmbedding]:
        with self._lock:
            return [self._encoded(prompt) for prompt in prompts]

    @cached_property
    def _encoded(self) -> Callable[[int], TextEmbedding]:
        """The text embedding of a prompt, fp32 with the digits that a cache would have kept."""

        def encode(prompt: int) -> TextEmbedding:
            context, pooled = self.encode_prompt(self.prompts[prompt])
            return _kept(context), None if pooled is None else _kept(pooled)

        return lru_cache(KEPT)(encode)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {prompt: number for number, prompt in enumerate(self.prompts)}

    @cached_property
    def _readers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(READERS, "pictures")


def _kept(embedding: Tensor) -> Tensor:
    return embedding.to("cpu", torch.float16).float()
