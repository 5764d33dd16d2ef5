"""Claim: training does not collapse on few pictures, and gets better with more (paper, section 4)."""

from __future__ import annotations

from . import runs
from .claim import Findings, Work, spread, table
from .curves import draw

SIZES = ("100", "1000", "10000", "zero")
LAST = 4
"""Measurements at the end of a training that are averaged: one of 16 scenes is noisy."""


def measure(work: Work) -> Findings:
    """Fidelity after the same number of steps, and where it jumped, by the number of pictures."""
    curves = {name: [runs.curve(work, name, seed) for seed in runs.SEEDS] for name in SIZES}
    titles = {name: f"{runs.RUNS[name].pictures:,} pictures" for name in SIZES}
    marks = {name: [runs.converged(work, name, seed) for seed in runs.SEEDS] for name in SIZES}
    rows = []
    for name, lines in curves.items():
        passes = lines[0][0][-1] * runs.OPTIONS.batch_size / runs.RUNS[name].pictures
        jumps = ", ".join("none" if mark is None else str(mark) for mark in marks[name])
        best = [max(scores) for _, scores in lines]
        last = [sum(scores[-LAST:]) / LAST for _, scores in lines]
        rows.append([titles[name], f"{passes:.3g}", jumps, spread(best, 3), spread(last, 3)])
    head = ["trained on", "passes over them", "converged at step", "best", f"mean of the last {LAST}"]
    plot = draw({titles[n]: curves[n] for n in SIZES}, {titles[n]: marks[n] for n in SIZES})
    return Findings(table(head, rows, 3), {"data_size": plot})
