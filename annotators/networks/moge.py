"""Normals and depth straight from a picture, by MoGe-2: a DINOv2 transformer, a shared neck, a head for each answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..images import AnnotatorError, to_picture
from .dinov2 import PATCH, DINOv2, view
from .learned import UNREADABLE

LEVELS = 5
ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": partial(nn.LeakyReLU, 0.2), "silu": nn.SiLU, "elu": nn.ELU}
SHIFT_SIDE, SHIFT_TOLERANCE = 64, 1e-3
"""The camera is sought with so many points across and down, until the sum of squares changes by less than this part."""


class Encoder(nn.Module):
    """A picture as features of `width_out` channels, one for each patch, and as one token."""

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, width: int, depth: int, layers: Sequence[int], width_out: int):
        super().__init__()
        self.layers = layers
        self.backbone = DINOv2(width, depth)
        self.output_projections = nn.ModuleList(nn.Conv2d(width, width_out, 1) for _ in layers)
        self.register_buffer("image_mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("image_std", torch.ones(1, 3, 1, 1))

    def forward(self, image: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """From (B,3,H,W), 0..1, to (B,C,rows,columns) and the class token (B,width)."""
        seen = F.interpolate(image, (rows * PATCH, columns * PATCH), mode="bilinear", antialias=True)
        found = self.backbone((seen - self.image_mean) / self.image_std, self.layers)
        maps = [rearrange(tokens[:, 1:], "b (h w) c -> b c h w", h=rows) for tokens in found]
        projected = [project(map_) for project, map_ in zip(self.output_projections, maps, strict=True)]
        return torch.stack(projected).sum(0), found[-1][:, 0]


class Residual(nn.Module):
    """Two convolutions, added to what they read."""

    def __init__(self, width: int, settings: Mapping[str, Any]):
        super().__init__()
        hidden = width * settings.get("dim_times_res_block_hidden", 1)
        activation = ACTIVATIONS[settings.get("activation", "relu")]
        self.layers = nn.Sequential(
            _norm(settings.get("res_block_in_norm", "layer_norm"), width),
            activation(),
            nn.Conv2d(width, hidden, 3, padding=1, padding_mode="replicate"),
            _norm(settings.get("res_block_hidden_norm", "group_norm"), hidden),
            activation(),
            nn.Conv2d(hidden, width, 3, padding=1, padding_mode="replicate"),
        )

    def forward(self, features: Tensor) -> Tensor:
        """From (B,C,h,w) to (B,C,h,w)."""
        return features + self.layers(features)


class ConvStack(nn.Module):
    """Features of several sizes, each twice the one before; `settings` are those that the published file carries."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        widths = settings["dim_res_blocks"]
        wanted = [_each(settings[key], len(widths)) for key in ("dim_in", "dim_out", "resamplers")]
        repeats = _each(settings.get("num_res_blocks", 1), len(widths))
        self.input_blocks = nn.ModuleList(map(_projection, wanted[0], widths))
        self.resamplers = nn.ModuleList(map(_doubling, wanted[2], widths[:-1], widths[1:]))
        self.res_blocks = nn.ModuleList(
            nn.Sequential(*(Residual(width, settings) for _ in range(count)))
            for width, count in zip(widths, repeats, strict=True)
        )
        self.output_blocks = nn.ModuleList(
            nn.Identity() if out is None else nn.Conv2d(width, out, 1)
            for width, out in zip(widths, wanted[1], strict=True)
        )

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """From (B,C,h*2**i,w*2**i) for i = 0, 1, ... to as many as there are sizes."""
        found: list[Tensor] = []
        features = torch.zeros(())
        for level in range(len(self.res_blocks)):
            features = self.input_blocks[level](inputs[level]) + (self.resamplers[level - 1](features) if level else 0)
            features = self.res_blocks[level](features)
            found.append(self.output_blocks[level](features))
        return found


class MoGe(nn.Module):
    """MoGe-2 with normals: all that the published file holds (microsoft/MoGe moge/model/v2.py)."""

    def __init__(self, settings: Mapping[str, Any], width: int, depth: int):
        super().__init__()
        encoder = settings["encoder"]
        layers = encoder["intermediate_layers"]
        layers = range(depth - layers, depth) if isinstance(layers, int) else layers
        self.encoder = Encoder(width, depth, layers, encoder["dim_out"])
        self.neck = ConvStack(settings["neck"])
        self.points_head = ConvStack(settings["points_head"])
        self.normal_head = ConvStack(settings["normal_head"])
        self.mask_head = ConvStack(settings["mask_head"])
        self.scale_head = _linears(settings["scale_head"]["dims"])
        self.patches = settings["num_tokens_range"][1]
        if settings["remap_output"] != "exp":
            raise ValueError(f"an unknown way to write points: {settings['remap_output']}")

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Normals (B,3,H,W) of length 1, x to the right, y down, z away, and where they are known, (B,1,H,W), 0..1."""
        normals, mask, _ = self._answers(image, self.normal_head)
        return F.normalize(normals, dim=1), mask

    def points(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points (B,3,H,W), where they are known, (B,1,H,W), 0..1, and how many metres their unit is, (B,).

        x is to the right, y down and z away. How far the camera is before the plane z = 0 is not said: `depths` finds
        it.
        """
        points, mask, token = self._answers(image, self.points_head)
        away = points[:, 2:].exp()
        return torch.cat([points[:, :2] * away, away], dim=1), mask, self.scale_head(token)[:, 0].exp()

    def _answers(self, image: Tensor, head: ConvStack) -> tuple[Tensor, Tensor, Tensor]:
        """What a head says of each pixel, (B,C,H,W), the mask (B,1,H,W), 0..1, and the class token (B,width)."""
        height, width = image.shape[2:]
        aspect = width / height
        rows, columns = max(1, round((self.patches / aspect) ** 0.5)), max(1, round((self.patches * aspect) ** 0.5))
        seen, token = self.encoder(image, rows, columns)
        views = [view(rows * 2**level, columns * 2**level, aspect).to(seen)[None] for level in range(LEVELS)]
        views = [one.expand(len(image), -1, -1, -1) for one in views]
        features = self.neck([torch.cat([seen, views[0]], dim=1), *views[1:]])
        answer, mask = (
            F.interpolate(one(features)[-1], (height, width), mode="bilinear") for one in (head, self.mask_head)
        )
        return answer, mask.sigmoid(), token


def build(path: Path) -> nn.Module:
    """MoGe-2 of its model.pt (Ruicheng/moge-2-vits-normal): eval, fp32, CPU. Raises AnnotatorError for another file.

    The file says how its network is made; every weight of it must be there, and no unknown one.
    """
    todo = "put the published file in its place, or delete it so that it is fetched again"
    try:
        said = torch.load(path, map_location="cpu", weights_only=True)
        weights = said["model"]
        blocks = {int(key.split(".")[3]) for key in weights if key.startswith("encoder.backbone.blocks.")}
        with torch.device("meta"):
            network = MoGe(said["model_config"], weights["encoder.backbone.cls_token"].shape[-1], len(blocks))
        network.load_state_dict(weights, strict=True, assign=True)
    except (*UNREADABLE, TypeError, AttributeError, IndexError) as error:
        raise AnnotatorError(
            f"{path} is no MoGe-2 with normals ({' '.join(str(error).split())[:200]}): {todo}"
        ) from error
    return network.float().requires_grad_(False).eval()


@torch.inference_mode()
def normals(network: MoGe, image: np.ndarray) -> np.ndarray:
    """Normals (B,H,W,3) float32 of length 1 of pictures (B,H,W,3), or of one: x to the right, y down, z away.

    Where the network knows none, as of the sky, the viewer is faced. Raises AnnotatorError for an answer that is not
    finite.
    """
    found, known = _finite(*network(_pixels(network, image)))
    front = found.new_tensor([0.0, 0.0, -1.0]).view(1, 3, 1, 1)
    facing = rearrange(torch.where(known > 0.5, found, front), "b c h w -> b h w c")
    return facing.contiguous().cpu().numpy().reshape(image.shape)


@torch.inference_mode()
def depths(network: MoGe, image: np.ndarray) -> np.ndarray:
    """Depth in metres (B,H,W) float32 of pictures (B,H,W,3), or of one.

    Where the network knows none, as of the sky, it is infinite. Raises AnnotatorError for an answer that is not finite.
    """
    points, known, scale = _finite(*network.points(_pixels(network, image)))
    found = []
    for one, there, metres in zip(points, known[:, 0] > 0.5, scale, strict=True):
        depth = one[2] + _shift(one, there)
        found.append(torch.where(there & (depth > 0), depth * metres, math.inf))
    return torch.stack(found).cpu().numpy().reshape(image.shape[:-1])


def _pixels(network: MoGe, image: np.ndarray) -> Tensor:
    """Pictures (B,H,W,3), or one, as (B,3,H,W), where and as the network is."""
    weight = network.encoder.backbone.cls_token
    pictures = np.stack([to_picture(one) for one in (image if image.ndim == 4 else [image])])
    return rearrange(torch.from_numpy(pictures), "b h w c -> b c h w").to(weight.device, weight.dtype)


def _finite(*answers: Tensor) -> list[Tensor]:
    """The answers in fp32. Raises AnnotatorError for numbers that are none."""
    if not all(answer.isfinite().all() for answer in answers):
        raise AnnotatorError("the network answered with numbers that are not finite: run it in fp32, or fetch it again")
    return [answer.float() for answer in answers]


def _shift(points: Tensor, known: Tensor) -> float:
    """How far the camera is before the plane z = 0 of points (3,H,W), where they are `known` (H,W).

    From there the points are seen where they lie in the picture, as well as any focal length allows: least squares
    (microsoft/MoGe moge/utils/geometry_torch.py, recover_focal_shift).
    """
    from scipy.optimize import least_squares

    height, width = known.shape
    place = view(height, width, width / height).to(points)
    fewer = F.interpolate(torch.cat([points, place, known[None].to(points)])[None], (SHIFT_SIDE, SHIFT_SIDE))[0]
    x, y, z, right, down, there = fewer.cpu().numpy()
    across, away, seen = (np.stack(pair)[..., there > 0] for pair in ((x, y), (z, z), (right, down)))
    if seen.shape[1] < 2:
        return 0.0

    def missed(shift: np.ndarray) -> np.ndarray:
        projected = across / (away + shift)
        return ((projected * seen).sum() / np.square(projected).sum() * projected - seen).ravel()

    return float(least_squares(missed, 0.0, ftol=SHIFT_TOLERANCE, method="lm").x[0])


def _linears(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers from width to width, ReLUs between them."""
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _each(setting: Any, count: int) -> list[Any]:
    return list(setting) if isinstance(setting, (list, tuple)) else [setting] * count


def _projection(width_in: int | None, width: int) -> nn.Module:
    return nn.Identity() if width_in is None else nn.Conv2d(width_in, width, 1)


def _doubling(kind: str, width: int, width_out: int) -> nn.Module:
    if kind == "conv_transpose":
        enlarge, width = nn.ConvTranspose2d(width, width_out, 2, stride=2), width_out
    elif kind in ("bilinear", "nearest"):
        enlarge = nn.Upsample(scale_factor=2, mode=kind)
    elif kind == "pixel_shuffle":
        wide = nn.Conv2d(width, 4 * width_out, 3, padding=1, padding_mode="replicate")
        return nn.Sequential(
            wide, nn.PixelShuffle(2), nn.Conv2d(width_out, width_out, 3, padding=1, padding_mode="replicate")
        )
    else:
        raise ValueError(f"an unknown way to enlarge: {kind}")
    return nn.Sequential(enlarge, nn.Conv2d(width, width_out, 3, padding=1, padding_mode="replicate"))


def _norm(kind: str, width: int) -> nn.Module:
    kinds = {"none": 0, "layer_norm": 1, "group_norm": width // 32}
    return nn.GroupNorm(kinds[kind], width) if kinds[kind] else nn.Identity()
