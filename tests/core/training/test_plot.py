"""The plot of a training: what is in it, found by its colours and its place."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from zeroconv.controlnet_core.training.plot import FIDELITY, MARK, RAW, SMOOTH, _finite, _range, _thinned, plot

LOSSES = [(step, 0.1 + 0.02 * (step % 7)) for step in range(1, 301)]
SCORES = [(step, 0.2 if step < 150 else 0.8) for step in range(0, 301, 30)]


def where(picture: np.ndarray, colour: str) -> np.ndarray:
    """The pixels (n,2), row and column, of exactly this colour."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.argwhere((picture == rgb).all(axis=-1))


@pytest.mark.parametrize(("width", "height"), [(960, 540), (640, 480), (333, 251)])
def test_size_and_type(width: int, height: int):
    picture = plot(LOSSES, SCORES, 150, width, height)
    assert picture.shape == (height, width, 3)
    assert picture.dtype == np.uint8
    assert (picture[0] == 255).all()  # white around it


def test_what_is_drawn():
    everything = plot(LOSSES, SCORES, 150)
    for colour in (RAW, SMOOTH, FIDELITY):
        assert len(where(everything, colour)) > 300, colour
    assert len(where(plot(LOSSES, SCORES, 150), MARK)) > len(where(plot(LOSSES, SCORES), MARK)) + 200
    assert len(where(plot(LOSSES), FIDELITY)) == 0
    assert len(where(plot([], SCORES), RAW)) == 0
    assert plot([]).shape == (540, 960, 3)  # before the first step


def test_fidelity_rises_where_it_does():
    points = where(plot([], SCORES), FIDELITY)
    curve = points[points[:, 1] < 850]  # without the axis at the right
    left, right = curve[curve[:, 1] < 350], curve[curve[:, 1] > 600]
    assert left[:, 0].mean() > right[:, 0].mean() + 200  # rows count from the top


def test_the_mark_stands_at_its_step():
    for step in (75, 150, 225):
        new = (plot(LOSSES, SCORES, step) != plot(LOSSES, SCORES)).any(axis=-1)
        column = new.sum(axis=0).argmax()  # the line is the highest of what has come
        assert abs((column - 35) / (905 - 35) - step / 300) < 0.03, step


def test_what_is_not_finite_is_left_out():
    broken = [*LOSSES, (301, float("nan")), (302, float("inf"))]
    assert len(_finite(broken)[0]) == 300
    assert len(where(plot(broken, [*SCORES, (310, float("nan"))]), SMOOTH)) > 300


def test_the_axis_is_logarithmic_beyond_a_factor_of_ten():
    assert _range(np.array([0.01, 0.05, 0.09])) == pytest.approx((0.0061, 0.0939, False), abs=1e-4)
    low, high, logarithmic = _range(np.geomspace(0.01, 0.2, 100))
    assert logarithmic
    assert 0 < low < 0.01 < 0.2 < high < 0.3
    assert _range(np.array([0.5, 0.5])) == (0.25, 0.75, False)
    assert _range(np.array([0.0, 0.0])) == (-1.0, 1.0, False)
    spike = np.append(np.linspace(0.1, 0.2, 5000), 1e6)
    assert _range(spike)[1] < 0.3  # one spike does not flatten the rest


def test_long_curves_are_thinned_and_keep_their_peaks():
    steps, values = np.arange(100_001.0), np.sin(np.arange(100_001.0) / 3000)
    values[77_777] = 5
    thin, kept = _thinned(steps, values)
    assert len(thin) == 2000
    assert (np.diff(thin) >= 0).all()
    assert (values[thin.astype(int)] == kept).all()
    assert kept.max() == 5
    assert thin[kept.argmax()] == 77_777
    assert _thinned(steps[:2000], values[:2000])[0] is not thin
    assert len(_thinned(steps[:2000], values[:2000])[0]) == 2000


def test_a_long_run_is_drawn_fast():
    plot(LOSSES)  # matplotlib's own imports
    rng = np.random.default_rng(0)
    losses = list(enumerate(rng.lognormal(-3, 0.5, 100_000).tolist(), start=1))
    started = time.process_time()
    plot(losses, [(step, 0.3) for step in range(0, 100_001, 2000)], 60_000)
    assert time.process_time() - started < 3  # 0.4 s on a machine with nothing else to do


def test_the_arguments_are_left_alone_and_pyplot_is_not_used():
    losses, scores = list(LOSSES), list(SCORES)
    plot(losses, scores, 150)
    assert (losses, scores) == (LOSSES, SCORES)
    code = (
        "import sys; sys.path.insert(0, '.'); import controlnet_core.training.plot as p\n"
        "assert not any(name.startswith('matplotlib') for name in sys.modules)\n"
        "p.plot([(1, 0.5), (2, 0.4)], [(0, 0.2)], 1)\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'matplotlib.figure' in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
