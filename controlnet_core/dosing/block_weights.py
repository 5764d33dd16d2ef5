"""One weight for each residual: how much of a control joins the shallow, the deep and the middle blocks of the UNet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import ZeroConvError
from ..limits import BLOCKS

Preset = Literal["even", "soft", "middle only", "deep half", "shallow half", "custom"]
PRESETS: tuple[Preset, ...] = ("even", "soft", "middle only", "deep half", "shallow half", "custom")

SOFT = 0.825
"""From one residual to the next shallower one in the authors' guess mode (lllyasviel/ControlNet, gradio demos)."""

LARGEST = 10.0
"""Of a weight, as of a strength."""


class BlockWeightsError(ZeroConvError):
    """Weights that cannot be meant, or that are made for a UNet of another size."""


@dataclass(frozen=True)
class BlockWeights:
    """Weights of the n skip connections, from shallow to deep, and of the middle block.

    "even": 1. "soft": falloff^(n - i) for skip i, the middle 1, as in the authors' guess mode. "middle only": 0 for
    every skip. "deep half" and "shallow half": 1 for the skips of that half (the skip in the middle of 9 is shallow),
    the middle block going with the deep half; the two add up to "even". "custom": the numbers in `skips`. `middle`
    multiplies the middle block's weight.
    """

    preset: Preset = "even"
    falloff: float = SOFT
    skips: tuple[float, ...] = ()
    middle: float = 1.0

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise BlockWeightsError(f"the preset is one of {', '.join(PRESETS)}, found {self.preset!r}")
        if not 0.0 <= self.falloff <= 1.0:
            raise BlockWeightsError(f"the falloff lies between 0 and 1, found {self.falloff:g}")
        if self.preset == "custom" and not self.skips:
            raise BlockWeightsError(
                "custom block weights are empty: write one number for each skip connection, "
                "12 for SD1.x and SD2.x, 9 for SDXL, or choose another preset"
            )
        if len(self.skips) > BLOCKS:
            raise BlockWeightsError(
                f"a model has 12 skip connections (SDXL 9), found {len(self.skips)} block weights: write one for each"
            )
        for weight in (*self.skips, self.middle):
            if not math.isfinite(weight) or not 0.0 <= weight <= LARGEST:
                raise BlockWeightsError(f"a block weight lies between 0 and {LARGEST:g}, found {weight:g}")

    def weights(self, n: int) -> tuple[float, ...]:
        """n + 1 numbers for a UNet of n skip connections; the last one is the middle block's."""
        middle = self.middle
        if self.preset == "custom":
            if len(self.skips) != n:
                raise BlockWeightsError(
                    f"the model has {n} skip connections, found {len(self.skips)} block weights: "
                    "write 12 for SD1.x and SD2.x, 9 for SDXL"
                )
            skips = self.skips
        elif self.preset == "soft":
            skips = tuple(self.falloff ** (n - i) for i in range(n))
        elif self.preset == "deep half":
            skips = tuple(float(i >= n / 2) for i in range(n))
        elif self.preset == "shallow half":
            skips, middle = tuple(float(i < n / 2) for i in range(n)), 0.0
        else:
            skips = (float(self.preset == "even"),) * n
        return (*skips, middle)
