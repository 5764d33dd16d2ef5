"""The Stable Diffusion UNet in the ldm layout: SD1.x, SD2.x, SDXL, and other widths of the same layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ZeroConvError
from . import injection
from .layers import Block, Downsample, ResBlock, SpatialTransformer, Upsample, add, timestep_embedding
from .residuals import Residuals


@dataclass(frozen=True)
class UNetConfig:
    """Hyperparameters of an ldm UNet; the defaults are SD1.5.

    `transformer_depth` has one entry per level (0: no attention there). `transformer_depth_middle` counts the blocks of
    the transformer between the middle block's two ResBlocks; 0 leaves its norm and projections alone, as in SDXL's
    "small" ControlNets, and -1 means a middle block of one ResBlock, as in SSD-1B (diffusers, UNetMidBlock2DCrossAttn
    and UNetMidBlock2D). `num_heads` 0 means as many heads of `head_dim` channels as fit; SD1.x has 8 heads at every
    width, SD2.x and SDXL 64 channels a head. `adm_in_channels` is the width of the pooled vector of SDXL, `None`
    elsewhere.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)
    transformer_depth_middle: int = 1
    context_dim: int = 768
    num_heads: int = 8
    head_dim: int = 64
    use_linear: bool = False
    adm_in_channels: int | None = None

    @property
    def family(self) -> str:
        """SDXL, SD2.x or SD1.x: the layout, at any width."""
        if self.adm_in_channels is not None and len(self.channel_mult) == 3:  # SD2.1 unCLIP has a pooled vector too
            return "SDXL"
        return "SD2.x" if self.use_linear else "SD1.x"

    def heads(self, channels: int) -> int:
        """Number of attention heads at a width of `channels`."""
        return self.num_heads or channels // self.head_dim

    @property
    def attention_precision(self) -> torch.dtype | None:
        """The dtype for products of queries and keys, `None` for theirs: SD2.x's are too large for fp16.

        (Stability-AI/stablediffusion, ldm/modules/attention.py, ATTN_PRECISION.)
        """
        return torch.float32 if self.family == "SD2.x" else None

    @property
    def time_embed_dim(self) -> int:
        """Width of the timestep embedding: four times the model's."""
        return self.model_channels * 4

    @property
    def skip_levels(self) -> tuple[int, ...]:
        """Level (0 = the latent's own size) of each skip connection, from shallow to deep."""
        levels = [0]
        for level in range(len(self.channel_mult)):
            levels += [level] * self.num_res_blocks
            if level + 1 < len(self.channel_mult):
                levels.append(level + 1)
        return tuple(levels)

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """Channels of each skip connection, from shallow to deep: 320 320 320 320 640 ... for SD1.5."""
        channels = [self.model_channels]
        for level, mult in enumerate(self.channel_mult):
            channels += [self.model_channels * mult] * self.num_res_blocks
            if level + 1 < len(self.channel_mult):
                channels.append(self.model_channels * mult)
        return tuple(channels)

    def residual_shapes(self, height: int, width: int) -> tuple[tuple[int, int, int], ...]:
        """(C, H, W) of each residual for a latent of `height` x `width`: the skips, then the middle."""

        def halved(n: int, times: int) -> int:
            return -(-n // 2**times)

        shapes = tuple(
            (channels, halved(height, level), halved(width, level))
            for channels, level in zip(self.skip_channels, self.skip_levels, strict=True)
        )
        return (*shapes, shapes[-1])


SD15 = UNetConfig()
SD21 = UNetConfig(context_dim=1024, num_heads=0, use_linear=True)
SDXL = UNetConfig(
    channel_mult=(1, 2, 4),
    transformer_depth=(0, 2, 10),
    transformer_depth_middle=10,
    context_dim=2048,
    num_heads=0,
    use_linear=True,
    adm_in_channels=2816,
)


class Encoder(nn.Module):
    """What the UNet and its trainable copy have in common: time embedding, encoder blocks and middle block."""

    def __init__(self, config: UNetConfig, *, operations: Any = nn, **place: Any):
        super().__init__()
        self.config = config
        width, emb = config.model_channels, config.time_embed_dim

        def mlp(dim: int) -> nn.Sequential:
            return nn.Sequential(operations.Linear(dim, emb, **place), nn.SiLU(), operations.Linear(emb, emb, **place))

        self.time_embed = mlp(width)
        if config.adm_in_channels is not None:
            self.label_emb = nn.Sequential(mlp(config.adm_in_channels))

        self.input_blocks = nn.ModuleList([Block(operations.Conv2d(config.in_channels, width, 3, padding=1, **place))])
        channels = width
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                parts: list[nn.Module] = [ResBlock(channels, emb, width * mult, operations=operations, **place)]
                channels = width * mult
                parts += self._attention(channels, config.transformer_depth[level], operations, place)
                self.input_blocks.append(Block(*parts))
            if level + 1 < len(config.channel_mult):
                self.input_blocks.append(Block(Downsample(channels, operations=operations, **place)))

        middle: list[nn.Module] = [ResBlock(channels, emb, channels, operations=operations, **place)]
        if config.transformer_depth_middle >= 0:
            middle.append(self._transformer(channels, config.transformer_depth_middle, operations, place))
            middle.append(ResBlock(channels, emb, channels, operations=operations, **place))
        self.middle_block = Block(*middle)

    def _attention(self, channels: int, depth: int, operations: Any, place: dict[str, Any]) -> list[nn.Module]:
        return [self._transformer(channels, depth, operations, place)] if depth else []

    def _transformer(self, channels: int, depth: int, operations: Any, place: dict[str, Any]) -> nn.Module:
        config = self.config
        heads = config.heads(channels)
        return SpatialTransformer(
            channels,
            config.context_dim,
            heads,
            depth,
            config.use_linear,
            precision=config.attention_precision,
            operations=operations,
            **place,
        )

    def embed(self, x: Tensor, timesteps: Tensor, y: Tensor | None) -> Tensor:
        """Timestep (B,), and SDXL's pooled vector (B, adm_in_channels), to (B, time_embed_dim) in the dtype of x."""
        emb = self.time_embed(timestep_embedding(timesteps, self.config.model_channels).to(x.dtype))
        if self.config.adm_in_channels is None:
            return emb
        if y is None:
            raise ZeroConvError(
                f"this UNet takes a pooled vector y of {self.config.adm_in_channels} numbers (SDXL), found none"
            )
        return add(emb, self.label_emb(y.to(x.dtype)))


class UNet(Encoder):
    """The noise predictor: latent (B,4,H,W), timestep (B,), context (B,T,C) -> prediction (B,4,H,W)."""

    def __init__(self, config: UNetConfig, *, operations: Any = nn, **place: Any):
        super().__init__(config, operations=operations, **place)
        width, emb = config.model_channels, config.time_embed_dim
        skips = list(config.skip_channels)
        channels = skips[-1]
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(config.channel_mult))):
            out_channels = width * config.channel_mult[level]
            for i in range(config.num_res_blocks + 1):
                parts: list[nn.Module] = [
                    ResBlock(channels + skips.pop(), emb, out_channels, operations=operations, **place)
                ]
                channels = out_channels
                parts += self._attention(channels, config.transformer_depth[level], operations, place)
                if level > 0 and i == config.num_res_blocks:
                    parts.append(Upsample(channels, operations=operations, **place))
                self.output_blocks.append(Block(*parts))
        self.out = nn.Sequential(
            operations.GroupNorm(32, channels, **place),
            nn.SiLU(),
            operations.Conv2d(width, config.out_channels, 3, padding=1, **place),
        )

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        residuals: Residuals | None = None,
    ) -> Tensor:
        """Predict the noise (or v); `residuals` of controls are added where `injection` says."""
        emb = self.embed(x, timesteps, y)
        skips = []
        h = x
        for i, block in enumerate(self.input_blocks):
            h = injection.to_encoder(block(h, emb, context), i, residuals)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        h, skips = injection.to_decoder(h, skips, residuals)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, emb, context, size=skips[-1].shape[2:] if skips else None)
        return self.out(h)
