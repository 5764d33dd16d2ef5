"""The one way to write a file whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to write, which takes the place of `path` when the block ends; its folder must be there.

    Whoever reads `path` finds the old file or the new one, never a part. An error in the block or at its end leaves
    the old one and nothing else, and goes on.
    """
    # In the same folder, so that the last step is one rename; under a name that no loader lists.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that nobody else may read, whatever the umask says
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with suppress(OSError):  # what went wrong has been said; here is only what it left
            temporary.unlink(missing_ok=True)


def sweep(folder: Path, names: str) -> None:
    """Remove what a process left in `folder` that was killed while it wrote a file of these `names` (a glob)."""
    for left in folder.glob(f".{names}.*.tmp"):
        left.unlink(missing_ok=True)
