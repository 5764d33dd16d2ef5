"""`dev.py bench reuse` on the lab: what is computed, and that half of it keeps the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zeroconv.benchmarks import reuse


def test_the_bench_counts_passes_and_compares_pictures(tmp_path: Path, capsys: pytest.CaptureFixture):
    words = ["--scenes", "2", "--steps", "8", "--hints", "depth", "--samplers", "karras", "--output", str(tmp_path)]
    assert reuse.main(words) == 0
    rows = {row["reuse"]: row for row in json.loads((tmp_path / "reuse.json").read_text())["rows"]}
    assert {name: row["passes"] for name, row in rows.items()} == {
        "0.00": 8,
        "0.50": 5,
        "0.67": 4,
        "0.75": 3,
        "held, every 2": 4,
    }
    assert rows["0.00"]["kept"] == 1.0 and rows["0.00"]["grey"] == 0.0
    assert rows["0.50"]["grey"] < rows["held, every 2"]["grey"] < rows["0.75"]["grey"] + 5
    assert rows["0.50"]["kept"] > 0.97
    table = (tmp_path / "reuse.md").read_text()
    assert all(reuse.line(reuse.Row(**row)) in table for row in rows.values())
    assert "| depth | karras | 0.50 | 5 | 0.62 |" in capsys.readouterr().out


def test_timesteps_fall_and_karras_spends_more_of_them_on_little_noise():
    even, karras = reuse.timesteps("ddim", 20), reuse.timesteps("karras", 20)
    for steps in (even, karras):
        assert len(steps) == 20 and steps == sorted(steps, reverse=True) and steps[0] == 999
    assert sum(t < 300 for t in karras) > sum(t < 300 for t in even)
