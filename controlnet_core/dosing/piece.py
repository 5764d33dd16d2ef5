"""Which piece of a run one call of the UNet is about: its samples that a control acts on, and the frames they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import ZeroConvError


class PieceError(ZeroConvError):
    """A call of the UNet that does not tell which piece of the run it is about."""


@dataclass(frozen=True)
class Piece:
    """The samples that a control acts on in a call of the UNet with `samples` of them.

    `rows` are their places in the call's batch and `frames`, one for each, their numbers in the batch of the run: a
    call may hold both halves of guidance, a window of the frames of a video, and several tiles of the picture.
    """

    samples: int
    rows: tuple[int, ...]
    frames: tuple[int, ...]
    _indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def whole(self) -> bool:
        """Whether these are all samples of the call."""
        return len(self.rows) == self.samples

    def take(self, tensor: Tensor) -> Tensor:
        """The entries of `tensor` (samples, ...) that control acts on."""
        return tensor if self.whole else self._pick(tensor, self.rows)

    def scatter(self, part: Tensor, into: Tensor | None = None) -> Tensor:
        """`part` at its rows of the call's batch, and what `into` has elsewhere, or zeros; both stay as they are."""
        if self.whole:
            return part
        into = part.new_zeros(1, *part.shape[1:]).expand(self.samples, *part.shape[1:]) if into is None else into
        if rows := _span(self.rows):
            return torch.cat([into[: rows.start], part, into[rows.stop :]])
        whole = into.clone(memory_format=torch.contiguous_format)
        whole[self._index(self.rows, part.device)] = part
        return whole

    def numbers(self, count: int) -> tuple[int, ...]:
        """Which of `count` entries the frames have, each once: entry i is frame i's, starting over where they end."""
        return (0,) if count == 1 else tuple(sorted({frame % count for frame in self.frames}))

    def of_frames(self, tensor: Tensor, count: int | None = None) -> Tensor:
        """For each of the samples the entry of its frame; a single entry, for all of them, as it is.

        `tensor` holds the entries `numbers(count)` of `count`; `None`: all that there are.
        """
        if len(tensor) == 1:
            return tensor
        count = len(tensor) if count is None else count
        place = {number: i for i, number in enumerate(self.numbers(count))} if len(tensor) < count else range(count)
        return self._pick(tensor, tuple(place[frame % count] for frame in self.frames))

    def _pick(self, tensor: Tensor, numbers: tuple[int, ...]) -> Tensor:
        return tensor[_span(numbers) or self._index(numbers, tensor.device)]

    def _index(self, numbers: tuple[int, ...], device: torch.device) -> Tensor:
        """The numbers as a tensor, moved to a device once."""
        if (numbers, device) not in self._indices:
            self._indices[numbers, device] = torch.tensor(numbers, device=device)
        return self._indices[numbers, device]


def _span(numbers: tuple[int, ...]) -> slice | None:
    """The numbers as a slice, where they follow one another: nothing is copied then, and no device is told them."""
    first = numbers[0]
    return slice(first, first + len(numbers)) if numbers == tuple(range(first, first + len(numbers))) else None


@lru_cache(maxsize=64)
def parts(
    samples: int, count: int, acting: tuple[int, ...], frames: tuple[int, ...] | None = None, tiles: int = 1
) -> Piece:
    """The piece of a call whose batch holds, for each tile, `count` parts of the same frames one after another.

    The parts are such as the halves of guidance. `acting` are those that control acts on, `frames` the numbers of a
    part's samples in the run; `None`: from 0 on. The same piece is given for the same arguments, so that what it keeps
    on a device lasts. Raises PieceError where there are not as many frames as samples in a part.
    """
    size = samples // (count * tiles)
    numbers: Sequence[int] = range(size) if frames is None else frames
    if len(numbers) != size:
        raise PieceError(
            f"the model is called with {size} frames, and the window that it is about has {len(numbers)}: take off "
            "what changes the number of frames inside a context window"
        )
    rows = tuple((tile * count + part) * size + i for tile in range(tiles) for part in acting for i in range(size))
    return Piece(samples, rows, tuple(numbers) * (len(acting) * tiles))
