"""What a run has computed of hints and masks and keeps for its next steps, within bounds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from ...controlnet_core.dosing.strength import ControlScales
from ...controlnet_core.networks.residuals import Residuals

LIMIT = 512 * 2**20
"""Bytes that one control keeps: the encoded hints of 100 frames of 512x512 in fp32, or of 200 in fp16."""


class Kept:
    """Values by what they were made of; the ones unused for longest go first where there are more than `LIMIT` bytes.

    A value that is larger by itself is not kept at all. `alive` are objects whose ids are in a key: they are kept from
    being freed, so that no other gets the same id.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, tuple[Any, int, Any]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any], alive: Any = None) -> Any:
        """The value of this key, made if it is not there."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key][0]
        value = make()
        size = _bytes(value)
        if size <= LIMIT:
            self._entries[key] = value, size, alive
        while sum(entry[1] for entry in self._entries.values()) > LIMIT:
            self._entries.popitem(last=False)
        return value


def _bytes(value: Any) -> int:
    if isinstance(value, (Tensor, Residuals)):
        return value.nbytes
    if isinstance(value, ControlScales):
        return 0 if value.mask is None else value.mask.nbytes
    return sum(map(_bytes, value.values())) if isinstance(value, dict) else 0
