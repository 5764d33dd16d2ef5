"""The lab's jointed figure: a pose given by angles becomes joints, capsules to draw, and 18 OpenPose keypoints.

World frame: x to the right, y up, z away from the camera; lengths in metres, the ground is y = 0. A figure with yaw 0
faces the camera, so that its right side is on the picture's left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

THIGH, SHIN, UPPER_ARM, FOREARM, SPINE = 0.39, 0.37, 0.30, 0.27, 0.46
HIP_HALF_WIDTH, SHOULDER_HALF_WIDTH = 0.125, 0.25
HEAD_ABOVE_NECK, HEAD_RADIUS = 0.27, 0.18
FOOT_RADIUS = 0.095

# Directions from the head's centre to the face points, in the figure's frame: right, up, forward.
FACE = {
    "nose": (0.0, -0.05, 1.0),
    "right_eye": (0.42, 0.28, 0.86),
    "left_eye": (-0.42, 0.28, 0.86),
    "right_ear": (1.0, 0.05, 0.0),
    "left_ear": (-1.0, 0.05, 0.0),
}

KEYPOINT_NAMES = (
    "nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
    "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
    "right_eye", "left_eye", "right_ear", "left_ear",
)  # fmt: skip
"""OpenPose's COCO-18 order."""


@dataclass(frozen=True)
class Limb:
    """Two segments hanging from a shoulder or a hip; angles in degrees in the figure's frontal plane.

    0 hangs straight down, 90 points sideways away from the body, 180 straight up; `upper` and `lower` are the two
    segments' own angles, `upper_forward` and `lower_forward` how far each leaves that plane towards the front.
    """

    upper: float
    lower: float
    upper_forward: float = 0.0
    lower_forward: float = 0.0


@dataclass(frozen=True)
class Figure:
    """A person: its colour word, where it stands (x, z in metres), yaw and sideways lean in degrees, and four limbs."""

    colour: str
    x: float
    z: float
    yaw: float
    lean: float
    right_arm: Limb
    left_arm: Limb
    right_leg: Limb
    left_leg: Limb


@dataclass(frozen=True)
class Capsule:
    """All points within `radius` of the segment from `start` to `end` (world, metres); a sphere when both are equal."""

    start: np.ndarray
    end: np.ndarray
    radius: float


def joints(figure: Figure) -> dict[str, np.ndarray]:
    """Named joints of the figure in the world, each (3,); the lower foot stands on the ground."""
    yaw = np.deg2rad(figure.yaw)
    right = np.array([-np.cos(yaw), 0.0, -np.sin(yaw)])
    forward = np.array([np.sin(yaw), 0.0, -np.cos(yaw)])
    up = np.array([0.0, 1.0, 0.0])
    lean = np.deg2rad(figure.lean)
    spine = np.cos(lean) * up + np.sin(lean) * right
    across = np.cos(lean) * right - np.sin(lean) * up

    def along(side: float, angle: float, ahead: float) -> np.ndarray:
        a, b = np.deg2rad(angle), np.deg2rad(ahead)
        return np.cos(b) * (np.sin(a) * side * right - np.cos(a) * up) + np.sin(b) * forward

    found: dict[str, np.ndarray] = {"pelvis": np.zeros(3)}
    found["neck"] = SPINE * spine
    found["head"] = found["neck"] + HEAD_ABOVE_NECK * spine
    for name, side, arm, leg in (
        ("right", 1.0, figure.right_arm, figure.right_leg),
        ("left", -1.0, figure.left_arm, figure.left_leg),
    ):
        shoulder = found["neck"] + side * SHOULDER_HALF_WIDTH * across
        elbow = shoulder + UPPER_ARM * along(side, arm.upper, arm.upper_forward)
        wrist = elbow + FOREARM * along(side, arm.lower, arm.lower_forward)
        hip = side * HIP_HALF_WIDTH * right - 0.04 * up
        knee = hip + THIGH * along(side, leg.upper, leg.upper_forward)
        ankle = knee + SHIN * along(side, leg.lower, leg.lower_forward)
        toe = ankle + 0.13 * forward + 0.05 * side * right
        parts = {"shoulder": shoulder, "elbow": elbow, "wrist": wrist, "hip": hip, "knee": knee, "ankle": ankle}
        found.update({f"{name}_{part}": point for part, point in parts.items()})
        found[f"{name}_toe"] = toe
    for name, (r, u, f) in FACE.items():
        direction = r * across + u * spine + f * forward
        found[name] = found["head"] + HEAD_RADIUS * direction / np.linalg.norm(direction)
    lowest = min(found["right_ankle"][1], found["left_ankle"][1])
    place = np.array([figure.x, FOOT_RADIUS - lowest, figure.z])
    return {name: point + place for name, point in found.items()}


def capsules(found: dict[str, np.ndarray]) -> tuple[list[Capsule], list[Capsule]]:
    """The clothed parts and the bare parts (head, hands) of the figure whose joints are given."""
    clothed = [
        Capsule(found["pelvis"] + [0, 0.06, 0], found["neck"] - [0, 0.13, 0], 0.2),
        Capsule(found["right_shoulder"], found["left_shoulder"], 0.12),
    ]
    bare = [Capsule(found["head"], found["head"], HEAD_RADIUS)]
    for side in ("right", "left"):
        clothed += [
            Capsule(found[f"{side}_shoulder"], found[f"{side}_elbow"], 0.11),
            Capsule(found[f"{side}_elbow"], found[f"{side}_wrist"], 0.105),
            Capsule(found[f"{side}_hip"], found[f"{side}_knee"], 0.13),
            Capsule(found[f"{side}_knee"], found[f"{side}_ankle"], 0.115),
            Capsule(found[f"{side}_ankle"], found[f"{side}_toe"], FOOT_RADIUS),
        ]
        reach = found[f"{side}_wrist"] - found[f"{side}_elbow"]
        hand = found[f"{side}_wrist"] + 0.05 * reach / FOREARM
        bare.append(Capsule(hand, hand, 0.12))
    return clothed, bare
