"""How much of anything is taken from a text, a file or a graph; more gets a sentence that says so."""

from __future__ import annotations

TEXT = 1000
"""Characters of an error, and of a line that is shown."""
