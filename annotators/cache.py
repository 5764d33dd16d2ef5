"""What annotators saw already: a node runs again when any of its widgets changes, its annotator need not."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import Annotator
from .pipeline import Seen, see


@dataclass
class _Kept:
    """One picture's answer, packed, and the run that used it last."""

    packed: np.ndarray
    channels: int
    found: dict[str, Any] | None
    run: object


class HintCache:
    """What was seen last, up to `capacity` bytes of it: in 8 bits and one channel where that loses nothing."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._kept: dict[bytes, _Kept] = {}
        self._size = 0

    def see(
        self,
        annotator: Annotator,
        images: Sequence[np.ndarray] | np.ndarray,
        resolution: int = 0,
        *,
        networks: Sequence[Any] | Callable[[], Sequence[Any]] = (),
        masks: Sequence[np.ndarray | None] | None = None,
        frames: Sequence[Any] | None = None,
        parameters: Mapping[str, Any] | None = None,
        run: object = None,
    ) -> list[Seen]:
        """What `pipeline.see` gives for these pictures; only what is not kept is made.

        Fresh copies, unless the annotator draws: what its `draw` reads is the kept array, which cannot be written.

        A mask, a frame or a parameter that the function does not read makes no difference. Errors are not kept. Calls
        of one `run` never push out what that run has used: of a sequence longer than the cache, the first part stays,
        and is there when the sequence comes again.
        """
        run = object() if run is None else run
        masks = masks if masks and annotator.reads_mask else [None] * len(images)
        frames = frames if frames and annotator.reads_pose else [None] * len(images)
        given = annotator.own(annotator.function, parameters or {})
        keys = [
            _key(annotator.name, resolution, given, image, mask, frame)
            for image, mask, frame in zip(images, masks, frames, strict=True)
        ]
        missing = [i for i, key in enumerate(keys) if key not in self._kept]
        made: dict[int, Seen] = {}
        if missing:
            new = see(
                annotator,
                [images[i] for i in missing],
                resolution,
                networks=networks,
                masks=[masks[i] for i in missing],
                frames=[frames[i] for i in missing],
                parameters=parameters,
            )
            made = dict(zip(missing, new))
        for i, (seen, found) in made.items():
            if annotator.draw:
                seen.flags.writeable = False
            self._keep(keys[i], _Kept(*_packed(seen), deepcopy(found), run))
        return [made[i] if i in made else self._again(key, run) for i, key in enumerate(keys)]

    def _again(self, key: bytes, run: object) -> Seen:
        kept = self._kept.pop(key)
        kept.run = run
        self._kept[key] = kept  # the one used last comes last
        return _unpacked(kept.packed, kept.channels), deepcopy(kept.found)

    def _keep(self, key: bytes, new: _Kept) -> None:
        """Keeps `new` if it fits beside what its own run has used; what others used longest ago makes room."""
        others = iter([key for key, kept in self._kept.items() if kept.run is not new.run])
        while self._size + new.packed.nbytes > self._capacity and (oldest := next(others, None)) is not None:
            self._size -= self._kept.pop(oldest).packed.nbytes
        if self._size + new.packed.nbytes <= self._capacity:
            self._kept[key] = new
            self._size += new.packed.nbytes


def _packed(seen: np.ndarray) -> tuple[np.ndarray, int]:
    """The array (H,W) or (H,W,C) in as few bytes as give it back bit by bit, and C (0 where there is none)."""
    channels = seen.shape[2] if seen.ndim == 3 else 0
    if channels and (seen == seen[:, :, :1]).all():
        seen = seen[:, :, 0]
    if 0 <= seen.min() and seen.max() <= 1:
        levels = np.rint(seen * 255).astype(np.uint8)
        if (_floats(levels) == seen).all():
            return levels, channels
    return seen.copy() if seen.flags.writeable else seen, channels


def _unpacked(packed: np.ndarray, channels: int) -> np.ndarray:
    if packed.dtype == np.uint8:
        seen = _floats(packed)
    else:
        seen = packed.copy() if packed.flags.writeable else packed
    return np.repeat(seen[:, :, None], channels, axis=2) if channels and seen.ndim == 2 else seen


def _floats(levels: np.ndarray) -> np.ndarray:
    """As annotators make floats of 8 bits."""
    return levels.astype(np.float32) / 255


def _key(
    name: str,
    resolution: int,
    given: Mapping[str, Any],
    image: np.ndarray,
    mask: np.ndarray | None,
    frame: Mapping[str, Any] | None,
) -> bytes:
    """A digest of all that is seen."""
    digest = hashlib.blake2b(digest_size=32)
    digest.update(pickle.dumps([name, resolution, dict(given), frame]))
    for array in (image, mask):
        if array is not None:
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).data)
    return digest.digest()
