"""Pictures side by side with their labels, for a person to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

MARGIN, LINE = 4, 18
NAMES = 150
"""Pixels for the names of rows."""


def contact_sheet(columns: Mapping[str, np.ndarray], names: Sequence[str] = ()) -> Image:
    """One picture with a column for each label: `columns` are (N,H,W,3) in 0..1, row n shows the n-th of each.

    `names` are written beside the rows, where there are any.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows, height, width = next(iter(columns.values())).shape[:3]
    before = MARGIN + (NAMES if names else 0)
    size = (before + len(columns) * (width + MARGIN), LINE + rows * (height + MARGIN) + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for row, name in enumerate(names):
        top = LINE + row * (height + MARGIN) + height // 2 - 8 * (1 + name.count("\n"))
        draw.text((MARGIN, top), name, "black", font)
    for column, (label, pictures) in enumerate(columns.items()):
        left = before + column * (width + MARGIN)
        draw.text((left, 2), label, "black", font)
        for row, picture in enumerate(pictures):
            pixels = np.rint(picture * 255).clip(0, 255).astype(np.uint8)
            sheet.paste(Image.fromarray(pixels), (left, LINE + row * (height + MARGIN)))
    return sheet
