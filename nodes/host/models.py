"""The host's models seen from the core, and networks handed to the host's memory management."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.ldm.modules import attention
from torch import Tensor

from ...controlnet_core.errors import ZeroConvError
from ...controlnet_core.files.loading import LoadedControl
from ...controlnet_core.networks.network import ControlNetwork
from ...controlnet_core.networks.unet import UNetConfig


class ModelError(ZeroConvError):
    """A model that no control of this pack can act on."""


def unet_config(model: Any, control: str, family: str | None) -> UNetConfig:
    """The core's configuration of the host's `model` (a BaseModel); `control` and `family` are for the error's text."""
    found = model.model_config.unet_config
    if "image_model" in found or "channel_mult" not in found:
        made_for = f"made for {family}" if family else "a ControlNet of the SD UNet"
        raise ModelError(
            f"{control} is {made_for}, the model is {type(model.model_config).__name__}: "
            "connect an SD1.x, SD2.x or SDXL model, or load a control of that model with the host's own loader"
        )
    blocks = found["num_res_blocks"]
    blocks = blocks[0] if isinstance(blocks, (list, tuple)) else blocks
    depth = found["transformer_depth"]
    return UNetConfig(
        in_channels=found["in_channels"],
        out_channels=found.get("out_channels", 4),
        model_channels=found["model_channels"],
        channel_mult=tuple(found["channel_mult"]),
        num_res_blocks=blocks,
        transformer_depth=tuple(depth[::blocks]),
        transformer_depth_middle=found.get("transformer_depth_middle", depth[-1]),
        context_dim=found["context_dim"],
        num_heads=max(0, found.get("num_heads", -1)),
        head_dim=max(0, found.get("num_head_channels", 64)),
        use_linear=found.get("use_linear_in_transformer", False),
        adm_in_channels=found.get("adm_in_channels"),
    )


def patcher_of(network: torch.nn.Module | ControlNetwork, device: Any = None) -> Any:
    """The one ModelPatcher of a network, of the class that this host loads best; `device` None is the host's first."""
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return kind(
        network,
        load_device=device or comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


_ON_DEVICES: WeakKeyDictionary[Any, dict[Any, tuple[LoadedControl, Any]]] = WeakKeyDictionary()
"""By the patcher of a control's network: copies of it for other devices."""


def on_device(loaded: LoadedControl, patcher: Any, device: Any) -> tuple[LoadedControl, Any]:
    """A copy of a loaded control for another device, and its patcher; made once, and shared like the first."""
    copies = _ON_DEVICES.setdefault(patcher, {})
    if device not in copies:
        moved = replace(loaded, control=copy.deepcopy(loaded.control))
        copies[device] = moved, patcher_of(moved.control, device)
    return copies[device]


def dtypes(weight_dtype: torch.dtype | None, file_dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype, Any]:
    """Storage dtype, computation dtype and layer classes for weights of `file_dtype`, as the host would choose them.

    `weight_dtype` is the user's choice of storage, `None` for the host's.
    """
    management = comfy.model_management
    stored = weight_dtype or management.unet_dtype(model_params=-1, weight_dtype=file_dtype)
    cast = management.unet_manual_cast(stored, management.get_torch_device())
    return stored, cast or stored, with_attention(comfy.ops.pick_operations(stored, cast))


def with_attention(operations: Any) -> Any:
    """The host's layer classes, and with them the attention that it was started with, as its own controls have it."""

    class Operations(operations):
        @staticmethod
        def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, precision: torch.dtype | None) -> Tensor:
            # Looked up at each call, as the host's own layers do: it is a name that other nodes set anew.
            return attention.optimized_attention(q, k, v, heads, attn_precision=precision)

    return Operations
