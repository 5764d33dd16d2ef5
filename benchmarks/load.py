"""What it takes to load a ControlNet: ours beside the host's own loader, on the same file of full size.

Each side takes its turns in processes of its own, with a real ComfyUI and a random model in them: it loads the file,
takes a first sampling step, and loads the file once more while the first is in use. The file is fp16, as published, and
lies in the system's cache. `growth` is the most memory since before the load, first step included, without what a step
takes that has no control; `private` what the load leaves in memory that is no mapped file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..controlnet_core.networks.controlnet import ControlNet
from ..devtools import DevError
from . import step
from ._report import machine
from .step import CONFIGS, RESULTS, Setting
from .training import forget_peak, peak, status, synchronize, used

SIDES = ("ours", "native")


@dataclass(frozen=True)
class Loaded:
    """Seconds of the load, of the first step, and of the second load; bytes of `growth` and `private`."""

    load: float
    first_step: float
    second_load: float
    growth: int
    private: int


def work(connection: Connection, side: str, setting: Setting, folder: Path) -> None:
    """One side's process: sends a `Loaded`."""
    with step.host(setting.device):
        model, hint = step.host_model(setting), torch.rand(1, 3, setting.size, setting.size)
        files = import_module("zeroconv.nodes.host.files")  # after the host is there
        import_module("folder_paths").add_model_folder_path("controlnet", str(folder))
        native = import_module("comfy.controlnet")

        def load() -> Any:
            return (
                files.load("file.safetensors")
                if side == "ours"
                else native.load_controlnet(str(folder / "file.safetensors"))
            )

        def first(*control: Any) -> tuple[float, int]:
            """Seconds of a sampling's first step, and the most memory in it."""
            options = {"control": control[0], "control_apply_to_uncond": False} if control else {}
            prompts = [step.prompt(setting, seed, **options) for seed in (2, 3)]
            found = []

            def once(take: step.Step) -> None:
                start = time.perf_counter()
                take()
                synchronize(setting.device)
                found.append(time.perf_counter() - start)

            forget_peak(setting.device)
            step.sampling(model, prompts, setting, warm=False)(once)
            return found[0], peak(setting.device)

        first()
        before, (_, bare) = used(setting.device), first()
        held, start = status("RssAnon"), time.perf_counter()
        forget_peak(setting.device)
        control = load()
        seconds = time.perf_counter() - start
        loaded, private = peak(setting.device) - before, status("RssAnon") - held
        taken, stepped = first(control.copy().set_cond_hint(hint, 1.0, (0.0, 1.0)))
        start = time.perf_counter()
        load()
        again = time.perf_counter() - start
    connection.send(Loaded(seconds, taken, again, max(loaded, stepped - bare), private))


def measure(setting: Setting, rounds: int) -> dict[str, list[Loaded]]:
    """What each side took, in turns whose order turns round each time."""
    found: dict[str, list[Loaded]] = {side: [] for side in SIDES}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        network = step.fill(ControlNet(setting.config, dtype=torch.float16))
        import_module("safetensors.torch").save_file(dict(network.state_dict()), Path(temporary) / "file.safetensors")
        del network
        for turn in range(rounds):
            for side in SIDES[:: 1 if turn % 2 == 0 else -1]:
                ours, theirs = context.Pipe()
                process = context.Process(target=work, args=(theirs, side, setting, Path(temporary)))
                process.start()
                theirs.close()
                try:
                    found[side].append(ours.recv())
                except EOFError as error:
                    raise DevError(f"{side!r} ended before it was done: see above") from error
                process.join()
    return found


def table(found: dict[str, list[Loaded]]) -> str:
    """A line for each side, in Markdown: medians, and the lowest and highest."""
    lines = [
        "| side | load, s | first step, s | second load, s | growth, MiB | private, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for side, rounds in found.items():
        times = [[getattr(each, name) for each in rounds] for name in ("load", "first_step", "second_load")]
        cells = [f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})" for values in times]
        cells += [f"{median(getattr(each, name) for each in rounds) / 2**20:.0f}" for name in ("growth", "private")]
        lines.append(" | ".join([f"| {side}", *cells]) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Print a table, and leave it with the numbers in the results; 0 when it is done."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="dev.py bench load", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--family", choices=tuple(CONFIGS), default="SD1.5")
    parser.add_argument("--size", type=int, default=64, help="sides of the square picture of the first step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder for table and numbers")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not cuda:
        raise DevError("torch finds no CUDA device here: choose --device cpu")
    if given.size % 64 or given.size < 64 or given.rounds < 1:
        raise DevError("--size needs a multiple of 64 and --rounds at least 1")
    setting = Setting(given.device, given.family, given.size, 1)
    found = measure(setting, given.rounds)
    command = f"python dev.py bench load {' '.join(arguments)}".rstrip()
    place = machine(given.device)
    text = f"`{command}`\n\n{setting}; {place}; {given.rounds} rounds\n\n{table(found)}\n"
    print(text)
    given.output.mkdir(parents=True, exist_ok=True)
    name = f"load_{given.device}_{given.family.lower().replace('.', '')}"
    (given.output / f"{name}.md").write_text(text)
    numbers = {side: [asdict(each) for each in rounds] for side, rounds in found.items()}
    (given.output / f"{name}.json").write_text(
        json.dumps({"command": command, "machine": place, **asdict(setting), "sides": numbers}, indent=1) + "\n"
    )
    return 0
