"""SAM 2, which sees the outlines of things and no names: of everything in a picture, or of what points lie on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..images import AnnotatorError, to_picture
from . import pretrained

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's RGB, which SAM 2 wants taken out (facebook/sam2.1-hiera-tiny, preprocessor_config.json)."""
TOGETHER = 64
"""Points that are asked about at once."""
STABILITY, STABLE_WITHIN = 0.95, 1.0
"""A mask is kept where what has logits above 1 is more than this part of what has logits above -1."""
OVERLAP = 0.7
"""Of two masks whose boxes share more (intersection over union), the less sure one is dropped."""
MOST_PIXELS = 1024 * 1024
"""Masks are compared at the picture's own size up to this; the network's have 256x256."""


def build(config: Path, weights: Path) -> nn.Module:
    """SAM 2 for pictures of its config.json and model.safetensors, published as that for videos. Or AnnotatorError."""
    return pretrained.build(
        *pretrained.classes("Sam2Model", "Sam2Config", "4.56"), config, weights, also=("sam2_video",)
    )


@torch.inference_mode()
def everything(network: Any, image: np.ndarray, points: int, confidence: float) -> np.ndarray:
    """Which thing each pixel of a picture (H,W,3) belongs to: (H,W) int64, 1 being the largest, and 0 none.

    A grid of `points` x `points` is asked about; masks of which the network is surer than `confidence` are kept, if
    they are stable and repeat no surer one; small ones lie on large ones. As transformers' pipeline "mask-generation"
    and facebookresearch/sam2, automatic_mask_generator.py.
    """
    height, width = image.shape[:2]
    shrink = min(1.0, (MOST_PIXELS / (height * width)) ** 0.5)
    size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
    seen = _seen(network, image)
    middles = (torch.arange(points) + 0.5) / points
    grid = torch.stack(torch.meshgrid(middles, middles, indexing="xy"), dim=-1).reshape(-1, 1, 2)
    masks, scores = [], []
    for few in grid.split(TOGETHER):
        logits, sure = (
            rearrange(answer, "n k ... -> (n k) ...") for answer in _asked(network, seen, few, several=True)
        )
        logits, sure = logits[sure > confidence], sure[sure > confidence]
        whole = F.interpolate(logits[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        inner, outer = ((whole > bound).sum((1, 2)) for bound in (STABLE_WITHIN, -STABLE_WITHIN))
        stable = inner / outer > STABILITY
        masks.append((whole > 0)[stable].cpu())
        scores.append(sure[stable].cpu())
    kept = _distinct(torch.cat(masks), torch.cat(scores))
    labels = torch.zeros(size)
    for number, mask in enumerate(kept[kept.sum((1, 2)).argsort(descending=True, stable=True)], 1):
        labels[mask] = number
    return F.interpolate(labels[None, None], (height, width), mode="nearest-exact")[0, 0].long().numpy()


@torch.inference_mode()
def pointed(network: Any, image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Where the one thing is that all points (N,2) lie on: (H,W) bool; x and y in pixels of a picture (H,W,3).

    Of a single point's three answers the surest.
    """
    height, width = image.shape[:2]
    shares = torch.from_numpy(points / (width, height)).float()
    logits, sure = _asked(network, _seen(network, image), shares[None], several=len(points) == 1)
    best = logits[:, sure[0].argmax()][:, None]
    return (F.interpolate(best, (height, width), mode="bilinear", align_corners=False)[0, 0] > 0).cpu().numpy()


def _seen(network: Any, image: np.ndarray) -> list[Tensor]:
    """What the network sees of a picture, which is squeezed to its own square."""
    side, place = network.config.prompt_encoder_config.image_size, network.no_memory_embedding
    pixels = rearrange(torch.from_numpy(to_picture(image)), "h w c -> 1 c h w").to(place.device)
    pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
    mean, std = (pixels.new_tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
    return network.get_image_embeddings(((pixels - mean) / std).to(place.dtype))


def _asked(network: Any, seen: list[Tensor], points: Tensor, several: bool) -> tuple[Tensor, Tensor]:
    """Logits (N,K,h,w) and scores (N,K) of the things that points (N,M,2) lie on, given as shares of the sides.

    K is 3 with `several`: a part, the whole and what is around it; else 1.
    """
    side, device = network.config.prompt_encoder_config.image_size, seen[0].device
    answer = network(
        image_embeddings=seen,
        input_points=(points * side).to(device)[None],
        input_labels=torch.ones(1, *points.shape[:2], dtype=torch.int64, device=device),
        multimask_output=several,
    )
    logits, sure = answer.pred_masks[0].float(), answer.iou_scores[0].float()
    if not (torch.isfinite(logits).all() and torch.isfinite(sure).all()):
        raise AnnotatorError("the network answered with numbers that are not finite: run it in fp32, or fetch it again")
    return logits, sure


def _distinct(masks: Tensor, scores: Tensor) -> Tensor:
    """Of masks (N,H,W) those that repeat no surer one, the surest first."""
    masks = masks[scores.argsort(descending=True, stable=True)]
    sides = []
    for axis in (1, 2):
        there = masks.any(axis).float()
        last = there.shape[1] - 1
        sides += [there.argmax(1), last - there.flip(1).argmax(1)]
    left, right, top, bottom = sides
    areas = (right - left) * (bottom - top)
    kept: list[int] = []
    for i in range(len(masks)):
        across = torch.minimum(right[i], right[kept]) - torch.maximum(left[i], left[kept])
        down = torch.minimum(bottom[i], bottom[kept]) - torch.maximum(top[i], top[kept])
        shared = across.clamp(min=0) * down.clamp(min=0)
        if not (shared > OVERLAP * (areas[i] + areas[kept] - shared)).any():
            kept.append(i)
    return masks[kept]
