"""Files that come in parts: all parts of the one that is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..errors import ZeroConvError
from ..limits import INDEX, PARTS

NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
"""As transformers and diffusers name the parts of a file."""


class PartsError(ZeroConvError):
    """A file that is a part of one whose other parts are not there."""


def parts(path: Path) -> list[Path]:
    """The files whose tensors together are those that `path` is named for: itself alone, or all of its parts.

    They lie beside it. An index file (`*.index.json`, its "weight_map" names a file for each tensor) says which they
    are, or their names do: NAME-00001-of-00002.safetensors. Raises PartsError for those that are missing.
    """
    names = _indexed(path) or _numbered(path)
    if len(names) < 2:
        return [path]
    found = [path.with_name(name) for name in names]
    missing = [part.name for part in found if not part.is_file()]
    if missing:
        raise PartsError(
            f"this is part {names.index(path.name) + 1} of {len(names)}, and {missing[0]} is not beside it"
            f"{f' ({len(missing)} parts are missing)' if len(missing) > 1 else ''}: put all parts into one folder"
        )
    return found


def _indexed(path: Path) -> list[str]:
    """The names of the files of the index that names `path`; none without one."""
    for index in sorted(path.parent.glob("*.index.json")):
        try:
            if index.stat().st_size > INDEX:
                continue
            found = json.loads(index.read_bytes())["weight_map"].values()
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue  # of another file: it says nothing about this one
        names = [name for name in dict.fromkeys(map(str, found)) if Path(name).name == name]
        if path.name in names:
            return sorted(names)
    return []


def _numbered(path: Path) -> list[str]:
    """The names of all parts of a file whose name says which part it is; none for any other."""
    told = NUMBERED.fullmatch(path.name)
    if told is None or not 1 <= int(told[2]) <= int(told[3]) <= PARTS:
        return []
    return [f"{told[1]}-{number:05d}-of-{told[3]}{told[4]}" for number in range(1, int(told[3]) + 1)]
