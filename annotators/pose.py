"""OpenPose body keypoints drawn as the stick figure that the published pose ControlNets were trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .images import AnnotatorError

LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10),
    (1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
"""Pairs of COCO-18 joints; limb i has colour i."""
COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85),
)  # fmt: skip
"""RGB of joint i, and of limb i before dimming (lllyasviel/ControlNet annotator/openpose)."""
PUBLISHED_SIDE, PUBLISHED_RADIUS = 512, 4.0
LIMB_BRIGHTNESS = 0.6
SMALLEST_RADIUS = 1.5


def draw_pose(keypoints: np.ndarray | Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """A stick figure per person on black, (height,width,3) float32 RGB 0..1.

    `keypoints` is (P,18,3) or a list of (18,3): x, y in pixels (pixel j covers j..j+1) and confidence; a joint with
    confidence 0 is left out, with the limbs that end in it. Limbs are filled ellipses of half-width 4 at 0.6 of their
    colour, joints discs of radius 4 on top: the published proportions, which are for 512 pixels. Other sizes scale them
    by the short side / 512, but not below 1.5 pixels, so that a stick survives an f=8 encoder on a small picture.
    Raises AnnotatorError for another shape.
    """
    import cv2

    people = [np.asarray(person, np.float32) for person in keypoints]
    for person in people:
        if person.shape != (18, 3):
            raise AnnotatorError(f"a person's keypoints have shape {person.shape}; OpenPose's body has (18, 3)")
    # Small pictures are drawn larger and averaged down: OpenCV's own circles are blocky at a radius of 2 pixels.
    zoom = max(1, -(-PUBLISHED_SIDE // min(height, width)))
    radius = max(PUBLISHED_RADIUS * min(height, width) / PUBLISHED_SIDE, SMALLEST_RADIUS) * zoom
    canvas = np.zeros((height * zoom, width * zoom, 3), np.uint8)
    for person in people:
        points, seen = person[:, :2] * zoom - 0.5, person[:, 2] > 0
        for (a, b), colour in zip(LIMBS, COLOURS[: len(LIMBS)], strict=True):
            if not (seen[a] and seen[b]):
                continue
            along = points[a] - points[b]
            half_axes = (int(np.hypot(*along) / 2), round(radius))
            angle = round(float(np.degrees(np.arctan2(along[1], along[0]))))
            outline = cv2.ellipse2Poly(_pixel((points[a] + points[b]) / 2), half_axes, angle, 0, 360, 1)
            cv2.fillConvexPoly(canvas, np.asarray(outline), [round(LIMB_BRIGHTNESS * value) for value in colour])
        for point, joint_seen, colour in zip(points, seen, COLOURS, strict=True):
            if joint_seen:
                cv2.circle(canvas, _pixel(point), round(radius), colour, -1)
    if zoom > 1:
        canvas = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    return canvas.astype(np.float32) / 255.0


def _pixel(point: np.ndarray) -> tuple[int, int]:
    return round(float(point[0])), round(float(point[1]))
