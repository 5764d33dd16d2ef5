"""The host's progress bar, which also notices Cancel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import comfy.utils

T = TypeVar("T")


def steps(items: Iterable[T], node_id: str | None) -> Iterator[T]:
    """`items` one by one, the bar of node `node_id` moving on after each."""
    items = list(items)
    bar = comfy.utils.ProgressBar(len(items), node_id=node_id)
    for item in items:
        yield item
        bar.update(1)
