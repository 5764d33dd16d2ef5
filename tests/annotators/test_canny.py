"""Canny: OpenCV's own answer as a hint, for bytes and floats; and the list of annotators loads no image library."""

import subprocess
import sys
from inspect import Parameter, signature
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.ndimage import binary_dilation
from skimage.data import astronaut

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


def test_agrees_with_controlnet_aux_on_a_photograph():
    from controlnet_aux.canny import CannyDetector

    photograph = astronaut()
    expected = np.asarray(CannyDetector()(photograph, 100, 200, 512, 512))
    assert 0.05 < (expected > 0).mean() < 0.2
    np.testing.assert_array_equal(canny(photograph), expected / np.float32(255))
    np.testing.assert_array_equal(canny(photograph.astype(np.float32) / 255), expected / np.float32(255))


@pytest.mark.parametrize(("low", "high"), [(100, 200), (20, 60)])
def test_kornia_is_opencv_on_the_blurred_grey_picture_with_a_euclidean_gradient(low: float, high: float):
    """To a pixel: more than 98 % of the edges of either side lie on, or next to, one of the other's."""
    photograph = astronaut()
    grey = cv2.GaussianBlur(cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY), (5, 5), 1)
    expected = cv2.Canny(grey, low, high, L2gradient=True) > 0
    found = canny(photograph, low, high, "kornia")
    assert found.shape == (512, 512, 3) and found.dtype == np.float32
    assert set(np.unique(found)) == {0.0, 1.0}
    found = found[:, :, 0] > 0
    assert 0.04 < expected.mean() < 0.2
    assert (found & binary_dilation(expected)).sum() > 0.98 * found.sum()
    assert (expected & binary_dilation(found)).sum() > 0.98 * expected.sum()
    # As its tooltip says: fewer edges than OpenCV's own at the same thresholds.
    assert found.sum() < 0.8 * (canny(photograph, low, high)[:, :, 0] > 0).sum()


def test_kornia_takes_thresholds_in_either_order_and_at_the_ends_of_the_range():
    photograph = astronaut()[100:228, 150:278]
    np.testing.assert_array_equal(canny(photograph, 200, 100, "kornia"), canny(photograph, 100, 200, "kornia"))
    assert canny(photograph, 0, 0, "kornia").mean() > canny(photograph, 255, 255, "kornia").mean() > 0


def test_kornia_refuses_what_it_cannot_blur():
    with pytest.raises(
        AnnotatorError, match=r"image is 2x9; backend kornia reads 3x3 pixels or more: use cv2, or resize it"
    ):
        canny(np.zeros((9, 2, 3), np.float32), backend="kornia")
    assert canny(np.zeros((9, 3, 3), np.float32), backend="kornia").shape == (9, 3, 3)


def test_without_kornia_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "kornia.filters", None)
    with pytest.raises(AnnotatorError, match=r"backend kornia cannot be loaded .*: install it with .*, or use cv2"):
        canny(step(), backend="kornia")
    assert canny(step()).max() == 1


@pytest.mark.gpu
def test_kornia_gives_the_same_on_cuda_and_runs_there(monkeypatch: pytest.MonkeyPatch):
    import torch

    before = torch.cuda.memory.memory_stats()["allocation.all.allocated"] if torch.cuda.is_initialized() else 0
    on_cuda = canny(astronaut(), backend="kornia")
    assert torch.cuda.memory.memory_stats()["allocation.all.allocated"] > before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # Rounding may move a pixel at a threshold, and hysteresis then a whole piece of an edge.
    assert (on_cuda != canny(astronaut(), backend="kornia")).mean() < 1e-3


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 4), (1, 8, 8, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]):
    with pytest.raises(AnnotatorError, match=r"image has shape .*; an annotator reads RGB of shape"):
        canny(np.zeros(shape, np.float32))


def test_other_types_are_refused():
    with pytest.raises(AnnotatorError, match=r"image is int64; give float in 0\.\.1 or uint8 in 0\.\.255"):
        canny(np.zeros((8, 8, 3), np.int64))


def test_the_list_describes_canny_and_loads_it():
    (record,) = [annotator for annotator in ANNOTATORS if annotator.name == "canny"]
    assert record.function is canny
    assert [(p.name, p.default, p.minimum, p.maximum) for p in record.parameters] == [
        ("low", 100.0, 0.0, 255.0),
        ("high", 200.0, 0.0, 255.0),
        ("backend", "cv2", 0.0, 1.0),
    ]
    assert record.parameters[2].choices == ("cv2", "kornia")
    assert all(p.tooltip for annotator in ANNOTATORS for p in annotator.parameters)


def test_defaults_in_the_list_are_the_functions_own():
    for annotator in ANNOTATORS:
        own = {
            **signature(annotator.function).parameters,
            **(signature(annotator.draw).parameters if annotator.draw else {}),
        }
        assert {p.name: p.default for p in annotator.parameters} == {
            name: parameter.default for name, parameter in own.items() if parameter.default is not Parameter.empty
        }, annotator.name


def test_importing_the_list_loads_no_image_library_and_no_torch():
    code = (
        "import importlib.util, sys\n"
        f"folder = {str(ROOT / 'annotators')!r}\n"
        "spec = importlib.util.spec_from_file_location(\n"
        "    'annotators', folder + '/__init__.py', submodule_search_locations=[folder])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['annotators'] = module\n"
        "spec.loader.exec_module(module)\n"
        "assert len(module.ANNOTATORS) > 30\n"
        "print(sorted({'cv2', 'skimage', 'torch', 'scipy', 'PIL'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
