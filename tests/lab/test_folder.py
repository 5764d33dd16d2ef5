"""A folder of lab scenes is data as anybody has it, and is rendered once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from zeroconv.controlnet_core.data import pictures, sources
from zeroconv.lab import folder as folders
from zeroconv.lab.dataset import HELD_OUT
from zeroconv.lab.folder import HINTS, render_folder
from zeroconv.lab.render import RenderError, render
from zeroconv.lab.scene import describe, random_scene


@pytest.mark.parametrize("hint", HINTS)
def test_scenes_are_read_as_fill50k(tmp_path: Path, hint: str):
    assert list(render_folder(tmp_path, range(3, 5), hint, 64)) == [3, 4]
    source = sources.read(tmp_path)
    assert (source.layout, source.skipped) == ("fill50k", ())
    assert [item.name for item in source.items] == ["target/000003.png", "target/000004.png"]
    for seed, item in zip((3, 4), source.items):
        picture = render(random_scene(seed), 64)
        for path, expected in ((item.picture, picture.image), (item.hint, HINTS[hint](picture))):
            assert np.abs(np.asarray(pictures.read(path)) / 255 - expected).max() <= 0.5 / 255 + 1e-6
        assert item.prompt == describe(random_scene(seed))


def test_only_what_is_missing_is_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = render_folder(tmp_path, range(4), "depth", 64)
    for _ in range(2):
        next(run)
    run.close()  # as Cancel does
    rendered = []
    monkeypatch.setattr(folders, "render", lambda scene, size: rendered.append(scene.seed) or render(scene, size))
    list(render_folder(tmp_path, range(4), "depth", 64))
    assert rendered == [2, 3]
    assert [item.prompt for item in sources.read(tmp_path).items] == [describe(random_scene(i)) for i in range(4)]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("target/*.png")}
    list(render_folder(tmp_path, range(3), "pose", 64))
    assert rendered == [2, 3, 0, 1, 2]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("target/*.png")} == times  # a dataset goes by it
    assert len(sources.read(tmp_path).items) == 3
    assert not list(tmp_path.rglob("*.tmp"))


def test_held_out_scenes_are_refused(tmp_path: Path):
    with pytest.raises(RenderError, match="seeds up to 1000001 are asked for; 1000000 and above are never trained on"):
        list(render_folder(tmp_path, range(HELD_OUT - 1, HELD_OUT + 2), "depth", 64))
    assert not list(tmp_path.iterdir())
