"""Pictures of where a result follows its hint: right is green or dark, missing and wrong are red, too much is blue."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .measure import NORMAL_WITHIN, align_depth, edge_matches, normal_angles, pair_people, pck_hits
from .pose import LIMBS

RIGHT, MISSED, EXTRA = (0.25, 0.95, 0.45), (1.0, 0.28, 0.2), (0.3, 0.6, 1.0)
DIM = 0.3
"""How bright the picture is under the marks."""


def edges(picture: np.ndarray, result: np.ndarray, hint: np.ndarray, tolerance: float) -> np.ndarray:
    """The hint's lines over the picture (H,W,3): green where the result has them, else red; blue is its surplus."""
    _, extra, met, missed = edge_matches(result, hint, tolerance)
    return _paint(_dim(picture), (extra, EXTRA), (met, RIGHT), (missed, MISSED))


def depth(picture: np.ndarray, result: np.ndarray, hint: np.ndarray) -> np.ndarray:
    """How far the result's depth (H,W) is off the hint's (H,W): red is too near, blue too far, over the picture."""
    off = (align_depth(result, hint) - hint)[:, :, None] * 2
    marked = _dim(picture) + off.clip(0, 1) * np.array(MISSED) - off.clip(-1, 0) * np.array(EXTRA)
    return marked.clip(0, 1).astype(np.float32)


def normals(picture: np.ndarray, result: np.ndarray, hint: np.ndarray) -> np.ndarray:
    """Red over the picture where normals point elsewhere, as bright as the angle is wide."""
    return _heat(picture, normal_angles(result, hint) / (2 * NORMAL_WITHIN))


def segments(picture: np.ndarray, result: np.ndarray, hint: np.ndarray) -> np.ndarray:
    """The hint's colours, dimmed, over the picture where the result has the same class; red where it has another."""
    wrong = np.abs(result - hint).max(axis=2) > 0.5 / 255
    return _paint((_dim(picture) + DIM * hint).clip(0, 1), (wrong, MISSED))


def pictures(picture: np.ndarray, result: np.ndarray, hint: np.ndarray) -> np.ndarray:
    """Red over the picture where the two hints differ, as bright as they do."""
    return _heat(picture, np.abs(result - hint).max(axis=2) * 2)


def people(picture: np.ndarray, found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> np.ndarray:
    """Wanted bodies (18,3) over the picture, their joints green where found and red where not; found ones in blue."""
    import cv2

    canvas = np.rint(_dim(picture) * 255).astype(np.uint8)
    thick = max(1, min(canvas.shape[:2]) // 256)
    red, green, blue = ([round(255 * part) for part in colour] for colour in (MISSED, RIGHT, EXTRA))

    def pixel(joint: np.ndarray) -> tuple[int, int]:
        return round(float(joint[0]) - 0.5), round(float(joint[1]) - 0.5)

    for bodies, colour in ((found, blue), (wanted, [200, 200, 200])):
        for body in bodies:
            for a, b in LIMBS:
                if body[a, 2] > 0 and body[b, 2] > 0:
                    cv2.line(canvas, pixel(body[a]), pixel(body[b]), colour, thick, cv2.LINE_AA)
    partner = {j: found[i] for i, j in pair_people(found, wanted)}
    for j, body in enumerate(wanted):
        hits = pck_hits(partner.get(j, np.zeros((18, 3))), body)
        for joint, hit in zip(body, hits, strict=True):
            if joint[2] > 0:
                cv2.circle(canvas, pixel(joint), 2 * thick, green if hit else red, -1, cv2.LINE_AA)
    return canvas.astype(np.float32) / 255


def _dim(picture: np.ndarray) -> np.ndarray:
    """The picture in grey, dark enough for marks on it."""
    return np.repeat(DIM * picture.mean(axis=2, keepdims=True), 3, axis=2)


def _paint(picture: np.ndarray, *marks: tuple[np.ndarray, tuple[float, float, float]]) -> np.ndarray:
    painted = picture.astype(np.float32)
    for mask, colour in marks:
        painted[mask] = colour
    return painted


def _heat(picture: np.ndarray, amount: np.ndarray) -> np.ndarray:
    amount = amount.clip(0, 1)[:, :, None]
    return (_dim(picture) * (1 - amount) + amount * np.array(MISSED)).astype(np.float32)
