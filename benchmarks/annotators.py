"""How fast annotators are beside controlnet-aux's, both in one run.

Both sides load the same files (seeded random weights in the published layout) and see the same photograph, in turns, so
that whatever else the machine does hits both. The first run loads the files and makes a hint, the second makes another
with the network at hand. Both read a float picture and give a float hint, as nodes of ComfyUI do: ours is what the node
runs, `pipeline.annotate`; theirs reads and gives bytes, and is brought to them and from them.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from ..annotators import ANNOTATORS, pipeline
from ..annotators.networks import NETWORKS
from ..annotators.pose import draw_pose
from ..devtools import DevError
from . import weights

Run = Callable[[np.ndarray], np.ndarray]
"""A picture (H,W,3) float32 0..1 becomes a hint like it."""
Load = Callable[[Path, str], Run]
"""Weights in a folder and a device become something that makes hints of pictures."""


@dataclass(frozen=True)
class Case:
    """One annotator on both sides, and the `files` that they load; without any there is nothing for a GPU to do."""

    name: str
    ours: Load
    theirs: Load
    files: tuple[str, ...] = ()


@dataclass
class Times:
    """Seconds of every first and second run of one side."""

    first: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)


def annotator(name: str) -> Load:
    """Ours, by its name in the list; with all parameters as in the list."""
    (record,) = [annotator for annotator in ANNOTATORS if annotator.name == name]

    def load(folder: Path, device: str) -> Run:
        networks = []
        for wanted in record.networks:
            (network,) = [network for network in NETWORKS if network.name == wanted]
            networks.append(network.load([folder / file.name for file in network.files]).to(device))
        return lambda image: pipeline.annotate(record, image, min(image.shape[:2]), networks=networks)[0]

    return load


def detector(name: str, **parameters: Any) -> Load:
    """Theirs, by the name of its class; with all parameters as published but those given."""

    def load(folder: Path, device: str) -> Run:
        made = getattr(import_module("controlnet_aux"), name)
        made = made.from_pretrained(str(folder)).to(device) if hasattr(made, "from_pretrained") else made()

        def run(image: np.ndarray) -> np.ndarray:
            side = min(image.shape[:2])
            return made(image, detect_resolution=side, image_resolution=side, output_type="np", **parameters)

        return in_bytes(run)

    return load


def in_bytes(run: Run) -> Run:
    """As comfyui_controlnet_aux calls them: bytes of a float picture go in, and floats are made of what comes out."""
    return lambda image: run((image * 255).astype(np.uint8)).astype(np.float32) / 255


def people(height: int, width: int) -> np.ndarray:
    """Three people (3,18,3) in pixels, all joints seen, at random places."""
    random = np.random.default_rng(0)
    return np.concatenate([random.uniform(0.1, 0.9, (3, 18, 2)) * (width, height), np.ones((3, 18, 1))], axis=2)


def our_pose(folder: Path, device: str) -> Run:  # noqa: ARG001  (nothing to load)
    """Three people drawn by us, at the picture's size."""
    return lambda image: draw_pose(people(*image.shape[:2]), *image.shape[:2])


def their_pose(folder: Path, device: str) -> Run:  # noqa: ARG001  (nothing to load)
    """The same three people drawn by them."""
    from controlnet_aux.open_pose.body import Keypoint
    from controlnet_aux.open_pose.util import draw_bodypose

    def run(image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        canvas = np.zeros(image.shape, np.uint8)
        for person in people(height, width):
            canvas = draw_bodypose(canvas, [Keypoint(x / width, y / height) for x, y, _ in person])
        return canvas.astype(np.float32) / 255

    return run


def their_teed(folder: Path, device: str) -> Run:
    """Their TEED, which knows no name of a file and no size but the picture's."""
    from controlnet_aux import TEEDdetector

    made: Any = TEEDdetector.from_pretrained(str(folder), *TEED).to(device)
    return in_bytes(lambda image: made(image, detect_resolution=min(image.shape[:2]), output_type="np"))


HED, TEED = ("ControlNetHED.pth",), ("5_model.pth",)
CASES = (
    Case("canny", annotator("canny"), detector("CannyDetector")),
    Case("pose drawing", our_pose, their_pose),
    Case("hed", annotator("hed"), detector("HEDdetector", safe=True), HED),
    Case("scribble_hed", annotator("scribble_hed"), detector("HEDdetector", safe=True, scribble=True), HED),
    # Their detector has the fine and the coarse network at all times.
    Case(
        "lineart_realistic",
        annotator("lineart_realistic"),
        detector("LineartDetector"),
        ("sk_model.pth", "sk_model2.pth"),
    ),
    Case("lineart_anime", annotator("lineart_anime"), detector("LineartAnimeDetector"), ("netG.pth",)),
    Case("mlsd", annotator("mlsd"), detector("MLSDdetector"), ("mlsd_large_512_fp32.pth",)),
    Case("teed", annotator("teed"), their_teed, TEED),
)


def measure(case: Case, folder: Path, device: str, image: np.ndarray, repeats: int) -> tuple[Times, Times, float]:
    """The times of both sides, and the share of pixels on which their hints are more than one level of 255 apart."""
    sides = ((case.ours, Times()), (case.theirs, Times()))
    # Not counted: imports, and what the device sets up once.
    ours, theirs = (load(folder, device)(image) for load, _ in sides)
    apart = float((np.abs(ours - theirs) * 255 > 1.001).any(axis=2).mean())
    for turn in range(repeats):
        for load, times in sides if turn % 2 == 0 else sides[::-1]:
            start = time.perf_counter()
            run = load(folder, device)
            run(image)
            loaded = time.perf_counter()
            run(image)
            times.first.append(loaded - start)
            times.second.append(time.perf_counter() - loaded)
    return sides[0][1], sides[1][1], apart


def heading(device: str, resolution: int, repeats: int) -> str:
    """What is measured and on what, and the table's head."""
    chip = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    where = f"torch {torch.__version__}, {platform.system()} {platform.machine()}"
    columns = f"{'ours':>9} {'aux':>9} {'aux/us':>7} |"
    return (
        f"{device} ({chip}), {resolution}x{resolution}, medians of {repeats} runs in ms, {where}\n"
        f"{'':<18} |{'first run (load + run)':^28}|{'second run':^28}|\n"
        f"{'':<18} |{columns}{columns} {'fastest':>7} {'spread':>7} {'differing':>10}"
    )


def row(name: str, ours: Times, theirs: Times, apart: float) -> str:
    """One line of the table: medians in ms, theirs / ours, the same of the fastest second runs, and the spread."""
    cells = [f"{name:<18}"]
    for mine, other in ((ours.first, theirs.first), (ours.second, theirs.second)):
        cells.append(f"{median(mine) * 1e3:9.1f} {median(other) * 1e3:9.1f} {median(other) / median(mine):7.2f}")
    fastest = min(theirs.second) / min(ours.second)
    spread = max(max(times.second) / min(times.second) for times in (ours, theirs))
    return " |".join([*cells, f" {fastest:7.2f} {spread:7.2f} {apart:10.2%}"])


def main(arguments: list[str]) -> int:
    """Print one table for each device; 0 when it is done."""
    parser = argparse.ArgumentParser(prog="dev.py bench annotators", description=__doc__)
    parser.add_argument("--only", help="names of cases, with commas between them; left out: all")
    parser.add_argument("--resolution", type=int, default=512, help="sides of the square picture, a multiple of 64")
    parser.add_argument("--repeats", type=int, default=7, help="how often each side runs")
    given = parser.parse_args(arguments)
    names = [case.name for case in CASES]
    wanted = given.only.split(",") if given.only else names
    if unknown := [name for name in wanted if name not in names]:
        raise DevError(f"there is no case {', '.join(unknown)}; there are {', '.join(names)}")
    if given.resolution < 64 or given.resolution % 64 or given.repeats < 1:
        raise DevError("--resolution needs a multiple of 64 and --repeats at least 1")
    if find_spec("controlnet_aux") is None:
        raise DevError("controlnet-aux is not installed: python -m pip install controlnet-aux==0.0.10")
    cases = [case for case in CASES if case.name in wanted]
    image = photograph(given.resolution)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    with tempfile.TemporaryDirectory() as folder:
        weights.write(Path(folder), sorted({name for case in cases for name in case.files}))
        for device in devices:
            print(heading(device, given.resolution, given.repeats))
            for case in cases:
                if device == "cpu" or case.files:
                    print(row(case.name, *measure(case, Path(folder), device, image, given.repeats)), flush=True)
    print("fastest: aux/us of the fastest second runs, which a busy machine disturbs least")
    print("spread: slowest second run / fastest of the same side; differing: pixels more than one level of 255 apart")
    if "cuda" not in devices:
        print("torch finds no CUDA device here: only the CPU was measured")
    return 0


def photograph(side: int) -> np.ndarray:
    """A portrait with a rocket, (side,side,3) float32 0..1."""
    import cv2
    from skimage.data import astronaut

    return cv2.resize(astronaut(), (side, side), interpolation=cv2.INTER_AREA) / np.float32(255)
