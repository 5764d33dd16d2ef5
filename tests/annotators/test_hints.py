"""`dev.py hints`: a picture for every annotator that can run here, and a line for every one that cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from zeroconv.annotators import ANNOTATORS
from zeroconv.devtools.hints import PHOTOGRAPHS, READS_NO_PHOTOGRAPH, main


def test_every_annotator_has_its_picture_or_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--output", str(tmp_path), "--side", "32"]) == 0
    said = capsys.readouterr().out.splitlines()
    pictures = {path.stem for path in tmp_path.glob("*.jpg")}
    for annotator in ANNOTATORS:
        made = {name for name in pictures if name == annotator.name or name.startswith(f"{annotator.name}_")}
        left_out = any(line.startswith(f"{annotator.name}: left out") for line in said)
        assert left_out == bool(annotator.networks or annotator.name in READS_NO_PHOTOGRAPH), annotator.name
        assert left_out or made, annotator.name
    sheets = {f"all_{photograph}" for photograph in PHOTOGRAPHS}
    assert {*sheets, "photograph", "pose_openpose", "pose_coco17"} <= pictures
    with Image.open(tmp_path / "canny.jpg") as picture:
        assert picture.size == (32, 32)
