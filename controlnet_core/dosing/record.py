"""How strongly residuals acted at each step: the RMS of each against that of what it joins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ZeroConvError
from ..networks.residuals import Residuals
from .clock import Moment

TOGETHER = "all controls together"
"""The name of the sum that the UNet got; shown unless it was a single control's residuals all the time."""


class RecordError(ZeroConvError):
    """A record that has nothing to tell, or is asked to hold what cannot be compared."""


@dataclass(frozen=True)
class Row:
    """The residuals of one control at one moment; `step` is `None` where the run's steps cannot be told.

    `ratios` are RMS(residual) / RMS(what it joins) for each skip connection from shallow to deep, then for the middle;
    `None` where nothing acted.
    """

    step: int | None
    sigma: float
    ratios: tuple[float | None, ...]


@dataclass(frozen=True)
class Panel:
    """One control's rows in the order of sampling, one for each moment that the UNet saw."""

    title: str
    rows: tuple[Row, ...]


def power(tensor: Tensor) -> Tensor:
    """Mean square of each sample: (B,C,H,W) -> (B,) in fp32."""
    return tensor.float().square().mean(dim=(1, 2, 3))


class Record:
    """What controls handed out in one sampling, and what it met.

    Each control says what it hands out (`add`) before the UNet runs; then the UNet says what that joined (`met`).
    Samples that a control leaves alone altogether, such as the other half of guidance, are not counted, and UNet calls
    of one moment are averaged.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Forget everything: a sampling begins."""
        self._seen: dict[Moment, None] = {}  # in order
        self._count = 0
        self._sum_says_more = False
        self._handed_out: dict[str, tuple[Moment, Residuals]] = {}
        self._ratios: dict[str, dict[Moment, dict[int, list[float]]]] = {}

    def add(self, name: str, moment: Moment, residuals: Residuals) -> None:
        """Control `name` hands out `residuals`, scaled, for the UNet call that comes next."""
        if all(tensor is None for tensor in (*residuals, *residuals.encoder)):
            return
        title, number = name, 1
        while title in self._handed_out:
            number += 1
            title = f"{name} ({number})"
        self._handed_out[title] = moment, residuals.mapped(lambda _, tensor: power(tensor))

    def shifted(self, name: str, moment: Moment, ratios: Mapping[int, float]) -> None:
        """Control `name` shifted what single layers are given: RMS(shift) / RMS(input) by block, the layers' mean."""
        for i, ratio in ratios.items():
            self._ratios.setdefault(name, {}).setdefault(moment, {}).setdefault(i, []).append(ratio)

    def met(self, moment: Moment, targets: Residuals) -> None:
        """The UNet ran; `targets` holds the `power` of what each residual joined, without any control."""
        self._seen[moment] = None
        self._count = len(targets)
        handed_out = {name: powers for name, (at, powers) in self._handed_out.items() if at == moment}
        self._handed_out.clear()
        if TOGETHER in handed_out and not (len(handed_out) == 2 and _alike(*handed_out.values())):
            self._sum_says_more = True
        for name, powers in handed_out.items():
            self._compare(name, moment, powers, targets)

    def _compare(self, name: str, moment: Moment, powers: Residuals, targets: Residuals) -> None:
        acting = _acting(powers)
        # What joins the encoder is kept apart: it meets the block's output before that becomes the skip connection.
        for title, found, joined in (
            (name, tuple(powers), tuple(targets)),
            (f"{name}, added in the encoder", powers.encoder, targets.encoder),
        ):
            for i, (own, other) in enumerate(zip(found, joined)):
                if own is None or other is None:
                    continue
                samples = len(other)
                if len(own) not in (1, samples):  # one for all is what the host's T2I-Adapter hands out
                    raise RecordError(
                        f"{name} made residuals for {len(own)} samples and the model was called with {samples}: "
                        "another node splits the batch; take that node off, or Record Control"
                    )
                rows = acting.expand(samples)
                ratio = (own.expand(samples)[rows].mean() / other[rows].mean()).sqrt().item()
                self._ratios.setdefault(title, {}).setdefault(moment, {}).setdefault(i, []).append(ratio)

    @property
    def panels(self) -> tuple[Panel, ...]:
        """One panel for each control; a single one without numbers when none acted. RecordError before a sampling."""
        if not self._seen:
            raise RecordError(
                "nothing was sampled with this record: connect the model of Record Control to the sampler (through "
                "Apply ControlNet if you like), and the sampler's latent to Control Report"
            )
        sums = [title for title in self._ratios if title.startswith(TOGETHER)]
        titles = [title for title in self._ratios if title not in sums] + (sums if self._sum_says_more else [])
        return tuple(Panel(title, self._rows(title)) for title in titles or [TOGETHER])

    def _rows(self, title: str) -> tuple[Row, ...]:
        of_moments = self._ratios.get(title, {})
        rows = []
        for moment in self._seen:
            ratios = of_moments.get(moment, {})
            means = (sum(ratios[i]) / len(ratios[i]) if i in ratios else None for i in range(self._count))
            rows.append(Row(moment.step, moment.sigma, tuple(means)))
        return tuple(rows)


def _acting(powers: Residuals) -> Tensor:
    """Which samples a control acts on: those in which any residual is not zero; all when there is no such one."""
    total = torch.stack(torch.broadcast_tensors(*(p for p in (*powers, *powers.encoder) if p is not None))).sum(0)
    return total > 0 if bool(total.any()) else total == 0


def _alike(a: Residuals, b: Residuals) -> bool:
    """Whether two controls handed out the same, as far as their powers tell."""

    def same(p: Tensor | None, q: Tensor | None) -> bool:
        return p is q if p is None or q is None else p.shape == q.shape and torch.allclose(p, q)

    def padded(powers: Residuals) -> tuple[Tensor | None, ...]:
        return (*powers, *(powers.encoder or (None,) * len(powers.skips)))

    return len(a) == len(b) and all(same(p, q) for p, q in zip(padded(a), padded(b)))


def table(record: Record) -> str:
    """The record as text: for each control a line that sums it up, and a table of percents, one row for each sigma."""
    return "\n\n".join(_table(panel) for panel in record.panels)


def _table(panel: Panel) -> str:
    count = len(panel.rows[0].ratios)
    names = [*map(str, range(count - 1)), "mid"]
    lines = [panel.title, _summary(panel, names), "step   sigma" + "".join(f"{name:>7}" for name in names)]
    for row in panel.rows:
        cells = "".join(f"{'-' if ratio is None else f'{100 * ratio:.1f}':>7}" for ratio in row.ratios)
        lines.append(f"{'-' if row.step is None else row.step:>4}{row.sigma:>8.3f}{cells}")
    return "\n".join(lines)


def _summary(panel: Panel, names: Sequence[str]) -> str:
    found = [
        (ratio, names[i], -1 if row.step is None else row.step)
        for row in panel.rows
        for i, ratio in enumerate(row.ratios)
        if ratio is not None
    ]
    if not found:
        return "acted nowhere"
    acted = sum(any(ratio is not None for ratio in row.ratios) for row in panel.rows)
    mean = sum(ratio for ratio, _, _ in found) / len(found)
    most, place, step = max(found)
    return (
        f"acted at {acted} of {len(panel.rows)} sigmas; RMS in percent of what each residual joins: "
        f"mean {100 * mean:.1f}, most {100 * most:.1f} at {place}" + (f" in step {step}" if step >= 0 else "")
    )
