"""The pictures of the shipped workflows lie where Load Image looks, and nothing of the user's is touched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hosting import Host

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The host's input folder, which is not there yet."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    return tmp_path / "input"


def lend() -> None:
    from zeroconv.nodes.host.examples import lend_examples

    lend_examples()


def test_all_that_ship_are_lent(folder: Path):
    lend()
    shipped = {path.name: path.read_bytes() for path in (ROOT / "workflows" / "input").iterdir()}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == shipped and len(shipped) == 3


def test_what_the_user_has_by_that_name_stays(folder: Path):
    folder.mkdir()
    (folder / "zeroconv_portrait.jpg").write_bytes(b"mine")
    (folder / "zeroconv_hole.webp").symlink_to(folder / "on a disk that is away")
    lend()
    assert (folder / "zeroconv_portrait.jpg").read_bytes() == b"mine"
    assert (folder / "zeroconv_hole.webp").is_symlink()
    assert (folder / "zeroconv_clip.mp4").is_file()


@pytest.mark.parametrize("lacks", ["the folder", "the pack"])
def test_what_cannot_be_lent_is_said_and_ends_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lacks: str
):
    from zeroconv.nodes.host import examples

    if lacks == "the folder":
        folder.write_bytes(b"a file in its place")
    else:
        monkeypatch.setattr(examples, "PLACE", folder / "deleted")
    lend()
    assert caplog.text.count("is not in the input folder") == 3
    assert not list(folder.iterdir()) if folder.is_dir() else folder.read_bytes() == b"a file in its place"
