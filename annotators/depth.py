"""Depth, near is white, by MiDaS (DPT), Depth Anything V2 and ZoeDepth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import Annotator
from .images import grey

if TYPE_CHECKING:
    from transformers import DepthAnythingForDepthEstimation, DPTForDepthEstimation, ZoeDepthForDepthEstimation

ZOE_PERCENTILES = (2, 85)


def depth_midas(network: DPTForDepthEstimation, image: np.ndarray) -> np.ndarray:
    """MiDaS depth (H,W,3) float32, stretched to 0..1, of a picture (H,W,3) (lllyasviel/ControlNet annotator/midas)."""
    from .networks.depth import midas

    return grey(stretched(midas(network, image)))


def depth_anything(network: DepthAnythingForDepthEstimation, image: np.ndarray) -> np.ndarray:
    """Depth Anything's depth (H,W,3) float32, stretched to 0..1, of a picture (H,W,3)."""
    from .networks.depth import anything

    return grey(stretched(anything(network, image)))


def depth_zoe(network: ZoeDepthForDepthEstimation, image: np.ndarray) -> np.ndarray:
    """ZoeDepth's metric depth as a hint (H,W,3) float32, from the 2nd percentile (white) to the 85th (black).

    As in lllyasviel/ControlNet-v1-1-nightly annotator/zoe: farther than the 85th percentile is black, too.
    """
    from .networks.depth import zoe

    depth = zoe(network, image)
    near, far = (float(number) for number in np.percentile(depth, ZOE_PERCENTILES))
    if far <= near:
        return np.zeros((*depth.shape, 3), np.float32)
    return grey((1 - (depth - near) / (far - near)).clip(0, 1))


def stretched(depth: np.ndarray) -> np.ndarray:
    """The depth with its least number at 0 and its greatest at 1; a flat one is 0 everywhere."""
    least, greatest = float(depth.min()), float(depth.max())
    return (depth - least) / (greatest - least) if greatest > least else np.zeros_like(depth)


RECORDS = (
    Annotator("depth_large", depth_midas, networks=("dpt_large",)),
    Annotator("depth_small", depth_midas, networks=("dpt_hybrid",)),
    Annotator("depth_anything", depth_anything, networks=("depth_anything_v2_small",)),
    Annotator("depth_zoe", depth_zoe, networks=("zoedepth",)),
)
