"""From 1,000 pictures of circles to a control that follows circles it has not seen, by the two commands alone.

The pictures are in the manner of fill50k, which the paper's authors made to see a training work: a disc of one colour
on a ground of another, and where it is as the hint.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from zeroconv.controlnet_core.files.loading import load_control, read_weights
from zeroconv.lab.models import SIZE, WEIGHTS
from zeroconv.lab.pipeline import LabModel, scene_noise

pytestmark = [
    pytest.mark.weights,
    pytest.mark.skipif(not (WEIGHTS / "unet.safetensors").is_file(), reason="the lab's weights are not in lab/weights"),
]

ROOT = Path(__file__).resolve().parents[2]
CIRCLES, UNSEEN = 1000, 32
COLOURS = {
    "red": (220, 40, 40), "orange": (240, 150, 30), "yellow": (240, 220, 50), "green": (40, 160, 60),
    "teal": (30, 150, 150), "blue": (40, 70, 210), "purple": (130, 50, 170), "pink": (240, 130, 180),
}  # fmt: skip
CONFIG = f"""
output = "run"
[model]
base = '{WEIGHTS}'
[data]
dataset = "dataset"
folder = "circles"
resolution = {SIZE}
batch_size = 32
[training]
steps = 600
batch_size = 8
learning_rate = 1e-3
warmup = 120
timesteps = "cubic"
sample_every = 25
held_out = 8
sample_steps = 8
guidance_scale = 2.0
"""


def circle(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Picture and hint (H,W,3) uint8, the disc as (H,W) bool, and the prompt."""
    draw = np.random.default_rng([7, seed])
    disc, ground = draw.permutation(list(COLOURS))[:2]
    radius = draw.uniform(0.12, 0.34) * SIZE
    x, y = draw.uniform(radius + 3, SIZE - radius - 3, 2)
    down, across = np.mgrid[:SIZE, :SIZE] + 0.5
    distance = np.hypot(across - x, down - y)
    inside = (radius - distance + 0.5).clip(0, 1)[..., None]
    picture = inside * COLOURS[disc] + (1 - inside) * np.array(COLOURS[ground])
    hint = np.repeat(inside * 255, 3, axis=2)
    prompt = f"a {disc} sphere on {ground} ground"
    return picture.round().astype(np.uint8), hint.round().astype(np.uint8), distance < radius, prompt


def write_circles(folder: Path) -> None:
    """As fill50k lies on disk."""
    lines = []
    for seed in range(CIRCLES):
        picture, hint, _, prompt = circle(seed)
        for kind, pixels in (("target", picture), ("source", hint)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / f"{seed}.png")
        lines.append(json.dumps({"source": f"source/{seed}.png", "target": f"target/{seed}.png", "prompt": prompt}))
    (folder / "prompt.json").write_text("\n".join(lines))


def foreground(picture: np.ndarray) -> np.ndarray:
    """What of a picture (H,W,3) is no ground, (H,W): far from the border's colour, by Otsu's threshold."""
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    distance = np.linalg.norm(picture - np.median(border, axis=0), axis=2)
    counts, edges = np.histogram(distance, 64)
    below = counts.cumsum()[:-1]
    sums = (counts * (edges[:-1] + edges[1:]) / 2).cumsum()
    total, whole = counts.sum(), sums[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = (whole * below / total - sums[:-1]) ** 2 / (below * (total - below))
    return distance > edges[1:-1][np.nanargmax(apart)]


def overlap(pictures: Tensor, discs: list[np.ndarray]) -> float:
    """The mean intersection over union of what stands out in pictures (B,3,H,W) and the discs that should."""
    found = [foreground(picture.movedim(0, -1).cpu().numpy()) for picture in pictures]
    return float(np.mean([(a & b).sum() / (a | b).sum() for a, b in zip(found, discs)]))


def test_the_measure():
    pictures, _, discs, _ = zip(*(circle(seed) for seed in range(8)))
    as_tensors = torch.stack([torch.from_numpy(picture).movedim(-1, 0) / 255 for picture in pictures])
    assert overlap(as_tensors, list(discs)) > 0.95
    assert overlap(as_tensors.roll(1, 0), list(discs)) < 0.35


def fidelity_of(control_file: Path) -> tuple[float, float]:
    """On circles that were never seen, the overlap without and with the control."""
    control = load_control(*read_weights(control_file)).control
    model = LabModel.load(())
    controlled = LabModel(
        model.autoencoder, model.text_encoder, model.unet, {"circle": control.float().to(model.place)}
    )
    _, hints, discs, prompts = zip(*(circle(CIRCLES + i) for i in range(UNSEEN)))
    hint = torch.stack([torch.from_numpy(each).movedim(-1, 0) / 255 for each in hints])
    noise = scene_noise(range(UNSEEN))
    base = model.sample(prompts, noise, guidance_scale=2.0)
    followed = controlled.sample(prompts, noise, {"circle": hint}, guidance_scale=2.0)
    return overlap(base, list(discs)), overlap(followed, list(discs))


@pytest.mark.slow
def test_a_control_learns_circles_and_follows_unseen_ones(tmp_path: Path):
    write_circles(tmp_path / "circles")
    (tmp_path / "circles.toml").write_text(CONFIG)
    for room in ("data", "training"):
        here = [sys.executable, "-m", f"controlnet_core.{room}", str(tmp_path / "circles.toml")]
        done = subprocess.run(here, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ))
        assert done.returncode == 0, done.stderr
    with (tmp_path / "run" / "fidelity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    converged = rows[-1]["converged"]
    base, followed = fidelity_of(tmp_path / "run" / "control.safetensors")
    print(f"converged at step {converged}; overlap {base:.3f} without the control, {followed:.3f} with it")
    assert converged and int(converged) <= 450
    assert base < 0.4 and followed > 0.65
