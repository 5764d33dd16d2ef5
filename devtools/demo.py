"""The demo: depth and pose steer a picture on a real ComfyUI; pictures, a contact sheet and numbers in `output/`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from . import DEV, ROOT
from .comfyui import HostServer, find, title

WORKFLOWS = ROOT / "workflows" / "api"
OUTPUT = ROOT / "output"
BAR = 30


def main(arguments: list[str]) -> int:
    """Run compare.json (one seed: without control, depth, pose, both) and depth_pose.json; print what came of it."""
    parser = argparse.ArgumentParser(prog="dev.py demo")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the pictures (default: %(default)s)")
    output = parser.parse_args(arguments).output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    comfy = find()
    host = HostServer(DEV / "demo", comfy)
    with stage(f"start ComfyUI ({comfy})"):
        host.start()
    try:
        compared = run_workflow(host, "compare", output)
        run_workflow(host, "depth_pose", output)
    finally:
        host.stop()
    sheet = output / "contact_sheet.png"
    with stage("contact sheet"):
        contact_sheet(compared).save(sheet)
    print_scores(read_workflow("compare"), compared)
    print(f"\nlook at {sheet}\nall of it took {time.monotonic() - started:.0f} s")
    return 0


def read_workflow(name: str) -> dict[str, Any]:
    """A shipped graph in API format."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def run_workflow(host: HostServer, name: str, output: Path) -> dict[str, Path]:
    """The pictures that a shipped graph saves, by the title of the node that saved them, in the order of node ids."""
    graph = read_workflow(name)
    with stage(f"run workflows/api/{name}.json"):
        run = host.run(graph, show_progress)
        pictures = {}
        for node, images in sorted(host.images(run).items(), key=lambda item: int(item[0])):
            for number, image in enumerate(images):
                label = title(graph, node) + (f" {number + 1}" if len(images) > 1 else "")
                pictures[label] = output / f"{name}_{label.lower().replace(' ', '_')}.png"
                pictures[label].write_bytes(image)
    return pictures


def print_scores(graph: dict[str, Any], pictures: dict[str, Path]) -> None:
    """Say in numbers how well each picture follows the scene that its hints came from."""
    (scene,) = [node["inputs"] for node in graph.values() if node["class_type"] == "LabScene"]
    files = [f"{label}={path}" for label, path in pictures.items()]
    import_module("zeroconv.lab.commands").main(["score", "--scene", json.dumps(scene), *files])


def contact_sheet(pictures: dict[str, Path], columns: int = 3, side: int = 256) -> Any:
    """One picture (PIL) of all of them, square, with their labels under them, `columns` in a row."""
    from PIL import Image, ImageDraw, ImageFont  # of the environment, like the host

    margin, line = 12, 28
    rows = -(-len(pictures) // columns)
    size = (columns * (side + margin) + margin, rows * (side + line + margin) + margin)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, (label, path) in enumerate(pictures.items()):
        left = margin + (index % columns) * (side + margin)
        top = margin + (index // columns) * (side + line + margin)
        picture = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(picture, (left, top))
        draw.text((left, top + side + 4), label, "black", ImageFont.load_default(16))
    return sheet


@contextmanager
def stage(name: str) -> Iterator[None]:
    """One line on the terminal for one stage, with its seconds."""
    print(f"{name} ...", end="\n" if sys.stdout.isatty() else " ", flush=True)
    started = time.monotonic()
    yield
    clear_line()
    print(f"{'  ' if sys.stdout.isatty() else ''}done in {time.monotonic() - started:.1f} s", flush=True)


def show_progress(node: str, done: int, total: int) -> None:
    """A bar for the running node, redrawn in place; nothing where the output is a file."""
    if not sys.stdout.isatty():
        return
    filled = BAR * done // total if total else 0
    count = f" {done}/{total}" if total else ""
    clear_line()
    print(f"  [{'#' * filled}{'.' * (BAR - filled)}] {node}{count}", end="", flush=True)


def clear_line() -> None:
    """Empty the terminal's last line."""
    if sys.stdout.isatty():
        print("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r", end="", flush=True)
