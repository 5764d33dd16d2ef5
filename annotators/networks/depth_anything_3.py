"""Depth of one picture by Depth Anything 3, of its sizes whose licence is permissive: Lin et al., "Depth Anything 3:
Recovering the Visual Space from Any Views" (ByteDance-Seed/Depth-Anything-3, da3-small)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from . import depth, learned
from .dinov2 import HEAD_WIDTH, PATCH, PATCHES, Block, PatchEmbed, places, view

DEPTH, LAYERS = 12, (5, 7, 9, 11)
LATER = 4
"""From this block on queries and keys are normed and turned, and every second one looks at all views at once."""
TURNS, WAVES = 100.0, 100.0
"""Of the angles of tokens, and of what tells pixels of maps their places: the longest wave over the shortest."""
SMALL = (384, (48, 96, 192, 384), 64)
"""Channels of tokens, of the four maps that are made of them, and of what these become (da3-small.yaml)."""
PLACES_SHARE = 0.1
LONG_SIDE = 504
"""Pixels at which the network looks (depth_anything_3/api.py, process_res)."""
FIRST = "head.scratch.layer1_rn.weight"
UNREAD = ("model.cam_enc.", "model.cam_dec.")
"""Parts of the published network that say where cameras are; what says where rays go is marked by _aux."""


class Backbone(nn.Module):
    """DINOv2, from some block on with angles in place of places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.camera_token = nn.Parameter(torch.zeros(1, 2, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + PATCHES**2, width))
        self.patch_embed = PatchEmbed(width)
        self.blocks = nn.ModuleList(Block(width, normed=index >= LATER) for index in range(DEPTH))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Patch tokens (B,h*w,2C) after each of LAYERS, of pixels (B,3,14h,14w): of the picture, and of all views."""
        rows, columns = pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
        patches = self.patch_embed(pixels)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        tokens = tokens + places(self.pos_embed, rows, columns)
        own, common = _angles(rows, columns, tokens)
        found, alone = [], tokens
        for index, block in enumerate(self.blocks):
            if index == LATER:  # the first of the two is that of the view which others are seen from
                tokens = torch.cat([self.camera_token[:, :1].expand(len(tokens), -1, -1), tokens[:, 1:]], dim=1)
            all_views = index >= LATER and index % 2 == 1
            tokens = block(tokens, None if index < LATER else common if all_views else own)
            alone = alone if all_views else tokens
            if index in LAYERS:
                found.append(torch.cat([alone, self.norm(tokens)], dim=2)[:, 1:])
        return found


class ResidualUnit(nn.Module):
    """Two convolutions, added to what they read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, features: Tensor) -> Tensor:
        """From (B,C,h,w) to (B,C,h,w)."""
        return features + self.conv2(F.relu(self.conv1(F.relu(features))))


class Fusion(nn.Module):
    """A coarse map, with a finer one beside it unless it is the `coarsest`, at the size of the next."""

    def __init__(self, width: int, coarsest: bool) -> None:
        super().__init__()
        self.resConfUnit1 = None if coarsest else ResidualUnit(width)
        self.resConfUnit2 = ResidualUnit(width)
        self.out_conv = nn.Conv2d(width, width, 1)

    def forward(self, features: Tensor, beside: Tensor | None, size: Sequence[int]) -> Tensor:
        """From (B,C,h,w) to (B,C,*size)."""
        if self.resConfUnit1 is not None:
            features = features + self.resConfUnit1(beside)
        return self.out_conv(_resized(self.resConfUnit2(features), size))


class Scratch(nn.Module):
    """What makes one map of four."""

    def __init__(self, stages: Sequence[int], features: int) -> None:
        super().__init__()
        for level, width in enumerate(stages, 1):
            self.add_module(f"layer{level}_rn", nn.Conv2d(width, features, 3, padding=1, bias=False))
            self.add_module(f"refinenet{level}", Fusion(features, coarsest=level == len(stages)))
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        layers = (nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 2, 1))
        self.output_conv2 = nn.Sequential(*layers)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """From four maps, the finest first, to (B,C/2,2h,2w), as fine as that one doubled."""
        narrow = [self.get_submodule(f"layer{level}_rn")(one) for level, one in enumerate(maps, 1)]
        height, width = narrow[0].shape[2:]
        sizes = [(2 * height, 2 * width), *(one.shape[2:] for one in narrow)]
        fused = self.get_submodule("refinenet4")(narrow[3], None, sizes[3])
        for level in (3, 2, 1):
            fused = self.get_submodule(f"refinenet{level}")(fused, narrow[level - 1], sizes[level - 1])
        return self.output_conv1(fused)


class Head(nn.Module):
    """A dense prediction transformer's head, of which depth's half is read."""

    def __init__(self, width: int, stages: Sequence[int], features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * width)
        self.projects = nn.ModuleList(nn.Conv2d(2 * width, stage, 1) for stage in stages)
        self.resize_layers = nn.ModuleList(
            (
                nn.ConvTranspose2d(stages[0], stages[0], 4, stride=4),
                nn.ConvTranspose2d(stages[1], stages[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(stages[3], stages[3], 3, stride=2, padding=1),
            )
        )
        self.scratch = Scratch(stages, features)

    def forward(self, found: Sequence[Tensor], rows: int, columns: int) -> Tensor:
        """From tokens (B,h*w,2C) after four layers to inverse depth (B,14h,14w), larger is nearer."""
        maps = []
        for tokens, project, resize in zip(found, self.projects, self.resize_layers, strict=True):
            map_ = project(rearrange(self.norm(tokens), "b (h w) c -> b c h w", h=rows))
            maps.append(resize(_placed(map_, columns / rows)))
        fused = _resized(self.scratch(maps), (rows * PATCH, columns * PATCH))
        logits = self.scratch.output_conv2(_placed(fused, columns / rows))
        return torch.exp(-logits[:, 0])  # of depth; the other is how sure it is


class DepthAnything3(nn.Module):
    """Inverse depth (B,14h,14w) of pixels (B,3,14h,14w), normed as ImageNet's; keys as in the published file."""

    def __init__(self, width: int, stages: Sequence[int], features: int) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"pretrained": Backbone(width)})
        self.head = Head(width, stages, features)

    def forward(self, pixels: Tensor) -> Tensor:
        """As the class says."""
        rows, columns = pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
        return self.head(self.backbone["pretrained"](pixels), rows, columns)


def build(path: Path) -> nn.Module:
    """Depth Anything 3 of a model.safetensors (depth-anything/DA3-SMALL): eval, fp32, CPU.

    Raises AnnotatorError for another file; what says where cameras and rays are is left out.
    """
    sizes = _sizes(learned.read_weights(path))
    return learned.build(
        lambda: DepthAnything3(*sizes), path, {"model.": ""}, lambda key: key.startswith(UNREAD) or "_aux." in key
    )


def _sizes(weights: Mapping[str, Tensor]) -> tuple[int, Sequence[int], int]:
    """As SMALL, of the weights' shapes."""
    tokens, first = (weights.get(f"model.{name}") for name in ("backbone.pretrained.cls_token", FIRST))
    stages = [weights[key].shape[0] for i in range(4) if (key := f"model.head.projects.{i}.weight") in weights]
    if tokens is None or first is None or len(stages) < 4:
        return SMALL
    return tokens.shape[-1], stages, first.shape[0]


@torch.inference_mode()
def inverse_depth(network: nn.Module, image: np.ndarray) -> np.ndarray:
    """Inverse depth (B,H,W) float32, larger is nearer, of pictures (B,H,W,3), or of one.

    The network looks with a long side of 504 pixels. Raises AnnotatorError for an answer that is not finite.
    """
    return depth.seen(network, image, LONG_SIDE / max(image.shape[-3:-1]), network)


def _angles(rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The angles (1+h*w,64) of tokens in their picture, half by row and half by column, and where all are in one place.

    Rows and columns are counted from 1; the token that is no patch is at 0.
    """
    quarter = HEAD_WIDTH // 4
    speeds = TURNS ** -(torch.arange(quarter, device=like.device) / quarter)
    row, column = torch.meshgrid(torch.arange(1, rows + 1), torch.arange(1, columns + 1), indexing="ij")
    at = F.pad(torch.stack([row.flatten(), column.flatten()], dim=1), (0, 0, 1, 0)).to(like.device)

    def angles(at: Tensor) -> Tensor:
        each = (at[..., None] * speeds)[:, :, None].expand(-1, -1, 2, -1)
        return rearrange(each, "n side two c -> n (side two c)").to(like)

    return angles(at), angles(at.clamp(max=1))


def _placed(maps: Tensor, aspect: float) -> Tensor:
    """Maps (B,C,h,w) with a little of what tells pixels their places: sines and cosines, across and then down."""
    quarter = maps.shape[1] // 4
    speeds = WAVES ** -(torch.arange(quarter, device=maps.device) / quarter)
    at = view(maps.shape[2], maps.shape[3], aspect).to(maps.device)
    waves = at[:, None] * speeds.view(-1, 1, 1)
    return maps + PLACES_SHARE * torch.cat([waves.sin(), waves.cos()], dim=1).flatten(0, 1).to(maps)


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=True)
