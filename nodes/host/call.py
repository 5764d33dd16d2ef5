"""One call of the UNet as a control sees it: its samples, its hint, and whether the model has the control's sizes."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...controlnet_core.dosing.piece import Piece
from ...controlnet_core.keys import times
from ...controlnet_core.networks import injection
from ...controlnet_core.networks.unet import UNetConfig
from .resize import POSITIONS


@dataclass(frozen=True)
class Call:
    """One call of the UNet, cut down to the samples that this control acts on, at strength `value`.

    `x` (B,4,H,W), `t` (B,) and `cond` hold conds of equal size one after the other, such as the halves of guidance:
    those numbered `halves` of the whole call, whose samples are `piece`. Of x and t the first `distinct` are enough:
    what follows repeats them. `options` are the host's for this call.
    """

    x: Tensor
    t: Tensor
    cond: dict[str, Any]
    halves: tuple[int, ...]
    piece: Piece
    distinct: int
    options: dict[str, Any]
    value: float

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the latent; less than the run's where a prompt is limited to an area."""
        return self.x.shape[2], self.x.shape[3]


@dataclass(frozen=True)
class Hint:
    """The hint of a call: of `source` (F,C,H,W), the whole one or what was cut of it, the entries `numbers`.

    The first `channels` are the picture's. With `count`, entry i is `piece.numbers(count)[i]` of so many; without,
    there is one for each sample that control acts on. What is made of it may be kept under `key` while `alive` is.
    """

    source: Tensor
    channels: int
    numbers: tuple[int, ...]
    count: int | None
    key: Hashable
    alive: Tensor | None

    @property
    def rows(self) -> Tensor:
        """The picture's channels of these entries, (F,C,H,W), at the size that they were given in."""
        return self._entries(self.source[:, : self.channels])

    @property
    def positions(self) -> Tensor | None:
        """Where the pixels lie in the whole hint, (F,2,H,W); `None` where that is not told."""
        told = self.source[:, self.channels :]
        return self._entries(told) if told.shape[1] == POSITIONS else None

    def _entries(self, tensor: Tensor) -> Tensor:
        return tensor if len(self.numbers) == len(tensor) else tensor[list(self.numbers)]

    def of(self, piece: Piece, made: Tensor) -> Tensor:
        """What was made of the entries, for each of the samples of `piece`."""
        return made if self.count is None else piece.of_frames(made, self.count)


def repeats(tensor: Tensor, rows: int) -> bool:
    """Whether it is known that `tensor` repeats its first `rows` all over: what lies on the CPU is compared."""
    return len(tensor) <= rows or (tensor.device.type == "cpu" and torch.equal(tensor[rows:], tensor[:-rows]))


def tiles(x: Tensor, t: Tensor, batched_number: int, options: dict[str, Any]) -> int:
    """How many tiles of the picture are in a call, one after another with all parts of the batch in each.

    The host says the sigmas of one part, and a tiled sampler repeats what the UNet is given for each tile.
    """
    part = len(options.get("sigmas", ())) * batched_number
    return len(t) // part if part and len(t) == len(x) and len(t) % part == 0 else 1


def watch_sizes(options: dict[str, Any], config: UNetConfig) -> None:
    """Let this call of the UNet raise where its blocks have other sizes than residuals: the host only logs that.

    Other nodes may shrink the features inside the UNet. The sizes are those of what the UNet is really given, which a
    tiled sampler may cut down.
    """
    patches, place = options.get("patches", {}), "input_block_patch_after_skip"
    if any(getattr(patch, "func", None) is _check_size for patch in patches.get(place, ())):
        return
    options["patches"] = {**patches, place: [partial(_check_size, config), *patches.get(place, ())]}


def _check_size(config: UNetConfig, h: Tensor, transformer_options: dict[str, Any]) -> Tensor:
    """The host's patch behind each encoder block: `h` as it came."""
    number = transformer_options["block"][1]
    expected = config.residual_shapes(*transformer_options["original_shape"][2:])[number]
    if tuple(h.shape[1:]) != expected:
        raise injection.InjectionError(
            f"encoder block {number} of the model gives {times(h.shape[1:])}, and control has {times(expected)} for "
            "it: another node changes the size inside the model (Deep Shrink does); take that node off, or the control"
        )
    return h
