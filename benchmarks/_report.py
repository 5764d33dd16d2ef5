"""What benchmarks have in common: what they run on, and how their results are left."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch


def machine(device: str) -> str:
    """What a benchmark runs on."""
    chip = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return f"{chip}, {platform.system()} {platform.machine()}, torch {torch.__version__}"


def leave(folder: Path, name: str, about: str, head: str, rows: Sequence[Any], line: Callable[[Any], str]) -> None:
    """Write dataclasses `rows` as NAME.json and, a `line` each under `head`, as NAME.md into `folder`; say where."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {"about": about, "rows": [asdict(row) for row in rows]}
    (folder / f"{name}.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    table = "\n".join([f"{about}.", "", head, *map(line, rows)])
    (folder / f"{name}.md").write_text(table + "\n", encoding="utf-8")
    print(f"look at {folder / f'{name}.md'}")
