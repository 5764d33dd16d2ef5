"""Checksums: whether a file still holds what was written."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import torch

from ..keys import State

BITS = 128
AT_ONCE = 1 << 20
"""Bytes that are read at once."""


def of_file(path: Path) -> str:
    """The checksum of all bytes of a file."""
    found = blake2b(digest_size=BITS // 8)
    with path.open("rb") as file:
        while part := file.read(AT_ONCE):
            found.update(part)
    return found.hexdigest()


def of_bytes(data: bytes) -> str:
    """The checksum of bytes."""
    return blake2b(data, digest_size=BITS // 8).hexdigest()


def of_tensors(tensors: State) -> str:
    """The checksum of tensors on the CPU: of their names, types, shapes and numbers, in whatever order."""
    found = blake2b(digest_size=BITS // 8)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
