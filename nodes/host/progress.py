"""The host's progress bar, which also notices Cancel."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import comfy.model_management
import comfy.utils

from ...controlnet_core.errors import printable

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


def say(text: str, node_id: str | None) -> None:
    """Show `text` on the node while it runs, where this host can."""
    server: Any = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if node_id is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(printable(text), node_id)


def bar(total: int, node_id: str | None) -> Callable[[int, Any], None]:
    """Told how much of `total` is done, with a PIL picture or None, moves the bar of the node and shows the picture.

    Cancel raises.
    """
    host = comfy.utils.ProgressBar(total, node_id=node_id)

    def moved(done: int, picture: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        host.update_absolute(done, total, None if picture is None else ("JPEG", picture, None))

    return moved
