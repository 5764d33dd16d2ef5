"""Hints of a rendered scene, as annotators would make them, from what the renderer knows exactly."""

from __future__ import annotations

import numpy as np

from ..annotators.canny import canny
from ..annotators.pose import draw_pose
from .render import Render


def depth_hint(render: Render) -> np.ndarray:
    """Inverse depth as MiDaS draws it, near white and far black, (H,W,3) float32 spread over 0..1."""
    inverse = 1.0 / render.depth
    low, high = inverse.min(), inverse.max()
    return np.repeat(((inverse - low) / (high - low)).astype(np.float32)[:, :, None], 3, axis=2)


def canny_hint(render: Render) -> np.ndarray:
    """Canny edges of the rendered image, (H,W,3) float32 0 or 1."""
    return canny(render.image)


def pose_hint(render: Render) -> np.ndarray:
    """The figure's keypoints as an OpenPose stick figure, (H,W,3) float32 0..1; black without a figure."""
    height, width = render.depth.shape
    return draw_pose(render.keypoints[None], height, width)
