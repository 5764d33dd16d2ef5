"""People as joints: how POSE_KEYPOINT frames are read and written, and how one body's joints become another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .images import AnnotatorError

OPENPOSE_JOINTS = (
    "nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
    "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle", "right_eye", "left_eye",
    "right_ear", "left_ear",
)  # fmt: skip
"""OpenPose's body of 18 joints (COCO-18), the one that the published ControlNets know."""
COCO_JOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip
"""The 17 joints of the COCO data set, which most pose networks find; there is no neck."""
BODY_25_OF_OPENPOSE = (0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18)
"""Which of BODY_25's joints are OpenPose's 18 (CMU openpose, doc/02_output.md): all but the middle hip and the feet."""
FARTHEST = 100.0
"""How many canvas sizes off the canvas a joint may lie: farther ones are a mistake of whoever made them."""


@dataclass(frozen=True)
class Person:
    """One person, each part as (N,3): x, y in pixels (pixel j covers j..j+1), and confidence, 0 where there is none.

    `body` has OpenPose's 18 joints, a hand 21, a face 70 (CMU) or 68 (DWPose); `None` where the part was not given.
    """

    body: np.ndarray | None
    left_hand: np.ndarray | None = None
    right_hand: np.ndarray | None = None
    face: np.ndarray | None = None


def coco_to_openpose(joints: np.ndarray) -> np.ndarray:
    """OpenPose's 18 joints (18,3) of COCO's 17 (17,3).

    The neck is the middle of the shoulders, as confident as the worse of them, and missing unless both are there.
    """
    joints = np.asarray(joints, np.float32)
    body = np.zeros((18, 3), np.float32)
    for i, name in enumerate(OPENPOSE_JOINTS):
        if name != "neck":
            body[i] = joints[COCO_JOINTS.index(name)]
    shoulders = body[[OPENPOSE_JOINTS.index("right_shoulder"), OPENPOSE_JOINTS.index("left_shoulder")]]
    if (shoulders[:, 2] > 0).all():
        body[OPENPOSE_JOINTS.index("neck")] = (*shoulders[:, :2].mean(axis=0), shoulders[:, 2].min())
    return body


def openpose_to_coco(joints: np.ndarray) -> np.ndarray:
    """COCO's 17 joints (17,3) of OpenPose's 18 (18,3)."""
    return np.asarray(joints, np.float32)[[OPENPOSE_JOINTS.index(name) for name in COCO_JOINTS]]


def read_frame(frame: Mapping[str, Any], height: int, width: int) -> list[Person]:
    """The people of one POSE_KEYPOINT frame, scaled from its canvas to a picture of (height, width) pixels.

    Coordinates may be pixels of the canvas or, when all of the frame lie in 0..1, shares of it. A body may have
    OpenPose's 18 joints, BODY_25's 25 or COCO's 17; a part may be missing, None or empty. Raises AnnotatorError.
    """
    if not isinstance(frame, Mapping) or "people" not in frame:
        found = f"keys {', '.join(map(repr, frame))}" if isinstance(frame, Mapping) else type(frame).__name__
        raise AnnotatorError(
            f"pose_keypoints has {found}; a frame of it has 'people', 'canvas_width' and 'canvas_height'"
        )
    people = [_read_person(person) for person in frame["people"] or ()]
    parts = [part for person in people for part in vars(person).values() if part is not None]
    places = np.concatenate([np.zeros((0, 2)), *(part[part[:, 2] > 0, :2] for part in parts)])
    if len(places) == 0:
        return people
    if (np.abs(places) <= 1).all():
        scale = np.array([width, height, 1.0])
    else:
        canvas = np.array([_side(frame, "canvas_width"), _side(frame, "canvas_height")])
        if (np.abs(places) > FARTHEST * canvas).any():
            x, y = places[(np.abs(places) > FARTHEST * canvas).any(axis=1)][0]
            raise AnnotatorError(
                f"pose_keypoints has a joint at ({x:g}, {y:g}), far off its canvas of {canvas[0]:g}x{canvas[1]:g}: "
                "look at the node that made it"
            )
        scale = np.array([width / canvas[0], height / canvas[1], 1.0])
    return [
        Person(*(None if part is None else (part * scale).astype(np.float32) for part in vars(person).values()))
        for person in people
    ]


def write_frame(people: Sequence[Person], height: int, width: int) -> dict[str, Any]:
    """A POSE_KEYPOINT frame in pixels: confidence is 1 for what is there, as decoders of other packs want it."""
    names = ("pose_keypoints_2d", "hand_left_keypoints_2d", "hand_right_keypoints_2d", "face_keypoints_2d")
    return {
        "people": [{name: _flat(part) for name, part in zip(names, vars(one).values(), strict=True)} for one in people],
        "canvas_width": width,
        "canvas_height": height,
    }


def _flat(part: np.ndarray | None) -> list[float] | None:
    if part is None:
        return None
    seen = part[:, 2:] > 0
    return [float(number) for number in (np.concatenate([part[:, :2], seen], axis=1) * seen).reshape(-1)]


def _side(frame: Mapping[str, Any], name: str) -> float:
    side = frame.get(name)
    if not isinstance(side, (int, float, np.number)) or not side > 0:
        raise AnnotatorError(f"pose_keypoints has {name} {side!r} and coordinates in pixels; it must be above 0")
    return float(side)


def _read_person(person: Any) -> Person:
    if not isinstance(person, Mapping):
        raise AnnotatorError(f"a person of pose_keypoints is {type(person).__name__}; it must be a dict of joint lists")
    body = _part(person, "pose_keypoints_2d", (17, 18, 25))
    if body is not None and len(body) == 17:
        body = coco_to_openpose(body)
    elif body is not None and len(body) == 25:
        body = body[list(BODY_25_OF_OPENPOSE)]
    left = _part(person, "hand_left_keypoints_2d", (21,))
    right = _part(person, "hand_right_keypoints_2d", (21,))
    return Person(body, left, right, _part(person, "face_keypoints_2d", (68, 70)))


def _part(person: Mapping[str, Any], name: str, sizes: tuple[int, ...]) -> np.ndarray | None:
    """One part as float64 (N,3), or None; joints that are not there have confidence 0."""
    numbers = person.get(name)
    try:
        if numbers is None or len(numbers) == 0:
            return None
        part = np.asarray(numbers, np.float64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise AnnotatorError(f"{name} of pose_keypoints is no list of numbers: {error}") from error
    if part.size not in [3 * size for size in sizes]:
        raise AnnotatorError(
            f"{name} of pose_keypoints has {part.size} numbers; expected x, y and confidence of "
            f"{' or '.join(map(str, sizes))} points"
        )
    part = part.reshape(-1, 3)
    if not np.isfinite(part[part[:, 2] != 0]).all():
        raise AnnotatorError(f"{name} of pose_keypoints has a joint that is not finite: look at the node that made it")
    return np.where(part[:, 2:] > 0, part, 0.0)
