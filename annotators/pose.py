"""People drawn as the stick figures that the published pose ControlNets were trained on."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import Annotator, Parameter
from .images import AnnotatorError
from .keypoints import CONFIDENT, Person, openpose_to_coco, read_frame, write_frame

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

FINGERS = tuple((0 if i == 0 else 4 * finger + i, 4 * finger + i + 1) for finger in range(5) for i in range(4))
"""Pairs of a hand's 21 points: from the wrist, point 0, along each finger."""
FINGER_COLOURS = tuple(tuple(255 * v for v in colorsys.hsv_to_rgb(i / 20, 1.0, 1.0)) for i in range(20))
HAND_POINT, HAND_LINE, FACE_DOT = 4.0, 2.0, 3.0
"""Radius of a hand's points, width of its lines, radius of a face's dots (lllyasviel/ControlNet annotator/openpose)."""

COCO_LIMBS = (
    (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10),
    (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
)  # fmt: skip
"""Pairs of COCO-17 joints in the order of Openpifpaf's COCO_PERSON_SKELETON; limb i has colour i."""
COCO_COLOURS = (
    (31, 119, 180), (174, 199, 232), (255, 127, 14), (255, 187, 120), (44, 160, 44), (152, 223, 138), (214, 39, 40),
    (255, 152, 150), (148, 103, 189), (197, 176, 213), (140, 86, 75), (196, 156, 148), (227, 119, 194), (247, 182, 210),
    (127, 127, 127), (199, 199, 199), (188, 189, 34), (219, 219, 141), (23, 190, 207),
)  # fmt: skip
"""Matplotlib's tab20, in which Openpifpaf paints its limbs."""
COCO_LINE, COCO_DOT = 512 * 6 / 504, 512 * 1.5 / 504
"""Width of Openpifpaf's lines and radius of its joints at 512 pixels: 6 and 1.5 points on a picture 504 points wide.

Source: openpifpaf show/painters.py and show/canvas.py; a marker '.' of size 3 is 1.5 points wide, with an edge of 1.5.
"""

STYLES = ("openpose", "coco17")
LONGEST_DRAWING = 4096
"""Small pictures are drawn larger, but never with a side longer than this."""
SMOOTH = 4


def draw_pose(keypoints: np.ndarray | Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """A stick figure per person on black, (height,width,3) float32 RGB 0..1.

    `keypoints` is (P,18,3) or a list of (18,3): x, y in pixels (pixel j covers j..j+1) and confidence; a joint with
    confidence 0 is left out, with the limbs that end in it. Limbs are filled ellipses of half-width 4 at 0.6 of their
    colour, joints discs of radius 4 on top: the published proportions, which are for 512 pixels. Other sizes scale them
    by the short side / 512, but not below 1.5 pixels, so that a stick survives an f=8 encoder on a small picture.
    Raises AnnotatorError for another shape.
    """
    bodies = [np.asarray(person, np.float32) for person in keypoints]
    for body in bodies:
        if body.shape != (18, 3):
            raise AnnotatorError(f"a person's keypoints have shape {body.shape}; OpenPose's body has (18, 3)")
    return draw_people([Person(body) for body in bodies], height, width)


def draw_people(
    people: Sequence[Person], height: int, width: int, *, style: str = "openpose", xinsir_sticks: bool = False
) -> np.ndarray:
    """All parts of all people on black, (height,width,3) float32 RGB 0..1.

    Style openpose: bodies as `draw_pose` says, hands and faces in the same proportions (lllyasviel/ControlNet
    annotator/openpose). With `xinsir_sticks` the limbs alone are wider, as xinsir's SDXL openpose ControlNet was
    trained: half-width 4 below 500 pixels on the long side, else 4 * min(2 + long side // 1000, 7)
    (comfyui_controlnet_aux, scale_stick_for_xinsr_cn). Style coco17: Openpifpaf's own painting, bodies alone, with its
    lines always solid. Raises AnnotatorError for another style.
    """
    import cv2

    if style not in STYLES:
        raise AnnotatorError(f"style is {style!r}; choose one of {', '.join(STYLES)}")
    # Small pictures are drawn larger and averaged down: OpenCV's own circles are blocky at a radius of 2 pixels.
    # Openpifpaf's lines have smooth edges at any size.
    wanted = max(-(-PUBLISHED_SIDE // min(height, width)), SMOOTH if style == "coco17" else 1)
    zoom = max(1, min(wanted, LONGEST_DRAWING // max(height, width)))
    scale = max(min(height, width) / PUBLISHED_SIDE, SMALLEST_RADIUS / PUBLISHED_RADIUS) * zoom
    stick = PUBLISHED_RADIUS * scale
    if xinsir_sticks:
        longest = max(height, width)
        stick = PUBLISHED_RADIUS * zoom * (1 if longest < 500 else min(2 + longest // 1000, 7))
    canvas = np.zeros((height * zoom, width * zoom, 3), np.uint8)
    for person in people:
        if person.body is not None and style == "openpose":
            _draw_body(canvas, person.body, zoom, round(stick), round(PUBLISHED_RADIUS * scale))
        elif person.body is not None:
            _draw_coco_body(canvas, openpose_to_coco(person.body), zoom, scale)
        if style == "openpose":
            for hand in (person.left_hand, person.right_hand):
                if hand is not None:
                    _draw_hand(canvas, hand, zoom, scale)
            if person.face is not None:
                for point in person.face[person.face[:, 2] > 0]:
                    cv2.circle(canvas, _pixel(point[:2] * zoom), round(FACE_DOT * scale), (255, 255, 255), -1)
    if zoom > 1:
        canvas = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    return canvas.astype(np.float32) / 255.0


def pose(
    image: np.ndarray,
    frame: Mapping[str, Any],
    style: str = "openpose",
    body: bool = True,
    hands: bool = True,
    face: bool = True,
    xinsir_sticks: bool = False,
    threshold: float = CONFIDENT,
) -> np.ndarray:
    """The people of a POSE_KEYPOINT frame on black, (H,W,3) float32 0..1, of the size of an image (H,W,3).

    The frame's canvas is stretched to the picture. Joints of less confidence than `threshold` are left out; `body`,
    `hands` and `face` say what else is drawn, `style` and `xinsir_sticks` how (`draw_people`). Raises AnnotatorError
    for a frame that cannot be read (`keypoints.read_frame`).
    """
    height, width = image.shape[:2]
    shown = _shown(read_frame(frame, height, width, threshold), body, hands, face)
    return draw_people(shown, height, width, style=style, xinsir_sticks=xinsir_sticks)


def human_pose(
    detector: Any,
    estimator: Any,
    image: np.ndarray,
    detection_threshold: float = 0.3,
    keypoint_threshold: float = 0.3,
    style: str = "openpose",
    xinsir_sticks: bool = False,
) -> tuple[np.ndarray, dict[str, Any]]:
    """The people of a picture (H,W,3), 0..1, as stick figures (H,W,3) float32 0..1, and as a POSE_KEYPOINT frame.

    People of whom the detector is surer than `detection_threshold` come surest first; joints of which the estimator is
    not surer than `keypoint_threshold` are missing, and so is a person without any. `style` and `xinsir_sticks` are
    those of `draw_people`. Nobody found gives a black hint and a frame without people.
    """
    from .networks.people import find

    height, width = image.shape[:2]
    people = find(detector, estimator, image, detection_threshold, keypoint_threshold)
    drawn = draw_people(people, height, width, style=style, xinsir_sticks=xinsir_sticks)
    return drawn, write_frame(people, height, width)


def dwpose(
    detector: Any,
    estimator: Any,
    image: np.ndarray,
    detection_threshold: float = 0.3,
    keypoint_threshold: float = 0.3,
    body: bool = True,
    hands: bool = True,
    face: bool = True,
    xinsir_sticks: bool = False,
) -> tuple[np.ndarray, dict[str, Any]]:
    """As `human_pose`, by a network that finds hands and faces, too: `body`, `hands` and `face` say what is drawn.

    The frame has all that was found.
    """
    from .networks.people import find_whole

    height, width = image.shape[:2]
    people = find_whole(detector, estimator, image, detection_threshold, keypoint_threshold)
    drawn = draw_people(_shown(people, body, hands, face), height, width, xinsir_sticks=xinsir_sticks)
    return drawn, write_frame(people, height, width)


def _shown(people: Sequence[Person], body: bool, hands: bool, face: bool) -> list[Person]:
    """The people with those of their parts that are to be drawn."""
    return [
        Person(
            person.body if body else None,
            person.left_hand if hands else None,
            person.right_hand if hands else None,
            person.face if face else None,
        )
        for person in people
    ]


def _draw_body(canvas: np.ndarray, body: np.ndarray, zoom: int, stick: int, radius: int) -> None:
    import cv2

    points, seen = body[:, :2] * zoom, body[:, 2] > 0
    for (a, b), colour in zip(LIMBS, COLOURS[: len(LIMBS)], strict=True):
        if not (seen[a] and seen[b]):
            continue
        along = points[a] - points[b]
        half_axes = (int(np.hypot(*along) / 2), stick)
        # Whole degrees, cut and not rounded, as the published drawing has them.
        angle = int(float(np.degrees(np.arctan2(along[1], along[0]))))
        outline = cv2.ellipse2Poly(_pixel((points[a] + points[b]) / 2), half_axes, angle, 0, 360, 1)
        cv2.fillConvexPoly(canvas, np.asarray(outline), [round(LIMB_BRIGHTNESS * value) for value in colour])
    for point, joint_seen, colour in zip(points, seen, COLOURS, strict=True):
        if joint_seen:
            cv2.circle(canvas, _pixel(point), radius, colour, -1)


def _draw_hand(canvas: np.ndarray, hand: np.ndarray, zoom: int, scale: float) -> None:
    import cv2

    points, seen = hand[:, :2] * zoom, hand[:, 2] > 0
    for (a, b), colour in zip(FINGERS, FINGER_COLOURS, strict=True):
        if seen[a] and seen[b]:
            cv2.line(canvas, _pixel(points[a]), _pixel(points[b]), colour, max(1, round(HAND_LINE * scale)))
    for point in points[seen]:
        cv2.circle(canvas, _pixel(point), round(HAND_POINT * scale), (0, 0, 255), -1)


def _draw_coco_body(canvas: np.ndarray, body: np.ndarray, zoom: int, scale: float) -> None:
    import cv2

    points, seen = body[:, :2] * zoom, body[:, 2] > 0
    for (a, b), colour in zip(COCO_LIMBS, COCO_COLOURS, strict=True):
        if seen[a] and seen[b]:
            # OpenCV's thick lines are a pixel wider than asked for, its discs half a pixel larger.
            cv2.line(canvas, _pixel(points[a]), _pixel(points[b]), colour, max(1, round(COCO_LINE * scale - 1)))
    for point in points[seen]:
        cv2.circle(canvas, _pixel(point), round(COCO_DOT * scale - 0.5), (255, 255, 255), -1)


def _pixel(point: np.ndarray) -> tuple[int, int]:
    """The pixel that a point lies in."""
    x, y = np.floor(point)
    return int(x), int(y)


STYLE = Parameter(
    "style",
    "openpose is what published pose controls read; coco17 the 17 joints as Openpifpaf paints them.",
    choices=STYLES,
)
XINSIR_STICKS = Parameter(
    "xinsir_sticks", "Wider limbs, as xinsir's SDXL openpose ControlNet was trained; for style openpose."
)

THRESHOLDS = (
    Parameter("detection_threshold", "Whom the detector is less sure to be a person is left out."),
    Parameter("keypoint_threshold", "A joint of which the network is less sure than this is left out."),
)

RECORDS = (
    Annotator(
        "pose",
        pose,
        (
            STYLE,
            Parameter("body", "Draw bodies."),
            Parameter("hands", "Draw hands where the keypoints have them; style openpose alone does."),
            Parameter("face", "Draw faces where the keypoints have them; style openpose alone does."),
            XINSIR_STICKS,
            Parameter("threshold", "A joint of less confidence is left out; files of 0 and 1 have none between."),
        ),
        reads_pose=True,
    ),
    Annotator(
        "human_pose",
        human_pose,
        (
            *THRESHOLDS,
            STYLE,
            XINSIR_STICKS,
        ),
        networks=("person_detector", "pose_estimator"),
        packages=("transformers",),
        gives_pose=True,
    ),
    Annotator(
        "dwpose",
        dwpose,
        (
            *THRESHOLDS,
            Parameter("body", "Draw bodies."),
            Parameter("hands", "Draw hands."),
            Parameter("face", "Draw faces."),
            XINSIR_STICKS,
        ),
        networks=("person_detector", "whole_pose_estimator"),
        packages=("transformers",),
        gives_pose=True,
    ),
)
