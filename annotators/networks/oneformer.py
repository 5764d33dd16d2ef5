"""OneFormer, which sees semantic segments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from ..images import AnnotatorError, to_bytes
from ..palettes import ADE20K, COCO
from . import pretrained

if TYPE_CHECKING:
    from transformers import OneFormerForUniversalSegmentation

    from ..palettes import Palette

TASK = (49406, 518, 10549, 533, 29119, 1550, 49407)
"""CLIP's tokens of "the task is semantic": the sentence that tells OneFormer what to do is always this one."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_ade20k(config: Path, weights: Path) -> nn.Module:
    """OneFormer for ADE20K's 150 classes (shi-labs/oneformer_ade20k_swin_large) of its files."""
    return _build(config, weights, ADE20K)


def build_coco(config: Path, weights: Path) -> nn.Module:
    """OneFormer for COCO's 133 panoptic classes (shi-labs/oneformer_coco_swin_large) of its files."""
    return _build(config, weights, COCO)


def labels(network: OneFormerForUniversalSegmentation, image: np.ndarray, short: int, long: int) -> np.ndarray:
    """The class of each pixel (H,W), int64, of a picture (H,W,3), float 0..1 or uint8; the network must be in fp32.

    The network looks at the picture with its shorter side at `short` pixels, the longer at no more than `long`, as in
    lllyasviel/ControlNet-v1-1-nightly annotator/oneformer; the answer is that of transformers'
    post_process_semantic_segmentation. Raises AnnotatorError for a network in half precision.
    """
    from PIL import Image

    pixels = to_bytes(image)
    height, width = pixels.shape[:2]
    size = _looked_at(height, width, short, long)
    resized = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    mean, std = (np.array(values, np.float32) for values in (IMAGENET_MEAN, IMAGENET_STD))
    normal = (np.asarray(resized, np.float32) / 255 - mean) / std
    weight = next(network.parameters())
    if weight.dtype != torch.float32:
        # It reads the task's tokens as plain numbers, up to 49407.
        raise AnnotatorError(f"OneFormer is in {weight.dtype}; it answers rightly in float32 alone")
    task = torch.zeros(1, network.config.task_seq_len, device=weight.device)
    task[0, : len(TASK)] = torch.tensor(TASK)
    with torch.inference_mode():
        values = rearrange(torch.from_numpy(normal), "h w c -> 1 c h w").to(weight.device)
        found = network(pixel_values=values, task_inputs=task)
        return best(found.class_queries_logits, found.masks_queries_logits, height, width).cpu().numpy()


def best(classes: Tensor, masks: Tensor, height: int, width: int) -> Tensor:
    """The class (height,width) that scores most at each pixel, the first of equals.

    `classes` (1,Q,K+1) are the logits of each query's class, none being the last; `masks` (1,Q,h,w) those of where it
    is. A class scores the sum over queries of probability times mask.
    """
    scores = einsum(classes.softmax(-1)[..., :-1], masks.sigmoid(), "b q k, b q h w -> k b h w")
    most = torch.full((height, width), -1.0, device=masks.device)
    chosen = torch.zeros((height, width), dtype=torch.int64, device=masks.device)
    # One class at a time: all of them at the size of a large picture would fill the memory.
    for index, score in enumerate(scores):
        enlarged = nn.functional.interpolate(score[None], (height, width), mode="bilinear", align_corners=False)[0, 0]
        better = enlarged > most
        most, chosen = torch.where(better, enlarged, most), chosen.masked_fill(better, index)
    return chosen


def _build(config: Path, weights: Path, palette: Palette) -> nn.Module:
    from transformers import OneFormerConfig, OneFormerForUniversalSegmentation

    network = pretrained.build(OneFormerForUniversalSegmentation, OneFormerConfig, config, weights)
    if network.config.num_labels != len(palette):
        raise AnnotatorError(f"{config} names {network.config.num_labels} classes; this palette has {len(palette)}")
    return network


def _looked_at(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """The sides of the picture for the network, rounded as transformers' OneFormerImageProcessor does."""
    least, greatest = sorted((height, width))
    other = int(short * greatest / least)
    if other > long:
        short, other = max(1, int(long * short / other)), long
    return (short, other) if height <= width else (other, short)
