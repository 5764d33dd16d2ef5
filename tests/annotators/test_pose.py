"""The stick figure: published colours, order and proportions, and sticks that survive on small pictures."""

import numpy as np
import pytest

from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.pose import COLOURS, LIMBS, draw_pose


def joints_at(**points: tuple[float, float]) -> np.ndarray:
    """(18,3) keypoints with only the given joints, named j<number>."""
    keypoints = np.zeros((18, 3), np.float32)
    for name, (x, y) in points.items():
        keypoints[int(name[1:])] = (x, y, 1.0)
    return keypoints


def test_one_limb_at_the_published_size():
    # Right shoulder to right elbow is the third limb: (255,170,0) dimmed by 0.6 is (153,102,0).
    picture = draw_pose(joints_at(j2=(100.5, 100.5), j3=(200.5, 100.5))[None], 512, 512)
    assert picture.shape == (512, 512, 3) and picture.dtype == np.float32
    np.testing.assert_allclose(picture[100, 150] * 255, [153, 102, 0], atol=1e-3)
    np.testing.assert_allclose(picture[100, 100] * 255, COLOURS[2], atol=1e-3)
    np.testing.assert_allclose(picture[100, 200] * 255, COLOURS[3], atol=1e-3)
    # The ellipse is 4 pixels to each side of its middle, the disc 4 about its joint.
    assert (picture[:, 150].max(1) > 0).sum() == 9
    assert (picture[:, 100].max(1) > 0).sum() == 9
    assert (picture[100].max(1) > 0).sum() == 109


def test_a_missing_joint_takes_its_limbs_away():
    keypoints = joints_at(j2=(100, 100), j3=(200, 100))
    keypoints[3, 2] = 0
    picture = draw_pose(keypoints[None], 512, 512)
    assert picture[100, 150].max() == 0 and picture[100, 200].max() == 0 and picture[100, 100].max() == 1


def test_size_scales_with_the_picture_but_not_below_one_and_a_half_pixels():
    def widths(side: int) -> float:
        """The limb's width in pixels in its middle, half-covered pixels counted by their share."""
        keypoints = joints_at(j2=(side * 0.25, side * 0.5), j3=(side * 0.75, side * 0.5))
        return float(draw_pose(keypoints[None], side, side)[:, side // 2, 0].sum()) / (153 / 255)

    assert widths(1024) == pytest.approx(17, abs=1)
    assert widths(512) == pytest.approx(9, abs=1)
    assert widths(256) == pytest.approx(4, abs=0.7)
    assert widths(128) == pytest.approx(3, abs=0.5)
    assert widths(64) == pytest.approx(3, abs=0.5)


def test_small_pictures_are_smooth_and_not_shifted():
    keypoints = joints_at(j0=(32.0, 20.0))
    picture = draw_pose(keypoints[None], 64, 64)[:, :, 0]
    assert ((picture > 0.05) & (picture < 0.95)).any()
    rows, columns = np.indices(picture.shape)
    weight = picture.sum()
    assert (picture * (columns + 0.5)).sum() / weight == pytest.approx(32.0, abs=0.1)
    assert (picture * (rows + 0.5)).sum() / weight == pytest.approx(20.0, abs=0.1)


def test_every_joint_and_limb_has_its_colour():
    angles = np.linspace(0, 2 * np.pi, 18, endpoint=False)
    keypoints = np.stack([256 + 200 * np.cos(angles), 256 + 200 * np.sin(angles), np.ones(18)], axis=1)
    picture = draw_pose(keypoints[None], 512, 512)
    for (x, y, _), colour in zip(keypoints, COLOURS, strict=True):
        np.testing.assert_allclose(picture[int(y), int(x)] * 255, colour, atol=1e-3)
    assert len(LIMBS) == 17 and len(COLOURS) == 18
    assert LIMBS[0] == (1, 2) and LIMBS[6] == (1, 8) and LIMBS[16] == (15, 17)


def test_several_people_and_none():
    one, two = joints_at(j0=(100, 100)), joints_at(j0=(300, 300))
    both = draw_pose([one, two], 512, 400)
    assert both.shape == (512, 400, 3)
    assert both[100, 100, 0] == 1 and both[300, 300, 0] == 1
    assert draw_pose([], 64, 48).shape == (64, 48, 3)
    assert draw_pose([], 64, 48).max() == 0


def test_the_input_is_left_alone():
    keypoints = joints_at(j2=(10, 10), j3=(20, 20))[None]
    before = keypoints.copy()
    draw_pose(keypoints, 64, 64)
    np.testing.assert_array_equal(keypoints, before)


def test_other_bodies_are_refused():
    with pytest.raises(
        AnnotatorError, match=r"a person's keypoints have shape \(25, 3\); OpenPose's body has \(18, 3\)"
    ):
        draw_pose(np.zeros((1, 25, 3)), 64, 64)
