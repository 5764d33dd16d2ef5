"""What real photographs used to come out as, and what of them must be in a hint: fur, a dim sky, grass and bricks."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from skimage import data

from zeroconv.annotators import pipeline
from zeroconv.annotators.colour import FLAT, blur
from zeroconv.annotators.drawings import threshold
from zeroconv.annotators.images import AnnotatorError, resize_short_side
from zeroconv.annotators.pipeline import covering

from .seeded import record


def photograph(name: str) -> np.ndarray:
    picture = getattr(data, name)()
    return np.repeat(picture[:, :, None], 3, axis=2) if picture.ndim == 2 else picture


def hint(name: str, picture: np.ndarray, resolution: int = 512, **parameters: float) -> np.ndarray:
    return pipeline.annotate(record(name), picture, resolution, parameters=parameters)[0]


def test_grass_and_gravel_have_no_straight_lines_and_bricks_have():
    drawn = {name: float((hint("hough_lines", photograph(name)) > 0).mean()) for name in ("grass", "gravel", "brick")}
    # Of all that lies in a row, 4, 2 and 5 %.
    assert drawn["grass"] < 0.006 and drawn["gravel"] < 0.004
    assert drawn["brick"] > 0.04


def test_the_towers_beside_the_rocket_keep_their_lines():
    rocket = photograph("rocket")
    all_of_them = hint("hough_lines", rocket, agreement=0)[:, :, 0] > 0
    kept = hint("hough_lines", rocket)[:, :, 0] > 0
    assert not (kept & ~all_of_them).any()
    # The tower at the left: bars, most of them straight up.
    assert kept[:, :75].sum() > 0.6 * all_of_them[:, :75].sum()


CAT = {"chin": (slice(430, 512), slice(380, 520)), "left cheek": (slice(330, 500), slice(20, 140))}
"""Where the cat's outline is, in the picture of 512x770."""


@pytest.mark.parametrize(("name", "least", "times"), [("scribble_xdog", 0.03, 3), ("cartoon_lines", 0.008, 1.5)])
@pytest.mark.parametrize("place", CAT)
def test_a_cat_has_a_face_and_not_only_eyes(name: str, least: float, times: float, place: str):
    """Its mouth and cheeks are as faint as its eyes are strong."""
    cat = photograph("chelsea")
    balanced, published = ((hint(name, cat, balance=balance)[:, :, 0] > 0.5)[CAT[place]].mean() for balance in (3, 1))
    assert balanced > least
    assert balanced > times * published


@pytest.mark.parametrize("name", ["scribble_xdog", "cartoon_lines"])
def test_what_is_strong_is_drawn_as_before(name: str):
    """The rim of a white cup against a dark saucer."""
    coffee = photograph("coffee")
    balanced, published = ((hint(name, coffee, balance=balance)[:, :, 0] > 0.5) for balance in (3, 1))
    rim = (slice(15, 180), slice(215, 430))
    assert published[rim].mean() > 0.02
    assert (balanced & published).sum() > 0.95 * published.sum()
    assert balanced[rim].mean() < 1.5 * published[rim].mean()


def test_a_dim_sky_is_no_grid_of_squares():
    def patches(picture: np.ndarray, merge: float) -> int:
        drawn = hint("superpixels", picture, merge=merge)[:250, 300:380]
        return len(np.unique(drawn.reshape(-1, 3), axis=0))

    rocket = photograph("rocket")
    assert patches(rocket, 0) >= 12
    assert patches(rocket, 8) <= 4
    # What differs stays apart: the cup, its coffee, the saucer.
    cup = hint("superpixels", photograph("coffee"))
    for one, other in (((50, 340), (200, 330)), ((200, 330), (420, 330)), ((50, 340), (420, 330))):
        assert np.abs(cup[one] - cup[other]).max() > 0.2


@pytest.mark.parametrize("name", ["chelsea", "coffee", "rocket"])
def test_normals_of_a_photograph_are_refused_and_those_of_a_depth_map_are_not(name: str):
    with pytest.raises(AnnotatorError, match="^normal_from_depth: image has colours, and a depth picture is grey"):
        hint("normal_from_depth", photograph(name))
    grey = np.repeat(photograph(name)[:, :, 1:2], 3, axis=2)
    expected = hint("normal_from_depth", grey)
    # JPEG's colours are no colours.
    _, packed = cv2.imencode(".jpg", grey[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 60])
    unpacked = cv2.imdecode(packed, cv2.IMREAD_COLOR)
    assert unpacked is not None
    assert np.abs(hint("normal_from_depth", unpacked[:, :, ::-1]) - expected).mean() < 0.1


def test_the_guided_filter_is_the_published_one():
    """Of a grey picture: three channels that are one have a third of its bound for what is flat."""
    grey = photograph("camera")[:256, 128:384, 0].astype(np.float32) / 255

    def mean(values: np.ndarray) -> np.ndarray:
        return cv2.blur(values, (15, 15), borderType=cv2.BORDER_REPLICATE)

    middle = mean(grey)
    spread = mean(grey * grey) - middle * middle
    slope = spread / (spread + FLAT / 3)
    expected = mean(slope) * grey + mean((1 - slope) * middle)
    made = blur(np.repeat(grey[:, :, None], 3, axis=2), 7.0, "guided")
    np.testing.assert_allclose(made, np.repeat(expected[:, :, None], 3, axis=2), atol=2e-3)


def test_guided_and_median_blur_the_fur_and_keep_the_borders():
    """Where the cat ends, and on its cheek: what a Gaussian of the same radius leaves of both."""
    cat = photograph("chelsea").astype(np.float32) / 255
    edges = cv2.Canny(cv2.GaussianBlur(photograph("chelsea"), (0, 0), 4.0), 50, 100) > 0
    plain = cv2.dilate(edges.astype(np.uint8), np.ones((15, 15))) == 0

    def steepness(picture: np.ndarray) -> float:
        across = np.hypot(cv2.Sobel(picture, cv2.CV_32F, 1, 0), cv2.Sobel(picture, cv2.CV_32F, 0, 1))
        return float(across.max(axis=2)[edges].mean())

    def texture(picture: np.ndarray) -> float:
        return float(cv2.Laplacian(picture, cv2.CV_32F)[plain].std())

    soft = steepness(blur(cat, 6.0))
    for kind in ("guided", "median"):
        made = blur(cat, 6.0, kind)
        assert steepness(made) > 1.3 * soft, kind
        assert texture(made) < 0.6 * texture(cat), kind


def test_a_page_in_uneven_light_is_read_to_its_corners():
    page = photograph("page")
    whole, local = (threshold(page, **given)[:, :, 0] for given in ({"level": 100}, {"around": 25}))
    dark = np.s_[:, :40]
    assert (whole[dark] == 0).mean() > 0.5  # the left rim is in the shade: all ink
    assert 0.05 < (local[dark] == 0).mean() < 0.3
    assert 0.05 < (local == 0).mean() < 0.3


def test_a_drawing_is_inverted_with_its_shades():
    page = photograph("page")
    np.testing.assert_allclose(hint("invert", page, 0), 1 - page / 255, atol=1e-6)


@pytest.mark.parametrize("target", [(512, 512), (768, 512), (512, 904), (8, 2048)])
def test_a_hint_just_covers_the_latent(target: tuple[int, int]):
    for name in ("chelsea", "coffee", "rocket", "grass"):
        picture = photograph(name)
        made = resize_short_side(picture, covering(picture.shape[:2], target)).shape[:2]
        smaller = resize_short_side(picture, covering(picture.shape[:2], target) - 1).shape[:2]
        assert all(side >= wanted for side, wanted in zip(made, target))
        assert any(side < wanted for side, wanted in zip(smaller, target))
