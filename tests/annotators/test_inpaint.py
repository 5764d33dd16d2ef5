"""The inpaint hint: masked pixels get the asked value, the others stay as they are."""

from __future__ import annotations

import numpy as np
import pytest

from zeroconv.annotators import ANNOTATORS
from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.inpaint import inpaint

MASK = np.array([[0.0, 0.5, 0.51], [1.0, 0.0, 0.2]], np.float32)
MASKED = np.array([[False, False, True], [True, False, False]])


def picture() -> np.ndarray:
    return np.random.default_rng(4).random((2, 3, 3), dtype=np.float32)


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.5])
def test_masked_pixels_get_the_value_and_the_others_stay(value: float):
    image, mask = picture(), MASK.copy()
    before = image.copy()
    hint = inpaint(image, mask, value)
    assert hint.shape == (2, 3, 3) and hint.dtype == np.float32
    assert (hint[MASKED] == value).all()
    np.testing.assert_array_equal(hint[~MASKED], image[~MASKED])
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(mask, MASK)


def test_the_default_marks_with_minus_one():
    assert (inpaint(picture(), MASK)[MASKED] == -1).all()


def test_agrees_with_the_published_code_on_bytes():
    """255 * picture with -255 where the mask is above 127, all of it over 255."""
    image = np.random.default_rng(5).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    expected = image.astype(np.float32)
    expected[MASK * 255 > 127.5] = -255.0
    np.testing.assert_allclose(inpaint(image, MASK), expected / 255.0, atol=1e-7)


def test_a_mask_of_truth_values_and_of_doubles_is_read_as_well():
    for mask in (MASKED, MASKED.astype(np.float64)):
        np.testing.assert_array_equal(inpaint(picture(), mask), inpaint(picture(), MASK))


def test_values_out_of_range_are_clamped_before_they_could_pass_for_a_mark():
    hint = inpaint(picture() * 4 - 2, MASK)
    assert hint[~MASKED].min() == 0 and hint[~MASKED].max() == 1
    assert (hint[MASKED] == -1).all()


@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 1), (1, 2, 3)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]):
    with pytest.raises(AnnotatorError, match=r"mask has shape .*; for this image it must be \(2, 3\): resize it"):
        inpaint(picture(), np.zeros(shape, np.float32))


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (1, 2, 3, 3)])
def test_an_image_of_another_shape_is_refused(shape: tuple[int, ...]):
    with pytest.raises(AnnotatorError, match=r"image has shape .*; an annotator reads RGB of shape"):
        inpaint(np.zeros(shape, np.float32), MASK)


def test_an_image_of_another_type_is_refused():
    with pytest.raises(AnnotatorError, match=r"image is int64; give float in 0\.\.1 or uint8 in 0\.\.255"):
        inpaint(np.zeros((2, 3, 3), np.int64), MASK)


def test_the_list_describes_it_as_one_that_reads_a_mask():
    (record,) = [annotator for annotator in ANNOTATORS if annotator.name == "inpaint"]
    assert record.function is inpaint
    assert [(p.name, p.default, p.minimum, p.maximum) for p in record.parameters] == [("masked_value", -1.0, -1.0, 1.0)]
    assert [annotator.name for annotator in ANNOTATORS if annotator.reads_mask] == [
        "inpaint",
        "mask_sam2",
        "inpaint_lama",
    ]
