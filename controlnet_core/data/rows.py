"""Rows of tensors in a safetensors file, read and never mapped: a mapped file that is cut short kills the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..files.header import Entry, HeaderError, read_header

DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8, "I32": torch.int32,
    "I64": torch.int64,
}  # fmt: skip
"""Those that datasets have."""


class Rows:
    """An open file of tensors, of which single ones or single rows are read."""

    def __init__(self, file: BinaryIO, entries: dict[str, Entry], start: int):
        self._file, self._entries, self._start = file, entries, start

    def tensor(self, name: str) -> Tensor:
        """The whole tensor of that name; raises HeaderError where the file holds none."""
        entry = self._entry(name)
        return self._read(entry, entry.begin, entry.shape)

    def row(self, name: str, number: int) -> Tensor:
        """`tensor(name)[number]`."""
        entry = self._entry(name)
        if not entry.shape or not 0 <= number < entry.shape[0]:
            raise HeaderError(f"{name} has no row {number}")
        size = (entry.end - entry.begin) // entry.shape[0]
        return self._read(entry, entry.begin + number * size, entry.shape[1:])

    def _entry(self, name: str) -> Entry:
        entry = self._entries.get(name)
        if entry is None or entry.dtype not in DTYPES:
            raise HeaderError(f"it holds no {name}" if entry is None else f"{name} is {entry.dtype}")
        return entry

    def _read(self, entry: Entry, begin: int, shape: tuple[int, ...]) -> Tensor:
        dtype = DTYPES[entry.dtype]
        size = prod(shape) * dtype.itemsize
        self._file.seek(self._start + begin)
        found = bytearray(self._file.read(size))
        if len(found) < size:
            raise HeaderError("it has become shorter since it was opened")
        return torch.frombuffer(found, dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


@contextmanager
def opened(path: Path) -> Iterator[Rows]:
    """The tensors of a file; raises HeaderError for one that is damaged, OSError for one that cannot be read."""
    entries, _ = read_header(path)
    with path.open("rb") as file:
        yield Rows(file, entries, 8 + int.from_bytes(file.read(8), "little"))
