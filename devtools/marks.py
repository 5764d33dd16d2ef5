"""The pack's icon and banner: a zero, and in it the star that stands for a convolution."""

from __future__ import annotations

import argparse
import math

from PIL import Image, ImageDraw, ImageFont

from . import ROOT

FOLDER = ROOT / "docs" / "images"
GROUND, ZERO, STAR, WORDS, QUIET = "#1f2126", "#ffb454", "#f1f3f5", "#f1f3f5", "#a9afba"
FINE = 4
"""Drawn this much larger and then made smaller, for smooth edges."""


def icon(side: int) -> Image.Image:
    """The icon, `side` pixels square, on no ground."""
    whole = side * FINE
    fine = Image.new("RGBA", (whole, whole))
    pen = ImageDraw.Draw(fine)
    pen.rounded_rectangle((0, 0, whole - 1, whole - 1), whole // 6, GROUND)
    pen.ellipse((whole * 0.22, whole * 0.12, whole * 0.78, whole * 0.88), outline=ZERO, width=round(whole * 0.085))
    reach, width = whole * 0.13, round(whole * 0.05)
    for angle in (math.pi / 2, math.pi / 6, -math.pi / 6):
        x, y = reach * math.cos(angle), reach * math.sin(angle)
        pen.line((whole / 2 - x, whole / 2 - y, whole / 2 + x, whole / 2 + y), STAR, width)
    return fine.resize((side, side), Image.Resampling.LANCZOS)


def banner(width: int = 1260, height: int = 540) -> Image.Image:
    """The banner, 21 to 9: the icon and what the pack is."""
    picture = Image.new("RGB", (width, height), GROUND)
    mark = icon(height * 2 // 3)
    picture.paste(mark, (height // 8, height // 6), mark)
    pen, left = ImageDraw.Draw(picture), height // 8 + mark.width + height // 16
    pen.text((left, height * 0.36), "ZeroConv", WORDS, ImageFont.load_default(128), "lm")
    says = "ControlNet for ComfyUI:\nload, chain, dose, measure, train"
    pen.multiline_text((left + 4, height * 0.62), says, QUIET, ImageFont.load_default(42), "lm", spacing=14)
    return picture


def main(arguments: list[str]) -> int:
    """Draw both into docs/images."""
    argparse.ArgumentParser(prog="dev.py marks", description=__doc__).parse_args(arguments)
    FOLDER.mkdir(exist_ok=True)
    for name, picture in (("icon", icon(400)), ("banner", banner())):
        picture.convert("RGB").quantize(32).save(FOLDER / f"{name}.png", optimize=True)
    print(f"icon.png and banner.png in {FOLDER}")
    return 0
