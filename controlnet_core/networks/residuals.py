"""What a control hands to the UNet: one residual for each place in which it can act."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ZeroConvError
from .layers import repeated


@dataclass(frozen=True)
class Residuals:
    """What is added to the UNet, each (B, C_i, H_i, W_i); `None` stands for nothing.

    `skips` join the skip connections as the decoder reads them, from the shallowest encoder block to the deepest, and
    `middle` the middle block's output: a ControlNet's 12+1 for SD1.x and SD2.x, 9+1 for SDXL. `encoder[i]` is added to
    the output of encoder block i itself, before that is kept as a skip connection and goes on (T2I-Adapter); it is as
    long as `skips`, or empty.
    """

    skips: tuple[Tensor | None, ...]
    middle: Tensor | None
    encoder: tuple[Tensor | None, ...] = ()

    def __post_init__(self) -> None:
        if self.encoder and len(self.encoder) != len(self.skips):
            raise ZeroConvError(f"{len(self.skips)} skips need as many encoder residuals or none: {len(self.encoder)}")

    def __iter__(self) -> Iterator[Tensor | None]:
        """What the decoder gets, in the order of the block weights: skips from shallow to deep, then the middle."""
        yield from self.skips
        yield self.middle

    def __len__(self) -> int:
        return len(self.skips) + 1

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return sum(tensor.nbytes for tensor in (*self, *self.encoder) if tensor is not None)

    @classmethod
    def of(cls, tensors: Iterable[Tensor | None], encoder: Iterable[Tensor | None] = ()) -> Residuals:
        """The inverse of iteration: the last entry is the middle."""
        *skips, middle = tensors
        return cls(tuple(skips), middle, tuple(encoder))

    @classmethod
    def cat(cls, parts: Sequence[Residuals]) -> Residuals:
        """Residuals of several batches as those of one; each has the same places."""

        def each(places: Iterable[tuple[Tensor | None, ...]]) -> Iterator[Tensor | None]:
            return (None if place[0] is None else torch.cat(place) for place in places)  # type: ignore[arg-type]

        return cls.of(each(zip(*parts)), each(zip(*(part.encoder for part in parts))))

    def mapped(self, f: Callable[[int, Tensor], Tensor | None]) -> Residuals:
        """Each residual through `f(i, residual)`; i is the encoder block's number, that of the middle comes last."""

        def each(tensors: Iterable[Tensor | None]) -> Iterator[Tensor | None]:
            return (None if tensor is None else f(i, tensor) for i, tensor in enumerate(tensors))

        return Residuals.of(each(self), each(self.encoder))

    def repeated(self, samples: int) -> Residuals:
        """Each residual over and over, for so many samples; as it is where it has as many."""
        return self.mapped(lambda _, residual: repeated(residual, samples))

    def pooled(self) -> Residuals:
        """Each residual's mean over its pixels, all over its size: shuffle (ControlNet-v1-1-nightly, README)."""
        return self.mapped(lambda _, residual: residual.mean(dim=(2, 3), keepdim=True).expand_as(residual))

    def __add__(self, other: Residuals) -> Residuals:
        """Several controls add, with no further weighting (paper, section 3.4)."""
        if len(self) != len(other):
            raise ZeroConvError(f"residuals of different UNets cannot be added: {len(self)} and {len(other)} of them")
        nothing = (None,) * len(self.skips)
        return Residuals.of(
            _sums(self, other),
            _sums(self.encoder or nothing, other.encoder or nothing) if self.encoder or other.encoder else (),
        )


def _sums(left: Iterable[Tensor | None], right: Iterable[Tensor | None]) -> Iterator[Tensor | None]:
    return (b if a is None else a if b is None else a + b for a, b in zip(left, right, strict=True))
