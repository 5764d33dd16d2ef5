"""Networks that see depth: MiDaS (DPT), Depth Anything V2 and ZoeDepth."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ..images import AnnotatorError, to_picture
from . import pretrained

if TYPE_CHECKING:
    from transformers import DepthAnythingForDepthEstimation, DPTForDepthEstimation, ZoeDepthForDepthEstimation

MOST_PIXELS = 1024 * 1024
"""Larger pictures are looked at reduced: attention needs memory by the square of the pixels."""
DPT_MULTIPLE, DPT_PATCH = 32, 16
ANYTHING_SHORT_SIDE, ANYTHING_MULTIPLE = 518, 14
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ZOE_HEIGHT, ZOE_WIDTH, ZOE_MULTIPLE = 384, 512, 32


def build_dpt(config: Path, weights: Path) -> nn.Module:
    """A DPT depth network (Intel/dpt-large, Intel/dpt-hybrid-midas) of its files."""
    from transformers import DPTConfig, DPTForDepthEstimation

    return pretrained.build(DPTForDepthEstimation, DPTConfig, config, weights)


def build_depth_anything(config: Path, weights: Path) -> nn.Module:
    """A Depth Anything network (depth-anything/Depth-Anything-V2-Small-hf) of its files."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

    return pretrained.build(DepthAnythingForDepthEstimation, DepthAnythingConfig, config, weights)


def build_zoe(config: Path, weights: Path) -> nn.Module:
    """A ZoeDepth network (Intel/zoedepth-nyu-kitti) of its files."""
    from transformers import ZoeDepthConfig, ZoeDepthForDepthEstimation

    return pretrained.build(ZoeDepthForDepthEstimation, ZoeDepthConfig, config, weights)


def midas(network: DPTForDepthEstimation, image: np.ndarray) -> np.ndarray:
    """MiDaS inverse depth (B,H,W) float32, larger is nearer, of pictures (B,H,W,3), or of one.

    The network looks at a picture as it is, as in the published preprocessor; transformers' own way squeezes it to
    384x384, and agrees where it has that size.
    """
    height, width = image.shape[-3:-1]
    size = _looked_at(height, width, DPT_MULTIPLE, 1.0)
    config: Any = network.config
    if config.is_hybrid:
        # The embedding fits its positions to any size, but first asks whether the size is this one.
        embeddings: Any = network.dpt.embeddings
        embeddings.image_size = size
    with torch.inference_mode():
        looked = _placed(_looked(image, size) * 2 - 1, network)
        seen: Any = network.dpt(looked, output_hidden_states=True)
        blocks = [seen.hidden_states[index + 1] for index in config.backbone_out_indices]
        if config.is_hybrid:
            blocks = [*seen.intermediate_activations, *blocks[2:]]
        depth = network.head(network.neck(blocks, size[0] // DPT_PATCH, size[1] // DPT_PATCH))
    return np.stack([_resized(one, (height, width)) for one in _whole(depth)]).reshape(image.shape[:-1])


def anything(network: DepthAnythingForDepthEstimation, image: np.ndarray) -> np.ndarray:
    """Depth Anything's inverse depth (B,H,W) float32, larger is nearer, of pictures (B,H,W,3), or of one.

    The network looks with a short side of 518 pixels (DepthAnything/Depth-Anything-V2 depth_anything_v2/dpt.py).
    """
    scale = ANYTHING_SHORT_SIDE / min(image.shape[-3:-1])
    return seen(network, image, scale, lambda pixels: network(pixel_values=pixels).predicted_depth)


def seen(network: nn.Module, image: np.ndarray, scale: float, run: Callable[[Tensor], Tensor]) -> np.ndarray:
    """What a network says (B,H,W) float32 of pictures (B,H,W,3), or of one, that it sees at another `scale`.

    `run` gives maps (B,h,w) of pixels (B,3,h,w), normed as ImageNet's, h and w being multiples of 14. Raises
    AnnotatorError for an answer that is not finite.
    """
    height, width = image.shape[-3:-1]
    size = _looked_at(height, width, ANYTHING_MULTIPLE, scale)
    with torch.inference_mode():
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        depth = run(_placed((_looked(image, size) - mean) / std, network)).float()
        depth = nn.functional.interpolate(depth[:, None], (height, width), mode="bilinear", align_corners=True)
    return _whole(depth).reshape(image.shape[:-1])


def zoe(network: ZoeDepthForDepthEstimation, image: np.ndarray) -> np.ndarray:
    """Depth in metres (H,W) float32 of a picture (H,W,3): the mean of the picture's and its mirror image's.

    The picture is continued by reflection at its borders while the network looks, about 384x512 pixels large (isl-org/
    ZoeDepth depth_model.py; transformers, ZoeDepthImageProcessor).
    """
    picture = to_picture(image)
    height, width = picture.shape[:2]
    top, left = (int(math.sqrt(side / 2) * 3) for side in (height, width))
    picture = np.pad(picture, ((top, top), (left, left), (0, 0)), mode="reflect")
    padded = (height + 2 * top, width + 2 * left)
    scales = (ZOE_HEIGHT / padded[0], ZOE_WIDTH / padded[1])
    size = _looked_at(*padded, ZOE_MULTIPLE, min(scales, key=lambda scale: abs(1 - scale)))
    with torch.inference_mode():
        tensor = rearrange(torch.from_numpy(picture), "h w c -> 1 c h w")
        looked = nn.functional.interpolate(tensor, size, mode="bilinear", align_corners=True) * 2 - 1
        looked = _placed(looked, network)
        # Not both in one batch: the network would decide once for the two whether they are indoors or outdoors.
        mirrored = network(pixel_values=looked.flip(3)).predicted_depth.flip(2)
        depth = (network(pixel_values=looked).predicted_depth.float() + mirrored.float()) / 2
        depth = nn.functional.interpolate(depth[:, None], padded, mode="bicubic", align_corners=False)
    return _whole(depth[0, 0, top : top + height, left : left + width])


def _looked_at(height: int, width: int, multiple: int, scale: float) -> tuple[int, int]:
    """The sides, multiples of `multiple`, at which a network looks at a picture that it wants scaled."""
    scale = min(scale, math.sqrt(MOST_PIXELS / (height * width)))
    tall, wide = (max(1, round(side * scale / multiple)) * multiple for side in (height, width))
    return tall, wide


def _resized(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if array.shape[:2] == size:
        return array
    import cv2

    return np.asarray(cv2.resize(array, size[::-1], interpolation=cv2.INTER_CUBIC))


def _looked(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Pictures (B,H,W,3), or one, in the size at which a network looks at them: (B,3,h,w)."""
    pictures = [_resized(to_picture(one), size) for one in (image if image.ndim == 4 else [image])]
    return rearrange(torch.from_numpy(np.stack(pictures)), "b h w c -> b c h w")


def _placed(tensor: Tensor, network: nn.Module) -> Tensor:
    weight = next(network.parameters())
    return tensor.to(weight.device, weight.dtype)


def _whole(depth: Tensor) -> np.ndarray:
    if not depth.isfinite().all():
        raise AnnotatorError("the network answered with numbers that are not finite: run it in fp32, or fetch it again")
    return depth.float().cpu().numpy()
