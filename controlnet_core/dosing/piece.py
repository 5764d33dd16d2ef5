"""Which piece of a run one call of the UNet is about: its samples that a control acts on, and the frames they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """The samples that a control acts on in a call of the UNet with `samples` of them.

    `rows` are their places in the call's batch and `frames`, one for each, their numbers in the batch of the run: a
    call may hold both halves of guidance, or a window of the frames of a video.
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
        return tensor if self.whole else tensor[self._index(self.rows, tensor.device)]

    def scatter(self, part: Tensor, into: Tensor | None = None) -> Tensor:
        """`part` at its rows of the call's batch, and what `into` has elsewhere, or zeros; both stay as they are."""
        if self.whole:
            return part
        whole = part.new_zeros((self.samples, *part.shape[1:])) if into is None else into.clone()
        whole[self._index(self.rows, part.device)] = part
        return whole

    def of_frames(self, tensor: Tensor) -> Tensor:
        """One entry for all, or for each of the samples that of its frame; they start over where there are fewer."""
        if len(tensor) == 1:
            return tensor
        return tensor[self._index(tuple(frame % len(tensor) for frame in self.frames), tensor.device)]

    def _index(self, numbers: tuple[int, ...], device: torch.device) -> Tensor:
        """The numbers as a tensor, moved to a device once."""
        if (numbers, device) not in self._indices:
            self._indices[numbers, device] = torch.tensor(numbers, device=device)
        return self._indices[numbers, device]


@lru_cache(maxsize=64)
def parts(samples: int, count: int, acting: tuple[int, ...], frames: tuple[int, ...] | None = None) -> Piece:
    """The piece of a call whose batch is `count` parts of the same frames, such as guidance halves, one after another.

    `acting` are the parts that control acts on, `frames` the numbers of a part's samples in the run; `None`: from 0 on.
    The same piece is given for the same arguments, so that what it keeps on a device lasts.
    """
    size = samples // count
    numbers: Sequence[int] = range(size) if frames is None else frames
    return Piece(samples, tuple(part * size + i for part in acting for i in range(size)), tuple(numbers) * len(acting))
