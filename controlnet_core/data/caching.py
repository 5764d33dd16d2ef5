"""Pictures, prompts and hints become a cached dataset: each encoded once, so that training needs no encoder."""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from . import captions
from .captions import PromptError
from .dataset import Dataset
from .manifest import DatasetError
from .pictures import Crop, PictureError, bucket, check_shape, hint_of, read, size_of
from .sources import Item, Skipped
from .writer import CachingOptions, EncodePictures, EncodePrompt, Prepared, View, Writer

log = logging.getLogger(__name__)

SHORT = 40
"""Letters of a caption that a report shows."""

Annotate = Callable[[np.ndarray], np.ndarray]
"""A picture (H,W,3) float32 in [0,1] -> its hint, the same; PictureError where it has none."""


@dataclass(frozen=True)
class CachingProgress:
    """How far it is: `step` of `steps` pictures and prompts that this run has to encode.

    `done` items are cached, `before` of them in earlier runs. `unused` items of earlier runs are not among the items
    now: they are kept on disk and not trained on. `enlarged` pictures of this run were smaller than their bucket.
    `bytes` is what this run writes at most, known before anything is encoded: hints of one channel take a third.
    """

    step: int
    steps: int
    done: int
    before: int
    unused: int
    enlarged: int
    skipped: tuple[Skipped, ...]
    bytes: int = 0


def make(
    folder: Path,
    items: Sequence[Item],
    encode_pictures: EncodePictures,
    encode_prompt: EncodePrompt,
    annotate: Annotate | None,
    options: CachingOptions,
    prompts: Sequence[str] = (),
    annotate_ahead: bool = False,
) -> Iterator[CachingProgress]:
    """Cache `items`, whose names differ, in `folder`, yielding now and then; `dataset.Dataset.open` reads them.

    Hints are made by `annotate`; without it every item needs one. With `annotate_ahead` they are made where pictures
    are read, in threads beside the encoder, several at once. `prompts` are encoded beside those of the items. What is
    cached already and has not changed stays; what is gone from `items` is put aside. Closing the generator keeps what
    is encoded; of a process that is killed one shard is lost at most, and the next run goes on from there. An item that
    cannot be read, or whose caption the text encoder does not take, is skipped by name.

    Raises DatasetError when the folder was made with other options or encoders, when no item could be used, and before
    anything is encoded when there is no room for it; SaveError when the disk is full; PromptError for one of `prompts`.
    """
    if annotate is not None:
        items = [replace(item, hint=None) for item in items]
    writer = Writer(folder, encode_pictures, encode_prompt, options)
    stamps, skipped = stamps_of(items)
    before = writer.keep_only(stamps)
    new = stamps.keys() - before
    groups, unreadable = groups_of([item for item in items if item.name in new], options.resolution)
    skipped += unreadable
    todo = [item for group in groups for item, _ in group]
    texts = {item.name: forms_of(item, options) for item in todo}
    unknown = writer.unknown([*(prompt for forms in texts.values() for prompt in forms), *prompts])

    def load(item: Item, centre: Crop) -> Loaded:
        views = partial(_views, _load(item, centre, options.crops), annotate, options.mirror)
        return partial(tuple, views()) if annotate_ahead else views

    step, enlarged = 0, 0
    most = _room(folder, writer, groups, len(unknown), options)
    if todo:
        log.info("%d pictures to encode, %s at most in %s", len(todo), size_in_words(most), folder)

    def progress() -> CachingProgress:
        done = len(before) + writer.added
        return CachingProgress(
            step, len(unknown) + len(todo), done, len(before), writer.unused, enlarged, tuple(skipped), most
        )

    yield progress()
    try:
        # Prompts first, so that a GPU that cannot hold both encoders changes between them once.
        refused: dict[str, str] = {}
        for prompt in unknown:
            try:
                writer.add_prompt(prompt)
            except PromptError as error:
                if prompt in prompts:
                    raise
                refused[prompt] = f"its caption {_short(prompt)!r} cannot be used: {error}"
            step += 1
            yield progress()
        writer.flush_prompts()
        reasons = {name: next((refused[one] for one in forms if one in refused), "") for name, forms in texts.items()}
        groups = [[(item, centre) for item, centre in group if not reasons[item.name]] for group in groups]
        skipped += [Skipped(name, reason) for name, reason in reasons.items() if reason]
        step += len(todo) - sum(map(len, groups))
        for group in groups:
            batches = [group[start : start + options.batch_size] for start in range(0, len(group), options.batch_size)]
            for batch, coming in _ahead(load, batches, options.batch_size):
                prepared: list[Prepared] = []
                for (item, _), future in zip(batch, coming):
                    try:
                        views = future.result()()
                        prepared.append(Prepared(item, stamps[item.name], texts[item.name], views))
                    except PictureError as error:
                        skipped.append(Skipped(item.name, str(error)))
                skipped += writer.add(prepared)
                enlarged += sum(each.views[0].crop.scale > 1 for each in prepared)
                step += len(batch)
                yield progress()
            writer.flush()
    finally:
        writer.flush_prompts()
        writer.flush()
    if not before and not writer.added:
        raise DatasetError(f"none of {len(items)} items could be used: {'; '.join(map(str, skipped[:3]))}")


def _short(text: str) -> str:
    return text if len(text) <= SHORT else f"{text[:SHORT]}..."


def stamps_of(items: Sequence[Item]) -> tuple[dict[str, str], list[Skipped]]:
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


def _room(folder: Path, writer: Writer, groups: Sequence[Group], prompts: int, options: CachingOptions) -> int:
    """The bytes that these items and so many prompts take on disk at most; DatasetError where there is no such room."""
    each = options.crops * (2 if options.mirror else 1)
    pixels = sum(crop.size[0] * crop.size[1] for group in groups for _, crop in group) * each
    rest = pixels // 64 * writer.latent_bytes + prompts * writer.prompt_bytes
    free = shutil.disk_usage(folder).free
    if rest + pixels > free:  # even if all hints have one channel
        raise DatasetError(
            f"{folder} needs {size_in_words(rest + pixels)} or more for {sum(map(len, groups))} pictures, and its disk "
            f"has {size_in_words(free)}: choose a lower resolution, or another disk"
        )
    return rest + 3 * pixels


def size_in_words(count: int) -> str:
    """A number of bytes, such as 1.5 GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def groups_of(items: Sequence[Item], resolution: int) -> tuple[list[Group], list[Skipped]]:
    """The items of each size, and the items that are no pictures, or whose hints are of another shape."""
    found: dict[tuple[int, int], Group] = defaultdict(list)
    skipped = []
    for item in items:
        try:
            full = size_of(item.picture)
            if item.hint is not None:
                check_shape(size_of(item.hint), full)
            crop = Crop(full, bucket(*full, resolution))
            found[crop.size].append((item, crop))
        except PictureError as error:
            skipped.append(Skipped(item.name, str(error)))
    return [found[size] for size in sorted(found)], skipped


def forms_of(item: Item, options: CachingOptions) -> tuple[str, ...]:
    """The forms of an item's caption that it is trained on with."""
    return captions.forms(item.prompt, item.name, options.caption_variants, options.tag_dropout, options.keep_tags)


LARGEST_ZOOM = 1.25
"""By how much a crop other than the centre enlarges its picture at most."""


def crops(centre: Crop, name: str, count: int) -> list[Crop]:
    """`count` parts of a picture: its centre, and others that the picture's name decides."""
    found = [centre]
    for number in range(1, count):
        draw = captions.generator(f"{name}\ncrop {number}")
        zoom, across, down = draw.uniform(1, LARGEST_ZOOM), *draw.uniform(size=2)
        found.append(replace(centre, zoom=zoom, at=(across, down)))
    return found


Loaded = Callable[[], tuple[View, ...]]
"""Gives the views of a picture that is in memory, whose hints are made then or already."""

Part = tuple[Crop, np.ndarray, np.ndarray | None]
"""A part of a picture with its hint, if it has one."""


def _load(item: Item, centre: Crop, count: int) -> list[Part]:
    picture = read(item.picture)
    return [
        (crop, crop.of(picture, Image.Resampling.LANCZOS), None if item.hint is None else hint_of(item.hint, crop))
        for crop in crops(centre, item.name, count)
    ]


def _ahead(
    load: Callable[[Item, Crop], Loaded], batches: Sequence[Group], threads: int
) -> Iterator[tuple[Group, list[Future[Loaded]]]]:
    """Each batch with what `load` makes of its items; the next batch is loaded while this one is encoded."""
    with ThreadPoolExecutor(threads) as pool:
        coming: list[list[Future[Loaded]]] = []
        for i, batch in enumerate(batches):
            coming += [
                [pool.submit(load, *each) for each in following] for following in batches[i + len(coming) : i + 2]
            ]
            yield batch, coming.pop(0)


def _views(parts: Sequence[Part], annotate: Annotate | None, mirror: bool) -> tuple[View, ...]:
    """Every part of a picture, with `mirror` its mirror image after it, each with its hint."""
    found = []
    for number, (crop, picture, hint) in enumerate(parts):
        for mirrored in (False, True) if mirror else (False,):
            turned = picture[:, ::-1] if mirrored else picture
            if annotate is not None:
                # Of the mirror image too: a hint that tells left from right is not the mirror image of the hint.
                own = _annotated(turned, annotate)
            elif hint is None:
                raise PictureError("it has no hint: choose an annotator, or give one")
            else:
                own = hint[:, ::-1] if mirrored else hint
            found.append(View(crop, number, mirrored, turned, own))
    return tuple(found)


def _annotated(picture: np.ndarray, annotate: Annotate) -> np.ndarray:
    hint = annotate(np.ascontiguousarray(picture, dtype=np.float32) / 255)
    assert hint.shape == picture.shape, f"hint {hint.shape} of picture {picture.shape}"
    return np.rint(hint.clip(0, 1) * 255).astype(np.uint8)


SHOWN = 100
"""Skipped items that a report names."""


def report(dataset: Dataset, layout: str, items: Sequence[Item], run: CachingProgress) -> str:
    """What a run that ended with `run` has made of `items`, which came from `layout`, in lines."""
    files = [*dataset.manifest.prompts, *dataset.manifest.shards]
    counts = {size: sum(dataset.places[i].variant == 0 for i in found) for size, found in dataset.buckets.items()}
    buckets = ", ".join(f"{count} of {width}x{height}" for (height, width), count in counts.items())
    unused = {skipped.name for skipped in run.skipped}
    uncaptioned = sum(not item.prompt for item in items if item.name not in unused)
    lines = [
        f"dataset {dataset.folder}",
        f"made of {layout}",
        f"{run.done} pictures, {run.done - run.before} of them new; items: {buckets}",
        f"hints: {dataset.manifest.options['hints']}",
        f"{size_in_words(sum(file.bytes for file in files))}, {len(dataset.prompts) - 1} different prompts",
    ]
    if uncaptioned:
        lines.append(f"{uncaptioned} pictures have no caption: they are trained on with the empty prompt")
    if run.enlarged:
        lines.append(f"{run.enlarged} of the new pictures are smaller than their bucket and were enlarged")
    if run.unused:
        lines.append(f"{run.unused} pictures of earlier runs are gone or have changed: they are not trained on")
    if run.skipped:
        lines += [f"{len(run.skipped)} skipped:", *(f"  {skipped}" for skipped in run.skipped[:SHOWN])]
    if len(run.skipped) > SHOWN:
        lines.append(f"  and {len(run.skipped) - SHOWN} more")
    return "\n".join(lines)
