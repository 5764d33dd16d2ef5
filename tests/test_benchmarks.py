"""`dev.py bench step` and `bench load`: what they make of measurements, and that they measure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zeroconv.benchmarks import load, memory, step
from zeroconv.benchmarks.load import Loaded
from zeroconv.benchmarks.step import Measured, Operations, ratios
from zeroconv.controlnet_core.networks.unet import UNetConfig
from zeroconv.devtools import DevError

ROOT = Path(__file__).resolve().parent.parent

FOUND = [
    Measured("bare", "bare", [2.0, 4.0], [4.0, 4.0], 100, 10, 1 << 20),
    Measured("ours, 1", "bare", [3.0, 4.4], [5.0, 6.0], 130, 14, 2 << 20),
    Measured("diffusers, bare", "diffusers, bare", [1.0, 1.0], [1.0, 1.0], 90, 9, 0),
    Measured("diffusers, 1", "diffusers, bare", [1.5, 1.5], [2.0, 2.0], 126, 12, 0),
]


def test_a_ratio_is_to_the_bare_step_of_the_same_side_and_round():
    assert ratios(FOUND[1], FOUND, "seconds") == pytest.approx([1.5, 1.1])
    assert ratios(FOUND[3], FOUND, "work") == pytest.approx([2.0, 2.0])


def test_the_table_has_a_line_for_each_case():
    _, _, bare, ours, _, theirs = step.table(FOUND).splitlines()
    assert bare.startswith("| bare | 3 | 1.00 (1.00 to 1.00) |")
    assert ours == "| ours, 1 | 3.7 | 1.30 (1.10 to 1.50) | 1.38 (1.25 to 1.50) | 0.0 | 1.300 | 14 | 2 |"
    assert "| 1.400 | 12 |" in theirs


def test_the_plot_is_a_picture(tmp_path: Path):
    step.plot(FOUND, "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_products_are_counted_attention_too():
    case = Measured("bare", "bare")
    q = torch.randn(1, 2, 8, 4)
    with torch.inference_mode(), step.counted(case, "cpu", steps=1):
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        _ = q.flatten() @ q.flatten()
    assert case.macs == 2 * (2 * 8 * 8 * 4)
    assert case.operations >= 2


def test_views_are_no_operations():
    x = torch.randn(4, 4)
    with Operations() as operations:
        _ = x[0].view(2, 2).transpose(0, 1)
        _ = x + 1
    assert operations.count == 1


def test_filled_networks_keep_signals_near_unit_size():
    layers = step.fill(torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256)))
    assert 0.5 < layers(torch.randn(64, 256)).std().item() < 2.0


@pytest.mark.parametrize("given", ["--size 100", "--batch 9", "--controls 5", "--size 1088"])
def test_what_cannot_be_is_refused(given: str):
    with pytest.raises(DevError, match="--size is 64 to 1024 by 64, --batch 1 to 8, --controls 0 to 4"):
        step.main(["--device", "cpu", *given.split()])


def test_the_table_of_loads_has_medians():
    rounds = [Loaded(1.0, 2.0, 0.5, 3 << 20, 1 << 20), Loaded(3.0, 2.0, 0.5, 5 << 20, 1 << 20)]
    *_, line = load.table({"ours": rounds}).splitlines()
    assert line == "| ours | 2.000 (1.000 to 3.000) | 2.000 (2.000 to 2.000) | 0.500 (0.500 to 0.500) | 4 | 1 |"


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.parametrize(
    ("name", "given"), [("step", ["--controls=1", "--size=64"]), ("load", ["--rounds=1", "--size=64"])]
)
def test_the_command_prints_a_table(name: str, given: list[str], comfy_path: Path, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "dev.py", "bench", name, "--device=cpu", *given, "--output", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "ZEROCONV_PYTHON": sys.executable, "COMFYUI_PATH": str(comfy_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| ours" in done.stdout
    assert "| native" in done.stdout
    assert {path.suffix for path in tmp_path.iterdir()} >= {".md", ".json"}


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_is_counted_option_by_option():
    config = UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(1, 0))
    found = list(memory.rows(config, 128, 4))
    assert [row.options for row in found][:4] == [
        "recompute off", "+ recompute on", "+ gradient_checkpointing on", "+ optimizer_in_ram on",
    ]  # fmt: skip
    totals = [row.total for row in found[: len(memory.SAVING)]]
    assert totals == sorted(totals, reverse=True)
    assert len(found) == len(memory.SAVING) + len(memory.OTHERS)
    assert memory.line(memory.Row("lion", 1.0, 0.5, 2.0, 3.9, 0.0)) == "| lion | 1.0 | 0.5 | 2.0 | 3.9 | 0.0 |"
