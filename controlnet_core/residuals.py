"""What a ControlNet hands to the UNet: one residual for each skip connection and one for the middle block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Residuals:
    """Zero-convolution outputs: `skips` from the shallowest encoder block to the deepest, and `middle`.

    12+1 tensors (B, C_i, H_i, W_i) for SD1.x and SD2.x, 9+1 for SDXL. `None` stands for a residual that is not added.
    """

    skips: tuple[Tensor | None, ...]
    middle: Tensor | None

    def __iter__(self) -> Iterator[Tensor | None]:
        """The residuals in the order of the block weights: skips from shallow to deep, then the middle."""
        yield from self.skips
        yield self.middle

    def __len__(self) -> int:
        return len(self.skips) + 1

    @classmethod
    def of(cls, tensors: Iterable[Tensor | None]) -> Residuals:
        """The inverse of iteration: the last entry is the middle."""
        *skips, middle = tensors
        return cls(tuple(skips), middle)

    def weighted(self, weights: Sequence[float | Tensor]) -> Residuals:
        """Each residual times its weight, as fresh tensors; a weight of 0 drops the residual."""
        if len(weights) != len(self):
            raise ValueError(f"{len(self)} residuals need as many weights, found {len(weights)}")
        return Residuals.of(
            None if tensor is None or (not isinstance(weight, Tensor) and weight == 0) else tensor * weight
            for tensor, weight in zip(self, weights, strict=True)
        )

    def __add__(self, other: Residuals) -> Residuals:
        """Several controls add, with no further weighting (paper, section 3.4)."""
        if len(self) != len(other):
            raise ValueError(f"residuals of different UNets cannot be added: {len(self)} and {len(other)} of them")
        return Residuals.of(b if a is None else a if b is None else a + b for a, b in zip(self, other, strict=True))
