"""Hints that were made already are not made again, and nobody can change them from outside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from zeroconv.annotators import Annotator, Parameter
from zeroconv.annotators.cache import HintCache
from zeroconv.annotators.images import AnnotatorError

calls: list[str] = []


def dim(image: np.ndarray, gain: float = 0.5) -> np.ndarray:
    calls.append("dim")
    return image * gain


def masked(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    calls.append("masked")
    return image * mask[:, :, None]


def posed(network: str, image: np.ndarray, frame: dict) -> tuple[np.ndarray, dict]:
    calls.append(f"posed by {network}")
    return image, {**frame, "people": [{"found": 1}]}


DIM = Annotator("dim", dim, (Parameter("gain", "How bright."),))
MASKED = Annotator("masked", masked, reads_mask=True)
POSED = Annotator("posed", posed, networks=("net",), reads_pose=True, gives_pose=True)


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


def annotate(cache: HintCache, annotator: Annotator, image: np.ndarray, resolution: int = 0, **given: Any) -> Any:
    """The answer for one picture."""
    masks, frames = [given.pop("mask", None)], [given.pop("frame", None)]
    (made,) = cache.see(annotator, [image], resolution, masks=masks, frames=frames, **given)
    return made


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((8, 8, 3), dtype=np.float32)


def test_the_same_again_is_not_made_again():
    cache = HintCache(10**6)
    first, _ = annotate(cache, DIM, picture(), 8, parameters={"gain": 0.25})
    second, _ = annotate(cache, DIM, picture(), 8, parameters={"gain": 0.25})
    np.testing.assert_array_equal(first, picture() * np.float32(0.25))
    np.testing.assert_array_equal(second, first)
    assert calls == ["dim"]


def test_a_default_written_out_is_the_same_as_none():
    cache = HintCache(10**6)
    annotate(cache, DIM, picture())
    annotate(cache, DIM, picture(), parameters={"gain": 0.5})
    assert calls == ["dim"]


def test_what_the_hint_is_made_of_makes_a_difference():
    cache = HintCache(10**6)
    for image, resolution, gain in (
        (picture(0), 8, 0.5),
        (picture(1), 8, 0.5),
        (picture(0), 16, 0.5),
        (picture(0), 8, 0.25),
        (picture(0).reshape(4, 16, 3), 4, 0.5),
        (picture(0).astype(np.float64), 8, 0.5),
    ):
        annotate(cache, DIM, image, resolution, parameters={"gain": gain})
    assert calls == ["dim"] * 6


def test_mask_and_frame_make_a_difference_to_those_that_read_them():
    cache = HintCache(10**6)
    masks = [np.zeros((8, 8), np.float32), np.ones((8, 8), np.float32)]
    hints = [annotate(cache, MASKED, picture(), mask=mask)[0] for mask in (*masks, *masks)]
    np.testing.assert_array_equal(hints[2], picture() * 0)
    np.testing.assert_array_equal(hints[3], picture())
    for mask in masks:
        annotate(cache, DIM, picture(), mask=mask)
    assert calls == ["masked", "masked", "dim"]
    calls.clear()
    frames = [{"people": [], "canvas": np.float32(8)}, {"people": [], "canvas": np.float32(9)}]
    for frame in (*frames, *frames):
        annotate(cache, POSED, picture(), networks=lambda: ["a"], frame=frame)
    assert calls == ["posed by a"] * 2


def test_what_it_gives_is_the_callers_own():
    cache = HintCache(10**6)
    for _ in range(2):
        hint, frame = annotate(cache, POSED, picture(), networks=["a"], frame={"people": []})
        np.testing.assert_array_equal(hint, picture())
        assert frame == {"people": [{"found": 1}], "canvas_width": 8, "canvas_height": 8}
        hint[:] = 0
        frame["people"].clear()
    assert len(calls) == 1


def test_networks_are_asked_for_only_when_all_else_is_in_order():
    asked = []

    def networks() -> list[str]:
        asked.append("net")
        return ["a"]

    cache = HintCache(10**6)
    with pytest.raises(AnnotatorError, match="posed: found no pose_keypoints"):
        annotate(cache, POSED, picture(), networks=networks)
    with pytest.raises(AnnotatorError, match="posed: image has 192 numbers that are not finite"):
        annotate(cache, POSED, picture() * np.nan, networks=networks, frame={})
    assert asked == []
    annotate(cache, POSED, picture(), networks=networks, frame={})
    annotate(cache, POSED, picture(), networks=networks, frame={})
    assert asked == ["net"]


def test_an_error_is_not_kept():
    cache = HintCache(10**6)
    for _ in range(2):
        with pytest.raises(AnnotatorError, match="masked: found no mask"):
            annotate(cache, MASKED, picture())


def test_the_hints_used_last_are_kept_as_far_as_the_capacity_goes():
    """Each hint has 8*8*3 floats of 4 bytes: two fit."""
    cache = HintCache(2 * 768)
    for seed in (0, 1, 0, 2):  # 2 pushes out 1, which was used longest ago
        annotate(cache, DIM, picture(seed))
    assert len(calls) == 3
    annotate(cache, DIM, picture(0))
    annotate(cache, DIM, picture(2))
    assert len(calls) == 3
    annotate(cache, DIM, picture(1))
    assert len(calls) == 4
    full = HintCache(767)
    for _ in range(2):
        np.testing.assert_array_equal(annotate(full, DIM, picture())[0], picture() * np.float32(0.5))
    assert len(calls) == 6
