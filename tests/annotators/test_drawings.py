"""Scribbles, line art and black-and-white against the published formulas, and cartoon lines on a drawn cartoon."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from scipy.ndimage import binary_dilation
from skimage.data import astronaut

from zeroconv.annotators.drawings import cartoon_lines, lineart_standard, scribble, scribble_xdog, threshold
from zeroconv.annotators.images import AnnotatorError

ALL = pytest.mark.parametrize("draw", [scribble, scribble_xdog, lineart_standard, cartoon_lines, threshold])


@ALL
def test_shape_range_and_the_input_left_alone(draw):
    image = astronaut()[:96, :80].astype(np.float32) / 255
    before = image.copy()
    hint = draw(image)
    assert hint.shape == (96, 80, 3) and hint.dtype == np.float32
    assert hint.min() == 0 and 0.5 < hint.max() <= 1
    for channel in (1, 2):
        np.testing.assert_array_equal(hint[:, :, channel], hint[:, :, 0])
    np.testing.assert_array_equal(image, before)


def test_scribble_is_white_where_any_channel_is_dark():
    image = np.array([[[126, 255, 255], [127, 255, 255], [255, 255, 0], [255, 255, 255]]], np.uint8)
    np.testing.assert_array_equal(scribble(image)[0, :, 0], [1, 0, 1, 0])
    photograph = astronaut()
    expected = (photograph < 127).any(axis=2)
    assert 0.5 < expected.mean() < 0.7
    np.testing.assert_array_equal(scribble(photograph)[:, :, 0], expected)


def test_scribble_xdog_agrees_with_the_published_formula_on_a_photograph():
    """To the pixel: 255 less the difference, cut to whole numbers; twice the rest of 255 above the threshold."""
    photograph = astronaut().astype(np.float32)
    near, far = cv2.GaussianBlur(photograph, (0, 0), 0.5), cv2.GaussianBlur(photograph, (0, 0), 5.0)
    left = np.clip(255 - (far - near).min(axis=2), 0, 255).astype(int)
    for limit in (1, 32, 64):
        expected = 2 * (255 - left) > limit
        assert 0.04 < expected.mean() < 0.6
        np.testing.assert_array_equal(scribble_xdog(astronaut(), limit, balance=1.0)[:, :, 0], expected)


def test_scribble_xdog_keeps_the_strongest_lines():
    """A black line on white differs by more than 128 of 255, which the published code's bytes take for nothing."""
    image = np.full((64, 64, 3), 255, np.uint8)
    image[:, 30:34] = 0
    hint = scribble_xdog(image)[:, :, 0]
    assert (hint[:, 30:34] == 1).all()
    assert hint[:, :25].max() == 0 and hint[:, 39:].max() == 0


def test_lineart_standard_agrees_with_controlnet_aux_on_a_photograph():
    """To a grey level: controlnet-aux cuts to whole ones."""
    from controlnet_aux.lineart_standard import LineartStandardDetector

    photograph = astronaut()
    for sigma, limit in ((6.0, 8), (2.0, 4)):
        expected = np.asarray(LineartStandardDetector()(photograph, sigma, limit, 512, "np"), np.float32)
        assert expected.mean() > 10
        difference = lineart_standard(photograph, sigma, limit) * 255 - expected
        assert difference.min() > -1e-3 and difference.max() < 1 + 1e-3


def test_lineart_standard_of_a_flat_picture_is_black():
    hint = lineart_standard(np.full((32, 32, 3), 0.5, np.float32))
    assert hint.max() < 1e-6


@pytest.mark.parametrize("level", [1, 100, 200])
def test_threshold_is_white_above_its_level(level: int):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    hint = threshold(np.repeat(grey[:, :, None], 3, axis=2), level)
    np.testing.assert_array_equal(hint[:, :, 0], grey > level)


def test_threshold_at_zero_takes_otsus_level():
    from skimage.filters import threshold_otsu

    grey = cv2.cvtColor(astronaut(), cv2.COLOR_RGB2GRAY)
    level = threshold_otsu(grey)
    assert 60 < level < 160
    np.testing.assert_array_equal(threshold(astronaut(), 0)[:, :, 0], grey > level)


def cartoon() -> np.ndarray:
    """A yellow disc with a black outline on cream, a blue box without one, and faint hatching, (160,200,3)."""
    image = np.full((160, 200, 3), (250, 245, 230), np.uint8)
    cv2.circle(image, (50, 60), 32, (255, 220, 80), -1)
    cv2.circle(image, (50, 60), 32, (20, 20, 25), 3)
    image[40:120, 120:180] = (80, 110, 200)
    image[50:110:6, 130:170] = (70, 100, 190)
    return image.astype(np.float32) / 255


def test_cartoon_lines_draws_outlines_and_borders_of_colour_once_and_no_hatching():
    hint = cartoon_lines(cartoon())[:, :, 0]
    rows, columns = np.indices(hint.shape)
    radius = np.hypot(columns - 50, rows - 60)
    assert hint[abs(radius - 32) < 0.7].min() > 0.9
    assert hint[radius < 25].max() < 0.01
    outside = (radius > 39) & (columns < 110)
    assert hint[outside].max() < 0.01
    # The box's border lies on its darker side; within and without is nothing, the hatching included.
    for border in (hint[40:43, 125:175], hint[117:120, 125:175]):
        assert border.max(axis=0).min() > 0.9
    for border in (hint[45:115, 120:123], hint[45:115, 177:180]):
        assert border.max(axis=1).min() > 0.9
    assert hint[48:112, 128:172].max() < 0.05
    assert hint[40:120, 108:116].max() < 0.01


def test_cartoon_lines_flatten_grain_and_darker_hatching():
    image = cartoon()
    image[50:110:6, 130:170] -= 0.04
    image += np.random.default_rng(0).normal(0, 0.03, image.shape).astype(np.float32)
    hint = cartoon_lines(image.clip(0, 1))[:, :, 0]
    # One pass of the filter would leave 0.08 of the hatching, two would leave 0.02.
    assert hint[48:112, 128:172].max() < 0.01 and hint[:30, 100:].max() < 0.01


def test_cartoon_lines_parameters():
    image = cartoon()
    # A wider Gaussian draws wider lines, less smoothing keeps the hatching, a high threshold leaves nothing.
    assert cartoon_lines(image, width=2.5).mean() > 1.3 * cartoon_lines(image).mean()
    assert cartoon_lines(image, smoothing=0.01, threshold=0.0)[48:112, 128:172].max() > 0.1
    assert cartoon_lines(image, threshold=0.5).max() == 0


def test_cartoon_lines_follow_the_edges_of_a_photograph():
    photograph = astronaut()
    lines = cartoon_lines(photograph.astype(np.float32) / 255)[:, :, 0] > 0.5
    edges = cv2.Canny(photograph, 200, 400) > 0
    assert 0.03 < lines.mean() < 0.12
    assert (edges & binary_dilation(lines, np.ones((3, 3)), 2)).sum() > 0.6 * edges.sum()
    assert (lines & binary_dilation(cv2.Canny(photograph, 50, 100) > 0, np.ones((3, 3)), 3)).sum() > 0.95 * lines.sum()


@ALL
def test_other_shapes_are_refused(draw):
    with pytest.raises(AnnotatorError, match=r"image has shape \(8, 8\); an annotator reads RGB of shape"):
        draw(np.zeros((8, 8), np.float32))
