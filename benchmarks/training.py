"""How fast ControlNet training is, and how much memory it takes, beside the same written with diffusers.

Three sides take turns, each in a process of its own: our loop on a cached dataset; training as diffusers' published
examples do it (examples/controlnet/train_controlnet.py: pictures and prompts encoded at every step, the ControlNet in
fp32 under autocast, what is locked in the precision's dtype, AdamW and everything else at its defaults;
train_controlnet_sdxl.py: the same, but prompts encoded once and the VAE in fp32); and that on cached latents and text
embeddings. Same layout, batch, resolution, precision and attention kernels, random weights.

In diffusers' favour: its pictures are decoded and its batches lie ready in memory, nothing of its is logged or saved.
The VAE and the text encoder are reduced as the UNet is, to the nearest size that their norms and heads allow.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..controlnet_core.networks.unet import SD15
from ..devtools import DevError
from . import _report
from ._training_sides import MODELS, SIDES, Setting, write_dataset

SWITCH = {"off": (False,), "on": (True,), "both": (False, True)}


@dataclass(frozen=True)
class Round:
    """Seconds for each step, those of them that processors worked, and the most bytes in use since the first round."""

    seconds: float
    work: float
    memory: int


def work(connection: Connection, side: str, setting: Setting, folder: Path) -> None:
    """One side's process: for each number received, take so many steps and send a `Round`."""
    from diffusers.models.controlnets import controlnet  # noqa: F401  (each side imports the same)
    from transformers import CLIPTextModel  # noqa: F401

    torch.manual_seed(0)
    before = used(setting.device)
    steps = SIDES[side](setting, folder)
    for _ in range(3):  # the optimizer's state, and what the device sets up once; graphs are captured in the second
        next(steps)
    gc.collect()
    forget_peak(setting.device)
    connection.send(None)
    while True:
        count = connection.recv()
        synchronize(setting.device)
        start, worked = time.perf_counter(), time.process_time()
        for _ in range(count):
            next(steps)
        synchronize(setting.device)
        seconds, work = (time.perf_counter() - start) / count, (time.process_time() - worked) / count
        connection.send(Round(seconds, work, peak(setting.device) - before))


class Worker:
    """A side's process, from its first steps on."""

    def __init__(self, side: str, setting: Setting, folder: Path):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, side, setting, folder), daemon=True)
        self._process.start()
        theirs.close()
        self._receive(side)
        self._side = side

    def run(self, steps: int) -> Round:
        """So many steps."""
        self._connection.send(steps)
        return self._receive(self._side)

    def _receive(self, side: str) -> Any:
        try:
            return self._connection.recv()
        except EOFError as error:
            raise DevError(f"{side!r} ended before it was done: see above; if memory ran out, lower --batch") from error

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # at once: our loop would save a checkpoint first
        self._process.join()


def measure(setting: Setting, steps: int, rounds: int) -> dict[str, list[Round]]:
    """The rounds of each side, which take turns, in an order that turns round each time."""
    found: dict[str, list[Round]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        write_dataset(folder, setting, 4 * setting.batch)
        # On a GPU each side has the memory to itself; on a CPU all are kept, so that turns follow closely.
        kept = {side: stack.enter_context(Worker(side, setting, folder)) for side in SIDES if setting.device == "cpu"}
        for turn in range(rounds):
            for side in list(SIDES)[:: 1 if turn % 2 == 0 else -1]:
                if kept:
                    found[side].append(kept[side].run(steps))
                else:
                    with Worker(side, setting, folder) as worker:
                        found[side].append(worker.run(steps))
    return found


def used(device: str) -> int:
    """Bytes of GPU memory that the allocator has reserved, or in use by this process."""
    return torch.cuda.memory_reserved() if device == "cuda" else status("VmRSS")


def peak(device: str) -> int:
    """The most of what `used` gives since `forget_peak`."""
    return torch.cuda.max_memory_reserved() if device == "cuda" else status("VmHWM")


def forget_peak(device: str) -> None:
    """Let `peak` begin anew."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif STATUS.exists():
        STATUS.with_name("clear_refs").write_text("5")


STATUS = Path("/proc/self/status")


def status(name: str) -> int:
    """A number of bytes that Linux tells about this process; 0 on other systems."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


# -- the table --------------------------------------------------------------------------------------------------------


def table(found: dict[str, list[Round]], device: str) -> str:
    """A line for each side: medians, and ours beside it: how many times faster, and what share of the memory."""
    first, *_ = found
    head = f"{'':<17} | {'steps/s':>7} {'ours is faster':>21} {'by processor time':>21}"
    lines = [f"{head} | {'MiB':>7} {'ours takes':>21}"]
    for side, rounds in found.items():
        pairs = list(zip(found[first], rounds))
        faster = _spread([theirs.seconds / mine.seconds for mine, theirs in pairs])
        # What other programs do on the machine hardly changes this one; on a GPU it says nothing.
        by_work = _spread([theirs.work / mine.work for mine, theirs in pairs]) if device == "cpu" else "-"
        smaller = _spread([mine.memory / theirs.memory for mine, theirs in pairs]) if rounds[0].memory else "-"
        if side == first:
            faster = by_work = smaller = ""
        speed, size = 1 / median(each.seconds for each in rounds), median(each.memory for each in rounds) / 2**20
        line = f"{side:<17} | {speed:7.3f} {faster:>21} {by_work:>21} | {size:7.0f} {smaller:>21}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _spread(ratios: list[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def machine(device: str) -> str:
    """What it runs on."""
    from diffusers import __version__

    return f"{_report.machine(device)}, diffusers {__version__}"


def main(arguments: list[str]) -> int:
    """Print a table for each of the chosen settings; 0 when it is done."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="dev.py bench training", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--model", choices=MODELS, default="SD1.5")
    parser.add_argument("--width", type=int, help="channels of the UNet, a multiple of 32 (SDXL: 64); 320 as published")
    parser.add_argument("--encoders", type=int, help="the same for VAE and text encoder; left out: as the UNet")
    parser.add_argument("--batch", type=int, help="left out: 4, SDXL 1")
    parser.add_argument("--resolution", type=int, help="sides of the square pictures, a multiple of 64")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=2, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--checkpointing", choices=SWITCH, default="both", help="gradient checkpointing")
    parser.add_argument("--graphs", choices=SWITCH, help="ours as CUDA graphs; left out: both on a GPU, off on a CPU")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not cuda:
        raise DevError("torch finds no CUDA device here: choose --device cpu")
    width = given.width or (SD15.model_channels if given.device == "cuda" else 64)
    published = 1024 if given.model == "SDXL" else 512
    side = given.resolution or (published if given.device == "cuda" else 256)
    batch = (1 if given.model == "SDXL" else 4) if given.batch is None else given.batch
    unit = 64 if given.model == "SDXL" else 32
    if width % unit or side % 64 or min(width, side, batch, given.steps, given.rounds) < 1:
        raise DevError(f"--width needs a multiple of {unit}, --resolution one of 64; the other numbers at least 1")
    setting = Setting(given.device, given.model, width, given.encoders or width, batch, side, given.precision)
    print(f"python dev.py bench training {' '.join(arguments)}".rstrip())
    print(f"{machine(given.device)}; medians of {given.rounds} rounds of {given.steps} steps (lowest to highest)")
    graphs = given.graphs or ("both" if given.device == "cuda" else "off")
    for captured, checkpointing in product(SWITCH[graphs], SWITCH[given.checkpointing]):
        chosen = replace(setting, checkpointing=checkpointing, graphs=captured)
        print(f"\n{chosen}")
        print(table(measure(chosen, given.steps, given.rounds), given.device), flush=True)
    return 0
