"""What ComfyUI's registry and the code host read of the pack is there and fits together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from zeroconv.devtools import marks

ROOT = Path(__file__).resolve().parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def said(key: str) -> str:
    """A text of pyproject.toml."""
    (found,) = re.findall(rf'^"?{key}"? = "(.*)"$', PROJECT, re.MULTILINE)
    return found


def test_the_version_has_its_chapter_in_the_changelog():
    version = said("version")
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    (newest, *_) = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest == version


@pytest.mark.parametrize(("key", "shape"), [("Icon", (400, 400)), ("Banner", (1260, 540))])
def test_icon_and_banner_are_the_files_that_are_named_and_small(key: str, shape: tuple[int, int]):
    at = f"https://raw.githubusercontent.com/{said('Repository').removeprefix('https://github.com/')}/main/"
    assert said(key).startswith(at)
    file = ROOT / said(key).removeprefix(at)
    assert file.stat().st_size < 20_000
    with Image.open(file) as picture:
        assert picture.size == shape


def test_they_are_drawn_by_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(marks, "FOLDER", tmp_path)
    assert marks.main([]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["banner.png", "icon.png"]


def test_what_the_code_host_runs_is_what_ci_runs():
    assert "- run: .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
