"""Rays against the lab's shapes: for each ray the depth, the surface normal and the shape it meets first.

A ray is camera position + depth * direction, with directions scaled to advance one metre along the view axis for each
unit of depth. Depth along the view axis is therefore what the intersections return, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from .figure import Capsule

WALL_Z = 6.5
"""World z of the back wall in metres; it bounds the depth."""
GROUND, WALL = -1, -2
"""What `Hits.shape` holds where a ray meets no shape."""


@dataclass(frozen=True)
class Camera:
    """A pinhole at (0, height, 0) that looks along +z, `pitch` degrees downwards; `focal` in picture heights."""

    height: float = 1.55
    pitch: float = 9.0
    focal: float = 1.6

    def axes(self) -> np.ndarray:
        """Rows right, up, forward of the camera in the world, (3,3)."""
        p = np.deg2rad(self.pitch)
        return np.array([[1.0, 0.0, 0.0], [0.0, np.cos(p), np.sin(p)], [0.0, -np.sin(p), np.cos(p)]])

    def position(self) -> np.ndarray:
        """The pinhole in the world, (3,)."""
        return np.array([0.0, self.height, 0.0])

    def directions(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Ray directions (N,3) float32 through picture points x, y (N,) in 0..1 (from the left, from the top)."""
        right, up, forward = self.axes().astype(np.float32)
        across, upward = (x - 0.5) / self.focal, (0.5 - y) / self.focal
        return forward + across[:, None].astype(np.float32) * right + upward[:, None].astype(np.float32) * up

    def project(self, points: np.ndarray) -> np.ndarray:
        """World points (N,3) as x, y in 0..1 of the picture and depth in metres, (N,3)."""
        right, up, depth = self.axes() @ (np.asarray(points) - self.position()).T
        return np.stack([0.5 + self.focal * right / depth, 0.5 - self.focal * up / depth, depth], axis=1)


@dataclass(frozen=True)
class Box:
    """A cube on the ground: centre x, z, half its edge, and its turn about the vertical in degrees."""

    x: float
    z: float
    half: float
    yaw: float


@dataclass(frozen=True)
class Cylinder:
    """An upright cylinder on the ground, seen from above its top or from the side."""

    x: float
    z: float
    radius: float
    height: float


@dataclass(frozen=True)
class Cone:
    """An upright cone on the ground, tip up; its base is never seen and has no surface."""

    x: float
    z: float
    radius: float
    height: float


Shape = Capsule | Box | Cylinder | Cone


@dataclass(frozen=True)
class Hits:
    """What each ray meets first.

    direction (N,3) of the ray, advancing one metre of depth; depth (N,) metres; normal (N,3), unit, in the world;
    shape (N,) index into the shapes, or GROUND or WALL.
    """

    direction: np.ndarray
    depth: np.ndarray
    normal: np.ndarray
    shape: np.ndarray


def pixel_centres(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y in 0..1, each (size*size,) float32, of the centres of a square picture's pixels, row by row."""
    grid = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return np.tile(grid, size), np.repeat(grid, size)


def bounds(shapes: Sequence[Shape], camera: Camera) -> np.ndarray:
    """Rectangles x0, y0, x1, y1 in 0..1 picture units, (len(shapes),4), each holding its shape's picture."""
    boxes = np.array([_box(shape) for shape in shapes]).reshape(-1, 2, 3)
    corners = np.stack([boxes[:, [i, j, k], [0, 1, 2]] for i, j, k in product((0, 1), repeat=3)], axis=1)
    seen = camera.project(corners.reshape(-1, 3)).reshape(-1, 8, 3)[:, :, :2]
    return np.concatenate([seen.min(1), seen.max(1)], axis=1)


def _box(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest x, y, z of a shape."""
    if isinstance(shape, Capsule):
        return np.minimum(shape.start, shape.end) - shape.radius, np.maximum(shape.start, shape.end) + shape.radius
    if isinstance(shape, Box):
        reach, height = np.sqrt(2.0) * shape.half, 2 * shape.half
    else:
        reach, height = shape.radius, shape.height
    return np.array([shape.x - reach, 0.0, shape.z - reach]), np.array([shape.x + reach, height, shape.z + reach])


def trace(shapes: Sequence[Shape], camera: Camera, x: np.ndarray, y: np.ndarray) -> Hits:
    """What the rays through picture points x, y (N,) in 0..1 meet first; every ray meets at least ground or wall."""
    origin = camera.position().astype(np.float32)
    directions = camera.directions(x, y)
    to_wall = np.float32(WALL_Z) / directions[:, 2]
    to_ground = np.where(
        directions[:, 1] < 0, -origin[1] / np.minimum(directions[:, 1], np.float32(-1e-6)), np.float32(np.inf)
    )
    on_ground = to_ground < to_wall
    depth = np.where(on_ground, to_ground, to_wall)
    found = np.where(on_ground, GROUND, WALL)
    normal = np.where(on_ground[:, None], np.array([0, 1, 0], np.float32), np.array([0, 0, -1], np.float32))
    for index, (shape, (x0, y0, x1, y1)) in enumerate(zip(shapes, bounds(shapes, camera), strict=True)):
        # Rays that pass a shape by at a distance are most of all rays: its rectangle on the picture rules them out.
        rays = np.flatnonzero((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1))
        if len(rays) == 0:
            continue
        reach, facing = _meet(shape, origin, directions[rays])
        nearer = reach < depth[rays]
        rays = rays[nearer]
        depth[rays], normal[rays], found[rays] = reach[nearer], facing[nearer], index
    return Hits(directions, depth, normal, found)


def _meet(shape: Shape, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth (N,) (inf where missed) and unit normal (N,3) of one shape along the rays."""
    if isinstance(shape, Capsule):
        return _meet_capsule(shape, origin, directions)
    if isinstance(shape, Box):
        return _meet_box(shape, origin, directions)
    if isinstance(shape, Cylinder):
        return _meet_cylinder(shape, origin, directions)
    return _meet_cone(shape, origin, directions)


def _nearer_root(a: np.ndarray, half_b: np.ndarray, c: np.ndarray | float) -> np.ndarray:
    """The smaller root of a t^2 + 2 half_b t + c = 0 for a > 0; inf where there is none."""
    discriminant = half_b * half_b - a * c
    root = (-half_b - np.sqrt(np.maximum(discriminant, 0))) / a
    return np.where(discriminant >= 0, root, np.float32(np.inf))


def _meet_capsule(shape: Capsule, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # The capsule is the union of its two end spheres and the tube between them: the nearest of the three wins.
    start, end = shape.start.astype(np.float32), shape.end.astype(np.float32)
    axis = end - start
    length2 = float(axis @ axis)
    square = np.einsum("ij,ij->i", directions, directions)

    def sphere(centre: np.ndarray) -> np.ndarray:
        offset = origin - centre
        return _nearer_root(square, directions @ offset, float(offset @ offset) - shape.radius**2)

    depth = sphere(start)
    if length2 > 0:
        depth = np.minimum(depth, sphere(end))
        offset = origin - start
        across, away = directions @ axis, float(offset @ axis)
        # Scaled by length2 as a whole, so that a ray along the axis gives a = 0 rather than a division by zero.
        a = np.maximum(length2 * square - across * across, np.float32(1e-9))
        half_b = length2 * (directions @ offset) - away * across
        tube = _nearer_root(a, half_b, length2 * (float(offset @ offset) - shape.radius**2) - away * away)
        along = away + np.where(np.isfinite(tube), tube, 0) * across
        tube = np.where((along >= 0) & (along <= length2), tube, np.float32(np.inf))
        depth = np.minimum(depth, tube)
    points = origin + np.where(np.isfinite(depth), depth, 0)[:, None] * directions - start
    if length2 > 0:
        points = points - np.clip(points @ axis / length2, 0, 1)[:, None] * axis
    return depth, points / np.float32(shape.radius)


def _meet_box(shape: Box, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    turn = np.deg2rad(shape.yaw)
    c, s = np.cos(turn), np.sin(turn)
    axes = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]], np.float32)
    start = axes @ (origin - np.array([shape.x, shape.half, shape.z], np.float32))
    local = directions @ axes.T
    local = np.where(np.abs(local) < 1e-7, np.float32(1e-7), local)
    enter = (-np.sign(local) * np.float32(shape.half) - start) / local
    leave = (np.sign(local) * np.float32(shape.half) - start) / local
    face = enter.argmax(1)
    depth = np.take_along_axis(enter, face[:, None], 1)[:, 0]
    depth = np.where(depth <= leave.min(1), depth, np.float32(np.inf))
    toward = -np.sign(np.take_along_axis(local, face[:, None], 1))
    return depth, axes[face] * toward


def _meet_cylinder(shape: Cylinder, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    offset = origin - np.array([shape.x, 0, shape.z], np.float32)
    flat = directions[:, [0, 2]]
    side = _nearer_root(
        (flat * flat).sum(1), flat @ offset[[0, 2]], float(offset[[0, 2]] @ offset[[0, 2]]) - shape.radius**2
    )
    height = offset[1] + np.where(np.isfinite(side), side, 0) * directions[:, 1]
    side = np.where((height >= 0) & (height <= shape.height), side, np.float32(np.inf))
    falling = np.minimum(directions[:, 1], np.float32(-1e-7))
    top = np.where(directions[:, 1] < 0, (shape.height - offset[1]) / falling, np.float32(np.inf))
    on_top = offset[[0, 2]] + np.where(np.isfinite(top), top, 0)[:, None] * flat
    top = np.where((on_top**2).sum(1) <= shape.radius**2, top, np.float32(np.inf))
    depth = np.minimum(side, top)
    points = offset + np.where(np.isfinite(side), side, 0)[:, None] * directions
    normal = points * np.array([1, 0, 1], np.float32) / np.float32(shape.radius)
    normal[top < side] = (0, 1, 0)
    return depth, normal


def _meet_cone(shape: Cone, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # x^2 + z^2 = (slope * (height - y))^2, measured from the tip.
    slope = shape.radius / shape.height
    stretch = np.array([1, -(slope**2), 1], np.float32)
    offset = origin - np.array([shape.x, shape.height, shape.z], np.float32)
    a = (directions * directions) @ stretch
    half_b = (directions * offset) @ stretch
    c = float((offset * offset) @ stretch)
    discriminant = np.sqrt(np.maximum(half_b * half_b - a * c, 0))
    missed = half_b * half_b - a * c < 0
    a = np.where(np.abs(a) < 1e-7, np.float32(1e-7), a)
    depth = np.full(len(a), np.inf, np.float32)
    # Either root may lie on the mirrored cone above the tip, so both are tried.
    for root in ((-half_b - discriminant) / a, (-half_b + discriminant) / a):
        below = offset[1] + root * directions[:, 1]
        valid = ~missed & (root > 0) & (below <= 0) & (below >= -shape.height)
        depth = np.where(valid & (root < depth), root, depth)
    points = offset + np.where(np.isfinite(depth), depth, 0)[:, None] * directions
    normal = points * stretch
    normal = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    return depth, normal.astype(np.float32)
