"""Pictures that follow one another: networks see several at once, depth keeps its greys, and what was seen stays."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skimage.data import coffee, rocket

from zeroconv.annotators import ANNOTATORS, Annotator, depth, pipeline
from zeroconv.annotators.cache import HintCache
from zeroconv.annotators.networks.depth import build_depth_anything, build_dpt

from . import pretrained_tiny as tiny
from .seeded import load, record

BATCHED = [annotator.name for annotator in ANNOTATORS if annotator.batched]


def video(count: int, height: int = 96, width: int = 128) -> list[np.ndarray]:
    """The camera moves over a cup of coffee."""
    return [coffee()[100 + 8 * i :, 200 + 4 * i :][:height, :width] for i in range(count)]


@pytest.mark.parametrize("name", [name for name in BATCHED if not name.startswith(("depth", "normal"))])
def test_several_at_once_give_the_hints_of_each_alone(name: str, tmp_path: Path):
    networks, frames = load(name, tmp_path), video(3)
    together = pipeline.see(record(name), frames, 96, networks=networks)
    alone = [pipeline.annotate(record(name), frame, 96, networks=networks)[0] for frame in frames]
    assert [hint.shape for hint, _ in together] == [(96, 128, 3)] * 3
    assert np.abs(alone[1] - alone[0]).mean() > 0.005
    # Of thin lines of a random network, a last bit moves some.
    moved = np.mean([np.abs(hint - one) > 0.5 / 255 for (hint, _), one in zip(together, alone, strict=True)])
    assert moved < 1e-3


@pytest.mark.parametrize("name", ["depth_large", "depth_small", "depth_anything"])
def test_depth_of_several_at_once_is_that_of_each_alone(name: str, tmp_path: Path):
    if name == "depth_anything":
        network = build_depth_anything(*tiny.depth_anything(tmp_path))
    else:
        network = build_dpt(*tiny.dpt(tmp_path, hybrid=name == "depth_small"))
    frames = video(3)
    together = pipeline.see(record(name), frames, 96, networks=[network])
    for (seen, _), frame in zip(together, frames, strict=True):
        ((alone, _),) = pipeline.see(record(name), [frame], 96, networks=[network])
        assert seen.shape == (96, 128)
        np.testing.assert_allclose(seen, alone, rtol=0, atol=1e-3 * np.ptp(alone))


def nearing(count: int = 8) -> list[np.ndarray]:
    """Inverse depths (H,W) of a wall that stays where it is, and something that comes nearer before it."""
    wall = np.tile(np.linspace(1.0, 2.0, 64, dtype=np.float32), (48, 1))
    frames = []
    for i in range(count):
        frame = wall.copy()
        frame[16:32, 20:36] = 3.0 + i
        frames.append(frame)
    return frames


@pytest.mark.parametrize("draw", [depth.stretched_hints, depth.metric_hints, depth.inverse_hints])
def test_with_the_range_of_the_batch_the_wall_does_not_flicker(draw: Any):
    def flicker(name: str) -> float:
        greys = np.stack([hint[:16] for hint in draw(nearing(), name)])
        return float(np.ptp(greys, axis=0).max() * 255)

    assert flicker("batch") == 0
    if draw is depth.stretched_hints:
        assert flicker("picture") > 95  # of 255: where it was a half of the range it becomes a ninth
    hints = list(depth.stretched_hints(nearing(), "batch"))
    assert hints[0].min() == 0 and hints[-1].max() == 1
    np.testing.assert_allclose([hint[20, 24, 0] for hint in hints], (np.arange(8) + 2) / 9, atol=1e-6)


def test_one_picture_has_the_same_hint_with_either_range():
    for frame in nearing(3):
        for draw in (depth.stretched_hints, depth.metric_hints, depth.inverse_hints):
            (one,), (other,) = draw([frame], "picture"), draw([frame], "batch")
            np.testing.assert_array_equal(one, other)


# -- the cache -------------------------------------------------------------------------------------------------------


def counting(name: str, made: list[str]) -> Annotator:
    """The annotator of this name, which notes each picture that it looks at."""
    listed = record(name)

    @wraps(listed.function)
    def noted(image: np.ndarray, **given: Any) -> Any:
        made.append(name)
        return listed.function(image, **given)

    return replace(listed, function=noted)


@pytest.mark.parametrize("name", ["canny", "scribble", "lsd", "hough_lines", "threshold", "scribble_xdog"])
def test_black_and_white_is_kept_in_a_twelfth_of_its_bytes_and_comes_back_bit_by_bit(name: str):
    made: list[str] = []
    annotator, frame = counting(name, made), rocket()[:64, 300:400]
    expected, _ = pipeline.annotate(record(name), frame)
    cache = HintCache(64 * 100)  # one channel of 8 bits
    for _ in range(2):
        ((hint, _),) = cache.see(annotator, [frame])
        np.testing.assert_array_equal(hint, expected)
        hint[:] = 0.5
    assert made == [name]
    small = HintCache(64 * 100 - 1)
    for _ in range(2):
        small.see(annotator, [frame])
    assert len(made) == 3


@pytest.mark.parametrize("name", ["blur", "luminance", "lineart_standard", "tile"])
def test_what_is_no_8_bits_comes_back_bit_by_bit(name: str):
    made: list[str] = []
    annotator, frame = counting(name, made), rocket()[:64, 300:400]
    cache = HintCache(10**6)
    (first, _), (again, _) = cache.see(annotator, [frame])[0], cache.see(annotator, [frame])[0]
    np.testing.assert_array_equal(again, first)
    assert made == [name] and again.dtype == np.float32 and again.flags.c_contiguous


def test_of_a_video_longer_than_the_cache_the_first_part_stays():
    """Where the oldest goes first, each frame pushes out the one that will be asked for next, and none is left."""
    made: list[str] = []
    annotator, frames = counting("canny", made), video(6, 64, 64)
    cache = HintCache(4 * 64 * 64)
    for wanted in (6, 2, 2):
        made.clear()
        run = object()
        for frame in frames:
            cache.see(annotator, [frame], run=run)
        assert len(made) == wanted
    # Another picture in a later run finds room all the same, and takes that of the one used longest ago.
    made.clear()
    for _ in range(2):
        cache.see(annotator, [rocket()[:64, :64]], run=object())
    assert len(made) == 1
    cache.see(annotator, frames[1:4], run=object())
    assert len(made) == 1
    cache.see(annotator, frames[:1], run=object())
    assert len(made) == 2
