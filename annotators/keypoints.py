"""People as joints: how POSE_KEYPOINT frames are read and written, and how one body's joints become another's."""

from __future__ import annotations

import json
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
WHOLE_BODIES = {133: 17, 134: 18}
"""Points of a whole body, and those of them that are the body: COCO-WholeBody's, and DWPose's, which has a neck.

The others are 6 of the feet, 68 of the face, 21 of the left hand and 21 of the right.
"""
CONFIDENT = 0.3
"""A joint of less confidence is not there: networks say a place for every joint, seen or not."""
LARGEST_SHARE = 2.0
"""Coordinates are shares of the canvas when their median is no more than this: as pixels they would be a dot."""
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


def person_of(points: np.ndarray) -> Person:
    """The person of a body's points (N,3): OpenPose's 18, BODY_25's 25, COCO's 17, a whole body's 133 or 134."""
    left = right = face = None
    if len(points) in WHOLE_BODIES:
        points, _, face, left, right = np.split(points, np.cumsum((WHOLE_BODIES[len(points)], 6, 68, 21)))
    if len(points) == 17:
        points = coco_to_openpose(points)
    elif len(points) == 25:
        points = points[list(BODY_25_OF_OPENPOSE)]
    return Person(points, left, right, face)


def openpose_to_coco(joints: np.ndarray) -> np.ndarray:
    """COCO's 17 joints (17,3) of OpenPose's 18 (18,3)."""
    return np.asarray(joints, np.float32)[[OPENPOSE_JOINTS.index(name) for name in COCO_JOINTS]]


def read_frames(given: Any, name: str = "pose_keypoints") -> list[Any] | None:
    """The POSE_KEYPOINT frames of what packs and files have: one frame, a list of them, or the JSON text of either.

    `None` is none at all. What a frame holds is `read_frame`'s to judge. Raises AnnotatorError for text without JSON,
    in which `name` is where it was given.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise AnnotatorError(f"{name} is text and no JSON ({error}): connect keypoints, or a file") from error
    if given is None or isinstance(given, Mapping):
        return None if given is None else [given]
    if not isinstance(given, (list, tuple)):
        raise AnnotatorError(f"{name} is {type(given).__name__}; expected frames, or their JSON text")
    return [frame for one in given for frame in (read_frames(one, name) or () if isinstance(one, str) else (one,))]


def canvas_of(frame: Any) -> tuple[int, int] | None:
    """Height and width in pixels of the canvas that a frame names; `None` where it names none.

    Raises AnnotatorError for what is no frame, and for a side that is none.
    """
    _check(frame)
    if not set(frame) & {"canvas_width", "canvas_height"}:
        return None
    return max(1, round(_side(frame, "canvas_height"))), max(1, round(_side(frame, "canvas_width")))


def with_canvas(frame: Any, height: int, width: int) -> Any:
    """The frame, on a canvas of (height, width) pixels where it names none, as CMU's own files name none.

    Raises AnnotatorError where most joints lie beyond it: they were found in another picture.
    """
    if not isinstance(frame, Mapping) or set(frame) & {"canvas_width", "canvas_height"} or "people" not in frame:
        return frame
    frame = {**frame, "canvas_width": width, "canvas_height": height}
    places = _places(read_frame(frame, height, width))
    if len(places) and (np.median(places, axis=0) > (width, height)).any():
        raise AnnotatorError(
            f"pose_keypoints names no canvas, and most joints lie beyond the picture of {width}x{height}: connect the "
            "picture that they were found in, or write canvas_width and canvas_height into the file"
        )
    return frame


def read_frame(frame: Mapping[str, Any], height: int, width: int, threshold: float = CONFIDENT) -> list[Person]:
    """The people of one POSE_KEYPOINT frame, scaled from its canvas to a picture of (height, width) pixels.

    Coordinates are pixels of the canvas or, when the median of all is small, shares of it. Joints of less confidence
    than `threshold` are missing. A body may have OpenPose's 18 joints, BODY_25's 25, COCO's 17, or the 133 or 134 of a
    whole body; a part or a joint may be missing, None or empty. Raises AnnotatorError.
    """
    _check(frame)
    people = [_read_person(person, threshold) for person in frame["people"] or ()]
    places = _places(people)
    if len(places) == 0:
        return people
    shares = np.median(np.abs(places)) <= LARGEST_SHARE
    canvas = np.ones(2) if shares else np.array([_side(frame, "canvas_width"), _side(frame, "canvas_height")])
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


def _check(frame: Any) -> None:
    """Raise AnnotatorError unless this is a frame."""
    if not isinstance(frame, Mapping) or "people" not in frame:
        found = f"keys {', '.join(map(repr, frame))}" if isinstance(frame, Mapping) else type(frame).__name__
        raise AnnotatorError(
            f"pose_keypoints has {found}; a frame of it has 'people', 'canvas_width' and 'canvas_height'"
        )


def _places(people: Sequence[Person]) -> np.ndarray:
    """x and y (N,2) of all joints that are there."""
    parts = [part for person in people for part in vars(person).values() if part is not None]
    return np.concatenate([np.zeros((0, 2)), *(part[part[:, 2] > 0, :2] for part in parts)])


def _flat(part: np.ndarray | None) -> list[float] | None:
    if part is None:
        return None
    seen = part[:, 2:] > 0
    return [float(number) for number in (np.concatenate([part[:, :2], seen], axis=1) * seen).reshape(-1)]


def _side(frame: Mapping[str, Any], name: str) -> float:
    side = frame.get(name)
    if not isinstance(side, (int, float, np.number)) or not 0 < side < np.inf:
        raise AnnotatorError(f"pose_keypoints has {name} {side!r} and coordinates in pixels; it must be above 0")
    return float(side)


def _read_person(person: Any, threshold: float) -> Person:
    if not isinstance(person, Mapping):
        raise AnnotatorError(f"a person of pose_keypoints is {type(person).__name__}; it must be a dict of joint lists")
    body = _part(person, "pose_keypoints_2d", (17, 18, 25, *WHOLE_BODIES), threshold)
    left = _part(person, "hand_left_keypoints_2d", (21,), threshold)
    right = _part(person, "hand_right_keypoints_2d", (21,), threshold)
    face = _part(person, "face_keypoints_2d", (68, 70), threshold)
    whole = Person(None) if body is None else person_of(body)
    return Person(
        whole.body,
        whole.left_hand if left is None else left,
        whole.right_hand if right is None else right,
        whole.face if face is None else face,
    )


def _part(person: Mapping[str, Any], name: str, sizes: tuple[int, ...], threshold: float) -> np.ndarray | None:
    """One part as float64 (N,3), or None; joints that are not there have confidence 0."""
    numbers: Any = person.get(name)
    try:
        if numbers is None or len(numbers) == 0:
            return None
        if not isinstance(numbers, np.ndarray) and any(
            isinstance(joint, (list, tuple, np.ndarray)) for joint in numbers
        ):
            numbers = [number for joint in numbers for number in ((None,) * 3 if joint is None else joint)]
        none = np.array([number is None for number in np.ravel(numbers)])
        part = np.where(none, 0, np.asarray(numbers, np.float64).reshape(-1))
    except (TypeError, ValueError) as error:
        raise AnnotatorError(f"{name} of pose_keypoints is no list of numbers: {error}") from error
    if part.size not in [3 * size for size in sizes]:
        raise AnnotatorError(
            f"{name} of pose_keypoints has {part.size} numbers; expected x, y and confidence of "
            f"{' or '.join(map(str, sizes))} points"
        )
    part = part.reshape(-1, 3)
    part = np.where(none.reshape(-1, 3).any(axis=1, keepdims=True), 0, part)
    if not np.isfinite(part[part[:, 2] != 0]).all():
        raise AnnotatorError(f"{name} of pose_keypoints has a joint that is not finite: look at the node that made it")
    return np.where((part[:, 2:] > 0) & (part[:, 2:] >= threshold), part, 0.0)
