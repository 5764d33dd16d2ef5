"""Random controls of the other kinds that fit the tiny models, as the tensors of their published files."""

from __future__ import annotations

import torch
from tiny_models import randomise, unet_config
from torch import Tensor

from zeroconv.controlnet_core.files.layouts import to_diffusers
from zeroconv.controlnet_core.networks.control_lora import ControlLora, to_control_lora
from zeroconv.controlnet_core.networks.lite import ControlNetLite
from zeroconv.controlnet_core.networks.t2i_adapter import INJECTION_POINTS, AdapterConfig, T2IAdapter
from zeroconv.controlnet_core.networks.unet import UNetConfig
from zeroconv.controlnet_core.networks.union import UnionControlNet

State = dict[str, Tensor]


def tiny_config(family: str) -> UNetConfig:
    """The core's configuration of the tiny model of `family`."""
    found = unet_config(family)
    blocks = found["num_res_blocks"][0]
    return UNetConfig(
        model_channels=found["model_channels"],
        channel_mult=tuple(found["channel_mult"]),
        transformer_depth=tuple(found["transformer_depth"][::blocks]),
        transformer_depth_middle=found["transformer_depth_middle"],
        context_dim=found["context_dim"],
        num_heads=0,
        use_linear=found["use_linear_in_transformer"],
        adm_in_channels=found["adm_in_channels"],
    )


def union_state(n_types: int = 6, seed: int = 505) -> State:
    """A ControlNet Union for the tiny SDXL model, in diffusers' layout, as they are published."""
    config = tiny_config("sdxl")
    network = UnionControlNet(config, n_types)
    randomise(network, seed)
    with torch.no_grad():
        network.task_embedding.mul_(config.model_channels**0.5)
    return to_diffusers(network.state_dict(), config)


def lora_state(family: str = "sd15", rank: int = 4, seed: int = 606) -> State:
    """A Control-LoRA for the tiny model of `family`."""
    network = ControlLora.fresh(tiny_config(family), rank)
    randomise(network, seed)
    return to_control_lora(network.state_dict())


def lite_state(family: str = "sd15", seed: int = 808) -> State:
    """A ControlNet-lite for the tiny model of `family`."""
    network = ControlNetLite(tiny_config(family))
    randomise(network, seed)
    return dict(network.state_dict())


def adapter_state(family: str = "sd15", light: bool = False, seed: int = 707) -> State:
    """A T2I-Adapter for the tiny model of `family`, in its authors' layout."""
    config, multiple = tiny_config(family), 16 if family == "sdxl" else 8
    channels = (*config.skip_channels, config.skip_channels[-1])
    places = INJECTION_POINTS[multiple].places
    network = T2IAdapter(AdapterConfig(tuple(channels[place] for place in places), hint_multiple=multiple, light=light))
    randomise(network, seed)
    return dict(network.state_dict())
