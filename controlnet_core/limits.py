"""How much of anything is taken from a text, a file or a graph; more gets a sentence that says so."""

from __future__ import annotations

TEXT = 1000
"""Characters of an error, and of a line that is shown."""

# -- weights files ----------------------------------------------------------------------------------------------------

HEADER = 16 << 20
"""Bytes of a safetensors header; that of a whole SDXL checkpoint has less than half a million."""

TENSORS = 50_000
"""Tensors in a file; a whole SDXL checkpoint has 4,000 with its ControlNet."""

KEY = 1000
"""Characters of a tensor's name."""

DIMENSIONS = 8
"""Of a tensor."""

BLOCKS = 64
"""Children of one name that are told apart by numbers, such as `input_blocks.11`; the most that is published is 14."""

WRAPPINGS = 8
"""Dictionaries around the weights of a file, and names before every key of them."""

INDEX = 16 << 20
"""Bytes of the index beside a file that comes in parts."""

PARTS = 1000
"""Of a file that comes in parts."""

PICKLE = 64 << 20
"""Bytes of the description of what is in a file that torch saved, beside the numbers of its tensors."""
