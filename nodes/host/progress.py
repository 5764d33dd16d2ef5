"""The host's progress bar, which also notices Cancel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import comfy.model_management
import comfy.utils

T = TypeVar("T")


def steps(items: Iterable[T], node_id: str | None) -> Iterator[T]:
    """`items` one by one, the bar of node `node_id` moving on after each; Cancel raises between them."""
    items = list(items)
    bar = comfy.utils.ProgressBar(len(items), node_id=node_id)
    for item in items:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield item
        bar.update(1)


def transfer(node_id: str | None) -> Callable[[int, int], None]:
    """Told how many bytes of how many have come, moves the bar of node `node_id`; Cancel raises."""
    bar = comfy.utils.ProgressBar(1, node_id=node_id)

    def moved(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return moved
