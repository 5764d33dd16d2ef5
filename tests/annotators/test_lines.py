"""Straight lines: a drawn rectangle's sides are found where they are, curves and grain are not, the seed decides."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from scipy.ndimage import binary_dilation
from skimage.data import astronaut

from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.lines import draw_segments, hough_lines, lsd

BOTH = pytest.mark.parametrize("find", [hough_lines, lsd])


def rectangle() -> np.ndarray:
    """White, columns 30 to 89 and rows 20 to 69, on black, (96,128,3)."""
    image = np.zeros((96, 128, 3), np.float32)
    image[20:70, 30:90] = 1
    return image


def rim(width: int) -> np.ndarray:
    """The pixels within `width` of the rectangle's border, on either side."""
    inside = rectangle()[:, :, 0] > 0
    return np.logical_and(*(binary_dilation(side, np.ones((3, 3)), width) for side in (inside, ~inside)))


@BOTH
def test_the_sides_of_a_rectangle(find):
    image = rectangle()
    hint = find(image)
    assert hint.shape == (96, 128, 3) and hint.dtype == np.float32
    assert set(np.unique(hint)) == {0.0, 1.0}
    lines = hint[:, :, 0] > 0
    assert not (lines & ~rim(2)).any()
    # Nearly all of each side, but for the corners: Hough's order at random may leave a piece shorter than a line.
    near = binary_dilation(lines, np.ones((3, 3)), 2)
    for side in (near[20, 40:80], near[69, 40:80], near[30:60, 30], near[30:60, 89]):
        assert side.mean() > 0.8
    np.testing.assert_array_equal(image, rectangle())


@BOTH
def test_bytes_and_floats_give_the_same(find):
    photograph = astronaut()
    np.testing.assert_array_equal(find(photograph), find(photograph.astype(np.float32) / 255))


@BOTH
def test_a_flat_picture_has_no_lines(find):
    hint = find(np.full((64, 64, 3), 0.5, np.float32))
    assert hint.shape == (64, 64, 3) and hint.max() == 0


@BOTH
def test_a_minimal_length_leaves_short_lines_out(find):
    image = rectangle()
    assert find(image, length=55)[25:65].max() == 0 and find(image, length=55)[:, 45:75].max() == 1
    assert find(image, length=70).max() == 0


def test_hough_finds_what_scikit_image_finds():
    from skimage.transform import probabilistic_hough_line

    photograph = astronaut()
    edges = cv2.Canny(photograph, 100, 200) > 0
    segments = probabilistic_hough_line(edges, threshold=20, line_length=40, line_gap=2, rng=3)
    assert len(segments) > 20
    expected = np.zeros((512, 512), np.uint8)
    for start, end in segments:
        cv2.line(expected, [int(x) for x in start], [int(x) for x in end], 1)
    hint = hough_lines(photograph, 100, 200, smoothing=0, votes=20, length=40, gap=2, seed=3, agreement=0)
    np.testing.assert_array_equal(hint[:, :, 0], expected)


def test_hough_depends_on_its_seed_and_on_nothing_else_that_is_random():
    photograph = astronaut()
    np.random.seed(0)
    one = hough_lines(photograph)
    np.random.seed(1)
    np.testing.assert_array_equal(one, hough_lines(photograph))
    assert (one != hough_lines(photograph, seed=1)).any()


def test_hough_without_smoothing_finds_more_in_hair():
    hair = astronaut()[0:90, 140:280]
    assert hough_lines(hair, smoothing=0, agreement=0).mean() > 2 * hough_lines(hair, agreement=0).mean() >= 0


def test_lsd_finds_what_opencv_finds():
    photograph = astronaut()
    found = cv2.createLineSegmentDetector().detect(cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY))[0].reshape(-1, 4)
    long = found[np.hypot(*(found[:, 2:] - found[:, :2]).T) >= 20]
    assert 100 < len(long) < len(found)
    np.testing.assert_array_equal(lsd(photograph), draw_segments(long, 512, 512))
    np.testing.assert_array_equal(lsd(photograph, 0), draw_segments(found, 512, 512))


@pytest.mark.parametrize("absent", [True, False])
def test_an_opencv_without_the_detector_is_named_and_another_way_given(absent: bool, monkeypatch: pytest.MonkeyPatch):
    def removed():
        raise cv2.error("Implementation has been removed due original code license conflict")

    if absent:
        monkeypatch.delattr(cv2, "createLineSegmentDetector")
    else:
        monkeypatch.setattr(cv2, "createLineSegmentDetector", removed)
    with pytest.raises(
        AnnotatorError, match=r"OpenCV [0-9.]+.* comes without its line segment detector: install OpenCV"
    ):
        lsd(rectangle())


@BOTH
def test_other_shapes_are_refused(find):
    with pytest.raises(AnnotatorError, match=r"image has shape \(8, 8\); an annotator reads RGB of shape"):
        find(np.zeros((8, 8), np.float32))


def test_segments_are_drawn_one_pixel_wide_and_cut_at_the_border():
    canvas = draw_segments(np.array([[1.0, 2.0, 5.0, 2.0], [0.0, -3.0, 0.0, 20.0]]), 6, 8)
    assert canvas.shape == (6, 8, 3) and canvas.dtype == np.float32
    expected = np.zeros((6, 8))
    expected[2, 1:6] = 1
    expected[:, 0] = 1
    for channel in range(3):
        np.testing.assert_array_equal(canvas[:, :, channel], expected)
