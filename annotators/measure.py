"""How faithfully a result follows its hint: the hint of the result against the hint that it was made with, in numbers.

Which score fits which annotator is said in `SCORES`. The first number of each is in 0..1, higher is better, and 1 when
both hints are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .images import AnnotatorError
from .keypoints import OPENPOSE_JOINTS

SCORES: dict[str, tuple[str, ...]] = {
    "edges": (
        "canny", "hough_lines", "lsd", "hed", "mlsd", "scribble_xdog", "scribble_hed", "lineart_standard",
        "cartoon_lines", "lineart_realistic", "lineart_coarse", "lineart_anime", "teed",
        "anyline", "lineart_manga",
    ),
    "depth": ("depth_large", "depth_small", "depth_anything", "depth_zoe", "depth_moge", "depth_anything_3"),
    "normals": ("normal_midas", "normal_moge", "normal_moge_large", "normal_marigold"),
    "segments": ("segments_ade20k", "segments_coco", "threshold"),
    "pose": ("human_pose", "dwpose"),
    "picture": ("superpixels", "tile", "blur", "luminance", "intensity", "color"),
}  # fmt: skip
"""Annotators by the score that fits them."""
UNMEASURED = {
    "scribble": "it reads drawings and a result is none: choose scribble_hed or scribble_xdog",
    "invert": "it reads drawings and a result is none: choose one of the lineart annotators",
    "normal_from_depth": "it reads depth maps and a result is none: choose an annotator that finds normals",
    "inpaint": "it marks what is to be painted anew, which a result does not show",
    "segments_sam2": "its colours name nothing: choose segments_ade20k or segments_coco",
    "mask_sam2": "it marks what a mask points at, which a result does not show",
    "inpaint_lama": "it fills what is to be painted anew, which a result does not show",
    "pose": "it draws keypoints and finds none: choose an annotator that finds people",
    "shuffle": "it keeps colours and leaves nothing where it was",
}
"""Why the other annotators have none."""

LINE = 0.25
"""From this brightness on a pixel belongs to a line: soft maps draw faint lines at about half of white."""
NORMAL_WITHIN = 30.0
"""Degrees; the widest of the usual three bounds (Fouhey, Gupta, Hebert 2013, Data-Driven 3D Primitives)."""
SMALLEST_CLASS = 1e-3
"""Colours on a smaller part of both hints are no class: they come from resizing, where two classes meet."""
SSIM_SIDE = 7
JOINT_SIGMAS = {
    "nose": 0.026, "neck": 0.079, "eye": 0.025, "ear": 0.035, "shoulder": 0.079, "elbow": 0.072, "wrist": 0.062,
    "hip": 0.107, "knee": 0.087, "ankle": 0.089,
}  # fmt: skip
"""How far annotators of COCO disagree about a joint (cocodataset/cocoapi, cocoeval.py); COCO has no neck, which lies
between the shoulders and has theirs."""
BODY_SHARE = 0.53
"""A person's area over that of the box around the joints, where no outline is known (Jeff-sjtu/CrowdPose)."""
PCK_WITHIN = 0.1
"""Of the longer side of the box around the joints (Yang, Ramanan 2013, Articulated Human Detection)."""


@dataclass(frozen=True)
class EdgeScore:
    """Parts in 0..1: `precision` of the result's edge pixels, `recall` of the hint's, and their harmonic mean `f1`."""

    f1: float
    precision: float
    recall: float


@dataclass(frozen=True)
class PoseScore:
    """Object keypoint similarity and part of correct keypoints, both 0..1; how many people each side has."""

    oks: float
    pck: float
    wanted: int
    found: int


def kind_of(annotator: str) -> str:
    """The key of SCORES for an annotator's name. Raises AnnotatorError, which says why there is none."""
    for kind, names in SCORES.items():
        if annotator in names:
            return kind
    raise AnnotatorError(
        f"results cannot be measured with {annotator}: {UNMEASURED.get(annotator, 'no score fits it')}"
    )


def edge_matches(result: np.ndarray, hint: np.ndarray, tolerance: float = 2.0) -> tuple[np.ndarray, ...]:
    """Four masks (H,W): the result's edges near an edge of the hint, its others; the hint's near the result's, others.

    Both maps are (H,W,3) in 0..1, bright edges on black; near is within `tolerance` pixels.
    """
    from scipy.ndimage import distance_transform_edt

    ours, wanted = (lines(picture) for picture in _same_size(result, hint))

    def near(edges: np.ndarray) -> np.ndarray:
        return np.asarray(distance_transform_edt(~edges)) <= tolerance if edges.any() else np.zeros(edges.shape, bool)

    by_hint, by_result = near(wanted), near(ours)
    return ours & by_hint, ours & ~by_hint, wanted & by_result, wanted & ~by_result


def lines(hint: np.ndarray) -> np.ndarray:
    """The pixels (H,W) that belong to a line of a hint (H,W,3)."""
    return hint.max(axis=2) >= LINE


def edge_f1(result: np.ndarray, hint: np.ndarray, tolerance: float = 2.0) -> EdgeScore:
    """How much of one edge map is found in the other, within `tolerance` pixels; maps as `edge_matches` reads them.

    A pixel may serve several others as their match, as in the boundary measure of DAVIS (Perazzi et al. 2016), which
    widens the edges by the tolerance; BSDS pairs them one to one. Two maps without an edge agree.
    """
    right, wrong, met, missed = (int(mask.sum()) for mask in edge_matches(result, hint, tolerance))
    if right + wrong == met + missed == 0:
        return EdgeScore(1.0, 1.0, 1.0)
    precision, recall = right / max(right + wrong, 1), met / max(met + missed, 1)
    return EdgeScore(2 * precision * recall / max(precision + recall, 1e-12), precision, recall)


def rank_correlation(result: np.ndarray, hint: np.ndarray) -> float:
    """Spearman's rank correlation of two maps of any equal shape, -1..1; 0 where one of them is flat.

    Both flat agree: 1. Depth maps come without a scale, and order is what is left.
    """
    from scipy.stats import rankdata

    ours, wanted = (rankdata(picture) for picture in _same_size(result, hint))
    if np.ptp(ours) == 0 or np.ptp(wanted) == 0:
        return float(np.ptp(ours) == np.ptp(wanted))
    return float(np.corrcoef(ours, wanted)[0, 1])


def align_depth(result: np.ndarray, hint: np.ndarray) -> np.ndarray:
    """The result's depth times the scale, plus the shift, that bring it closest to the hint's by least squares.

    As MiDaS is evaluated (Ranftl et al. 2020), but with no scale below 0: an inverted map is wrong.
    """
    ours, wanted = (picture.astype(np.float64) for picture in _same_size(result, hint))
    spread = ours.var()
    scale = max(0.0, ((ours - ours.mean()) * (wanted - wanted.mean())).mean() / spread) if spread > 0 else 0.0
    return scale * (ours - ours.mean()) + wanted.mean()


def depth_rmse(result: np.ndarray, hint: np.ndarray) -> float:
    """Root mean square difference of two depth maps of any equal shape in 0..1, scale and shift aligned: 0..0.5."""
    return float(np.sqrt(((align_depth(result, hint) - hint) ** 2).mean()))


def normal_angles(result: np.ndarray, hint: np.ndarray) -> np.ndarray:
    """Angles (H,W) in degrees between the normals of two maps (H,W,3), where 0..1 stands for -1..1."""

    def unit(colours: np.ndarray) -> np.ndarray:
        normals = colours.astype(np.float64) * 2 - 1
        return normals / np.maximum(np.linalg.norm(normals, axis=2, keepdims=True), 1e-6)

    ours, wanted = _same_size(result, hint)
    return np.degrees(np.arccos((unit(ours) * unit(wanted)).sum(axis=2).clip(-1, 1)))


def mean_iou(result: np.ndarray, hint: np.ndarray) -> float:
    """Intersection over union of two maps (H,W,3) in 0..1 whose colours are classes, mean over the classes of either.

    A colour is a class where it covers a thousandth of either map. Without any such colour the mean is 0.
    """
    ours, wanted = (_colour_codes(picture) for picture in _same_size(result, hint))
    classes, labels = np.unique(np.concatenate([ours.ravel(), wanted.ravel()]), return_inverse=True)
    ours, wanted = labels.ravel()[: ours.size], labels.ravel()[ours.size :]
    first, second, shared = (np.bincount(part, minlength=len(classes)) for part in (ours, wanted, ours[ours == wanted]))
    counted = np.maximum(first, second) >= SMALLEST_CLASS * ours.size
    ious = shared[counted] / (first + second - shared)[counted]
    return float(ious.mean()) if counted.any() else 0.0


def oks(found: np.ndarray, wanted: np.ndarray) -> float:
    """Object keypoint similarity 0..1 of one body (18,3) to the wanted one, in pixels (cocodataset/cocoapi, cocoeval).

    Mean of exp(-d^2 / (2 area (2 sigma)^2)) over the wanted joints; one that was not found counts 0.
    """
    seen = wanted[:, 2] > 0
    if not seen.any():
        return 0.0
    sigmas = np.array([JOINT_SIGMAS[name.rpartition("_")[2]] for name in OPENPOSE_JOINTS])
    width, height = np.maximum(np.ptp(wanted[seen, :2].astype(np.float64), axis=0), 1.0)
    squares = ((found[:, :2].astype(np.float64) - wanted[:, :2]) ** 2).sum(axis=1)
    alike = np.exp(-squares / (2 * BODY_SHARE * width * height * (2 * sigmas) ** 2))
    return float((alike * (found[:, 2] > 0))[seen].mean())


def pck_hits(found: np.ndarray, wanted: np.ndarray, within: float = PCK_WITHIN) -> np.ndarray:
    """Which wanted joints (18,) of a body (18,3) were found within that part of the longer side of the body's box."""
    seen = wanted[:, 2] > 0
    side = max(1.0, *np.ptp(wanted[seen, :2], axis=0)) if seen.any() else 1.0
    distance = np.linalg.norm(found[:, :2].astype(np.float64) - wanted[:, :2], axis=1)
    return seen & (found[:, 2] > 0) & (distance <= within * side)


def pck(found: np.ndarray, wanted: np.ndarray, within: float = PCK_WITHIN) -> float:
    """Part of the wanted joints of a body (18,3) that `pck_hits`; 0 for a body without joints."""
    return float(pck_hits(found, wanted, within).sum() / max(1, (wanted[:, 2] > 0).sum()))


def pair_people(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Pairs (index in `found`, index in `wanted`) of bodies (18,3), together as similar by OKS as can be."""
    from scipy.optimize import linear_sum_assignment

    if not (found and wanted):
        return []
    alike = np.array([[oks(one, other) for other in wanted] for one in found])
    return [(int(i), int(j)) for i, j in zip(*linear_sum_assignment(-alike), strict=True)]


def pose_score(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> PoseScore:
    """OKS and PCK of the people's bodies (18,3), in pixels of the same picture.

    People are paired, and each mean is over as many as the side with more people has, so that one too many counts as
    much as one too few. Nobody where nobody is wanted scores 1.
    """
    if not (found or wanted):
        return PoseScore(1.0, 1.0, 0, 0)
    pairs = pair_people(found, wanted)
    most = max(len(found), len(wanted))
    similar = sum(oks(found[i], wanted[j]) for i, j in pairs) / most
    return PoseScore(similar, sum(pck(found[i], wanted[j]) for i, j in pairs) / most, len(wanted), len(found))


def ssim(result: np.ndarray, hint: np.ndarray) -> float:
    """Structural similarity -1..1 of two pictures (H,W,3) in 0..1 (Wang et al. 2004, as scikit-image computes it).

    Raises AnnotatorError for sides below 7 pixels.
    """
    from skimage.metrics import structural_similarity

    ours, wanted = _same_size(result, hint)
    if min(ours.shape[:2]) < SSIM_SIDE:
        raise AnnotatorError(
            f"the hint is {ours.shape[1]}x{ours.shape[0]}; to compare pictures both sides must be at least {SSIM_SIDE}"
        )
    return float(structural_similarity(ours, wanted, data_range=1.0, channel_axis=2))  # pyright: ignore


def centre_like(height: int, width: int, like_height: int, like_width: int) -> tuple[slice, slice]:
    """Rows and columns of the part of a picture (height, width) that the host's crop keeps for another shape.

    The centre with the other's aspect, as `resize` crop of Apply ControlNet keeps it of a hint.
    """
    x = y = 0
    if width * like_height > height * like_width:
        x = round((width - height * like_width / like_height) / 2)
    elif width * like_height < height * like_width:
        y = round((height - width * like_height / like_width) / 2)
    return slice(y, height - y), slice(x, width - x)


def _same_size(result: np.ndarray, hint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if result.shape != hint.shape:
        raise AnnotatorError(f"result's hint has shape {result.shape} and the hint {hint.shape}: resize one of them")
    return result, hint


def _colour_codes(picture: np.ndarray) -> np.ndarray:
    """Colours as whole numbers (H,W)."""
    red, green, blue = np.moveaxis(np.rint(picture.clip(0, 1) * 255).astype(np.int64), 2, 0)
    return (red << 16) | (green << 8) | blue
