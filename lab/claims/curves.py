"""Curves of trainings in one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart by the colour-blind as well (Okabe and Ito)."""

Curve = tuple[Sequence[int], Sequence[float]]


def draw(
    fidelity: Mapping[str, Sequence[Curve]], marks: Mapping[str, Sequence[int | None]], loss: Curve | None = None
) -> Image:
    """Fidelity against steps, a colour for each training and a line for each of its seeds; dotted: sudden convergence.

    `loss` is drawn pale behind them, on an axis of its own, with its running mean over 20 steps.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(9, 4.5), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for colour, (name, lines) in zip(COLOURS, fidelity.items(), strict=False):
        for i, (steps, scores) in enumerate(lines):
            axes.plot(steps, scores, "o-", color=colour, label="" if i else name, markersize=3, linewidth=1, zorder=3)
        for mark in sorted({mark for mark in marks[name] if mark is not None}):
            axes.axvline(mark, color=colour, linestyle=":", linewidth=1.5, label=f"converged at step {mark}")
    axes.set(xlabel="optimizer steps", ylabel="fidelity (mean IoU, held-out scenes)", ylim=(0, 1))
    axes.grid(alpha=0.3)
    if loss is not None:
        steps, values = loss
        behind = axes.twinx()
        near = min(20, len(values))
        smooth = np.convolve(values, np.ones(near) / near, "valid")
        behind.plot(steps, values, color="#bbbbbb", linewidth=0.6)
        behind.plot(steps[len(values) - len(smooth) :], smooth, color="#777777", linewidth=1.5)
        axes.plot([], [], color="#777777", label="loss (mean of 20 steps)")
        behind.set(ylabel="loss", ylim=(0, 1.1 * float(np.quantile(values, 0.995))))
        axes.set_zorder(behind.get_zorder() + 1)
        axes.patch.set_visible(False)
    axes.legend(loc="center right" if loss else "lower right", framealpha=0.9, fontsize=9)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
