"""One process at a time in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import ZeroConvError

NAME = ".lock"
PLACE = 1 << 20
"""The byte that is locked, far behind what is written: Windows lets nobody read a locked one."""


class LockedError(ZeroConvError):
    """A folder that another process works in."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have `folder`, which is made where it is missing, for this process alone.

    Raises LockedError where another process has it. The system lets go of a lock when its process ends, however it
    ends; the file that is left means nothing. Where a file system knows no locks, none is taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NAME).open("a+b", buffering=0) as file:
        try:
            _lock(file)
        except BlockingIOError:
            file.seek(0)
            raise LockedError(
                f"{folder} is in use by another process ({file.read(20).decode('ascii', 'replace').strip() or '?'}): "
                "wait until it ends, stop it, or choose another name"
            ) from None
        own = f"{os.getpid()}\n".encode()
        file.seek(0)
        if file.read() != own:
            file.truncate(0)
            file.write(own)
        yield


def _lock(file: BinaryIO) -> None:
    """Lock an open file until it is closed; raises BlockingIOError where another has."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        file.seek(PLACE)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except PermissionError as error:
            raise BlockingIOError(*error.args) from error
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return  # no locks here
