"""What needs no network, step by step as the packs compute it whose hints the published controls are used with."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from skimage import data

from zeroconv.annotators import pipeline
from zeroconv.annotators.images import resize_short_side, resized

from .seeded import record


def grown(picture: np.ndarray, resolution: int) -> np.ndarray:
    """As sd-webui-controlnet and comfyui_controlnet_aux resize (their `resize_image_with_pad`), in bytes."""
    scale = resolution / min(picture.shape[:2])
    height, width = (round(side * scale) for side in picture.shape[:2])
    how = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    return cv2.resize(picture, (width, height), interpolation=how)


@pytest.mark.parametrize(("name", "resolution"), [("chelsea", 512), ("coffee", 768), ("rocket", 512), ("coffee", 256)])
def test_canny_of_a_resized_photograph_is_theirs_in_every_pixel(name: str, resolution: int):
    """With Lanczos, as before, 0.9 to 1.4 % of the pixels of what is enlarged are others."""
    picture = getattr(data, name)()
    expected = cv2.Canny(grown(picture, resolution), 100, 200)
    hint, _ = pipeline.annotate(record("canny"), picture, resolution)
    assert 0.01 < (expected > 0).mean() < 0.5
    np.testing.assert_array_equal(hint[:, :, 0] * 255, expected)


@pytest.mark.parametrize("resolution", [96, 512])
def test_bytes_and_floats_are_resized_alike_and_stay_in_range(resolution: int):
    picture = data.chelsea()
    wanted = grown(picture, resolution)
    np.testing.assert_array_equal(resize_short_side(picture, resolution), wanted)
    hint = resize_short_side(picture.astype(np.float32) / 255, resolution)
    assert hint.dtype == np.float32 and 0 <= hint.min() and hint.max() <= 1
    np.testing.assert_allclose(hint * 255, wanted, atol=1.01)
    assert resized(picture, *picture.shape[:2]) is picture is resize_short_side(picture, 0)


def test_a_scribble_is_white_where_the_drawing_is_dark():
    """lllyasviel/ControlNet; the other pack's is the inverse."""
    page = np.repeat(data.page()[:, :, None], 3, axis=2)
    expected = np.where(page.min(axis=2) < 127, 255, 0)
    assert 0.05 < (expected > 0).mean() < 0.5
    hint, _ = pipeline.annotate(record("scribble"), page)
    np.testing.assert_array_equal(hint[:, :, 1] * 255, expected)


def test_tile_is_theirs_moved_back_to_its_picture():
    """Newer comfyui_controlnet_aux: area, pyrUp, and a move by half a cell. Away from the rims."""
    coffee = np.ascontiguousarray(data.coffee()[:384, :576])
    theirs = cv2.resize(coffee, (576 // 8, 384 // 8), interpolation=cv2.INTER_AREA)
    for _ in range(3):
        theirs = cv2.pyrUp(theirs)
    theirs = cv2.warpAffine(theirs, np.array([[1.0, 0, 4], [0, 1, 4]]), (576, 384), borderMode=cv2.BORDER_REFLECT_101)
    hint, _ = pipeline.annotate(record("tile"), coffee)
    inside = (slice(32, -32), slice(32, -32))
    away = np.abs(hint * 255 - theirs)[inside]
    # Their cells begin at the picture's rim and ours half a cell before: neighbours, not the same averages.
    assert away.mean() < 3 < np.abs(hint * 255 - coffee)[inside].mean()


def test_luminance_is_theirs_where_there_is_no_colour():
    camera = np.repeat(data.camera()[:, :, None], 3, axis=2)
    expected = cv2.cvtColor(camera, cv2.COLOR_BGR2LAB)[:, :, 0].astype(int)
    hint, _ = pipeline.annotate(record("luminance"), camera)
    np.testing.assert_allclose(hint[:, :, 0] * 255, expected, atol=1.1)


def test_shuffle_is_theirs_for_the_same_seed():
    """comfyui_controlnet_aux: the steps of lllyasviel's, with numpy's generator of that seed; to a grey level."""
    rocket = np.ascontiguousarray(data.rocket()[:384, :576])
    generator = np.random.default_rng(7)

    def noise(height: int, width: int) -> np.ndarray:
        wide = cv2.resize(
            generator.uniform(low=0, high=1, size=(height // 256 + 2, width // 256 + 2, 1)),
            (width + 512, height + 512),
            interpolation=cv2.INTER_CUBIC,
        )[256 : 256 + height, 256 : 256 + width]
        return (wide - wide.min()) / (wide - wide.min()).max()

    x, y = noise(384, 576) * 575, noise(384, 576) * 383
    theirs = cv2.remap(rocket, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR)
    hint, _ = pipeline.annotate(record("shuffle"), rocket, parameters={"seed": 7})
    assert np.abs(theirs.astype(int) - rocket).mean() > 20
    np.testing.assert_allclose(hint * 255, theirs, atol=1.01)
