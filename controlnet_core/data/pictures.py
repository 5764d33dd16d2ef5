"""Pictures as training takes them: any file or array as 8-bit RGB, resized to cover a bucket and cropped."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from math import log
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import ZeroConvError
from ..keys import times

FINEST, COARSEST = 8, 64
"""Sides of buckets are multiples of an eighth of the resolution between these: of 64, so that all four levels of a UNet
halve evenly, where that leaves enough shapes to choose from, and at least of the latent's 8."""

LONGEST = 4.0
"""No bucket is longer than this many times its other side."""

SAME_SHAPE = 1.03
"""A hint and its picture may differ in aspect by this factor: rounding of sides, not another picture."""

FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "TIFF", "GIF", "TGA", "JPEG2000", "AVIF", "HEIF", "JXL", "PPM",
)  # fmt: skip
"""What is opened, by Pillow's names and whatever a file is called: pictures of pixels alone. Others start programs
(EPS) or stand for files elsewhere."""

UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, Image.DecompressionBombError)
"""What PIL raises for files that are damaged, of another kind, or not there."""


class PictureError(ZeroConvError):
    """A picture that cannot be used; the message is the reason alone."""


@cache
def _formats() -> list[str]:
    """Those of FORMATS that this Pillow, with what is installed beside it, reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def readable(path: Path) -> bool:
    """Whether `read` opens files of this suffix; what is in them is seen then."""
    return Image.registered_extensions().get(path.suffix.lower()) in _formats()


@cache
def buckets(resolution: int) -> tuple[tuple[int, int], ...]:
    """All (width, height) of about `resolution` squared pixels, never more of them than the square has."""
    multiple = COARSEST
    while multiple > FINEST and multiple * 8 > resolution:
        multiple //= 2
    side = max(1, round(resolution / multiple))  # in multiples
    found = {(wide, side * side // wide) for wide in range(1, side + 1)}
    found = {size for size in found if size[1] <= LONGEST * size[0]}
    found |= {(wide, high) for high, wide in found}
    return tuple(sorted((wide * multiple, high * multiple) for wide, high in found))


def bucket(width: int, height: int, resolution: int) -> tuple[int, int]:
    """The (width, height) among `buckets` whose shape is nearest to that of a picture of `width` x `height` pixels."""
    return min(buckets(resolution), key=lambda size: (abs(log(size[0] / size[1]) - log(width / height)), size))


@dataclass(frozen=True)
class Crop:
    """A part of a picture of `full` = (width, height), resized to cover a bucket of `size` = (width, height).

    The picture becomes `zoom` times as large as it has to be. `at` says which part of what then sticks out is cut off
    on the left and at the top, 0..1; by default the centre of the picture is left.
    """

    full: tuple[int, int]
    size: tuple[int, int]
    zoom: float = 1.0
    at: tuple[float, float] = (0.5, 0.5)

    @property
    def scale(self) -> float:
        """By how much the picture grows; above 1 it lacks the detail that the bucket could show."""
        return max(self.size[0] / self.full[0], self.size[1] / self.full[1]) * self.zoom

    @property
    def sizes(self) -> tuple[int, ...]:
        """What SDXL is told: height and width of the picture, top and left of the crop once resized, its sides."""
        left, top = (round((full * self.scale - size) * at) for full, size, at in zip(self.full, self.size, self.at))
        return (self.full[1], self.full[0], top, left, self.size[1], self.size[0])

    def of(self, picture: Image.Image, how: Image.Resampling) -> np.ndarray:
        """This part of `picture`, (H,W,3) uint8; a picture of another size is cut at the same place of it."""
        parts = (side / (self.scale * own) for side, own in zip(self.size, self.full))  # of each side, at most 1
        (left, right), (top, bottom) = (
            ((1 - part) * at * side, min(((1 - part) * at + part) * side, side))
            for part, at, side in zip(parts, self.at, picture.size)
        )
        return np.array(picture.resize(self.size, how, box=(max(0, left), max(0, top), right, bottom)))


def read(source: Path | np.ndarray) -> Image.Image:
    """A file, or an array (H,W,3) uint8, as an RGB picture: turned as its camera says, on white where transparent.

    16-bit grey keeps its upper 8 bits. Raises PictureError.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    try:
        with Image.open(source, formats=_formats()) as file:
            picture = ImageOps.exif_transpose(file)
            picture.load()
    except UNREADABLE as error:
        raise PictureError(f"{source.name} cannot be read as a picture ({error})") from error
    if picture.mode == "F":
        raise PictureError(f"{source.name} holds floating-point numbers: save it with 8 bits a channel")
    if picture.mode == "I" or picture.mode.startswith("I;"):
        # as one fraction of the range, as the 8-bit file of the same picture would have it
        grey = np.asarray(picture.convert("I"), dtype=np.float64) / 65535 * 255
        return Image.fromarray(np.rint(grey.clip(0, 255)).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def size_of(source: Path | np.ndarray) -> tuple[int, int]:
    """(width, height) as `read` gives it, from the file's first bytes; raises PictureError."""
    if isinstance(source, np.ndarray):
        return source.shape[1], source.shape[0]
    try:
        with Image.open(source, formats=_formats()) as file:
            turned = file.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # orientations that swap the sides
            return (file.height, file.width) if turned else file.size
    except UNREADABLE as error:
        raise PictureError(f"{source.name} cannot be read as a picture ({error})") from error


def hint_of(source: Path | np.ndarray, crop: Crop) -> np.ndarray:
    """The part of a hint that belongs to the part `crop` of its picture, (H,W,3) uint8.

    Area average where it is made smaller, so that thin lines stay; the nearest pixel where it is made larger, so that
    palettes stay. Raises PictureError for a hint of another shape than the picture.
    """
    hint = read(source)
    check_shape(hint.size, crop.full)
    return crop.of(hint, Image.Resampling.BOX)


def check_shape(hint: tuple[int, int], picture: tuple[int, int]) -> None:
    """Raise PictureError for a hint of another shape than its picture; both (width, height)."""
    shapes = hint[0] / hint[1], picture[0] / picture[1]
    if max(shapes) > SAME_SHAPE * min(shapes):
        raise PictureError(
            f"its hint is {times(hint)}, the picture {times(picture)}: they must show the same in the same place, so "
            "have the same shape"
        )
