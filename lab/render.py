"""Pictures of lab scenes: a shaded image with exact depth, normals, segments and keypoints, all from one ray tracer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..controlnet_core.errors import ZeroConvError
from .figure import KEYPOINT_NAMES, capsules, joints
from .scene import FIGURE_ID, SOLID_IDS, Scene
from .shade import COLOUR_VALUES, SKIN, shade
from .trace import Hits, Shape, pixel_centres, trace

# Where the four rays of an edge pixel go, in pixels from its centre: a rotated grid smooths near-upright borders best.
SUBPIXELS = np.array([(-0.375, -0.125), (0.125, -0.375), (0.375, 0.125), (-0.125, 0.375)], np.float32)
CREASE = 0.8
"""Neighbouring normals with a smaller dot product than this count as an edge."""


class RenderError(ZeroConvError):
    """A picture was asked for that the lab cannot draw."""


@dataclass(frozen=True)
class Render:
    """A picture and what is exactly true of it; all maps are evaluated at pixel centres.

    image (H,W,3) float32 RGB 0..1, anti-aliased. depth (H,W) float32, metres along the view axis. normals (H,W,3)
    float32, unit, camera frame: x right, y up, z towards the viewer. segments (H,W) uint8: 0 ground and wall, 1 figure,
    2 sphere, 3 cube, 4 cone, 5 cylinder. keypoints (18,3) float32 in OpenPose's order: x, y in pixels (pixel j covers
    j..j+1) and confidence 1; all zeros without a figure.
    """

    image: np.ndarray
    depth: np.ndarray
    normals: np.ndarray
    segments: np.ndarray
    keypoints: np.ndarray


def render(scene: Scene, size: int = 128) -> Render:
    """The picture of a scene, `size` x `size` pixels; the same scene always gives the same picture.

    Raises RenderError unless size is a positive multiple of 8, the autoencoder's stride.
    """
    if size <= 0 or size % 8:
        raise RenderError(
            f"size is {size}; it must be a positive multiple of 8, for example {max(8, round(size / 8) * 8)}"
        )
    shapes, colours, segment_ids = _things(scene)
    x, y = pixel_centres(size)
    hits = trace(shapes, scene.camera, x, y)
    image = shade(scene, shapes, colours, hits)
    # Only pixels on an edge need more than one ray.
    edge = np.flatnonzero(_edges(hits, size))
    offsets = SUBPIXELS / np.float32(size)
    finer = trace(
        shapes, scene.camera, (x[edge, None] + offsets[:, 0]).ravel(), (y[edge, None] + offsets[:, 1]).ravel()
    )
    image[edge] = shade(scene, shapes, colours, finer).reshape(len(edge), len(offsets), 3).mean(1)
    right, up, forward = scene.camera.axes()
    to_camera = np.stack([right, up, -forward]).astype(np.float32)
    return Render(
        image=image.reshape(size, size, 3),
        depth=hits.depth.reshape(size, size),
        normals=(hits.normal @ to_camera.T).reshape(size, size, 3),
        # Ground and wall are -2 and -1: shifted by two they index the two zeros in front.
        segments=np.array([0, 0, *segment_ids], np.uint8)[hits.shape + 2].reshape(size, size),
        keypoints=_keypoints(scene, size),
    )


def _things(scene: Scene) -> tuple[list[Shape], np.ndarray, list[int]]:
    """The shapes to trace, their colours (N,3) and their segment ids."""
    shapes: list[Shape] = []
    colours: list[tuple[float, float, float]] = []
    segment_ids: list[int] = []
    if scene.figure is not None:
        clothed, bare = capsules(joints(scene.figure))
        shapes += [*clothed, *bare]
        colours += [COLOUR_VALUES[scene.figure.colour]] * len(clothed) + [SKIN] * len(bare)
        segment_ids += [FIGURE_ID] * len(shapes)
    for solid in scene.solids:
        shapes.append(solid.shape())
        colours.append(COLOUR_VALUES[solid.colour])
        segment_ids.append(SOLID_IDS[solid.kind])
    return shapes, np.array(colours, np.float32).reshape(-1, 3), segment_ids


def _keypoints(scene: Scene, size: int) -> np.ndarray:
    keypoints = np.zeros((len(KEYPOINT_NAMES), 3), np.float32)
    if scene.figure is not None:
        found = joints(scene.figure)
        keypoints[:, :2] = scene.camera.project(np.stack([found[name] for name in KEYPOINT_NAMES]))[:, :2] * size
        keypoints[:, 2] = 1.0
    return keypoints


def _edges(hits: Hits, size: int) -> np.ndarray:
    """Which pixels (size*size,) border on another shape or on a crease, such as two faces of a cube."""
    shape, normal = hits.shape.reshape(size, size), hits.normal.reshape(size, size, 3)
    edge = np.zeros((size, size), bool)
    across = (shape[:, 1:] != shape[:, :-1]) | (np.einsum("ijk,ijk->ij", normal[:, 1:], normal[:, :-1]) < CREASE)
    down = (shape[1:] != shape[:-1]) | (np.einsum("ijk,ijk->ij", normal[1:], normal[:-1]) < CREASE)
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return edge.ravel()
