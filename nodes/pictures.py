"""Small pictures of what nodes make: block weights as bars, a record of residuals as a heat map."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..controlnet_core.dosing.record import Panel

BACKGROUND, PAPER, GRID, QUIET, TEXT = "#1f2126", "#2a2d33", "#43474f", "#a9afba", "#f1f3f5"
LINE = "#ffb454"
SMALL, BIG = 11, 13  # of letters, in pixels

SCALE = np.array([(20, 24, 60), (66, 40, 120), (150, 48, 120), (222, 83, 84), (250, 150, 60), (252, 230, 140)])
"""Colours of a heat map from nothing to most: ever lighter, so that it reads in grey too."""


def bars(panels: Sequence[tuple[str, Sequence[float]]]) -> Tensor:
    """Block weights, one panel (title, weights; the last is the middle's) below the other: an IMAGE 512 wide."""
    width, each, left = 512, 150, 16
    picture = Image.new("RGB", (width, each * len(panels) + 6), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for number, (title, weights) in enumerate(panels):
        top, bottom = each * number + 44, each * (number + 1) - 18
        _write(draw, left, each * number + 8, title, "la", BIG, TEXT)
        most = max(1.0, *weights)
        pitch = (width - 2 * left) / len(weights)
        draw.line((left, bottom, width - left, bottom), fill=GRID)
        for i, weight in enumerate(weights):
            x, y = left + pitch * (i + 0.5), bottom - (bottom - top) * weight / most
            if weight > 0:
                draw.rectangle((x - pitch * 0.36, y, x + pitch * 0.36, bottom), fill=LINE)
            _write(draw, x, y - 3, _short(weight), "md", SMALL, TEXT if weight > 0 else QUIET)
            _write(draw, x, bottom + 4, _place_name(i, len(weights)), "ma")
    return _tensor(picture)


def heat_map(panels: Sequence[Panel]) -> Tensor:
    """How strong each residual was at each step, one panel for each control: an IMAGE (1,H,W,3) in 0..1.

    Rows are the steps from first to last, columns the residuals from shallow to deep and the middle; a cell says the
    residual's RMS in percent of what it joins, and stays empty where nothing acted.
    """
    columns = max(len(panel.rows[0].ratios) for panel in panels)
    count = max(len(panel.rows) for panel in panels)
    cell = (40, 20 if count <= 40 else max(3, 800 // count))
    left, head, foot = 104, 44, 22
    tall = [head + len(panel.rows) * cell[1] + foot for panel in panels]
    bar_height = min(240, max(60, tall[0] - head - foot))
    found = [ratio for panel in panels for row in panel.rows for ratio in row.ratios if ratio is not None]
    most = _nice(100 * max((ratio for ratio in found if math.isfinite(ratio)), default=0.0))

    size = (left + columns * cell[0] + 96, max(sum(tall), head + bar_height + 30))
    picture = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(picture)
    top = head
    for panel, high in zip(panels, tall, strict=True):
        _grid(draw, panel, (left, top), cell, most)
        top += high
    _legend(draw, left + columns * cell[0] + 16, head, bar_height, most)
    return _tensor(picture)


def _grid(draw: ImageDraw.ImageDraw, panel: Panel, corner: tuple[int, int], cell: tuple[int, int], most: float) -> None:
    """The cells of one panel from `corner` on, with its title above and its steps to the left; `most` is in percent."""
    (left, top), (width, height) = corner, cell
    count = len(panel.rows[0].ratios)
    apart = math.ceil(14 / height)  # rows from one label to the next; cells of all rows have one where there is room
    _write(draw, left, top - 38, _fitted(draw, panel.title, count * width), "la", BIG, TEXT)
    _write(draw, 40, top - 4, "step", "rd")
    _write(draw, left - 8, top - 4, "sigma", "rd")
    for i in range(count):
        _write(draw, left + (i + 0.5) * width, top - 4, _place_name(i, count), "md")
    for j, row in enumerate(panel.rows):
        y = top + j * height
        if j % apart == 0:
            _write(draw, 40, y + height / 2, str(row.step), "rm")
            _write(draw, left - 8, y + height / 2, f"{row.sigma:.3g}", "rm")
        for i, ratio in enumerate(row.ratios):
            x = left + i * width
            box = (x, y, x + width - 2, y + height - (2 if apart == 1 else 1))
            if ratio is None:
                draw.rectangle(box, fill=PAPER)
                continue
            colour = _colour(100 * ratio / most if math.isfinite(ratio) else 1.0)
            draw.rectangle(box, fill=colour)
            if apart == 1:
                ink = "#000000" if sum(colour) > 380 else "#ffffff"
                _write(draw, x + width / 2 - 1, y + height / 2, _short(100 * ratio), "mm", SMALL, ink)


def _legend(draw: ImageDraw.ImageDraw, x: int, top: int, height: int, most: float) -> None:
    """The colour scale of a heat map, 0 to `most` percent from bottom to top."""
    for i in range(height):
        draw.line((x, top + i, x + 13, top + i), fill=_colour(1 - i / (height - 1)))
    _write(draw, x, top - 4, "what it joins", "ld")
    _write(draw, x, top - 18, "RMS in % of", "ld")
    for part in (0, 0.5, 1) if height < 100 else (0, 0.25, 0.5, 0.75, 1):
        _write(draw, x + 19, top + (1 - part) * (height - 1), f"{most * part:g}", "lm")
    draw.rectangle((x, top + height + 10, x + 13, top + height + 20), fill=PAPER)
    _write(draw, x + 19, top + height + 15, "nothing", "lm")


def _colour(part: float) -> tuple[int, int, int]:
    at = np.linspace(0, 1, len(SCALE))
    red, green, blue = (round(float(np.interp(part, at, SCALE[:, channel]))) for channel in range(3))
    return red, green, blue


def _place_name(i: int, count: int) -> str:
    return "mid" if i == count - 1 else str(i)


def _short(number: float) -> str:
    """Three digits at most where that is possible: 0, 0.1, 0.099, 9.3, 43."""
    return f"{number:.0f}" if number >= 100 else f"{number:.2g}"


def _nice(number: float) -> float:
    """The smallest of 1, 2, 4, 6, 8 times a power of ten that is not below `number`; 1 for nothing."""
    if number == 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(number))
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= number * (1 - 1e-9))


def _write(
    draw: ImageDraw.ImageDraw, x: float, y: float, text: str, anchor: str, size: int = SMALL, colour: str = QUIET
) -> None:
    draw.text((round(x), round(y)), text, fill=colour, font=ImageFont.load_default(size), anchor=anchor)


def _fitted(draw: ImageDraw.ImageDraw, text: str, width: float) -> str:
    """`text`, cut where it is longer than `width` pixels."""
    font = ImageFont.load_default(BIG)
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]
