"""Claim: the hint is not learned gradually; the model begins to follow it suddenly (paper, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from ..sheet import contact_sheet
from . import runs
from .claim import Findings, Work, table
from .curves import draw
from .sampling import shown

SHOWN = 4
SEED = runs.SEEDS[0]
"""The training whose pictures and losses are shown."""


def measure(work: Work) -> Findings:
    """Fidelity against steps of the trainings with zero convolutions, the detector's marks, and samples around one."""
    curves = [runs.curve(work, "zero", seed) for seed in runs.SEEDS]
    marks = [runs.converged(work, "zero", seed) for seed in runs.SEEDS]
    title, losses = runs.RUNS["zero"].title, runs.losses(work, "zero", SEED)
    plot = draw({title: curves}, {title: marks}, losses)
    steps = curves[SEED][0]
    chosen = around(steps, marks[SEED])
    told = {step for mark in marks for step in around(steps, mark)}
    rows = [
        [
            str(step),
            *(f"{scores[at]:.3f}{' (converged)' if step == mark else ''}" for (_, scores), mark in zip(curves, marks)),
            mean_loss(*losses, step),
        ]
        for at, step in enumerate(steps)
        if step in told or step % 100 == 0
    ]
    scenes = runs.watched()
    columns = {"hint": shown(scenes.hints[runs.HINT], SHOWN), "render": shown(scenes.images, SHOWN)}
    for step in chosen:
        pictures = runs.samples(work, "zero", SEED, step)
        if pictures is not None:
            columns[f"step {step}"] = pictures[:SHOWN]
    sheet = contact_sheet(columns)
    head = ["step", *(f"fidelity, seed {seed}" for seed in runs.SEEDS), f"mean loss around it, seed {SEED}"]
    return Findings(table(head, rows, 3), {"convergence": plot, "convergence_samples": sheet})


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
