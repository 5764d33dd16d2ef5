"""Scores of a result against its hint: numbers written out, against scipy and scikit-image, and pictures of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity

from zeroconv.annotators import ANNOTATORS, measure
from zeroconv.annotators.compare import compare, compare_people, cut_bodies, read_bodies
from zeroconv.annotators.images import AnnotatorError, resized
from zeroconv.annotators.overlay import EXTRA, MISSED, RIGHT


def column(x: int, side: int = 32) -> np.ndarray:
    """A white line, one pixel wide, on black."""
    hint = np.zeros((side, side, 3), np.float32)
    hint[:, x] = 1
    return hint


def noise(seed: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).random((side, side, 3), dtype=np.float32)


def body(shift: float = 0.0) -> np.ndarray:
    """Joints on a grid: a box of 100 x 200 pixels."""
    joints = np.ones((18, 3), np.float32)
    joints[:, 0] = 50 + np.linspace(0, 100, 18) + shift
    joints[:, 1] = 30 + np.linspace(0, 200, 18)
    return joints


def test_each_annotator_has_a_score_or_a_reason_for_none():
    scored = [name for names in measure.SCORES.values() for name in names]
    assert len(scored) == len(set(scored))
    assert sorted([*scored, *measure.UNMEASURED]) == sorted(annotator.name for annotator in ANNOTATORS)
    with_input = {a.name for a in ANNOTATORS if a.reads_mask or a.reads_pose}
    assert with_input <= set(measure.UNMEASURED)  # a result alone is all that they would get
    assert set(measure.SCORES["pose"]) == {a.name for a in ANNOTATORS if a.gives_pose}


def test_an_annotator_without_a_score_says_why():
    with pytest.raises(AnnotatorError, match="results cannot be measured with inpaint: it marks what is to be painted"):
        measure.kind_of("inpaint")


# -- edges ---------------------------------------------------------------------------------------------------------


def test_edge_f1_within_the_tolerance():
    assert measure.edge_f1(column(10), column(10), 0) == measure.EdgeScore(1.0, 1.0, 1.0)
    assert measure.edge_f1(column(12), column(10), 1).f1 == 0
    assert measure.edge_f1(column(12), column(10), 2).f1 == 1


def test_precision_is_the_results_and_recall_the_hints():
    both = np.maximum(column(10), column(20))
    score = measure.edge_f1(both, column(10))  # half of what there is was wanted
    assert (score.precision, score.recall) == (0.5, 1.0)
    assert score.f1 == pytest.approx(2 / 3)
    score = measure.edge_f1(column(10), both)
    assert (score.precision, score.recall) == (1.0, 0.5)


def test_maps_without_edges():
    black = np.zeros((32, 32, 3), np.float32)
    assert measure.edge_f1(black, black).f1 == 1
    assert measure.edge_f1(black, column(3)).f1 == 0
    assert measure.edge_f1(column(3), black).f1 == 0


def test_edges_are_what_dilation_finds_too():
    """Against the masks widened by a disc, as DAVIS does it."""
    from scipy.ndimage import binary_dilation

    ours, wanted = (np.repeat(noise(seed)[:, :, :1] > 0.97, 3, axis=2).astype(np.float32) for seed in (1, 2))
    y, x = np.mgrid[-3:4, -3:4]
    disc = x * x + y * y <= 9
    a, b = ours[:, :, 0] > 0, wanted[:, :, 0] > 0
    score = measure.edge_f1(ours, wanted, 3)
    assert score.precision == pytest.approx((a & np.asarray(binary_dilation(b, disc), bool)).sum() / a.sum())
    assert score.recall == pytest.approx((b & np.asarray(binary_dilation(a, disc), bool)).sum() / b.sum())
    assert 0.1 < score.f1 < 0.9


# -- depth and normals ---------------------------------------------------------------------------------------------


def test_rank_correlation_is_spearmans():
    a, b = noise(1)[:, :, 0], noise(2)[:, :, 0]
    b = np.round((a + b) * 8) / 8  # with ties
    expected = float(np.asarray(spearmanr(a.ravel(), b.ravel()))[0])
    assert 0.5 < expected < 0.9
    assert measure.rank_correlation(a, b) == pytest.approx(expected, abs=1e-9)
    assert measure.rank_correlation(a, a**3) == pytest.approx(1)
    assert measure.rank_correlation(a, -a) == pytest.approx(-1)
    flat = np.full_like(a, 0.5)
    assert measure.rank_correlation(a, flat) == 0
    assert measure.rank_correlation(flat, flat) == 1


def test_depth_rmse_aligns_scale_and_shift_but_turns_nothing_around():
    ramp = np.tile(np.linspace(0, 1, 5, dtype=np.float32), (5, 1))
    assert measure.depth_rmse(ramp * 0.3 + 0.5, ramp) == pytest.approx(0, abs=1e-7)
    spread = np.sqrt(0.125)  # of 0, 1/4 .. 1: nothing is left but the mean
    assert measure.depth_rmse(1 - ramp, ramp) == pytest.approx(spread)
    assert measure.depth_rmse(np.zeros_like(ramp), ramp) == pytest.approx(spread)
    rough = noise(3)[:5, :5, 0]
    a, b = rough.ravel().astype(float), ramp.ravel().astype(float)
    fitted = np.stack([a, np.ones_like(a)], 1) @ np.linalg.lstsq(np.stack([a, np.ones_like(a)], 1), b, rcond=None)[0]
    if np.corrcoef(a, b)[0, 1] > 0:
        assert measure.depth_rmse(rough, ramp) == pytest.approx(np.sqrt(((fitted - b) ** 2).mean()), abs=1e-6)


def test_angles_between_normals():
    def normal(*vector: float) -> np.ndarray:
        return (np.array(vector, np.float32)[None, None] + 1) / 2

    assert measure.normal_angles(normal(0, 0, 1), normal(0, 0, 1))[0, 0] == pytest.approx(0, abs=1e-3)
    assert measure.normal_angles(normal(0, 0, 1), normal(1, 0, 0))[0, 0] == pytest.approx(90)
    half = np.sqrt(0.5)
    assert measure.normal_angles(normal(0, half, half), normal(0, 0, 1))[0, 0] == pytest.approx(45, abs=1e-3)


# -- segments and pictures -----------------------------------------------------------------------------------------


def test_mean_iou_over_colours():
    red, blue, green = np.eye(3, dtype=np.float32)[[0, 2, 1]]
    hint = np.tile(red, (4, 4, 1))
    hint[:, 2:] = blue
    assert measure.mean_iou(hint, hint) == 1
    result = hint.copy()
    result[:, 2] = red  # red 8 of 12 pixels, blue 4 of 8
    assert measure.mean_iou(result, hint) == pytest.approx((8 / 12 + 4 / 8) / 2)
    result[:, 2] = green  # a class of its own: red 8 of 8, blue 4 of 8, green 0 of 4
    assert measure.mean_iou(result, hint) == pytest.approx((1 + 0.5 + 0) / 3)
    assert measure.mean_iou(hint, result) == measure.mean_iou(result, hint)


def test_colours_on_a_few_pixels_are_no_class():
    hint = np.zeros((64, 64, 3), np.float32)
    result = hint.copy()
    result[0, :4] = 1.0  # 4 of 4096 pixels, under a thousandth
    assert measure.mean_iou(result, hint) == pytest.approx(4092 / 4096)
    result[1, :4] = 1.0
    assert measure.mean_iou(result, hint) == pytest.approx(4088 / 4096 / 2)


def test_ssim_is_scikit_images():
    a = noise(1)
    b = (a + noise(2)) / 2
    expected = float(np.mean(structural_similarity(a, b, data_range=1.0, channel_axis=2)))
    assert 0.3 < expected < 0.95
    assert measure.ssim(a, b) == pytest.approx(expected)
    assert measure.ssim(a, a) == pytest.approx(1)
    with pytest.raises(AnnotatorError, match="the hint is 6x32; to compare pictures both sides must be at least 7"):
        measure.ssim(a[:, :6], a[:, :6])


# -- people --------------------------------------------------------------------------------------------------------


def test_oks_is_cocos_formula():
    assert measure.oks(body(), body()) == 1
    one = np.zeros((18, 3), np.float32)
    one[[2, 9]] = [(100, 100, 1), (140, 300, 1)]  # right shoulder and right knee, a box of 40 x 200
    found = one.copy()
    found[2, 0] += 6
    found[9, 1] += 8
    area = 0.53 * 40 * 200
    expected = (np.exp(-36 / (2 * area * 0.158**2)) + np.exp(-64 / (2 * area * 0.174**2))) / 2
    assert measure.oks(found, one) == pytest.approx(expected, rel=1e-5)
    found[2, 2] = 0  # not found: counts nothing
    assert measure.oks(found, one) == pytest.approx(np.exp(-64 / (2 * area * 0.174**2)) / 2, rel=1e-5)
    assert measure.oks(body(), np.zeros((18, 3))) == 0


def test_pck_counts_joints_near_enough():
    wanted, found = body(), body()
    found[:9, 0] += 19.5  # the longer side of the box is 200, a tenth of it 20
    found[9:, 0] += 20.5
    assert measure.pck(found, wanted) == 0.5
    found[0, 2] = 0
    assert measure.pck(found, wanted) == pytest.approx(8 / 18)
    wanted[8, 2] = 0  # not wanted: of no account
    assert measure.pck(found, wanted) == pytest.approx(7 / 17)


def test_people_are_paired_whatever_their_order_and_one_too_many_counts():
    left, right = body(), body(400)
    assert measure.pair_people([right, left], [left, right]) == [(0, 1), (1, 0)]
    assert measure.pose_score([right, left], [left, right]) == measure.PoseScore(1.0, 1.0, 2, 2)
    assert measure.pose_score([left], [left, right]).oks == 0.5
    assert measure.pose_score([left, right], [left]).oks == 0.5
    assert measure.pose_score([], []).oks == 1
    assert measure.pose_score([left], []).oks == measure.pose_score([], [left]).oks == 0


def test_a_crop_takes_joints_away():
    (cut,) = cut_bodies([body()], slice(30, 130), slice(0, 400))
    assert (cut[:, 2] > 0).sum() == 9  # the upper half
    np.testing.assert_allclose(cut[0], (50, 0, 1))
    assert cut_bodies([body()], slice(300, 400), slice(0, 400)) == []


def test_bodies_are_read_in_the_pictures_pixels():
    frame = {
        "people": [{"pose_keypoints_2d": body().reshape(-1).tolist()}, {"pose_keypoints_2d": None}],
        "canvas_width": 400,
        "canvas_height": 400,
    }
    (read,) = read_bodies(frame, 200, 800)
    np.testing.assert_allclose(read[:, 0], body()[:, 0] * 2)
    np.testing.assert_allclose(read[:, 1], body()[:, 1] / 2)


# -- all of them ---------------------------------------------------------------------------------------------------

ONE_OF_EACH = ("canny", "depth_small", "normal_midas", "segments_coco", "tile")


@pytest.mark.parametrize("annotator", ONE_OF_EACH)
def test_the_same_hint_scores_one_another_less_and_nothing_is_changed(annotator: str):
    picture, hint = noise(5), (noise(6) > 0.9).astype(np.float32)
    other = (noise(7) > 0.9).astype(np.float32)
    given = [array.copy() for array in (picture, hint, other)]
    same, less = compare(annotator, picture, hint, hint), compare(annotator, picture, other, hint, 0)
    assert same.score == pytest.approx(1)
    assert 0 <= less.score < 0.8
    for one in (same, less):
        assert one.overlay.shape == (32, 32, 3)
        assert one.overlay.dtype == np.float32
        assert 0 <= one.overlay.min() and one.overlay.max() <= 1
    assert not np.array_equal(same.overlay, less.overlay)
    assert f"{less.score:.3f}" in less.says or less.score == 0
    for array, before in zip((picture, hint, other), given):
        np.testing.assert_array_equal(array, before)


def test_the_picture_of_edges_says_what_is_right_missed_and_too_much():
    picture = np.full((32, 32, 3), 0.5, np.float32)
    hint, result = np.maximum(column(10), column(20)), np.maximum(column(11), column(28))
    shown = compare("canny", picture, result, hint).overlay
    np.testing.assert_allclose(shown[5, 10], RIGHT)  # drawn where the hint has it
    np.testing.assert_allclose(shown[5, 20], MISSED)
    np.testing.assert_allclose(shown[5, 28], EXTRA)
    np.testing.assert_allclose(shown[5, 11], 0.15)  # the picture, dimmed


def test_the_picture_of_people_says_which_joints_are_found():
    wanted, found = body(), body()
    found[0, :2] = 5, 200
    made = compare_people(np.zeros((256, 256, 3), np.float32), [found], [wanted])
    assert made.says == f"pose OKS {17 / 18:.3f}, PCK {17 / 18:.3f}, 1 people for 1"
    np.testing.assert_allclose(made.overlay[30, 50], MISSED, atol=0.03)
    np.testing.assert_allclose(made.overlay[230, 150], RIGHT, atol=0.03)


def test_hints_of_different_sizes_are_refused():
    with pytest.raises(AnnotatorError, match=r"result's hint has shape \(32, 32, 3\) and the hint \(16, 16, 3\)"):
        measure.edge_f1(column(3), column(3, 16))


@pytest.mark.parametrize(
    ("size", "like", "part"),
    [
        ((512, 512), (128, 128), (512, 512)),
        ((512, 512), (512, 768), (342, 512)),
        ((512, 512), (768, 512), (512, 342)),
        ((300, 512), (64, 64), (300, 300)),
        ((511, 512), (512, 512), (511, 512)),  # off by rounding alone
    ],
)
def test_the_centre_that_a_crop_keeps(size: tuple[int, int], like: tuple[int, int], part: tuple[int, int]):
    rows, columns = measure.centre_like(*size, *like)
    assert (rows.stop - rows.start, columns.stop - columns.start) == part
    assert rows.start == size[0] - rows.stop and columns.start == size[1] - columns.stop


def test_resized_keeps_the_range():
    picture = np.round(noise(8))
    for height, width in ((16, 20), (70, 64)):
        again = resized(picture, height, width)
        assert again.shape == (height, width, 3) and again.min() >= 0 and again.max() <= 1
    assert resized(picture, 32, 32) is picture
