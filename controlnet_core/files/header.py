"""The header of a safetensors file, believed only when all of it holds; nothing is allocated by what it says.

A file is 8 bytes (the header's length, little-endian), the header (JSON: name -> dtype, shape, data_offsets) and the
numbers of all tensors, one after the other and without gaps (huggingface/safetensors, README.md).
"""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from ..errors import ZeroConvError
from ..keys import times
from ..limits import DIMENSIONS, HEADER, KEY, TENSORS

BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "C64": 8,
}  # fmt: skip
"""Of one number, by the names of dtypes; types of less than a byte hold no weights that a control could use as is."""


class HeaderError(ZeroConvError):
    """What is wrong with a header, as the end of a sentence that begins with the file's name."""


class Entry(NamedTuple):
    """A tensor as the header describes it; its numbers are the bytes `begin` to `end` behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata; HeaderError where anything in it does not hold."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            raise HeaderError(
                f"the file is truncated: its header alone needs {8 + length} bytes, found {size}: download it again"
            )
        if length > HEADER:
            raise _damaged(f"its header has {length} bytes, and at most {HEADER} are read")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # what is no UTF-8 or has a number of 5,000 digits is a ValueError
        raise _damaged(f"its header is no JSON ({str(error)[:100]})") from error
    if not isinstance(header, dict) or len(header) > TENSORS:
        found = f"{len(header)} entries" if isinstance(header, dict) else f"a {type(header).__name__}"
        raise _damaged(f"its header holds {found}, expected a name for each of at most {TENSORS} tensors")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged("its metadata are no texts with names")
    entries = {name: _entry(name, found) for name, found in header.items()}
    _check_places(entries, size - 8 - length, size)
    return entries, metadata


def _damaged(what: str) -> HeaderError:
    return HeaderError(f"this file is damaged, {what}: download it again")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name, count = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name} is there {count} times")
    return found


def _entry(name: str, found: Any) -> Entry:
    """The entry of tensor `name`, whose size is that of its shape."""
    if len(name) > KEY:
        raise _damaged(f"a tensor's name has {len(name)} characters, expected at most {KEY} ({name[:50]}...)")
    fields = found if isinstance(found, dict) else {}
    dtype, shape, offsets = (fields.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise _damaged(f"{name} is of the type {str(dtype)[:20]!r}, which is none that weights have")
    if not _whole_numbers(shape) or len(shape) > DIMENSIONS:
        raise _damaged(f"{name} has no shape of at most {DIMENSIONS} whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise _damaged(f"{name} has no data_offsets of two whole numbers")
    entry = Entry(dtype, tuple(shape), *offsets)
    if entry.end - entry.begin != prod(shape) * BYTES[dtype]:
        raise _damaged(
            f"{name} of {times(shape)} {dtype} needs {prod(shape) * BYTES[dtype]} bytes and has "
            f"{entry.end - entry.begin}"
        )
    return entry


def _whole_numbers(found: Any) -> TypeGuard[list[int]]:
    return isinstance(found, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in found)


def _check_places(entries: dict[str, Entry], data: int, size: int) -> None:
    """Raise unless the tensors lie one behind the other in the file's `data` bytes, and fill them."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise _damaged(f"{name} begins at byte {entry.begin} of the data, expected at {end}")
        end = entry.end
    if end > data:
        raise HeaderError(f"the file is truncated: expected {size - data + end} bytes, found {size}: download it again")
    if end < data:
        raise _damaged(f"{data - end} bytes follow the last tensor")
