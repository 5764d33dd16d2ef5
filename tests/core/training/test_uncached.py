"""A training on pictures themselves is the training on their cache, from the same file but for one word."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zeroconv.controlnet_core.data import __main__ as making
from zeroconv.controlnet_core.data import encoders
from zeroconv.controlnet_core.training import __main__ as command

from .tiny import encode_picture, encode_prompt, write_config

SECTION = """
[data]
folder = "pictures"
resolution = 64
mirror = true
cached = {cached}
"""


def write(folder: Path, cached: bool) -> str:
    """Pictures with hints and captions, and a file that says whether they are cached."""
    folder.mkdir()
    file = write_config(folder, folder / "dataset", steps=4, sample_every=2, held_out=1)
    text = file.read_text().replace("[data]\n", SECTION.format(cached=str(cached).lower()).lstrip())
    file.write_text(text + '\n[[validation]]\nhint = "pictures/hints/0.png"\nprompt = "new"\n')
    for i in range(6):
        squares = (
            np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        )
        for place in (folder / "pictures", folder / "pictures" / "hints"):
            place.mkdir(exist_ok=True, parents=True)
            Image.fromarray(squares).save(place / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text(f"squares {i % 3}")
    return str(file)


def test_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(encoders, "read", lambda *_: encoders.Encoders(encode_picture, encode_prompt))
    cached, uncached = (write(tmp_path / name, name == "cached") for name in ("cached", "uncached"))
    assert making.main([cached]) == 0
    assert command.main([cached]) == 0  # the prompt of [[validation]] is in the dataset: the base has no text encoder
    assert making.main([uncached]) == 1
    assert (
        "so there is nothing to make: python -m controlnet_core.training reads the pictures" in capsys.readouterr().err
    )
    assert command.main([uncached, "--steps", "2"]) == 0
    assert command.main([uncached]) == 0
    for name in ("losses.csv", "fidelity.csv", "validation.csv"):
        ours, theirs = (
            [line.split(",")[:2] for line in (Path(file).parent / "run" / name).read_text().splitlines()[1:]]
            for file in (uncached, cached)
        )
        assert [row[0] for row in ours] == [row[0] for row in theirs] and len(ours) > 1
        assert [float(row[1]) for row in ours] == pytest.approx([float(row[1]) for row in theirs], rel=1e-5)
    assert not (tmp_path / "uncached" / "dataset").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('annotator = "canny"', r"cached in \[data\] is false, which goes with hints that lie beside the pictures"),
        ("crops = 0", r"crops in \[data\] is 0: expected 1 to 64"),
    ],
)
def test_what_does_not_go_with_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture, line: str, said: str):
    file = Path(write(tmp_path / "run", cached=False))
    file.write_text(file.read_text().replace("[data]\n", f"[data]\n{line}\n"))
    assert command.main([str(file)]) == 1
    assert re.search(said, capsys.readouterr().err)
