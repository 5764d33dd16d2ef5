"""A training in one picture: its losses, how well samples follow their hints, and the step where that began."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .convergence import smoothed

RAW, SMOOTH, FIDELITY, MARK, GRID, TEXT = "#b5d6ef", "#0072b2", "#d55e00", "#333333", "#e6e6e6", "#333333"
HELD_OUT = "#009e73"
"""Colours: blue, vermilion and green of Okabe and Ito's palette, which colour-blind readers tell apart, and greys."""
WIDE = 10.0
"""Losses whose largest is this many times their smallest are drawn on a logarithmic axis."""
POINTS = 2000
"""Points of a curve beyond which it is thinned: more than there are pixels."""
DPI = 100
WIDTH, HEIGHT = 960, 540

Curve = Sequence[tuple[int, float]]


def plot(
    losses: Curve,
    fidelity: Curve = (),
    converged: int | None = None,
    width: int = WIDTH,
    height: int = HEIGHT,
    validation: Curve = (),
) -> np.ndarray:
    """A picture (height,width,3) uint8 of a training so far: (step, loss) pale, smoothed strong, fidelity at the right.

    `losses` has an entry for each step, `fidelity` and `validation` (held-out losses) one for each measurement; each
    may be empty. `converged` is drawn as a line with its step. Values that are not finite are left out.
    """
    # Not pyplot, whose figures live on in a state shared by the process; and not at import, which must stay cheap.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    left = figure.add_subplot()
    left.set_xlabel("optimizer step", color=TEXT)
    left.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    left.grid(color=GRID, linewidth=0.8)
    left.set_axisbelow(True)
    left.spines[["top"]].set_visible(False)

    steps, values = _finite(losses)
    if len(steps):
        average = np.array(smoothed(values.tolist(), half_life=max(50, len(values) / 100)))
        few = len(steps) < 50
        left.plot(*_thinned(steps, values), color=RAW, linewidth=0.8, marker="." if few else "", label="loss")
        left.plot(*_thinned(steps, average), color=SMOOTH, linewidth=2.0, label="loss, smoothed")
        low, high, logarithmic = _range(values)
        if logarithmic:
            left.set_yscale("log")
            left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            left.yaxis.set_minor_locator(NullLocator())
        left.set_ylim(low, high)
    watched, held_out = _finite(validation)
    if len(watched):
        left.plot(watched, held_out, color=HELD_OUT, linewidth=1.2, linestyle=":", marker=".", label="held-out loss")
    left.set_ylabel("loss", color=SMOOTH)
    left.tick_params(axis="y", colors=SMOOTH)
    left.tick_params(axis="x", colors=TEXT)

    measured, scores = _finite(fidelity)
    right = left.twinx()
    right.spines[["top"]].set_visible(False)
    if len(measured):
        right.plot(
            measured, scores, color=FIDELITY, linewidth=1.6, marker="o", markersize=5, markeredgecolor="white",
            label="fidelity",
        )  # fmt: skip
        right.set_ylabel("fidelity of held-out samples", color=FIDELITY)
        right.tick_params(axis="y", colors=FIDELITY)
        if 0 <= scores.min() and scores.max() <= 1:
            right.set_ylim(0, 1)
    else:
        right.set_axis_off()
    end = max([1.0, *steps[-1:], *measured[-1:]])
    left.set_xlim(-0.01 * end, 1.01 * end)
    if converged is not None:
        right.axvline(converged, color=MARK, linewidth=1.2, linestyle="--")
        far = converged > end / 2
        right.annotate(
            f"converged at step {converged}", (converged, 0.03), xycoords=("data", "axes fraction"),
            xytext=(-6 if far else 6, 0), textcoords="offset points", ha="right" if far else "left", va="bottom",
            color=MARK, weight="bold", bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2},
        )  # fmt: skip

    handles = [handle for axes in (left, right) for handle in axes.get_legend_handles_labels()[0]]
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _finite(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """The steps (n,) and values (n,) of a curve where they are finite."""
    points = np.array(curve, dtype=np.float64).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    return points[:, 0], points[:, 1]


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `POINTS` points that look the same: of each stretch the lowest and the highest value."""
    if len(steps) <= POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), POINTS // 2 + 1).astype(int)[:-1]
    length = np.diff(edges, append=len(steps)).max()
    rows = np.minimum(edges[:, None] + np.arange(length), np.append(edges[1:], len(steps))[:, None] - 1)
    ends = np.stack([values[rows].argmin(axis=1), values[rows].argmax(axis=1)], axis=1)
    chosen = np.sort(np.take_along_axis(rows, ends, axis=1), axis=1).ravel()
    return steps[chosen], values[chosen]


def _range(values: np.ndarray) -> tuple[float, float, bool]:
    """The limits of the loss axis, and whether it is logarithmic.

    All but the highest and the lowest 0.1 % of the losses, which may be spikes, fit into it with some air.
    """
    low, high = np.quantile(values, [0.001, 0.999]).tolist()
    if low > 0 and high / low > WIDE:
        return low / 1.1, high * 1.1, True
    air = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    return low - air, high + air, False
