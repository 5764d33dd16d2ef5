"""What a cached dataset holds, in one small file beside its shards; only what it names counts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import ZeroConvError
from ..files.writing import replacing

NAME = "manifest.json"
FORMAT, VERSION = "zeroconv dataset", 1


class DatasetError(ZeroConvError):
    """A dataset that cannot be read or written; the message begins with its folder or a file in it."""


@dataclass(frozen=True)
class Entry:
    """One row of a shard: the item's name, the stamp of what it was made from, and whether the mirror image of it.

    A row that is not `live` belongs to a picture that is gone or was changed; it stays on disk and is not read.
    """

    name: str
    stamp: str
    mirrored: bool = False
    live: bool = True


@dataclass(frozen=True)
class Shard:
    """A file of items of one size: `bytes` long, pictures of `height` x `width` pixels."""

    file: str
    bytes: int
    height: int
    width: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class PromptFile:
    """A file of text embeddings; prompt i of the dataset is the i-th of all files together, the first is empty."""

    file: str
    bytes: int
    prompts: tuple[str, ...]


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
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read ({error}): delete the folder and make the dataset again") from error
    said = (found.get("format"), found.get("version")) if isinstance(found, dict) else found
    if said != (FORMAT, VERSION):
        raise DatasetError(
            f"{path} says {said!r}, expected {(FORMAT, VERSION)!r}: make the dataset again in another folder, or use "
            "the version of this pack that made it"
        )
    return Manifest(
        options=found["options"],
        probe=tuple(found["probe"]),
        moments=tuple(map(tuple, found["moments"])),
        prompts=tuple(PromptFile(**{**each, "prompts": tuple(each["prompts"])}) for each in found["prompts"]),
        shards=tuple(
            Shard(**{**each, "entries": tuple(Entry(**entry) for entry in each["entries"])}) for each in found["shards"]
        ),
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put `manifest` in place of the one in `folder`, whole or not at all; raises DatasetError with the reason."""
    path = folder / NAME
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8", newline="\n")
    except OSError as error:
        raise DatasetError(f"{path} cannot be written: {error}") from error


def damage(folder: Path, part: Shard | PromptFile) -> str | None:
    """What is wrong with this file of the dataset; None when it is as it was written."""
    path = folder / part.file
    try:
        found = path.stat().st_size
        if found != part.bytes:
            return f"{part.file} has {found} bytes instead of {part.bytes}"
        with safe_open(path, framework="pt"):
            return None
    except FileNotFoundError:
        return f"{part.file} is missing"
    except (OSError, SafetensorError) as error:
        return f"{part.file} cannot be read ({' '.join(str(error).split())})"
