"""Rendered scenes as a folder of pictures, in the layout of fill50k: what anybody's data looks like."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from ..controlnet_core.data.sources import SourceError
from ..controlnet_core.files.writing import replacing
from .dataset import HELD_OUT
from .hints import canny_hint, depth_hint, pose_hint
from .models import SIZE
from .render import Render, RenderError, render
from .scene import describe, random_scene

PROMPTS = "prompt.json"

HINTS: dict[str, Callable[[Render], np.ndarray]] = {"depth": depth_hint, "canny": canny_hint, "pose": pose_hint}


def render_folder(folder: Path, seeds: Sequence[int], hint: str, size: int = SIZE) -> Iterator[int]:
    """Scenes as `target/`, their hints as `source/<hint>/` and their prompts in `prompt.json`; yields after each scene.

    Pictures that are there are kept. `prompt.json` comes last and names the scenes of `seeds`, no others. `hint` is one
    of `HINTS`. Raises RenderError for seeds that are held out.
    """
    if max(seeds) >= HELD_OUT:
        raise RenderError(
            f"seeds up to {max(seeds)} are asked for; {HELD_OUT} and above are never trained on: take less"
        )
    known = _known(folder / PROMPTS)
    lines = []
    for seed in seeds:
        source, target = f"source/{hint}/{seed:06d}.png", f"target/{seed:06d}.png"
        missing = [path for path in (source, target) if not (folder / path).is_file()]
        if target not in known or missing:
            scene = random_scene(seed)
            known[target] = describe(scene)
        if missing:
            picture = render(scene, size)
            for path in missing:
                _save(folder / path, picture.image if path == target else HINTS[hint](picture))
        lines.append(json.dumps({"source": source, "target": target, "prompt": known[target]}))
        yield seed
    _write(folder / PROMPTS, "".join(f"{line}\n" for line in lines).encode())


def _known(path: Path) -> dict[str, str]:
    """The prompt of each picture that a list names."""
    if not path.is_file():
        return {}
    try:
        records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return {record["target"]: record["prompt"] for record in records}
    except (ValueError, LookupError, TypeError) as error:
        raise SourceError(f"{path} is no list of scenes ({error}): delete it, or choose another name") from error


def _save(path: Path, picture: np.ndarray) -> None:
    data = BytesIO()
    Image.fromarray(np.rint(picture * 255).astype(np.uint8)).save(data, format="PNG")
    _write(path, data.getvalue())


def _write(path: Path, data: bytes) -> None:
    """A file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(data)
