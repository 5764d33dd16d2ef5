"""A result against its hint, with the score that fits the annotator: one number, what it is made of, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import measure, overlay
from .images import AnnotatorError
from .keypoints import read_frame, with_canvas

TOLERANCE = 2
"""Pixels that an edge may be off."""
MOVES = ((0.0, 0.5), (0.5, 0.0), (0.5, 0.5))
"""Parts of the sides, down and right, by which a result is moved round where chance is sought: as far as it gets.

Mirroring would not do: a face is its own mirror image.
"""


@dataclass(frozen=True)
class Comparison:
    """`score` in 0..1, 1 is the same; `says` names it and its parts; `overlay` is (H,W,3) float32 0..1."""

    score: float
    says: str
    overlay: np.ndarray


def compare(
    annotator: str, picture: np.ndarray, result: np.ndarray, hint: np.ndarray, tolerance: float = TOLERANCE
) -> Comparison:
    """How well `result`, the hint of a `picture`, follows `hint`, made with the annotator of this name.

    All three are (H,W,3) float 0..1 of one size; the score is that of `score`, which raises AnnotatorError.
    """
    number, says = score(annotator, result, hint, tolerance)
    kind = measure.kind_of(annotator)
    if kind == "edges":
        shown = overlay.edges(picture, result, hint, tolerance)
    elif kind == "depth":
        shown = overlay.depth(picture, result.mean(axis=2), hint.mean(axis=2))
    else:
        shown = {"normals": overlay.normals, "segments": overlay.segments, "picture": overlay.pictures}[kind](
            picture, result, hint
        )
    return Comparison(number, says, shown)


def score(annotator: str, result: np.ndarray, hint: np.ndarray, tolerance: float = TOLERANCE) -> tuple[float, str]:
    """How well one hint (H,W,3) follows another, 0..1, and what that is in words.

    For edges the F1 within `tolerance` pixels; for depth Spearman's rank correlation, not below 0; for normals the part
    that points within 30 degrees; for segments the mean IoU; else SSIM, not below 0. Raises AnnotatorError for an
    annotator that has no score, or whose score needs keypoints (`compare_people`).
    """
    kind = measure.kind_of(annotator)
    if kind == "edges":
        edges = measure.edge_f1(result, hint, tolerance)
        return edges.f1, f"edge F1 {edges.f1:.3f}, precision {edges.precision:.3f}, recall {edges.recall:.3f}"
    elif kind == "depth":
        ours, wanted = result.mean(axis=2), hint.mean(axis=2)
        rank, rmse = measure.rank_correlation(ours, wanted), measure.depth_rmse(ours, wanted)
        return max(0.0, rank), f"depth rank correlation {rank:.3f}, RMSE {rmse:.3f} with scale and shift aligned"
    elif kind == "normals":
        angles = measure.normal_angles(result, hint)
        near = float((angles <= measure.NORMAL_WITHIN).mean())
        says = f"normals {near:.3f} within {measure.NORMAL_WITHIN:g} degrees, on average {angles.mean():.1f} off"
        return near, says
    elif kind == "segments":
        iou = measure.mean_iou(result, hint)
        return iou, f"segment mean IoU {iou:.3f}"
    elif kind == "picture":
        ssim = measure.ssim(result, hint)
        return max(0.0, ssim), f"SSIM {ssim:.3f}"
    raise AnnotatorError(f"{annotator}: poses are compared by their joints: give those of the hint and of the result")


def chance(annotator: str, result: np.ndarray, hint: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """What `score` gives a result that has nothing to do with the hint and is as busy: the mean over it in MOVES."""
    height, width = result.shape[:2]
    moved = [np.roll(result, (round(down * height), round(right * width)), axis=(0, 1)) for down, right in MOVES]
    return float(np.mean([score(annotator, one, hint, tolerance)[0] for one in moved]))


def compare_people(picture: np.ndarray, found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> Comparison:
    """How well the bodies (18,3) found in a `picture` (H,W,3) follow the wanted ones, in its pixels: by OKS."""
    score = measure.pose_score(found, wanted)
    says = f"pose OKS {score.oks:.3f}, PCK {score.pck:.3f}, {score.found} people for {score.wanted}"
    return Comparison(score.oks, says, overlay.people(picture, found, wanted))


def chance_of_people(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray], height: int, width: int) -> float:
    """As `chance`, of bodies (18,3) in pixels of a picture (height, width): each moves as a whole."""
    scores = []
    for down, right in MOVES:
        moved = []
        for body in found:
            middle = body[body[:, 2] > 0, :2].mean(axis=0)
            place = (middle + (right * width, down * height)) % (width, height)
            moved.append(body + np.append(place - middle, 0).astype(body.dtype))
        scores.append(measure.pose_score(moved, wanted).oks)
    return float(np.mean(scores))


def read_bodies(frame: Mapping[str, Any], height: int, width: int) -> list[np.ndarray]:
    """The bodies (18,3) of a POSE_KEYPOINT frame, in pixels of a picture (height, width)."""
    frame = with_canvas(frame, height, width)
    return [person.body for person in read_frame(frame, height, width) if person.body is not None]


def cut_bodies(bodies: Sequence[np.ndarray], rows: slice, columns: slice) -> list[np.ndarray]:
    """Bodies (18,3) as a part of their picture shows them: what lies outside is not there."""
    cut = []
    for body in bodies:
        inside = (body[:, 0] >= columns.start) & (body[:, 0] <= columns.stop)
        inside &= (body[:, 1] >= rows.start) & (body[:, 1] <= rows.stop)
        cut.append((body - (columns.start, rows.start, 0)) * inside[:, None])
    return [body for body in cut if (body[:, 2] > 0).any()]
