"""Hints that were made already: a node runs again when any of its widgets changes, its annotator need not."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np

from . import Annotator
from .pipeline import annotate

Made = tuple[np.ndarray, "dict[str, Any] | None"]


class HintCache:
    """The hints made last, up to `capacity` bytes of them."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._kept: dict[bytes, Made] = {}

    def annotate(
        self,
        annotator: Annotator,
        image: np.ndarray,
        resolution: int = 0,
        *,
        networks: Sequence[Any] | Callable[[], Sequence[Any]] = (),
        mask: np.ndarray | None = None,
        frame: Mapping[str, Any] | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> Made:
        """What `pipeline.annotate` gives for this, a fresh copy.

        A mask, a frame or a parameter that the annotator does not read makes no difference. Errors are not kept.
        """
        mask, frame = (mask if annotator.reads_mask else None), (frame if annotator.reads_pose else None)
        key = _key(annotator, image, resolution, mask, frame, parameters)
        made = self._kept.pop(key, None)
        if made is None:
            made = annotate(
                annotator, image, resolution, networks=networks, mask=mask, frame=frame, parameters=parameters
            )
        self._kept[key] = made  # the one used last comes last
        while sum(hint.nbytes for hint, _ in self._kept.values()) > self._capacity:
            del self._kept[next(iter(self._kept))]
        hint, found = made
        return hint.copy(), deepcopy(found)


def _key(
    annotator: Annotator,
    image: np.ndarray,
    resolution: int,
    mask: np.ndarray | None,
    frame: Mapping[str, Any] | None,
    parameters: Mapping[str, Any] | None,
) -> bytes:
    """A digest of all that the hint is made of."""
    given = {parameter.name: parameter.default for parameter in annotator.parameters} | dict(parameters or {})
    digest = hashlib.blake2b(digest_size=32)
    text = [annotator.name, resolution, given, frame]
    digest.update(pickle.dumps(text))
    for array in (image, mask):
        if array is not None:
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).data)
    return digest.digest()
