"""Claim: the hint is not learned gradually; the model begins to follow it suddenly (paper, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from ..sheet import contact_sheet
from . import runs
from .claim import Findings, Work, table
from .curves import draw
from .sampling import shown

SHOWN = 4


def measure(work: Work) -> Findings:
    """Fidelity against steps of the training with zero convolutions, the detector's mark, and samples around it."""
    steps, scores = runs.curve(work, "zero")
    mark = runs.converged(work, "zero")
    title = runs.RUNS["zero"].title
    losses = runs.losses(work, "zero")
    plot = draw({title: (steps, scores)}, {title: mark}, losses)
    chosen = around(steps, mark)
    rows = [
        [f"{step}{' (converged)' if step == mark else ''}", score, mean_loss(*losses, step)]
        for step, score in zip(steps, scores, strict=True)
        if step in chosen or step % 100 == 0
    ]
    scenes = runs.watched()
    columns = {"hint": shown(scenes.hints[runs.HINT], SHOWN), "render": shown(scenes.images, SHOWN)}
    for step in chosen:
        pictures = runs.samples(work, "zero", step)
        if pictures is not None:
            columns[f"step {step}"] = pictures[:SHOWN]
    sheet = contact_sheet(columns)
    return Findings(
        table(["step", "fidelity", "mean loss around it"], rows, 3), {"convergence": plot, "convergence_samples": sheet}
    )


def mean_loss(steps: Sequence[int], losses: Sequence[float], step: int, reach: int = 25) -> float:
    """The mean of the losses of at most `reach` steps to either side."""
    near = [loss for at, loss in zip(steps, losses, strict=True) if abs(at - step) <= reach]
    return sum(near) / len(near)


def around(steps: list[int], mark: int | None, count: int = 7) -> list[int]:
    """The measured steps to show: the first, the last, and those around the mark, or evenly spread without one."""
    if mark is None:
        inner = [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]
    else:
        at = steps.index(mark)
        inner = steps[max(0, at - count // 2) : at + count - count // 2 - 1]
    return sorted({steps[0], *inner, steps[-1]})
