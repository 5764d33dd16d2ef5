"""Pictures, prompts and hints become a cached dataset: each encoded once, so that training needs no encoder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from .manifest import DatasetError
from .pictures import Crop, PictureError, bucket, hint_of, read, size_of
from .sources import Item, Skipped
from .writer import CachingOptions, EncodePictures, EncodePrompt, Prepared, Writer

Annotate = Callable[[np.ndarray], np.ndarray]
"""A picture (H,W,3) float32 in [0,1] -> its hint, the same; PictureError where it has none."""


@dataclass(frozen=True)
class CachingProgress:
    """How far it is: `step` of `steps` pictures and prompts that this run has to encode.

    `done` items are cached, `before` of them in earlier runs. `unused` items of earlier runs are not among the items
    now: they are kept on disk and not trained on. `enlarged` pictures of this run were smaller than their bucket.
    """

    step: int
    steps: int
    done: int
    before: int
    unused: int
    enlarged: int
    skipped: tuple[Skipped, ...]


def make(
    folder: Path,
    items: Sequence[Item],
    encode_pictures: EncodePictures,
    encode_prompt: EncodePrompt,
    annotate: Annotate | None,
    options: CachingOptions,
) -> Iterator[CachingProgress]:
    """Cache `items`, whose names differ, in `folder`, yielding now and then; `dataset.Dataset.open` reads them.

    Hints are made by `annotate`; without it every item needs one. What is cached already and has not changed stays;
    what is gone from `items` is put aside. Closing the generator keeps what is encoded; of a process that is killed
    one shard is lost at most, and the next run goes on from there. An item that cannot be read is skipped by name.

    Raises DatasetError when the folder was made with other options or encoders, and when no item could be used;
    SaveError when the disk is full.
    """
    if annotate is not None:
        items = [replace(item, hint=None) for item in items]
    writer = Writer(folder, encode_pictures, encode_prompt, options)
    stamps, skipped = _stamps(items)
    before = writer.keep_only(stamps)
    new = stamps.keys() - before
    groups, unreadable = _groups([item for item in items if item.name in new], options.resolution)
    skipped += unreadable
    todo = [item for group in groups for item, _ in group]
    prompts = writer.unknown(item.prompt for item in todo)
    step, enlarged = 0, 0

    def progress() -> CachingProgress:
        done = len(before) + writer.added
        return CachingProgress(
            step, len(prompts) + len(todo), done, len(before), writer.unused, enlarged, tuple(skipped)
        )

    yield progress()
    try:
        # Prompts first, so that a GPU that cannot hold both encoders changes between them once.
        for prompt in prompts:
            writer.add_prompt(prompt)
            step += 1
            yield progress()
        writer.flush_prompts()
        for group in groups:
            batches = [group[start : start + options.batch_size] for start in range(0, len(group), options.batch_size)]
            for batch, loaded in _loaded_ahead(_load, batches, options.batch_size):
                prepared: list[Prepared] = []
                for (item, crop), pictures in zip(batch, loaded):
                    try:
                        prepared.append(_prepared(item, stamps[item.name], crop, pictures, annotate, options.mirror))
                    except PictureError as error:
                        skipped.append(Skipped(item.name, str(error)))
                skipped += writer.add(prepared)
                enlarged += sum(each.crop.scale > 1 for each in prepared)
                step += len(batch)
                yield progress()
            writer.flush()
    finally:
        writer.flush_prompts()
        writer.flush()
    if not before and not writer.added:
        raise DatasetError(f"none of {len(items)} items could be used: {'; '.join(map(str, skipped[:3]))}")


def _stamps(items: Sequence[Item]) -> tuple[dict[str, str], list[Skipped]]:
    """The stamp of each item, and the items whose files are gone."""
    stamps, skipped = {}, []
    for item in items:
        if item.name in stamps:
            raise DatasetError(f"two items are called {item.name}: give each its own name")
        try:
            stamps[item.name] = item.stamp
        except OSError as error:
            skipped.append(Skipped(item.name, f"cannot be read ({error.strerror})"))
    return stamps, skipped


Group = list[tuple[Item, Crop]]
"""Items of one size, with what is taken of each."""


def _groups(items: Sequence[Item], resolution: int) -> tuple[list[Group], list[Skipped]]:
    """The items of each size, and the items that are no pictures."""
    found: dict[tuple[int, int], Group] = defaultdict(list)
    skipped = []
    for item in items:
        try:
            full = size_of(item.picture)
            crop = Crop(full, bucket(*full, resolution))
            found[crop.size].append((item, crop))
        except PictureError as error:
            skipped.append(Skipped(item.name, str(error)))
    return [found[size] for size in sorted(found)], skipped


Loaded = tuple[np.ndarray, np.ndarray | None] | PictureError
"""Picture and hint, or why there are none."""


def _load(item: Item, crop: Crop) -> Loaded:
    try:
        picture = crop.of(read(item.picture), Image.Resampling.LANCZOS)
        return picture, None if item.hint is None else hint_of(item.hint, crop)
    except PictureError as error:
        return error


def _loaded_ahead(
    load: Callable[[Item, Crop], Loaded], batches: Sequence[Group], threads: int
) -> Iterator[tuple[Group, list[Loaded]]]:
    """Each batch with what `load` makes of its items; the next batch is loaded while this one is encoded."""
    with ThreadPoolExecutor(threads) as pool:
        coming: list[list[Future[Loaded]]] = []
        for i, batch in enumerate(batches):
            coming += [
                [pool.submit(load, *each) for each in following] for following in batches[i + len(coming) : i + 2]
            ]
            yield batch, [future.result() for future in coming.pop(0)]


def _prepared(item: Item, stamp: str, crop: Crop, loaded: Loaded, annotate: Annotate | None, mirror: bool) -> Prepared:
    if isinstance(loaded, PictureError):
        raise loaded
    picture, hint = loaded
    pictures = (picture, picture[:, ::-1]) if mirror else (picture,)
    if annotate is not None:
        # Of the mirror image too: a hint that tells left from right is not the mirror image of the hint.
        return Prepared(item, stamp, crop, pictures, tuple(_annotated(each, annotate) for each in pictures))
    if hint is None:
        raise PictureError("it has no hint: choose an annotator, or give one")
    return Prepared(item, stamp, crop, pictures, (hint, hint[:, ::-1]) if mirror else (hint,))


def _annotated(picture: np.ndarray, annotate: Annotate) -> np.ndarray:
    hint = annotate(np.ascontiguousarray(picture, dtype=np.float32) / 255)
    assert hint.shape == picture.shape, f"hint {hint.shape} of picture {picture.shape}"
    return np.rint(hint.clip(0, 1) * 255).astype(np.uint8)
