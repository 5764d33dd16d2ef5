"""`dev.py fuzz`: nothing that files, texts and pictures hold ends in anything but a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from zeroconv.devtools import fuzz

CASES = 200


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_sound_files_are_read(name: str, tmp_path: Path):
    for file, data in fuzz._sound(name).items():
        (tmp_path / file).write_bytes(data)
    fuzz.FORMATS[name].read(tmp_path)


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_changed_files_are_read_or_refused_in_a_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = ["--formats", name, "--processes", "1", "--output", str(tmp_path)]
    assert fuzz.main([*run, "--cases", str(CASES)]) == 0, capsys.readouterr().out
    tried = [json.loads(line) for line in (tmp_path / f"{name}-0.jsonl").read_text().splitlines()]
    assert [number for number, *_ in tried] == list(range(CASES))
    assert sum(outcome == "refused" for _, outcome, _ in tried) > CASES / 10


def test_a_run_goes_on_where_it_was_stopped_and_cases_follow_from_their_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = ["--formats", "texts", "--processes", "1"]
    log = tmp_path / "cut" / "texts-0.jsonl"
    assert fuzz.main([*run, "--output", str(tmp_path / "whole"), "--cases", "250"]) == 0
    assert fuzz.main([*run, "--output", str(tmp_path / "cut"), "--cases", "130"]) == 0
    assert len(log.read_text().splitlines()) == 130
    assert fuzz.main([*run, "--output", str(tmp_path / "cut"), "--cases", "250"]) == 0
    assert log.read_bytes() == (tmp_path / "whole" / log.name).read_bytes()
    assert "250" in capsys.readouterr().out.splitlines()[-1]


def fail() -> None:
    raise KeyError("x")


def wait() -> None:
    while True:
        pass


def fill() -> bytes:
    return b"x" * (1 << 60)


def shout() -> None:
    raise fuzz.AnnotatorError("half a letter: \ud800")


@pytest.mark.parametrize(("outcome", "fault"), [("raw", fail), ("hang", wait), ("memory", fill), ("raw", shout)])
def test_faults_are_found(outcome: str, fault: Callable[[], None], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(fuzz.FORMATS, "texts", fuzz.Format(fuzz.FORMATS["texts"].sound, lambda _: fault()))
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    assert fuzz.case("texts", 0, 0)[0] == outcome
