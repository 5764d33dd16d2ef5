"""Annotators make a hint from a picture. This list is all of them; importing it loads no image library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import numpy as np


@dataclass(frozen=True)
class Parameter:
    """One number that a user may set: its name, its default and range, and what it does."""

    name: str
    default: float
    minimum: float
    maximum: float
    step: float
    tooltip: str


@dataclass(frozen=True)
class Annotator:
    """One annotator: `name` as users choose it, `function` as 'module:function' in this package, its parameters.

    With `reads_mask` the function takes a `mask` (H,W), 0..1, besides the picture and cannot do without.
    """

    name: str
    function: str
    parameters: tuple[Parameter, ...]
    reads_mask: bool = False

    def load(self) -> Callable[..., np.ndarray]:
        """The function itself: (H,W,3) RGB and the parameters by name in, hint (H,W,3) float32 0..1 out."""
        module, function = self.function.split(":")
        return getattr(import_module(f".{module}", __package__), function)


ANNOTATORS: tuple[Annotator, ...] = (
    Annotator(
        "canny",
        "canny:canny",
        (
            Parameter("low", 100.0, 0.0, 255.0, 1.0, "A gradient below this is no edge."),
            Parameter("high", 200.0, 0.0, 255.0, 1.0, "A gradient above this always is an edge."),
        ),
    ),
    Annotator(
        "inpaint",
        "inpaint:inpaint",
        (
            Parameter(
                "masked_value",
                -1.0,
                -1.0,
                1.0,
                0.5,
                "What the hint has where the mask is white: -1 for SD1.5's inpaint ControlNet, 0 for those of SDXL.",
            ),
        ),
        reads_mask=True,
    ),
)
