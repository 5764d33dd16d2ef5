"""Tile, blur, recolor, palette and shuffle against the published computations in bytes, and against controlnet-aux."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from skimage.color import rgb2lab
from skimage.data import astronaut

from zeroconv.annotators.colour import blur, color, intensity, luminance, shuffle, tile

ALL = pytest.mark.parametrize("make", [tile, blur, luminance, intensity, color, shuffle])
PHOTOGRAPH = astronaut().astype(np.float32) / 255


@ALL
@pytest.mark.parametrize("size", [(96, 160), (37, 61), (1, 1), (3, 200)])
def test_shape_range_and_the_input_left_alone(make, size: tuple[int, int]):
    image = np.random.default_rng(2).random((*size, 3), np.float32)
    before = image.copy()
    hint = make(image)
    assert hint.shape == (*size, 3) and hint.dtype == np.float32
    assert 0 <= hint.min() and hint.max() <= 1
    np.testing.assert_array_equal(image, before)


@ALL
@pytest.mark.parametrize("size", [(64, 64), (75, 130)])
def test_a_plain_picture_keeps_its_brightness(make, size: tuple[int, int]):
    hint = make(np.full((*size, 3), 0.5, np.float32))
    # CIE Lab's lightness of the middle grey of sRGB is 53.4 of 100.
    np.testing.assert_allclose(hint, 0.534 if make is luminance else 0.5, atol=1e-3)


@pytest.mark.parametrize("halvings", [1, 3, 5])
def test_tile_agrees_with_the_published_steps_on_a_photograph(halvings: int):
    """To 2.5 grey levels, for the published ones round to bytes after each; of the picture moved by half a cell."""
    half, side = 2 ** (halvings - 1), 512 // 2**halvings
    moved = np.pad(astronaut(), ((half, 0), (half, 0), (0, 0)), mode="edge")[:512, :512]
    expected = cv2.resize(moved, (side, side), interpolation=cv2.INTER_AREA)
    for _ in range(halvings):
        expected = cv2.pyrUp(expected)
    assert expected.shape == (512, 512, 3)
    assert np.abs(expected.astype(int) - astronaut()).mean() > 3
    # What was moved out of the picture reaches three cells back into it.
    seen = 512 - 3 * 2**halvings
    np.testing.assert_allclose(tile(PHOTOGRAPH, halvings)[:seen, :seen] * 255, expected[:seen, :seen], atol=2.5)


def test_tile_moves_nothing_when_sides_are_uneven():
    """A wide soft spot stays where it is, to half a pixel; the published steps move it by 3.5 pixels."""
    rows, columns = np.mgrid[:101, :131]
    spot = np.exp(-((rows - 44) ** 2 + (columns - 70) ** 2) / (2 * 9.0**2)).astype(np.float32)
    hint = tile(np.repeat(spot[:, :, None], 3, axis=2))[:, :, 0]
    centre = [(hint * at).sum() / hint.sum() for at in (rows, columns)]
    np.testing.assert_allclose(centre, [44, 70], atol=0.55)


def test_blur_agrees_with_opencv_on_bytes():
    """To 1.5 grey levels: OpenCV cuts the Gaussian of bytes off at 3 sigma, that of floats at 4."""
    expected = cv2.GaussianBlur(astronaut(), (0, 0), 9.0)
    assert np.abs(expected.astype(int) - astronaut()).mean() > 5
    np.testing.assert_allclose(blur(PHOTOGRAPH) * 255, expected, atol=1.5)
    assert blur(PHOTOGRAPH, 20.0).std() < blur(PHOTOGRAPH).std() < PHOTOGRAPH.std()


def test_luminance_is_the_lightness_of_cie_lab():
    np.testing.assert_allclose(luminance(PHOTOGRAPH)[:, :, 0], rgb2lab(PHOTOGRAPH)[:, :, 0] / 100, atol=2e-3)
    red, green, blue = luminance(np.eye(3, dtype=np.float32)[None])[0, :, 0]
    assert (round(red, 2), round(green, 2), round(blue, 2)) == (0.53, 0.88, 0.32)


def test_luminance_is_the_published_one_of_the_picture_with_red_and_blue_swapped():
    """To 2 grey levels, for the published one is in bytes; on the picture itself it is up to 37 levels away."""
    swapped = np.ascontiguousarray(astronaut()[:, :, ::-1])
    published = [cv2.cvtColor(image, cv2.COLOR_BGR2LAB)[:, :, 0].astype(int) for image in (astronaut(), swapped)]
    ours = luminance(PHOTOGRAPH)[:, :, 0] * 255
    np.testing.assert_allclose(ours, published[1], atol=2)
    assert np.abs(ours - published[0]).max() > 30


def test_intensity_is_the_value_of_hsv():
    expected = cv2.cvtColor(astronaut(), cv2.COLOR_RGB2HSV)[:, :, 2]
    np.testing.assert_allclose(intensity(PHOTOGRAPH)[:, :, 0] * 255, expected, atol=1e-3)


@pytest.mark.parametrize("make", [luminance, intensity])
def test_gamma_is_a_power(make):
    for gamma in (0.1, 0.5, 2.0):
        np.testing.assert_allclose(make(PHOTOGRAPH, gamma), make(PHOTOGRAPH) ** gamma, rtol=1e-5)


def test_color_agrees_with_the_published_steps_on_a_photograph():
    """To half a grey level: the published one rounds to bytes."""
    grid = cv2.resize(astronaut(), (8, 8), interpolation=cv2.INTER_CUBIC)
    expected = cv2.resize(grid, (512, 512), interpolation=cv2.INTER_NEAREST)
    hint = color(PHOTOGRAPH)
    np.testing.assert_allclose(hint * 255, expected, atol=0.51)
    cells = hint.reshape(8, 64, 8, 64, 3)
    assert (cells == cells[:, :1, :, :1]).all()


def test_shuffle_agrees_with_controlnet_aux_on_the_same_noise(monkeypatch: pytest.MonkeyPatch):
    """To a grey level: controlnet-aux rounds to bytes."""
    from controlnet_aux.shuffle import ContentShuffleDetector

    generator = np.random.default_rng(5)
    monkeypatch.setattr(np.random, "uniform", generator.uniform)
    for picture in (astronaut(), np.ascontiguousarray(astronaut()[:320])):
        generator.bit_generator.state = np.random.default_rng(5).bit_generator.state
        resolution = min(picture.shape[:2])
        detector = ContentShuffleDetector()
        expected = np.asarray(detector(picture, None, None, None, resolution, resolution, "np"))
        assert np.abs(expected.astype(int) - picture).mean() > 30
        np.testing.assert_allclose(shuffle(picture.astype(np.float32) / 255, seed=5) * 255, expected, atol=1.01)


def test_shuffle_depends_on_its_seed_alone_and_draws_on_the_whole_picture():
    one = shuffle(PHOTOGRAPH, 1)
    np.testing.assert_array_equal(one, shuffle(PHOTOGRAPH, 1))
    assert np.abs(one - shuffle(PHOTOGRAPH, 2)).mean() > 0.1
    # A picture of its own coordinates shows from where each pixel came: from one end to the other.
    rows, columns = np.mgrid[:300, :400].astype(np.float32)
    came_from = shuffle(np.stack([columns / 399, rows / 299, rows * 0], axis=2), 3)
    for axis in (0, 1):
        assert came_from[:, :, axis].min() < 1e-3 and came_from[:, :, axis].max() > 0.999
