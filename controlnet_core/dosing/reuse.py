"""Residuals told from those of earlier steps: a control that is computed at a part of the steps alone.

From one step to the next a control's residuals move little, and nearly in a straight line over log(sigma): the line
through the last two that were computed tells those of the steps that follow (docs/reuse.md has the measurements). It
tells them at strength 1, so that schedules, masks and windows act at every step as they do without.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..networks.residuals import Residuals
from .clock import Moment

LIMIT = 2 * 2**30
"""Bytes that one control holds: those of 36 pictures of SD1.5 at 512x512 in fp16 with both halves, or 9 of SDXL."""

HELD = 2
"""How many steps' residuals a line is drawn through."""


@dataclass(frozen=True)
class Computed:
    """The residuals computed last, at strength 1, those computed before them, and what must live as long as they do."""

    moment: Moment
    residuals: Residuals
    before: tuple[Moment, Residuals] | None
    alive: Any

    @property
    def nbytes(self) -> int:
        """How many bytes it holds."""
        return self.residuals.nbytes + (self.before[1].nbytes if self.before else 0)

    def told(self, now: Moment) -> Residuals:
        """The residuals on the line at another moment; those computed last where no line can be drawn."""
        if self.before is None:
            return self.residuals
        moment, residuals = self.before
        (first, last), at = (_place(moment), _place(self.moment)), _place(now)
        if first == last:
            return self.residuals
        # No farther ahead than the two are apart: a line is trusted as far as it was seen.
        ahead = min(1.0, max(0.0, (at - last) / (last - first)))
        return Residuals.of(
            _on_line(residuals, self.residuals, 1 + ahead),
            _on_line(residuals.encoder, self.residuals.encoder, 1 + ahead),
        )


class Reused:
    """The residuals of a run's pieces, of which `share` of the steps, 0..1, get told ones.

    A piece that was not asked for when it was its turn is let go, and so are those unused for longest where there are
    more than `limit` bytes: they begin anew, with two steps computed.
    """

    def __init__(self, share: float, limit: int = LIMIT):
        self._share, self._limit = share, limit
        self._pieces: OrderedDict[Hashable, Computed] = OrderedDict()

    def at(self, piece: Hashable, now: Moment, compute: Callable[[], Residuals], alive: Any = None) -> Residuals:
        """The residuals of a piece of the run now, which nobody may change; where steps cannot be told, computed.

        `alive` are objects whose ids are in `piece`.
        """
        held = self._pieces.get(piece)
        if held is not None and held.before is not None and self._turn(now) == self._turn(held.moment):
            self._pieces.move_to_end(piece)
            return held.told(now)
        residuals = compute()
        if now.step is not None:
            before = None if held is None else (held.moment, held.residuals)
            if held is not None and _place(held.moment) == _place(now):
                before = held.before
            self._pieces[piece] = Computed(now, residuals, before, alive)
            self._pieces.move_to_end(piece)
            self._let_go(self._turn(now))
        return residuals

    def _let_go(self, turn: float) -> None:
        for piece in [piece for piece, held in self._pieces.items() if self._turn(held.moment) < turn - 1]:
            del self._pieces[piece]
        while sum(held.nbytes for held in self._pieces.values()) > self._limit:
            self._pieces.popitem(last=False)

    def _turn(self, moment: Moment) -> float:
        """Which of its computations a step belongs to: those of one number share one."""
        return math.nan if moment.step is None else math.floor(moment.step * (1 - self._share) + 1e-9)


def _place(moment: Moment) -> float:
    return math.log(max(moment.sigma, 1e-6))


def _on_line(first: Iterable[Tensor | None], last: Iterable[Tensor | None], weight: float) -> Iterator[Tensor | None]:
    for a, b in zip(first, last, strict=True):
        yield b if a is None or b is None else torch.lerp(a, b, weight)
