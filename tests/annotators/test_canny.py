"""Canny: OpenCV's own answer as a hint, for bytes and floats; and the list of annotators loads no image library."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from zeroconv.annotators import ANNOTATORS
from zeroconv.annotators.canny import canny
from zeroconv.annotators.images import AnnotatorError

ROOT = Path(__file__).resolve().parents[2]


def step() -> np.ndarray:
    """Black left half, white right half."""
    image = np.zeros((16, 16, 3), np.float32)
    image[:, 8:] = 1.0
    return image


def test_a_step_gives_one_line():
    hint = canny(step())
    assert hint.shape == (16, 16, 3) and hint.dtype == np.float32
    assert set(np.unique(hint)) == {0.0, 1.0}
    assert (hint.sum(axis=1) == 1).all()
    assert set(np.nonzero(hint)[1]) <= {7, 8}


def test_thresholds_decide():
    faint = step() * 0.15
    # OpenCV's gradient of a step of 38 grey levels is 4 * 38 = 152: under the high threshold of 200, over one of 150.
    assert canny(faint).max() == 0
    assert canny(faint, low=50, high=150).max() == 1


def test_agrees_with_opencv_on_bytes_and_leaves_the_input_alone():
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    image = cv2.GaussianBlur(image, (9, 9), 3)
    before = image.copy()
    expected = cv2.Canny(image, 30, 60)
    assert 0 < expected.mean() < 255
    np.testing.assert_array_equal(canny(image, 30, 60)[:, :, 0] * 255, expected)
    np.testing.assert_array_equal(canny(image.astype(np.float32) / 255, 30, 60), canny(image, 30, 60))
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 4), (1, 8, 8, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]):
    with pytest.raises(AnnotatorError, match=r"image has shape .*; an annotator reads RGB of shape"):
        canny(np.zeros(shape, np.float32))


def test_other_types_are_refused():
    with pytest.raises(AnnotatorError, match=r"image is int64; give float in 0\.\.1 or uint8 in 0\.\.255"):
        canny(np.zeros((8, 8, 3), np.int64))


def test_the_list_describes_canny_and_loads_it():
    (record,) = [annotator for annotator in ANNOTATORS if annotator.name == "canny"]
    assert record.load() is canny
    assert [(p.name, p.default, p.minimum, p.maximum) for p in record.parameters] == [
        ("low", 100.0, 0.0, 255.0),
        ("high", 200.0, 0.0, 255.0),
    ]
    assert all(p.tooltip for annotator in ANNOTATORS for p in annotator.parameters)


def test_defaults_in_the_list_are_the_functions_own():
    for annotator in ANNOTATORS:
        function = annotator.load()
        reads = {"mask": step()[:, :, 0]} if annotator.reads_mask else {}
        np.testing.assert_array_equal(
            function(step(), **reads, **{parameter.name: parameter.default for parameter in annotator.parameters}),
            function(step(), **reads),
        )


def test_importing_the_list_loads_no_image_library_and_no_torch():
    code = (
        "import importlib.util, sys\n"
        f"path = {str(ROOT / 'annotators' / '__init__.py')!r}\n"
        "spec = importlib.util.spec_from_file_location('annotators', path, submodule_search_locations=[])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['annotators'] = module\n"
        "spec.loader.exec_module(module)\n"
        "assert module.ANNOTATORS\n"
        "print(sorted({'cv2', 'skimage', 'torch', 'scipy', 'PIL'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
