"""The smallest run of `dev.py bench annotators`, and that its table holds what it says."""

from __future__ import annotations

import re

import pytest
import torch

from zeroconv.benchmarks import annotators
from zeroconv.benchmarks.annotators import Times, main, row
from zeroconv.devtools import DevError


# Sticks scale with the picture here but not there: the two draw the same pose at 512 pixels alone.
@pytest.mark.parametrize(("names", "side"), [(["canny", "mlsd"], 256), (["pose drawing"], 512)])
def test_the_smallest_run(names: list[str], side: int, capsys: pytest.CaptureFixture[str]):
    assert main(["--only", ",".join(names), "--resolution", str(side), "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].startswith("cpu (") and f"{side}x{side}, medians of 1 runs in ms, torch" in lines[0]
    rows = {line.split(" |")[0].strip(): line for line in lines[3 : 3 + len(names)]}
    assert list(rows) == names
    for line in rows.values():
        numbers = [float(number) for number in re.findall(r"(?<= )[\d.]+", line.split("|", 1)[1])]
        # Three numbers for each run, the ratio of the fastest, the spread, and the share of other pixels.
        assert len(numbers) == 9
        assert min(numbers[:8]) > 0
        assert numbers[8] < 1.0
    assert ("torch finds no CUDA device" in printed) is not torch.cuda.is_available()


def test_a_row_is_medians_ratios_and_spread():
    ours = Times(first=[0.003, 0.001, 0.002], second=[0.001, 0.001, 0.004])
    theirs = Times(first=[0.004, 0.004, 0.004], second=[0.002, 0.0015, 0.002])
    assert row("x", ours, theirs, 0.125).split() == (
        ["x", "|", "2.0", "4.0", "2.00", "|", "1.0", "2.0", "2.00", "|", "1.50", "4.00", "12.50%"]
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "cany"], "there is no case cany; there are canny, pose drawing, hed"),
        (["--resolution", "100"], "--resolution needs a multiple of 64 and --repeats at least 1"),
        (["--repeats", "0"], "--resolution needs a multiple of 64 and --repeats at least 1"),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str):
    with pytest.raises(DevError, match=said):
        main(arguments)


def test_without_the_peer_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(annotators, "find_spec", lambda name: None)
    with pytest.raises(DevError, match="controlnet-aux is not installed: python -m pip install"):
        main([])
