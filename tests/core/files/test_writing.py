"""A file is written whole or not at all, and what a killed process leaves is found again."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from zeroconv.controlnet_core.files import saving, writing
from zeroconv.controlnet_core.files.writing import replacing, sweep


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_is_there_when_the_block_ends_and_not_before(tmp_path: Path):
    path = tmp_path / "a.csv"
    with replacing(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.csv"]


def test_the_old_file_stays_until_the_block_ends(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"old")
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_an_error_leaves_the_old_file_alone_and_goes_on(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"old")

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyError("why")

    with pytest.raises(KeyError, match="why"):
        write()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.csv"]


@pytest.mark.parametrize(("owner", "call"), [(os, "fsync"), (Path, "replace")])
def test_a_disk_that_fails_at_the_end_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, call: str
):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.csv"
    path.write_bytes(b"old")
    monkeypatch.setattr(owner, call, full)
    with pytest.raises(OSError, match="No space left"), replacing(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.csv"]


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, synced = tmp_path / "a.csv", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((os.fstat(descriptor).st_size, path.exists())))
    with replacing(path) as temporary:
        temporary.write_bytes(b"four")
    assert synced == [(4, False)]


def test_two_that_write_the_same_file_do_not_meet(tmp_path: Path):
    path = tmp_path / "a.csv"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["a.csv"]


DYING = """
import os, runpy
from pathlib import Path
replacing = runpy.run_path({module!r})["replacing"]
with replacing(Path({path!r})) as temporary:
    temporary.write_bytes(b"half")
    os._exit(9)
"""


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path: Path):
    keep = [".mine.tmp", ".other.csv.ab.tmp", ".shard-1.safetensors.mine", "notes.tmp", "shard-1.safetensors"]
    for name in keep:
        (tmp_path / name).touch()
    script = DYING.format(module=str(Path(writing.__file__)), path=str(tmp_path / "shard-1.safetensors"))
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    (left,) = set(names(tmp_path)) - set(keep)
    sweep(tmp_path, "prompts-*")
    assert left in names(tmp_path)
    sweep(tmp_path, "shard-*")
    assert names(tmp_path) == keep


@pytest.mark.skipif(os.name == "nt", reason="there are no such modes")
def test_others_may_read_a_weights_file_as_they_may_any_new_file(tmp_path: Path):
    (tmp_path / "any").touch()
    saving.write(tmp_path / "weights.safetensors", {"x": torch.zeros(2)})
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
