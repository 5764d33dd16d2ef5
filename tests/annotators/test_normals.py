"""Normals: slopes of a ramp written out, colours in both orders, and the published formula on an uneven depth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import sobel

from zeroconv.annotators.normals import normal_from_depth, normals_of_depth


def bumpy() -> np.ndarray:
    """An uneven depth (48,64) from 0 to 40 with grain, as MiDaS would give it: no unit, no fixed range."""
    rows, columns = np.mgrid[:48, :64]
    depth = 20 + 10 * np.sin(columns / 9) + 9 * np.cos(rows / 7)
    return (depth + np.random.default_rng(0).normal(0, 0.3, depth.shape)).astype(np.float32)


def picture(depth: np.ndarray) -> np.ndarray:
    return np.repeat(np.rint(depth)[:, :, None], 3, axis=2).astype(np.float32) / 255


def test_a_ramp_has_the_slope_of_its_numbers():
    # One unit per pixel to the right and two down: Sobel gives 8 and 16. What rises to the right faces left: red.
    depth = np.add.outer(2.0 * np.arange(12), np.arange(10)).astype(np.float32)
    colours = normals_of_depth(depth, background=0, strength=4)
    assert colours.shape == (12, 10, 3) and colours.dtype == np.float32
    length = math.sqrt(8**2 + 16**2 + 4**2)
    expected = [(8 / length + 1) / 2, (16 / length + 1) / 2, (4 / length + 1) / 2]
    np.testing.assert_allclose(colours[1:-1, 1:-1], np.broadcast_to(expected, (10, 8, 3)), atol=1e-6)


@pytest.mark.parametrize("front", ["blue", "red"])
def test_agrees_with_the_published_formula(front: str):
    """Sobel (here scikit-image's kin, scipy's) over 2 pi, flat below the threshold, red in front for ControlNet 1.0."""
    depth = bumpy()
    near = (depth - depth.min()) / (depth.max() - depth.min()) >= 0.4
    assert 0.2 < near.mean() < 0.9
    slopes = [np.where(near, sobel(depth.astype(np.float64), axis, mode="mirror"), 0) for axis in (1, 0)]
    normal = np.stack([*slopes, np.full(depth.shape, 2 * np.pi)], axis=2)
    expected = (normal / np.sqrt((normal**2).sum(axis=2, keepdims=True)) * 127.5 + 127.5) / 255
    assert expected.std(axis=(0, 1))[0] > 0.05
    if front == "red":
        expected = expected[:, :, ::-1]
    np.testing.assert_allclose(normals_of_depth(depth, front=front), expected, atol=1e-5)


def test_background_and_flat_depth_face_the_viewer():
    flat = [0.5, 0.5, 1.0]
    for depth in (np.zeros((5, 7), np.float32), np.full((5, 7), 3.5, np.float32)):
        np.testing.assert_allclose(normals_of_depth(depth), np.broadcast_to(flat, (5, 7, 3)), atol=1e-6)
    depth = bumpy()
    far = depth < depth.min() + 0.4 * (depth.max() - depth.min())
    assert (np.abs(normals_of_depth(depth)[far] - flat) < 1e-6).all()
    assert not (np.abs(normals_of_depth(depth, background=0)[far] - flat) < 1e-6).all(axis=1).any()


def test_a_sphere_is_red_at_its_left_green_at_its_top_and_blue_in_front():
    rows, columns = np.mgrid[:128, :128]
    depth = np.sqrt(np.maximum(50.0**2 - (rows - 64) ** 2 - (columns - 64) ** 2, 0)) * 3 + 60
    hint = normal_from_depth(picture(depth), background=0)
    middle, left, right, top, bottom = (hint[at] for at in ((64, 64), (64, 34), (64, 94), (34, 64), (94, 64)))
    np.testing.assert_allclose(middle, [0.5, 0.5, 1.0], atol=0.03)
    assert left[0] > 0.75 and right[0] < 0.25 and top[1] > 0.75 and bottom[1] < 0.25
    np.testing.assert_array_equal(normal_from_depth(picture(depth), background=0, front="red"), hint[:, :, ::-1])


def test_a_picture_counts_in_grey_levels_and_is_left_alone():
    image = picture(bumpy() * 4)
    before = image.copy()
    hint = normal_from_depth(image, smoothing=0)
    np.testing.assert_allclose(hint, normals_of_depth(np.rint(bumpy() * 4)), atol=1e-3)
    np.testing.assert_array_equal(image, before)


def test_smoothing_takes_the_terraces_of_eight_bits_away():
    # A slope of a fifth of a grey level per pixel: 8 / 5 / sqrt((8 / 5)^2 + (2 pi)^2) of the way to the left.
    exact = 128 + np.broadcast_to(np.arange(96) / 5, (64, 96))
    red = 0.5 + 0.5 * 1.6 / math.hypot(1.6, 2 * math.pi)
    inner = (slice(8, -8), slice(8, -8), 0)
    terraced, smooth = (normal_from_depth(picture(exact), 0, smoothing=sigma)[inner] for sigma in (0, 1.5))
    assert np.abs(terraced - red).max() > 0.1
    assert np.abs(smooth - red).max() < 0.05
