"""What a cached dataset holds, in one small file beside its shards; only what it names counts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ..errors import ZeroConvError
from ..files import checksum
from ..files.header import HeaderError, read_header
from ..files.writing import replacing

NAME = "manifest.json"
FORMAT, VERSION = "zeroconv dataset", 2
READ = (1, VERSION)
"""The versions that are read: the first had no checksums."""


VARIANTS = 1 << 16
"""Channels of an encoder, and forms of a caption, at most."""

Record = TypeVar("Record", bound=Any)


class DatasetError(ZeroConvError):
    """A dataset that cannot be read or written; the message begins with its folder or a file in it."""


@dataclass(frozen=True)
class Entry:
    """One row of a shard: the item's name, the stamp of what it was made from, and whether the mirror image of it.

    `crop` 0 is the centre of the picture, others are parts drawn from it. A row that is not `live` belongs to a picture
    that is gone or was changed; it stays on disk and is not read.
    """

    name: str
    stamp: str
    mirrored: bool = False
    live: bool = True
    crop: int = 0


@dataclass(frozen=True)
class Shard:
    """A file of items of one size: `bytes` long, pictures of `height` x `width` pixels; `checksum` of all its bytes."""

    file: str
    bytes: int
    height: int
    width: int
    entries: tuple[Entry, ...]
    checksum: str = ""


@dataclass(frozen=True)
class PromptFile:
    """A file of text embeddings; prompt i of the dataset is the i-th of all files together, the first is empty."""

    file: str
    bytes: int
    prompts: tuple[str, ...]
    checksum: str = ""


@dataclass(frozen=True)
class Manifest:
    """All of a dataset.

    `options` are those it was cached with. `probe` is the latent of a known picture, by which another encoder is told.
    `moments` (C+1, C+1+3) are the sums from which latents are turned into small pictures: of each item's latent pixels
    (and 1) times themselves, and times the picture's colours there.
    """

    options: dict[str, Any]
    probe: tuple[float, ...] = ()
    moments: tuple[tuple[float, ...], ...] = ()
    prompts: tuple[PromptFile, ...] = ()
    shards: tuple[Shard, ...] = field(default=())


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in `folder`, None where there is none; raises DatasetError for one that cannot be read."""
    path = folder / NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path} cannot be read ({error}): delete the folder and make the dataset again") from error
    said = (found.get("format"), found.get("version")) if isinstance(found, dict) else found
    if said not in [(FORMAT, version) for version in READ]:
        raise DatasetError(
            f"{path} says {str(said)[:80]!r}, expected {(FORMAT, VERSION)!r}: make the dataset again in another "
            "folder, or use the version of this pack that made it"
        )
    try:
        return Manifest(
            options=_numbers_and_texts(found["options"]),
            probe=tuple(map(float, found["probe"])),
            moments=tuple(tuple(map(float, row)) for row in found["moments"]),
            prompts=tuple(_record(PromptFile, each) for each in found["prompts"]),
            shards=tuple(
                _record(Shard, {**each, "entries": [_record(Entry, entry) for entry in each["entries"]]})
                for each in found["shards"]
            ),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{path} is damaged ({type(error).__name__}: {error}): delete the folder and make the dataset again"
        ) from error


def _record(kind: type[Record], found: dict[str, Any]) -> Record:
    """A dataclass of plain values from JSON; raises TypeError or ValueError where they are not what it says."""
    made = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in dict(found).items()})
    for name, expected in get_type_hints(kind).items():
        value, (inside, *_) = getattr(made, name), (*get_args(expected), None)
        right = type(value) is (get_origin(expected) or expected)
        if not right or (inside is not None and not all(type(each) is inside for each in value)):
            raise TypeError(f"{name} is {str(value)[:60]!r}")
    if "file" in found and Path(made.file).name != made.file:
        raise ValueError(f"{made.file[:60]!r} is no name of a file")
    return made


def _numbers_and_texts(options: dict[str, Any]) -> dict[str, Any]:
    """The options, of which those that are counts are counts."""
    counts = {name: options[name] for name in ("latent_channels", "context_channels", "pooled_channels")}
    for name, value in {**counts, "caption_variants": options.get("caption_variants", 1)}.items():
        if type(value) is not int or not 0 <= value <= VARIANTS:
            raise TypeError(f"{name} is {str(value)[:60]!r}")
    return options


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put `manifest` in place of the one in `folder`, whole or not at all; raises DatasetError with the reason."""
    path = folder / NAME
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8", newline="\n")
    except OSError as error:
        raise DatasetError(f"{path} cannot be written: {error}") from error


def damage(folder: Path, part: Shard | PromptFile, whole: bool = True) -> str | None:
    """What is wrong with this file of the dataset; None when it is as it was written.

    All of it is read, unless `whole` is off: then its size and its header alone.
    """
    path = folder / part.file
    try:
        found = path.stat().st_size
        if found != part.bytes:
            return f"{part.file} has {found} bytes instead of {part.bytes}"
        read_header(path)
        if whole and part.checksum and checksum.of_file(path) != part.checksum:
            return f"{part.file} has changed since it was written"
        return None
    except FileNotFoundError:
        return f"{part.file} is missing"
    except (OSError, HeaderError) as error:
        return f"{part.file} cannot be read ({' '.join(str(error).split())})"
