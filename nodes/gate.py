"""The way out of every node: what goes wrong leaves with a text that the host can log, show and keep.

The host's log cannot write half characters (names of files that are not UTF-8 have them), and its queue ends for good
with the attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

from ..controlnet_core.errors import ZeroConvError
from ..controlnet_core.limits import TEXT

Node = TypeVar("Node", bound=type)


def gated(node: Node) -> Node:
    """`node`, out of whose functions no error comes but through the gate."""
    for name in ("execute", "fingerprint_inputs"):
        if name in vars(node):
            setattr(node, name, classmethod(_gated(vars(node)[name].__func__)))
    return node


def _gated(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if all(_fit(str(each)) for each in _told(error)):
                raise
            if isinstance(error, ZeroConvError):
                raise error from None
            raise ZeroConvError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__) from None

    return guarded


def _told(error: BaseException | None) -> Iterator[BaseException]:
    """The errors that a traceback of `error` prints: it and those that it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _fit(text: str) -> bool:
    return len(text) <= TEXT and all(c.isprintable() or c in "\n\t" for c in text)
