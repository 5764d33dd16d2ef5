"""One process at a time in a folder, and none that has ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zeroconv.controlnet_core.files import lock
from zeroconv.controlnet_core.files.lock import LockedError, locked

HOLD = "import sys\n{}\nprint('held', flush=True)\nsys.stdin.read()"


def test_a_folder_is_had_once(tmp_path: Path):
    with (
        locked(tmp_path / "new"),
        pytest.raises(LockedError, match=rf"new is in use by another process \({os.getpid()}\): wait until it ends"),
    ):
        locked(tmp_path / "new").__enter__()
    with locked(tmp_path / "new"), locked(tmp_path / "other"):
        pass


def test_another_process_has_it_until_it_is_killed(tmp_path: Path):
    program = HOLD.format(
        f"import fcntl, os; f = open({str(tmp_path / lock.NAME)!r}, 'a+'); "
        "fcntl.flock(f, fcntl.LOCK_EX); f.write(f'{os.getpid()}\\n'); f.flush()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(LockedError, match=f"{process.pid}"):
            locked(tmp_path).__enter__()
        process.kill()
        process.wait()
    with locked(tmp_path):
        assert (tmp_path / lock.NAME).read_text() == f"{os.getpid()}\n"


def test_a_file_system_without_locks_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import fcntl

    def flock(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path), locked(tmp_path):
        pass
