"""What real photographs used to come out as, and what of them must be in a hint: fur, a dim sky, grass and bricks."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from skimage import data

from zeroconv.annotators import pipeline
from zeroconv.annotators.images import AnnotatorError

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
