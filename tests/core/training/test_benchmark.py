"""`dev.py bench training` measures three sides that train, and puts them side by side."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from zeroconv.benchmarks import training
from zeroconv.benchmarks._training_sides import SIDES, Setting, layout, write_dataset
from zeroconv.benchmarks.training import Round
from zeroconv.controlnet_core.networks.unet import SD15, SDXL, UNet
from zeroconv.devtools import DevError

ROOT = Path(__file__).resolve().parents[3]
SMALLEST = Setting(device="cpu", model="SD1.5", width=32, encoders=32, batch=2, resolution=64, precision="bf16")
SETTINGS = {"SD1.5": SMALLEST, "SDXL": replace(SMALLEST, model="SDXL", width=64, encoders=64)}


def test_published_sizes_are_those_of_sd15():
    published = replace(SMALLEST, width=320, encoders=320)
    assert published.config == SD15
    assert [published.encoder_width(width, 32) for width in (128, 256, 512, 512)] == [128, 256, 512, 512]
    reduced = replace(SMALLEST, encoders=64)
    assert (reduced.config.context_dim, reduced.encoder_width(128, 32)) == (128, 32)
    assert replace(published, model="SDXL").config == SDXL


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_both_sides_train_one_network(setting: Setting):
    unets = import_module("diffusers.models.unets.unet_2d_condition")
    with torch.device("meta"):
        ours, theirs = UNet(setting.config), unets.UNet2DConditionModel(**layout(setting))
    sizes = [sorted(p.numel() for p in network.parameters()) for network in (ours, theirs)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("side", SIDES)
def test_each_side_takes_steps(side: str, setting: Setting, tmp_path: Path):
    write_dataset(tmp_path, setting, count=4)
    steps = SIDES[side](replace(setting, checkpointing=True), tmp_path)
    first, second = next(steps), next(steps)
    losses = [getattr(step, "loss", step) for step in (first, second)]
    assert all(isinstance(loss, float) and 0.1 < loss < 10 for loss in losses)


def test_the_table_compares_the_rounds_in_pairs():
    found = {
        "ours": [Round(1.0, 0.5, 100 << 20), Round(2.0, 0.5, 100 << 20), Round(1.0, 0.5, 100 << 20)],
        "theirs": [Round(2.0, 0.5, 200 << 20), Round(3.0, 1.0, 200 << 20), Round(1.0, 1.5, 200 << 20)],
    }
    assert [" ".join(line.split()) for line in training.table(found, "cpu").splitlines()] == [
        "| steps/s ours is faster by processor time | MiB ours takes",
        "ours | 1.000 | 100",
        "theirs | 0.500 1.50 (1.00 to 2.00) 2.00 (1.00 to 3.00) | 200 0.50 (0.50 to 0.50)",
    ]


@pytest.mark.parametrize("given", ["--width 40", "--resolution 100", "--rounds 0"])
def test_sizes_that_cannot_be_are_refused(given: str):
    with pytest.raises(DevError, match="--width needs a multiple of 32, --resolution one of 64"):
        training.main(["--device", "cpu", *given.split()])


@pytest.mark.slow
def test_the_command_prints_a_table():
    smallest = ["--device=cpu", "--width=32", "--batch=1", "--resolution=64", "--rounds=1", "--steps=1"]
    done = subprocess.run(
        [sys.executable, ROOT / "dev.py", "bench", "training", *smallest, "--checkpointing=off"],
        env={**os.environ, "ZEROCONV_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    assert torch.__version__ in done.stdout
    lines = {line.split("|")[0].strip(): line.split("|")[1:] for line in done.stdout.splitlines() if "|" in line}
    assert list(lines) == ["", *SIDES]
    for speed, memory in (lines[side] for side in SIDES):
        assert float(speed.split()[0]) > 0
        assert sys.platform != "linux" or float(memory.split()[0]) > 50
