"""What every error of the pack is: one short sentence that any log can print."""

from __future__ import annotations

import sys

from .limits import TEXT


class ZeroConvError(ValueError):
    """A mistake of a user, a file or a graph, in one sentence: what was expected, what was found and what to do.

    However it came about, its text is `printable`: names of files and of tensors stand in it as they are.
    """

    def __init__(self, sentence: str):
        super().__init__(printable(sentence))


def printable(text: str) -> str:
    r"""`text` as one line that any log and any screen takes, of at most `limits.TEXT` characters.

    What cannot be printed (control characters, the half characters by which Python names files that are not UTF-8) is
    written as Python writes it, such as \udce9 or \n, and so is what this process's own output has no character for.
    Of a longer text the middle is left out: the beginning says what it is about, the end what to do.
    """
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in _shortened(text))
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    return _shortened(text.encode(encoding, "backslashreplace").decode(encoding))


def _shortened(text: str) -> str:
    half = (TEXT - 5) // 2
    return text if len(text) <= TEXT else f"{text[:half]} ... {text[-half:]}"
