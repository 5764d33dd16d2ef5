"""`dev.py fuzz`: files and texts as strangers and broken disks make them, and what the pack says of each.

Each case follows from the seed, its format and its number alone. It ends as *loaded*, *refused* (a sentence of the
pack), *raw* (any other error), *hang* (over 5 seconds of work) or *memory* (over 3 GiB): the last three are faults.
Where the system knows no alarms or limits (Windows), hangs and memory are not looked for.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..annotators import ANNOTATORS, keypoints, pipeline
from ..annotators.images import AnnotatorError
from ..controlnet_core.data import caching, pictures, sources
from ..controlnet_core.data.dataset import Dataset
from ..controlnet_core.data.sources import Item
from ..controlnet_core.data.writer import CachingOptions
from ..controlnet_core.dosing import block_weights, schedule
from ..controlnet_core.errors import ZeroConvError
from ..controlnet_core.files.loading import load_control, read_weights
from ..controlnet_core.files.saving import to_file, write
from ..controlnet_core.networks.controlnet import ControlNet
from ..controlnet_core.networks.lite import ControlNetLite
from ..controlnet_core.networks.lllite import ControlLLLite, LLLite
from ..controlnet_core.networks.t2i_adapter import AdapterConfig, T2IAdapter
from ..controlnet_core.networks.unet import UNetConfig
from ..controlnet_core.networks.union import UnionControlNet
from ..controlnet_core.training import checkpoint

FULL = 20_000
CHUNK = 100
SECONDS = 5.0
"""Of this process's own time, after which a case hangs; of the clock's, PATIENCE times as many."""

PATIENCE = 12
MEMORY = 3 << 30
SAID = 1000
"""Characters that a refusal may have."""

OUTCOMES = ("loaded", "refused", "raw", "hang", "memory")
FAULTS = ("raw", "hang", "memory")

SMALL = UNetConfig(
    model_channels=64, channel_mult=(1,), num_res_blocks=1, transformer_depth=(1,), context_dim=8, num_heads=0
)


LLLITE = "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


class Hang(BaseException):
    """The alarm: nothing that catches errors catches it."""


@dataclass(frozen=True)
class Format:
    """What is attacked: sound files by name, made once, of which a case changes one, and what reads their folder."""

    sound: Callable[[Path], None]
    read: Callable[[Path], Any]


# -- what is read -----------------------------------------------------------------------------------------------------


def _controls() -> dict[str, Mapping[str, Any]]:
    torch.manual_seed(0)
    networks = {
        "controlnet": ControlNet(SMALL),
        "lite": ControlNetLite(SMALL),
        "union": UnionControlNet(SMALL),
        "adapter": T2IAdapter(AdapterConfig((32, 64, 64, 64), blocks=1)),
        "lllite": ControlLLLite({LLLITE: LLLite(64, 8, 8, 1, False)}),
    }
    return {name: to_file(network, dtype=torch.float16)[0] for name, network in networks.items()}


def _weights(folder: Path) -> None:
    for name, weights in _controls().items():
        write(folder / f"{name}.safetensors", weights)
    write(folder / "diffusers.safetensors", to_file(ControlNet(SMALL), "diffusers", torch.float16)[0])


def _pickles(folder: Path) -> None:
    for name, weights in _controls().items():
        torch.save({"state_dict": weights, "epoch": 3}, folder / f"{name}.pth")
        torch.save(weights, folder / f"{name}.ckpt", _use_new_zipfile_serialization=False)


def _load(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        weights, metadata = read_weights(path)
        load_control(weights, metadata, name=path.name)


def _texts(folder: Path) -> None:
    frame = {"canvas_width": 64, "canvas_height": 64, "people": [{"pose_keypoints_2d": [1.0, 2.0, 1.0] * 18}]}
    texts = {
        "keyframes": "0: 1, 0.5: 0.3 ease\n1: 0 hold",
        "weights": "1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0, 1",
        "pose": json.dumps([frame]),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _read_texts(folder: Path) -> None:
    """Texts of a canvas may hold half characters, as JSON does: so do these, for bytes that are no text."""
    texts = {path.name: path.read_bytes().decode("utf-8", "surrogateescape") for path in folder.iterdir()}
    frames = schedule.parse(texts["keyframes"])
    schedule.Schedule(frames, "percent", ())
    for frame in keypoints.read_frames(texts["pose"]) or []:
        keypoints.read_frame(keypoints.with_canvas(frame, 64, 64), 64, 64)
    numbers = [part for part in texts["weights"].split(",") if _is_number(part)]
    block_weights.BlockWeights("custom", skips=tuple(map(float, numbers))).weights(12)


def _is_number(text: str) -> bool:
    with suppress(ValueError):
        float(text)
        return True
    return False


def _pictures(folder: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    for suffix in ("png", "jpg", "webp", "gif", "tif", "bmp", "tga"):
        data = io.BytesIO()
        Image.fromarray(picture).save(data, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
        (folder / f"a.{suffix}").write_bytes(data.getvalue())


def _read_pictures(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        pictures.size_of(path)
        picture = np.asarray(pictures.read(path))
        (canny,) = (annotator for annotator in ANNOTATORS if annotator.name == "canny")
        pipeline.annotate(canny, picture, 64)


def _dataset(folder: Path) -> None:
    hint = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    items = [Item(str(i), hint, f"prompt {i}", hint) for i in range(3)]

    def prompt(text: str) -> tuple[torch.Tensor, None]:
        return torch.full((77, 8), float(len(text))), None

    def latents(batch: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(batch, 8)[:, [0, 1, 2, 0]]

    for _ in caching.make(folder, items, latents, prompt, None, CachingOptions(resolution=64)):
        pass
    listed = [{"image": "a.png", "text": "a cat", "hint": "a.png"}, {"image": "b.png", "text": ["x"]}]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, listed)), encoding="utf-8")
    (folder / "metadata.csv").write_text("file_name,text\na.png,a cat\n", encoding="utf-8")


def _read_dataset(folder: Path) -> None:
    dataset = Dataset.open(folder)
    for index in range(min(len(dataset), 8)):
        dataset.read([index])
    with suppress(sources.SourceError):
        sources.read(folder)


def _checkpoint(folder: Path) -> None:
    numbers = torch.arange(12.0).reshape(3, 4)
    facts = {"options": {"seed": 1}, "seconds": 1.5, "measured": [[0, 0.5]], "scaler": {}}
    checkpoint.save(folder, checkpoint.Checkpoint(7, {"model.a": numbers, "optimizer.exp_avg.a": numbers}, facts), 1)


FORMATS = {
    "weights": Format(_weights, _load),
    "pickles": Format(_pickles, _load),
    "texts": Format(_texts, _read_texts),
    "pictures": Format(_pictures, _read_pictures),
    "datasets": Format(_dataset, _read_dataset),
    "checkpoints": Format(_checkpoint, checkpoint.newest),
}


@cache
def _sound(name: str) -> dict[str, bytes]:
    """The sound files of a format."""
    with tempfile.TemporaryDirectory() as folder:
        FORMATS[name].sound(Path(folder))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.name != ".lock"}


# -- what is done to it -----------------------------------------------------------------------------------------------


WORDS = [
    b"\x00", b"\xff" * 8, b"\xed\xa0\x80", b"NaN", b"1e308", b"-1", b"9" * 5000, b"[" * 3000, b'"', b"null", b"{}",
    b"[]",
    b"999999999", b"true", b"-0", b"../../", b"\\ud800", b"F64", b"BOOL", b"__metadata__", b": 1e999",
]  # fmt: skip


def mutated(data: bytes, draw: random.Random) -> bytes:
    """`data` with one to four changes; where it is a safetensors file, half of them in its header."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        ends = len(data)
        if len(data) > 8 and draw.random() < 0.5:
            ends = min(len(data), 8 + struct.unpack("<Q", data[:8])[0])
        place = draw.randrange(ends + 1)
        kind = draw.randrange(7)
        if kind == 0 and place < len(data):
            data = data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
        elif kind == 1:
            data = data[:place]
        elif kind == 2:
            data = data[:place] + draw.choice(WORDS) + data[place:]
        elif kind == 3:
            word = draw.choice(WORDS)
            data = data[:place] + word + data[place + len(word) :]
        elif kind == 4:
            data = data[:place] + data[place + draw.randrange(1, 64) :]
        elif kind == 5:
            length = draw.randrange(1, 200)
            data = data[:place] + data[place : place + length] * draw.randrange(2, 5) + data[place + length :]
        else:
            digits = [i for i in range(min(ends, 20_000)) if data[i : i + 1].isdigit()]
            if digits:
                place = draw.choice(digits)
                data = data[:place] + str(draw.choice((0, 9, 255, 2**31, 2**63, -1))).encode() + data[place + 1 :]
    return data


def case(name: str, seed: int, number: int) -> tuple[str, str]:
    """How one case ends, and in what words."""
    draw = random.Random(zlib.crc32(f"{seed} {name} {number}".encode()))
    sound = _sound(name)
    changed = draw.choice(sorted(sound))
    # A format of many files of one kind is read by the one that is changed.
    alone = name in ("weights", "pickles", "pictures")
    files = {changed: sound[changed]} if alone else dict(sound)
    files[changed] = mutated(files[changed], draw)
    with tempfile.TemporaryDirectory() as folder:
        for file, data in files.items():
            (Path(folder) / file).write_bytes(data)
        try:
            with _alarm():
                FORMATS[name].read(Path(folder))
        except (ZeroConvError, AnnotatorError) as error:
            said = str(error)
            fit = len(said) <= SAID and said.isprintable()
            return ("refused" if fit else "raw"), said[:300]
        except Hang:
            return "hang", changed
        except MemoryError as error:
            return "memory", str(error)[:300]
        except Exception as error:  # noqa: BLE001 (whatever it is, it is what is looked for)
            # torch's allocator has no MemoryError
            short = "not enough memory" in str(error)
            return ("memory" if short else "raw"), f"{type(error).__name__}: {str(error)[:300]}"
    return "loaded", ""


@contextmanager
def _alarm() -> Any:
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: object) -> None:
        raise Hang

    timers = {signal.ITIMER_PROF: (signal.SIGPROF, SECONDS), signal.ITIMER_REAL: (signal.SIGALRM, PATIENCE * SECONDS)}
    before = {number: signal.signal(number, ring) for number, _ in timers.values()}
    try:
        for timer, (_, seconds) in timers.items():
            signal.setitimer(timer, seconds)
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


# -- many cases -------------------------------------------------------------------------------------------------------


def _begin() -> None:
    """A worker: one thread, quiet, and no more memory than it may have."""
    torch.set_num_threads(1)
    import logging

    logging.disable()
    with suppress(ImportError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        own = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, resource.RLIM_INFINITY))


@cache
def _warm(name: str) -> None:
    """Read the sound files once: what libraries load at their first use is no case's time."""
    with tempfile.TemporaryDirectory() as folder:
        for file, data in _sound(name).items():
            (Path(folder) / file).write_bytes(data)
        FORMATS[name].read(Path(folder))


def chunk(name: str, seed: int, first: int, last: int) -> list[tuple[int, str, str]]:
    """The cases first ... last - 1: number, outcome and words."""
    _warm(name)
    return [(number, *case(name, seed, number)) for number in range(first, last)]


def main(arguments: Sequence[str]) -> int:
    """Try changed files and texts; 1 where a fault was found."""
    parser = argparse.ArgumentParser(prog="dev.py fuzz", description=main.__doc__)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--cases", type=int, default=FULL, help="of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--output", type=Path, default=Path("output") / "fuzz", help="goes on from what is there")
    chosen = parser.parse_args(arguments)
    chosen.output.mkdir(parents=True, exist_ok=True)
    print(f"{'format':<12}{'tried':>8}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES), flush=True)
    faults = 0
    for name in chosen.formats:
        path = chosen.output / f"{name}-{chosen.seed}.jsonl"
        done = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        counts = Counter(outcome for number, outcome, _ in done if number < chosen.cases)
        starts = range(len(done) // CHUNK * CHUNK, chosen.cases, CHUNK)
        with ProcessPoolExecutor(chosen.processes, initializer=_begin) as pool, path.open("a", encoding="utf-8") as log:
            given = [(name, chosen.seed, first, min(first + CHUNK, chosen.cases)) for first in starts]
            try:
                for results in pool.map(chunk, *zip(*given)) if given else ():
                    counts.update(outcome for number, outcome, _ in results if number >= len(done))
                    log.write("".join(json.dumps(each) + "\n" for each in results if each[0] >= len(done)))
                    log.flush()
            except BrokenProcessPool:
                print(f"{name}: a process died after case {sum(counts.values())}")
                return 1
        faults += sum(counts[fault] for fault in FAULTS)
        row = "".join(f"{counts[outcome]:>9}" for outcome in OUTCOMES)
        print(f"{name:<12}{sum(counts.values()):>8}{row}", flush=True)
        for line in path.read_text(encoding="utf-8").splitlines():
            number, outcome, said = json.loads(line)
            if outcome in FAULTS and number < chosen.cases:
                print(f"    {name} {number}: {outcome}: {said}")
    return int(faults > 0)
