"""The hyperparameters of a UNet or ControlNet, read from the shapes of its weights, and which control fits which model.

The keys are ldm's, without prefix: `files.layouts` makes them so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from ..errors import ZeroConvError
from ..keys import State, numbered
from .unet import UNetConfig

SD1_WIDTH, SD1_HEADS = 320, 8
"""SD1.x, as published, has eight heads at every level (CompVis/stable-diffusion, configs v1-inference.yaml)."""

HEAD_DIM = 64
"""Channels a head in SD2.x and SDXL, and what ComfyUI assumes of every size that was never published."""

NORM_GROUPS = 32
"""Of every GroupNorm (CompVis/stable-diffusion, ldm/modules/diffusionmodules/util.py)."""


class ConfigurationError(ZeroConvError):
    """Weights of a layout that `UNetConfig` cannot express; the message names the odd key."""


def read_unet_config(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> UNetConfig:
    """The configuration of the UNet or ControlNet whose ldm weights are `state`.

    Shapes do not tell how many heads there are. The safetensors `metadata` may: {"num_heads": "4"} or {"head_dim":
    "32"}. Without it SD1.x at its published width has 8 heads, everything else 64 channels a head. Where there is no
    attention at all, `context_dim` is 0; a ControlNet has no output layer, so its `out_channels` are 4.

    Raises ConfigurationError when a key is missing or the layout is irregular.
    """
    model_channels, in_channels = shape_of(state, "input_blocks.0.0.weight", 4)[:2]
    if model_channels % NORM_GROUPS:
        raise ConfigurationError(
            f"input_blocks.0.0.weight has {model_channels} output channels: expected a multiple of {NORM_GROUPS}, the "
            "groups that a UNet's channels are normalised in"
        )
    levels = _levels(state, model_channels)
    linear = any(key.endswith(".1.proj_in.weight") and tensor.ndim == 2 for key, tensor in state.items())
    contexts = [key for key in state if key.endswith(".attn2.to_k.weight")]
    pooled = shape_of(state, "label_emb.0.0.weight", 2) if "label_emb.0.0.weight" in state else None
    config = UNetConfig(
        in_channels=in_channels,
        out_channels=shape_of(state, "out.2.weight", 4)[0] if "out.2.weight" in state else 4,
        model_channels=model_channels,
        channel_mult=tuple(level[0].channels // model_channels for level in levels),
        num_res_blocks=len(levels[0]),
        transformer_depth=tuple(level[0].depth for level in levels),
        transformer_depth_middle=_middle_depth(state),
        context_dim=shape_of(state, contexts[0], 2)[1] if contexts else 0,
        use_linear=linear,
        adm_in_channels=pooled[1] if pooled else None,
    )
    transformers = config.num_res_blocks * sum(config.transformer_depth) + config.transformer_depth_middle
    if transformers > len(state):
        raise ConfigurationError(
            f"its keys speak of {transformers} transformer blocks, and there are {len(state)} tensors in all: load a "
            "whole control"
        )
    num_heads, head_dim = _heads(metadata or {}, default=_usual_heads(config))
    return replace(config, num_heads=num_heads, head_dim=head_dim)


def heads_metadata(config: UNetConfig) -> dict[str, str]:
    """The metadata with which `read_unet_config` finds these heads; empty where it would without."""
    num_heads, head_dim = _usual_heads(config)
    if config.num_heads == num_heads and (num_heads or config.head_dim == head_dim):
        return {}
    return {"num_heads": str(config.num_heads)} if config.num_heads else {"head_dim": str(config.head_dim)}


def check_heads(config: UNetConfig) -> None:
    """Raise ConfigurationError unless each attention's width can be cut into heads."""
    depths = (*config.transformer_depth, config.transformer_depth_middle)
    for depth, mult in zip(depths, (*config.channel_mult, config.channel_mult[-1]), strict=True):
        channels = config.model_channels * mult
        heads = config.heads(channels)
        if depth > 0 and (heads == 0 or channels % heads):
            cut = f"{heads} heads" if config.num_heads else f"heads of {config.head_dim} channels"
            raise ConfigurationError(
                f"an attention of {channels} channels cannot be cut into {cut}: write num_heads or head_dim into the "
                "safetensors metadata of the file"
            )


def describe_mismatch(control: UNetConfig, model: UNetConfig, kind: str = "ControlNet") -> str | None:
    """Why a control of this kind and configuration does not fit the model, in one sentence; `None` when it fits.

    Transformers may differ in depth: residuals do not depend on it (SDXL has controls with no attention at all). A
    model that takes more than the latent (inpainting) hands its control the latent alone.
    """
    ours, theirs = control.family, model.family
    if ours != theirs:
        return f"this {kind} is made for {ours}, the model is {theirs}: load a control made for {theirs}"
    contexts = {control.context_dim, model.context_dim}
    for what, found, expected, fits in (
        ("channels at the top level", control.model_channels, model.model_channels, False),
        ("channel multipliers", control.channel_mult, model.channel_mult, False),
        ("ResBlocks on each level", control.num_res_blocks, model.num_res_blocks, False),
        ("numbers for each text token", control.context_dim, model.context_dim, 0 in contexts),
        ("numbers in the pooled vector", control.adm_in_channels, model.adm_in_channels, False),
        ("latent channels", control.in_channels, model.out_channels, False),
    ):
        if found != expected and not fits:
            found, expected = (" ".join(map(str, n)) if isinstance(n, tuple) else n for n in (found, expected))
            return (
                f"this {ours} {kind} has {found} {what}, the {theirs} model {expected}: "
                "load a control made for this model"
            )
    return None


# -- reading ----------------------------------------------------------------------------------------------------------


class _ResBlock(NamedTuple):
    name: str
    channels: int
    depth: int  # of the transformer behind it


def _levels(state: State, model_channels: int) -> list[list[_ResBlock]]:
    """The encoder's blocks, level by level; raises unless all levels are regular."""
    levels: list[list[_ResBlock]] = [[]]
    for i in range(1, numbered(state, "input_blocks.")):
        name = f"input_blocks.{i}"
        convolution = f"{name}.0.in_layers.2.weight"
        if f"{name}.0.op.weight" in state:
            levels.append([])
        elif convolution in state:
            channels = shape_of(state, convolution, 4)[0]
            if channels == 0 or channels % model_channels:
                raise ConfigurationError(
                    f"{convolution} has {channels} output channels: expected a multiple of {model_channels}, the width "
                    "of input_blocks.0.0.weight"
                )
            levels[-1].append(_ResBlock(name, channels, numbered(state, f"{name}.1.transformer_blocks.")))
        else:
            raise ConfigurationError(
                f"{name} is neither a ResBlock nor a downsampling: expected {convolution} or {name}.0.op.weight, "
                "found neither"
            )
    for level, blocks in enumerate(levels):
        if not blocks or len(blocks) != len(levels[0]):
            raise ConfigurationError(
                f"level {level} of input_blocks has {len(blocks)} ResBlocks and level 0 has {len(levels[0])}: expected "
                "the same number on each"
            )
        for block in blocks:
            if block[1:] != blocks[0][1:]:
                raise ConfigurationError(
                    f"{block.name} has {block.channels} channels and {block.depth} transformer blocks, "
                    f"{blocks[0].name} {blocks[0].channels} and {blocks[0].depth}: expected the same all over a level"
                )
    return levels


def _middle_depth(state: State) -> int:
    """Transformer blocks between the two ResBlocks of the middle block, -1 where it is a single ResBlock."""
    parts = numbered(state, "middle_block.")
    if parts == 1:
        return -1
    if parts != 3 or "middle_block.1.proj_in.weight" not in state:
        raise ConfigurationError(
            f"middle_block has {parts} parts{' and no middle_block.1.proj_in.weight' if parts == 3 else ''}: expected "
            "a ResBlock, a transformer and another ResBlock, or one ResBlock alone"
        )
    return numbered(state, "middle_block.1.transformer_blocks.")


def _usual_heads(config: UNetConfig) -> tuple[int, int]:
    """(number of heads or 0, channels a head) of published models of this width and layout."""
    is_sd1 = config.model_channels == SD1_WIDTH and not config.use_linear and config.adm_in_channels is None
    return (SD1_HEADS if is_sd1 else 0), HEAD_DIM


def _heads(metadata: Mapping[str, str], default: tuple[int, int]) -> tuple[int, int]:
    """(number of heads or 0, channels a head): from the file's metadata, if it says so."""
    for name in ("num_heads", "head_dim"):
        text = metadata.get(name)
        if text is not None and (not text.isdecimal() or len(text) > 4 or int(text) < 1):
            raise ConfigurationError(
                f"the file's metadata has {name} {text!r}: expected a whole number from 1 up to 9999"
            )
    if "num_heads" in metadata:
        return int(metadata["num_heads"]), HEAD_DIM
    if "head_dim" in metadata:
        return 0, int(metadata["head_dim"])
    return default


def shape_of(state: State, key: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor that tells a network's size; raises ConfigurationError unless it has `ndim` dimensions."""
    if key not in state:
        raise ConfigurationError(f"{key} is missing, of which the network's size is read")
    shape = tuple(state[key].shape)
    if len(shape) != ndim or 0 in shape:
        empty = ", none of them 0" if 0 in shape else ""
        raise ConfigurationError(f"{key} has shape {'x'.join(map(str, shape))}: expected {ndim} dimensions{empty}")
    return shape
