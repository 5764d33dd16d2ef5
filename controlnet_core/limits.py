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

# -- pictures and texts -----------------------------------------------------------------------------------------------

SIDE = 16384
"""Pixels of a picture's side, as the host has it."""

PIXEL = 16.0
"""Of a hint's numbers, which are 0 to 1: some marks lie outside, such as the -1 of pixels to paint anew."""

FACTOR = 100.0
"""Of a strength, and of what multiplies it."""

WRITTEN = 100_000
"""Characters of a text that numbers are read from."""

NUMBERS = 10_000
"""In such a text: a strength for each frame of a long video."""

KEYFRAMES = 1000
"""Of a schedule."""

STEPS = 100_000
"""Of a run that can be pointed at."""

PEOPLE = 1000
"""In one frame of pose keypoints."""

NAME = 200
"""Bytes of a file's or folder's name; file systems take 255, and more is added while it is written."""

FOLDERS = 16
"""Names of folders in the name of a file."""

BATCH = 4096
"""Pictures that are worked on at once."""
