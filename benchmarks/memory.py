"""What a training takes of a GPU's memory, option by option: counted on tensors without numbers, on any machine.

The networks of full size are run forward and backward as a training does, and every storage that lives is counted
(controlnet_core/training/memory.py). Nothing is timed, and no GPU is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..controlnet_core.networks.unet import SD15, SD21, SDXL, UNetConfig
from ..controlnet_core.training.memory import GB, RESERVE, Counter, Examples, Needs
from ..controlnet_core.training.options import TrainingOptions
from ._report import leave
from .step import RESULTS

FAMILIES = {"sd15": (SD15, 512), "sd21": (SD21, 768), "sdxl": (SDXL, 1024)}

SAVING: tuple[dict[str, Any], ...] = (
    {"recompute": "off"},
    {"recompute": "on"},
    {"gradient_checkpointing": True},
    {"optimizer_in_ram": True},
    {"base_weights": "fp8"},
    {"control_weights": "bf16"},
)
"""Each line of the table adds one to those above it, in the order in which `fit_memory` takes them."""

OTHERS: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": True, "optimizer": "adamw8bit"},
    {"gradient_checkpointing": True, "optimizer": "adamw8bit", "control_weights": "bf16"},
    {"gradient_checkpointing": True, "optimizer": "lion"},
    {"gradient_checkpointing": True, "kind": "control_lora"},
)
"""What a user chooses and no program: each line for itself."""


@dataclass(frozen=True)
class Row:
    """Gigabytes on the GPU under `options`: `total` with the reserve; `ram` beside it in main memory."""

    options: str
    weights: float
    optimizer: float
    step: float
    total: float
    ram: float


def rows(config: UNetConfig, size: int, batch: int) -> Iterator[Row]:
    """The table, line by line as it is counted."""
    counter = Counter(config, Examples(size, size))
    taken: dict[str, Any] = {}
    for i, added in enumerate(SAVING):
        taken |= added
        yield _row(f"{'+ ' if i else ''}{_said(added)}", counter.needs(_options(taken, batch)))
    for chosen in OTHERS:
        yield _row(_said(chosen), counter.needs(_options(chosen, batch)))


def _options(chosen: dict[str, Any], batch: int) -> TrainingOptions:
    return TrainingOptions(batch_size=batch, **{"recompute": "on", **chosen})


def _said(chosen: dict[str, Any]) -> str:
    return ", ".join(f"{name} {'on' if value is True else value}" for name, value in chosen.items())


def _row(options: str, needs: Needs) -> Row:
    return Row(
        options, *(round(n / GB, 2) for n in (needs.weights, needs.optimizer, needs.step, needs.total, needs.ram))
    )


HEAD = "| options | weights | optimizer | step | on the GPU, GB | in main memory, GB |\n|---|---|---|---|---|---|"


def line(row: Row) -> str:
    """A row of the table."""
    return "| " + " | ".join(str(value) for value in asdict(row).values()) + " |"


def main(arguments: list[str]) -> int:
    """Count, print the table and leave it in a folder."""
    parser = argparse.ArgumentParser(prog="dev.py bench memory", description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, default="sd15")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels; the family's own without it")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--folder", type=type(RESULTS), default=RESULTS, help="where the results go")
    given = parser.parse_args(arguments)
    config, usual = FAMILIES[given.family]
    size = given.size or usual
    about = (
        f"{given.family}, {size}x{size}, batch {given.batch}, bf16, AdamW; counted by torch {torch.__version__}; "
        f"{RESERVE / GB:g} GB of what is on the GPU are a reserve"
    )
    print(f"{about}\n\n{HEAD}", flush=True)
    found = []
    for row in rows(config, size, given.batch):
        print(line(row), flush=True)
        found.append(row)
    leave(given.folder, f"memory_{given.family}_{size}_{given.batch}", about, HEAD, found, line)
    return 0
