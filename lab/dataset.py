"""Rendered scenes on disk: shards of pictures, hints and prompts that training reads, made from seeds alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ..controlnet_core.files.writing import replacing
from .hints import canny_hint, depth_hint, pose_hint
from .render import render
from .scene import describe, random_scene
from .vocabulary import tokenize

HINTS = ("canny", "depth", "pose")
"""The hints that a shard holds beside `image`, `segments` and `tokens`."""

SHARD = 500
"""Scenes in a shard."""

HELD_OUT = 1_000_000
"""Seeds from here on are never trained on."""


def render_arrays(seed: int, size: int) -> dict[str, np.ndarray]:
    """One scene: uint8 `image`, `canny`, `depth`, `pose` (H,W,3) and `segments` (H,W), int32 `tokens` (77,)."""
    scene = random_scene(seed)
    picture = render(scene, size)
    floats = {
        "image": picture.image,
        "canny": canny_hint(picture),
        "depth": depth_hint(picture),
        "pose": pose_hint(picture),
    }
    arrays = {name: np.rint(value * 255).astype(np.uint8) for name, value in floats.items()}
    return {
        **arrays,
        "segments": picture.segments,
        "tokens": np.array(tokenize(describe(scene)), dtype=np.int32),
    }


def render_shards(folder: Path, count: int, size: int = 128) -> list[Path]:
    """Shards for the seeds 0 to `count` - 1 in `folder`; those that exist are kept.

    Each is written whole or not at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for start in range(0, count, SHARD):
        path = folder / f"scenes-{size}-{start:06d}.safetensors"
        paths.append(path)
        if path.exists():
            continue
        rows = [render_arrays(seed, size) for seed in range(start, start + SHARD)]
        with replacing(path) as temporary:
            save_file({name: np.stack([row[name] for row in rows]) for name in rows[0]}, temporary)
    return paths


def load_shards(paths: list[Path], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays `names` of all shards, in the order of the seeds."""
    shards = []
    for path in paths:
        with safe_open(path, framework="numpy") as shard:
            shards.append({name: shard.get_tensor(name) for name in names})
    return {name: np.concatenate([shard[name] for shard in shards]) for name in names}
