"""Depth, near is white, by MiDaS (DPT), Depth Anything V2 and ZoeDepth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import Annotator, Parameter
from .images import grey

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import DepthAnythingForDepthEstimation, DPTForDepthEstimation, ZoeDepthForDepthEstimation

ZOE_PERCENTILES = (2, 85)


def depth_midas(network: DPTForDepthEstimation, image: np.ndarray) -> np.ndarray:
    """MiDaS inverse depth (B,H,W) float32, larger is nearer, of pictures (B,H,W,3), or of one."""
    from .networks.depth import midas

    return midas(network, image)


def depth_anything(network: DepthAnythingForDepthEstimation, image: np.ndarray) -> np.ndarray:
    """Depth Anything's inverse depth (B,H,W) float32, larger is nearer, of pictures (B,H,W,3), or of one."""
    from .networks.depth import anything

    return anything(network, image)


def depth_zoe(network: ZoeDepthForDepthEstimation, image: np.ndarray) -> np.ndarray:
    """ZoeDepth's depth in metres (H,W) float32 of a picture (H,W,3)."""
    from .networks.depth import zoe

    return zoe(network, image)


def stretched_hints(depths: Iterable[np.ndarray], range: str = "picture") -> Iterator[np.ndarray]:
    """Hints (H,W,3) float32 of inverse depths (H,W): from the farthest, black, to the nearest, white.

    Of each by itself (lllyasviel/ControlNet annotator/midas), or with `range` batch of all, so that what does not move
    in a video keeps its grey.
    """
    bounds = None
    if range == "batch":
        depths = list(depths)
        bounds = min(float(one.min()) for one in depths), max(float(one.max()) for one in depths)
    for depth in depths:
        yield grey(stretched(depth, *(bounds or (float(depth.min()), float(depth.max())))))


def metric_hints(depths: Iterable[np.ndarray], range: str = "picture") -> Iterator[np.ndarray]:
    """Hints (H,W,3) float32 of depths (H,W) in metres: from the 2nd percentile, white, to the 85th, black.

    As in lllyasviel/ControlNet-v1-1-nightly annotator/zoe: farther than the 85th percentile is black, too. The
    percentiles are those of each picture, or with `range` batch those of all.
    """
    bounds = None
    if range == "batch":
        depths = list(depths)
        bounds = np.percentile(np.concatenate([one.ravel() for one in depths]), ZOE_PERCENTILES)
    for depth in depths:
        near, far = (float(number) for number in (np.percentile(depth, ZOE_PERCENTILES) if bounds is None else bounds))
        yield grey(1 - stretched(depth, near, far) if far > near else np.zeros_like(depth))


def stretched(depth: np.ndarray, least: float, greatest: float) -> np.ndarray:
    """The depth with `least` at 0 and `greatest` at 1, cut to 0..1; where they are the same, 0 everywhere."""
    return ((depth - least) / (greatest - least)).clip(0, 1) if greatest > least else np.zeros_like(depth)


_RANGE = Parameter(
    "range",
    "Where black and white are: at the bounds of each picture, or of all of a batch, so that a video does not flicker.",
    choices=("picture", "batch"),
)

RECORDS = (
    Annotator("depth_large", depth_midas, (_RANGE,), networks=("dpt_large",), batched=True, draw=stretched_hints),
    Annotator("depth_small", depth_midas, (_RANGE,), networks=("dpt_hybrid",), batched=True, draw=stretched_hints),
    Annotator(
        "depth_anything",
        depth_anything,
        (_RANGE,),
        networks=("depth_anything_v2_small",),
        batched=True,
        draw=stretched_hints,
    ),
    Annotator("depth_zoe", depth_zoe, (_RANGE,), networks=("zoedepth",), draw=metric_hints),
)
