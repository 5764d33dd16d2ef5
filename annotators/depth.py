"""Depth, near is white, by MiDaS (DPT), Depth Anything V2 and 3, ZoeDepth and MoGe-2."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import Annotator, Parameter
from .images import grey

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn
    from transformers import DepthAnythingForDepthEstimation, DPTForDepthEstimation, ZoeDepthForDepthEstimation

    from .networks.moge import MoGe

ZOE_PERCENTILES = (2, 85)
INVERSE_PERCENTILES = (0, 99)
"""A hand before the lens would leave no grey to all else."""
FARTHEST = 1000.0
"""Metres; farther things are as far as the sky."""


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


def depth_anything_3(network: nn.Module, image: np.ndarray) -> np.ndarray:
    """Depth Anything 3's inverse depth (B,H,W) float32, larger is nearer, of pictures (B,H,W,3), or of one."""
    from .networks.depth_anything_3 import inverse_depth

    return inverse_depth(network, image)


def depth_moge(network: MoGe, image: np.ndarray) -> np.ndarray:
    """MoGe-2's inverse depth (B,H,W) float32, in 1 / metres, of pictures (B,H,W,3), or of one; 0 of the sky."""
    from .networks.moge import depths

    return 1 / depths(network, image)


def stretched_hints(depths: Iterable[np.ndarray], range: str = "picture") -> Iterator[np.ndarray]:
    """Hints (H,W,3) float32 of inverse depths (H,W): from the farthest, black, to the nearest, white.

    Of each by itself (lllyasviel/ControlNet annotator/midas), or with `range` batch of all, so that what does not move
    in a video keeps its grey.
    """
    bounds = None
    if range == "batch":
        depths = list(depths)
        bounds = min(float(one.min()) for one in depths), max(float(one.max()) for one in depths)
        depths = _let_go(depths)
    for depth in depths:
        yield grey(stretched(depth, *(bounds or (float(depth.min()), float(depth.max())))))


def metric_hints(depths: Iterable[np.ndarray], range: str = "picture") -> Iterator[np.ndarray]:
    """Hints (H,W,3) float32 of depths (H,W) in metres: from the 2nd percentile, white, to the 85th, black.

    As in lllyasviel/ControlNet-v1-1-nightly annotator/zoe: farther than the 85th percentile is black, too. The
    percentiles are those of each picture, or with `range` batch those of all.
    """
    for depth, near, far in _bounded(depths, range, ZOE_PERCENTILES):
        yield grey(1 - stretched(depth, near, far) if far > near else np.zeros_like(depth))


def inverse_hints(depths: Iterable[np.ndarray], range: str = "picture") -> Iterator[np.ndarray]:
    """Hints (H,W,3) float32 of inverses of depths (H,W): the farthest black, the nearest hundredth white.

    The nearest and farthest of each picture, or with `range` batch of all.
    """
    yield from (grey(stretched(*bounded)) for bounded in _bounded(depths, range, INVERSE_PERCENTILES))


def moge_hints(depths: Iterable[np.ndarray], range: str = "picture", farthest: float = 0.0) -> Iterator[np.ndarray]:
    """Hints (H,W,3) float32 of inverse depths (H,W) in 1 / metres: as `inverse_hints`, or in metres.

    Above 0, `farthest` makes each grey a distance, the same in all pictures: white at the camera, black from so many
    metres on, linear between.
    """
    if farthest:
        yield from (grey((1 - 1 / (farthest * depth.clip(1 / FARTHEST))).clip(0)) for depth in depths)
    else:
        yield from inverse_hints(depths, range)


def _bounded(
    depths: Iterable[np.ndarray], range: str, percentiles: tuple[float, float]
) -> Iterator[tuple[np.ndarray, float, float]]:
    """Each depth with its numbers at two percentiles, or with `range` batch with those of all."""
    bounds = None
    if range == "batch":
        depths = list(depths)
        # Of each picture other places, and of all as many as one has: a video is large.
        some = [one.ravel()[i :: len(depths)] for i, one in enumerate(depths)]
        bounds = np.percentile(np.concatenate(some), percentiles)
        depths = _let_go(depths)
    for depth in depths:
        least, greatest = np.percentile(depth, percentiles) if bounds is None else bounds
        yield depth, float(least), float(greatest)


def _let_go(depths: list[np.ndarray]) -> Iterator[np.ndarray]:
    """One after the other, and none is kept: where the hints of a video grow, its depths make room."""
    while depths:
        yield depths.pop(0)


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
    Annotator(
        "depth_anything_3",
        depth_anything_3,
        (_RANGE,),
        networks=("depth_anything_3_small",),
        batched=True,
        draw=inverse_hints,
    ),
    Annotator("depth_zoe", depth_zoe, (_RANGE,), networks=("zoedepth",), draw=metric_hints),
    Annotator(
        "depth_moge",
        depth_moge,
        (
            _RANGE,
            Parameter(
                "farthest",
                "Above 0 greys are metres: white at the camera, black from so many on, in all pictures alike.",
                0.0,
                FARTHEST,
                0.1,
            ),
        ),
        networks=("moge2_small",),
        packages=("scipy",),
        batched=True,
        draw=moge_hints,
    ),
)
