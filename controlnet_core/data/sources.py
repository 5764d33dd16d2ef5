"""What a folder holds: pictures with captions and hints, in any of the layouts that people keep them in."""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ZeroConvError
from .pictures import readable

PICTURES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".tga", ".avif", ".jp2", ".jxl",
    ".heic", ".heif",
)  # fmt: skip
"""What is a picture by its suffix, in small letters; some need a newer Pillow, or none that reads them is there."""

CAPTIONS = (".txt", ".caption")
"""Where several lie beside a picture, the first of these is its caption."""

HINT_FOLDERS = ("hints", "hint", "conditioning", "conditioning_images", "conditioning_image", "control", "controls")
PICTURE_FOLDERS = ("images", "image", "pictures", "target", "targets")
"""Pictures lie in such a folder, or in no special one; their hints lie in one of HINT_FOLDERS beside it or below it."""

BESIDE_TARGETS = {"source": "target", "sources": "targets"}
"""Folders of hints where the other one lies beside them, as in fill50k, and of pictures where not."""

HINT_ENDING = "_hint"

PICTURE_KEYS = ("file_name", "image", "target")
PROMPT_KEYS = ("text", "caption", "prompt")
HINT_KEYS = ("conditioning_image_file_name", "conditioning_image", "hint", "source")


class SourceError(ZeroConvError):
    """A folder in which there is nothing to train on; the message says what is read and what was found."""


@dataclass(frozen=True)
class Item:
    """A picture, its prompt and its hint, if there is one: files, or arrays (H,W,3) uint8.

    `name` is unique among items: the picture's place in its folder. An empty prompt is a picture without caption.
    """

    name: str
    picture: Path | np.ndarray
    prompt: str = ""
    hint: Path | np.ndarray | None = None

    @property
    def stamp(self) -> str:
        """What tells this item from an earlier one of the same name: sizes and times of its files, and its prompt.

        Raises OSError for a file that is not there.
        """
        found = blake2b(self.prompt.encode("utf-8", "replace"), digest_size=8)
        for source in (self.picture, self.hint):
            if isinstance(source, Path):
                facts = source.stat()
                found.update(f"file {facts.st_size} {facts.st_mtime_ns}".encode())
            else:
                found.update(b"none" if source is None else repr(source.shape).encode() + source.tobytes())
        return found.hexdigest()


@dataclass(frozen=True)
class Skipped:
    """What could not be used: its name, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Source:
    """What was found in a folder, in a fixed order, and by which layout."""

    layout: str
    items: tuple[Item, ...]
    skipped: tuple[Skipped, ...]


Found = Iterator[Item | Skipped]


@dataclass(frozen=True)
class Layout:
    """A way to keep pictures: how it is called, what it looks like, the files that show it, and how they are read."""

    name: str
    looks_like: str
    files: Callable[[Path], list[Path]]
    read: Callable[[Path, list[Path]], Found]


def read(folder: Path) -> Source:
    """The items of `folder` in the first of `LAYOUTS` that it shows.

    What cannot be used is told by name in `skipped`: a missing file, a caption that is no text. Pictures are not
    opened. Raises SourceError when nothing is left.
    """
    if not folder.is_dir():
        raise SourceError(f"there is no folder {folder}: give the whole path of a folder of pictures")
    for layout in LAYOUTS:
        files = layout.files(folder)
        if files:
            break
    else:
        raise SourceError(f"{folder} holds {_contents(folder)}: expected {_expected()}")
    found = list(layout.read(folder, files))
    items = tuple(each for each in found if isinstance(each, Item))
    skipped = tuple(each for each in found if isinstance(each, Skipped))
    if not items:
        raise SourceError(
            f"{folder} was read as {layout.name}, and none of its {len(skipped)} items can be used: "
            f"{'; '.join(map(str, skipped[:3]))}. Expected {_expected()}"
        )
    return Source(layout.name, items, skipped)


# -- layouts with a list ----------------------------------------------------------------------------------------------


def _listed(folder: Path, files: list[Path]) -> Found:
    """What lists name: each record of a list names files beside that list."""
    taken: Counter[str] = Counter()
    for file in files:
        where = file.relative_to(folder).as_posix()
        try:
            for number, record in enumerate(_table(file) if file.suffix == ".csv" else _json_lines(file), start=1):
                found = _from_record(folder, file.parent, record, f"{where}, item {number}")
                if isinstance(found, Item):
                    taken[found.name] += 1
                    if taken[found.name] > 1:  # one picture with several hints or prompts
                        found = replace(found, name=f"{found.name} #{taken[found.name]}")
                yield found
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            yield Skipped(where, f"cannot be read ({error}): save it as UTF-8 text")


def _from_record(folder: Path, beside: Path, record: Any, where: str) -> Item | Skipped:
    if not isinstance(record, Mapping):
        return Skipped(where, record if isinstance(record, str) else f"expected names and values, found {record!r:.60}")
    values = {}
    for kind, keys in {"picture": PICTURE_KEYS, "prompt": PROMPT_KEYS, "hint": HINT_KEYS}.items():
        key = next((key for key in keys if record.get(key) is not None), None)
        values[kind] = "" if key is None else record[key]
        if not isinstance(values[kind], str):
            return Skipped(where, f"its {key} is {values[kind]!r:.60}: expected a text")
    if not values["picture"]:
        return Skipped(where, f"it names no picture: expected one of {', '.join(PICTURE_KEYS)}")
    picture = _file(beside, values["picture"])
    hint = _file(beside, values["hint"]) if values["hint"] else None
    for path in (picture, hint):
        if path is not None and not _is_inside(path, folder):
            return Skipped(where, f"{path} lies outside of {folder}: a list names files of its own folder")
        if path is not None and not _is_there(path):
            return Skipped(where, f"there is no file {path}")
        if path is not None and path.suffix.lower() in PICTURES and not readable(path):
            return Skipped(where, f"this Pillow reads no {path.suffix.lower()}: save {path.name} as .png")
    return Item(_name(folder, picture), picture, _one_line(values["prompt"]), hint)


def _one_line(prompt: str) -> str:
    """The prompt without line breaks, and without halves of letters, which JSON may hold and no tokenizer takes."""
    return " ".join(prompt.encode("utf-8", "replace").decode().split())


def _file(beside: Path, name: str) -> Path:
    """The file of that name below the list; lists written on Windows have backslashes."""
    path = beside / name
    return path if _is_there(path) else beside / name.replace("\\", "/")


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a file lies in `folder` once `..` and links are followed: data of strangers names no other files."""
    try:
        return path.resolve().is_relative_to(folder.resolve()) and path.is_relative_to(folder)
    except (OSError, RuntimeError, ValueError):  # names that no system has, links in a circle
        return False


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no system has room for, a folder that is closed to us
        return False


def _json_lines(file: Path) -> Iterator[Any]:
    """One JSON value a line, a text saying what is wrong where a line is none; a list in one piece will do, too."""
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            yield from json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            yield f"this is no JSON ({error})"
        return
    for line in text.splitlines():
        if line.strip():
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                yield f"this line is no JSON ({error})"


def _table(file: Path) -> Iterator[dict[str, str | None]]:
    with file.open(encoding="utf-8-sig", newline="") as text:
        for row in csv.DictReader(text):
            # the reader keeps surplus columns under None
            yield {key: value for key, value in row.items() if isinstance(key, str)}


# -- pictures with captions beside them -------------------------------------------------------------------------------


def _captioned(folder: Path, files: list[Path]) -> Found:
    """Pictures with what belongs to them by its name; where that cannot be told, none of it is guessed."""
    pictures, hints, captions = defaultdict(list), defaultdict(list), defaultdict(list)
    folders = {(place.parent, place.name.lower()) for path in files for place in path.parents}
    for path in files:
        if path.suffix.lower() in CAPTIONS:
            captions[path.parent / path.stem].append(path)
        elif path.suffix.lower() in PICTURES:
            (hints if _is_hint(path, folder, folders) else pictures)[_pair(folder, path)].append(path)
        else:
            yield Skipped(_name(folder, path), "neither a picture nor the caption of one")
    for pair, paths in pictures.items():
        found = hints.pop(pair, [])
        texts = [sorted(captions.pop(path.parent / path.stem, []), key=_place_of_caption) for path in paths]
        for path, text in zip(paths, texts):
            name = _name(folder, path)
            for other in text[1:]:
                yield Skipped(_name(folder, other), f"{text[0].name} is the caption of {path.name} already")
            if len(found) > 1:
                several = " and ".join(_name(folder, hint) for hint in found)
                yield Skipped(name, f"its hint may be {several}: leave one")
            elif len(paths) > 1 and (found or any(texts)):
                several = " and ".join(_name(folder, one) for one in paths)
                yield Skipped(name, f"caption or hint may be of {several}: give each a name of its own")
            elif not readable(path):
                yield Skipped(name, f"this Pillow reads no {path.suffix.lower()}: save it as .png")
            elif found and not readable(found[0]):
                yield Skipped(name, f"this Pillow reads no {found[0].suffix.lower()}, as its hint is: save it as .png")
            else:
                try:
                    prompt = text[0].read_text(encoding="utf-8-sig") if text else ""
                except (OSError, UnicodeDecodeError) as error:
                    yield Skipped(name, f"{text[0].name} cannot be read ({error}): save it as UTF-8 text")
                else:
                    yield Item(name, path, _one_line(prompt), found[0] if found else None)
    for path in (path for paths in hints.values() for path in paths):
        yield Skipped(_name(folder, path), "a hint without picture: expected one of the same name")
    for path in (path for paths in captions.values() for path in paths):
        yield Skipped(_name(folder, path), "a caption without picture: expected one of the same name")


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _place_of_caption(path: Path) -> int:
    return CAPTIONS.index(path.suffix.lower())


def _is_hint(path: Path, folder: Path, folders: set[tuple[Path, str]]) -> bool:
    """Whether its name or a folder around it says so; `folders` are those that there are, as (where, name)."""
    around = [place for place in path.parents if place != folder and place.is_relative_to(folder)]
    return path.stem.endswith(HINT_ENDING) or any(
        place.name.lower() in HINT_FOLDERS or (place.parent, BESIDE_TARGETS.get(place.name.lower(), "")) in folders
        for place in around
    )


def _pair(folder: Path, path: Path) -> str:
    """What a picture and its hint have in common: where they lie, but for their folders' names, ending and suffix."""
    special = (*HINT_FOLDERS, *PICTURE_FOLDERS, *BESIDE_TARGETS)
    *folders, _ = path.relative_to(folder).parts
    return "/".join([*(part for part in folders if part.lower() not in special), path.stem.removesuffix(HINT_ENDING)])


# -- the list of layouts ----------------------------------------------------------------------------------------------


def _here(*patterns: str) -> Callable[[Path], list[Path]]:
    """Files of these patterns in the folder itself, or else in folders right below it (train/, validation/)."""

    def files(folder: Path) -> list[Path]:
        for depth in ("", "*/"):
            found = sorted(
                path
                for pattern in patterns
                for path in folder.glob(depth + pattern)
                if path.is_file() and not path.name.startswith(".")
            )
            if found:
                return found
        return []

    return files


def _beside_pictures(folder: Path) -> list[Path]:
    """All files in and below a folder of pictures, hidden ones (as macOS leaves beside its files) apart."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    return files if any(path.suffix.lower() in PICTURES for path in files) else []


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "fill50k",
        "prompt.json with lines of source (the hint), target (the picture) and prompt",
        _here("prompt.json"),
        _listed,
    ),
    Layout(
        "a Hugging Face image folder",
        "metadata.jsonl or metadata.csv with file_name, text and perhaps conditioning_image",
        _here("metadata.jsonl", "metadata.csv"),
        _listed,
    ),
    Layout("JSON lines", "*.jsonl with lines of image, text and perhaps hint", _here("*.jsonl"), _listed),
    Layout(
        "pictures with captions",
        "pictures with captions beside them (cat.png, cat.txt), hints as hints/cat.png, cat_hint.png or in a folder "
        "beside theirs (images/cat.png and conditioning_images/cat.png, target/ and source/)",
        _beside_pictures,
        _captioned,
    ),
)
"""Tried in this order: a list beside pictures says more than the pictures."""


def _expected() -> str:
    return "one of: " + "; ".join(layout.looks_like for layout in LAYOUTS)


def _contents(folder: Path) -> str:
    """What is in a folder, by suffix: 3 .mp4, 1 .zip."""
    counts = Counter(path.suffix.lower() or "without suffix" for path in folder.rglob("*") if path.is_file())
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(5)) or "no files"
