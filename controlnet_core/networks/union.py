"""ControlNet Union and ProMax: one ControlNet for many types of hint, and several hints at once.

Like a ControlNet, but each hint's features are shifted, channel by channel, by what a small transformer makes of their
mean and of a learnt embedding of the hint's type; and the types in use shift the timestep embedding. Follows the
authors' code (xinsir6/ControlNetPlus, models/controlnet_union.py; diffusers, models/controlnets/controlnet_union.py).

That code hands its transformer one token for each hint and one for the noisy latent, as (B, tokens, C), but its
nn.MultiheadAttention takes the first axis for the sequence. So attention runs over the pictures of the batch, for each
token by itself: hints do not see each other, and the latent's token, whose output is not used, reaches nothing. We
compute the same, and therefore need no latent: the fused hint depends on the hints alone, and once per sampling is
enough. (A host that fuses each picture by itself, as ComfyUI does, agrees wherever all pictures share their hint.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import ZeroConvError
from ..keys import State, numbered
from .configuration import check_heads, read_unet_config, shape_of
from .controlnet import ControlNet
from .layers import attention_of, timestep_embedding
from .residuals import Residuals
from .unet import UNetConfig

TYPES = (
    "openpose",
    "depth",
    "hed/pidi/scribble/ted",
    "canny/lineart/anime_lineart/mlsd",
    "normal",
    "segment",
    "tile",
    "repaint",
)
"""The types of hint by number, in ComfyUI's words; the last two are ProMax's (comfy/cldm/control_types.py)."""

HEADS = 8
"""Of the transformer, as published: shapes do not tell."""


class UnionError(ZeroConvError):
    """Hints or types that this ControlNet Union cannot fuse."""


class BatchAttention(nn.Module):
    """Self-attention of (B, dim) over the batch, as the authors' nn.MultiheadAttention runs it."""

    def __init__(self, dim: int, *, operations: Any = nn, **place: Any):
        super().__init__()
        self.attend = attention_of(operations)
        self.in_proj = operations.Linear(dim, 3 * dim, **place)
        self.out_proj = operations.Linear(dim, dim, **place)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.in_proj(x), "b (qkv dim) -> qkv 1 b dim", qkv=3)
        return self.out_proj(self.attend(q, k, v, HEADS, None)[0])


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), CLIP's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class FusionBlock(nn.Module):
    """A residual block of attention over the batch and a feed-forward to four times the width: (B, dim) -> (B, dim)."""

    def __init__(self, dim: int, *, operations: Any = nn, **place: Any):
        super().__init__()
        self.attn = BatchAttention(dim, operations=operations, **place)
        self.ln_1 = operations.LayerNorm(dim, **place)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=operations.Linear(dim, dim * 4, **place),
                gelu=QuickGELU(),
                c_proj=operations.Linear(dim * 4, dim, **place),
            )
        )
        self.ln_2 = operations.LayerNorm(dim, **place)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class UnionControlNet(ControlNet):
    """A ControlNet that is told the type of each hint, one of the first `n_types` of `TYPES` (6; ProMax: 8).

    `type_dim` is the number of sinusoids for each type, `layers` that of transformer blocks. Call `encode_hint` for
    each hint, `fuse` them into one guided hint, then the network with the same types at every step. With no types at
    all ("auto" in ComfyUI) the guided hint is `encode_hint`'s own, not fused.
    """

    kind = "ControlNet Union"

    def __init__(
        self,
        config: UNetConfig,
        n_types: int = len(TYPES),
        hint_channels: int = 3,
        type_dim: int = 256,
        layers: int = 1,
        *,
        operations: Any = nn,
        **place: Any,
    ):
        super().__init__(config, hint_channels, operations=operations, **place)
        self.n_types, self.type_dim = n_types, type_dim
        width, emb = config.model_channels, config.time_embed_dim
        self.task_embedding = nn.Parameter(torch.randn(n_types, width, **place) * width**0.5)
        self.transformer_layes = nn.Sequential(
            *(FusionBlock(width, operations=operations, **place) for _ in range(layers))
        )
        self.spatial_ch_projs = operations.Linear(width, width, **place)
        for parameter in self.spatial_ch_projs.parameters():
            nn.init.zeros_(parameter)
        self.control_add_embedding = nn.Sequential(
            OrderedDict(
                linear_1=operations.Linear(n_types * type_dim, emb, **place),
                silu=nn.SiLU(),
                linear_2=operations.Linear(emb, emb, **place),
            )
        )

    def describe(self) -> dict[str, str]:
        """What it takes and gives, in a user's words; also the types of hint that it knows."""
        return super().describe() | {"types": f"{self.n_types}: {', '.join(TYPES[: self.n_types])}"}

    def fuse(self, features: Sequence[Tensor], types: Sequence[int], strengths: Sequence[float]) -> Tensor:
        """The guided hint of one or more hints: (B, model_channels, H, W).

        `features[i]` (B or 1, model_channels, H, W) is what `encode_hint` made of hint i, `types[i]` its type,
        `strengths[i]` its strength. The strength of a single hint is left out: it multiplies the residuals. Among
        several it scales the hint's features, its token and its shift, and the residuals are not scaled again
        (diffusers, as above). Features of batch 1 stand for every picture. Raises UnionError.
        """
        if not features or not len(features) == len(types) == len(strengths):
            raise UnionError(
                f"each hint needs a type and a strength, and there is at least one: found {len(features)} hints, "
                f"{len(types)} types and {len(strengths)} strengths"
            )
        self.check_types(types)
        largest = max(features, key=len)
        for i, feature in enumerate(features):
            if feature.shape[1:] != largest.shape[1:] or len(feature) not in (1, len(largest)):
                found, expected = ("x".join(map(str, t.shape)) for t in (feature, largest))
                raise UnionError(
                    f"hint {i + 1} of {len(features)} has features of {found}, another {expected}: hints that are "
                    "fused have one size, and as many pictures as the others or a single one"
                )
        scales = strengths if len(features) > 1 else (1.0,)
        fused = [self._shifted(*of_hint) for of_hint in zip(features, types, scales, strict=True)]
        return reduce(torch.add, fused)

    def _shifted(self, feature: Tensor, kind: int, scale: float) -> Tensor:
        token = (feature.mean(dim=(2, 3)) + self.task_embedding[kind].to(feature)) * scale
        shift = self.spatial_ch_projs(self.transformer_layes(token))
        return (feature + shift[:, :, None, None]) * scale

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        guided_hint: Tensor,
        y: Tensor | None = None,
        types: Sequence[int] | Tensor = (),
    ) -> Residuals:
        """As a ControlNet's, told the `types` of the hints in `guided_hint`, in any order; none means "auto".

        In their place may stand what `embed_types` made of them: they are the same all over a run.
        """
        shift = types if isinstance(types, Tensor) else self.embed_types(types, x)
        return self._residuals(x, self.embed(x, timesteps, y) + shift, context, guided_hint)

    def embed_types(self, types: Sequence[int], like: Tensor) -> Tensor:
        """What `types` add to the timestep embedding, (1, time_embed_dim), in the dtype and on the device of `like`."""
        self.check_types(types)
        used = torch.tensor([float(i in types) for i in range(self.n_types)], device=like.device)
        waves = rearrange(timestep_embedding(used, self.type_dim), "types waves -> 1 (types waves)")
        return self.control_add_embedding(waves.to(like.dtype))

    def check_types(self, types: Sequence[int]) -> None:
        """Raise UnionError unless this file knows all of `types`."""
        for kind in types:
            if not 0 <= kind < self.n_types:
                wanted = f"type {kind} ({TYPES[kind]})" if 0 <= kind < len(TYPES) else f"type {kind}"
                load = " or load a ProMax file, which knows 8" if self.n_types < len(TYPES) else ""
                raise UnionError(
                    f"this ControlNet Union knows {self.n_types} types of hint, 0 to {self.n_types - 1}, and not "
                    f"{wanted}: choose one of {', '.join(TYPES[: self.n_types])}{load}"
                )


def build(
    weights: State, metadata: Mapping[str, str] | None = None, *, operations: Any = nn, **place: Any
) -> UnionControlNet:
    """The network that these ldm weights fit, not yet filled with them; raises ConfigurationError.

    Keys beyond a ControlNet's are the authors' own, except that `attn.in_proj` is a layer here: `in_proj.weight`.
    """
    config = read_unet_config(weights, metadata)
    check_heads(config)
    n_types = shape_of(weights, "task_embedding", 2)[0]
    return UnionControlNet(
        config,
        n_types=n_types,
        hint_channels=shape_of(weights, "input_hint_block.0.weight", 4)[1],
        type_dim=shape_of(weights, "control_add_embedding.linear_1.weight", 2)[1] // n_types,
        layers=numbered(weights, "transformer_layes."),
        operations=operations,
        **place,
    )
