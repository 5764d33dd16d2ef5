"""The look of the lab: colours, light, ground texture and shadows of what the rays met."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .figure import Capsule
from .scene import Scene
from .trace import GROUND, WALL, Box, Cone, Hits, Shape

COLOUR_VALUES = {
    "red": (0.86, 0.16, 0.16),
    "orange": (0.96, 0.52, 0.10),
    "yellow": (0.96, 0.84, 0.16),
    "green": (0.18, 0.62, 0.22),
    "teal": (0.10, 0.68, 0.68),
    "blue": (0.16, 0.32, 0.86),
    "purple": (0.52, 0.22, 0.74),
    "pink": (0.96, 0.50, 0.70),
}
SKIN = (0.94, 0.76, 0.62)
# Ground and wall colours by ground word: the wall is always the paler of the two, so that the horizon stays readable.
GROUND_VALUES = {
    "sand": ((0.84, 0.74, 0.56), (0.95, 0.90, 0.82)),
    "grass": ((0.56, 0.68, 0.42), (0.78, 0.88, 0.95)),
    "stone": ((0.60, 0.61, 0.64), (0.84, 0.85, 0.90)),
    "wood": ((0.64, 0.49, 0.36), (0.90, 0.85, 0.78)),
    "snow": ((0.90, 0.92, 0.96), (0.70, 0.79, 0.90)),
}
TEXTURE_CONTRAST = 0.055
SHADOW_DARKNESS = 0.38


def shade(scene: Scene, shapes: Sequence[Shape], colours: np.ndarray, hits: Hits) -> np.ndarray:
    """Colour (N,3) float32 0..1 of each hit, under one directional light and the sky.

    `colours` (len(shapes),3) are the shapes' own, RGB 0..1.
    """
    light = np.array(scene.light, np.float32)
    ground, wall = (np.array(value, np.float32) for value in GROUND_VALUES[scene.ground])
    eye = scene.camera.position().astype(np.float32)
    image = np.empty_like(hits.normal)

    rays = np.flatnonzero(hits.shape >= 0)
    normal, direction, depth = hits.normal[rays], hits.direction[rays], hits.depth[rays]
    lambert = np.maximum(normal @ light, 0)
    facing = -np.einsum("ij,ij->i", normal, direction) / np.sqrt(np.einsum("ij,ij->i", direction, direction))
    sky = 0.5 + 0.5 * normal[:, 1]
    # Darker rims make a limb readable in front of a torso of the same colour, darker feet set things on the ground.
    rim = 0.62 + 0.38 * np.clip(facing * 1.6, 0, 1)
    grounding = 0.72 + 0.28 * np.minimum((eye[1] + depth * direction[:, 1]) / 0.3, 1)
    halfway = light + np.array([0, 0, -1], np.float32)
    shine = 0.22 * np.maximum(normal @ (halfway / np.linalg.norm(halfway)), 0) ** 24
    brightness = (0.34 + 0.18 * sky + 0.62 * lambert) * rim * grounding
    image[rays] = colours[hits.shape[rays]] * brightness[:, None] + shine[:, None]

    rays = np.flatnonzero(hits.shape == GROUND)
    floor = eye[[0, 2]] + hits.depth[rays, None] * hits.direction[rays][:, [0, 2]]
    image[rays] = ground * (_texture(scene, floor) * _shadow(shapes, light, floor))[:, None]

    rays = np.flatnonzero(hits.shape == WALL)
    height = eye[1] + hits.depth[rays] * hits.direction[rays, 1]
    brightness = 0.90 + 0.10 * np.clip(height / 1.2, 0, 1) + 0.05 * np.clip((height - 1.0) / 1.5, 0, 1)
    image[rays] = wall * brightness[:, None]
    return np.clip(image, 0, 1)


def _texture(scene: Scene, floor: np.ndarray) -> np.ndarray:
    """Brightness (N,) of the ground's pattern at floor points x, z (N,2): soft, and fading with the distance."""
    turn = np.deg2rad(scene.texture_angle)
    along, across = (
        np.cos(turn) * floor[:, 0] + np.sin(turn) * floor[:, 1],
        np.cos(turn) * floor[:, 1] - np.sin(turn) * floor[:, 0],
    )
    u, v = along * (np.pi / scene.texture_size), across * (np.pi / scene.texture_size)
    if scene.texture == "checks":
        pattern = np.tanh(3 * np.sin(u)) * np.tanh(3 * np.sin(v))
    elif scene.texture == "stripes":
        pattern = np.tanh(3 * np.sin(u))
    else:
        broad, fine = np.sin(1.3 * u + 0.7 * v) * np.sin(0.9 * v - 0.4 * u), np.sin(2.3 * v + 1.1 * u) * np.sin(1.9 * u)
        pattern = 0.7 * broad + 0.49 * fine
    fade = np.clip((7.5 - floor[:, 1]) / 4.0, 0, 1)
    return 1 + TEXTURE_CONTRAST * fade * pattern


def _shadow(shapes: Sequence[Shape], light: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """Brightness (N,) of floor points x, z (N,2) under the shapes' shadows; 1 in full light.

    Each shape's axis is projected along the light; its shadow is a band about that, softer where the shape is high.
    """
    bright = np.ones(len(floor), np.float32)
    slope = light[[0, 2]] / light[1]
    for shape in shapes:
        start, end, start_radius, end_radius = _axis(shape)
        a, b = ((point[[0, 2]] - slope * point[1]).astype(np.float32) for point in (start, end))
        reach = max(start_radius, end_radius) * 1.5 + 0.1
        low, high = np.minimum(a, b) - reach, np.maximum(a, b) + reach
        near = np.flatnonzero(
            (floor[:, 0] >= low[0]) & (floor[:, 0] <= high[0]) & (floor[:, 1] >= low[1]) & (floor[:, 1] <= high[1])
        )
        axis = b - a
        offset = floor[near] - a
        along = np.clip(offset @ axis / max(float(axis @ axis), 1e-6), 0, 1)
        offset -= along[:, None] * axis
        distance = np.sqrt(offset[:, 0] ** 2 + offset[:, 1] ** 2)
        radius = start_radius + along * (end_radius - start_radius)
        soft = 0.06 + 0.08 * (start[1] + along * (end[1] - start[1]))
        cover = np.clip((radius + soft - distance) / (2 * soft), 0, 1)
        bright[near] = np.minimum(bright[near], 1 - SHADOW_DARKNESS * cover * cover * (3 - 2 * cover))
    return bright


def _axis(shape: Shape) -> tuple[np.ndarray, np.ndarray, float, float]:
    """A shape as a thick line for its shadow: start, end, and the radius at each."""
    if isinstance(shape, Capsule):
        return shape.start, shape.end, shape.radius, shape.radius
    base = np.array([shape.x, 0.0, shape.z])
    if isinstance(shape, Box):
        return base, base + [0, 1.5 * shape.half, 0], 1.15 * shape.half, 1.1 * shape.half
    top = base + [0, shape.height, 0]
    return base, top, shape.radius, 0.05 if isinstance(shape, Cone) else shape.radius
