"""Tiny random models of the SD1.x, SD2.x and SDXL layouts, as the host holds them, and control files that fit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.cldm.cldm
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch
from graphs import CONTEXT, POOLED
from safetensors.torch import save_file

WIDTH = 64  # one head of 64 channels: what the host assumes of sizes that match no published model
FAMILIES = ("sd15", "sd21", "sdxl")

# How far the zero convolutions are from zero: enough that control moves every test's latent by 5 % and more.
CONTROL_GAIN = 1.0

# What SiLU takes from a signal at every layer of the hint encoder, given back: else the hint is lost on its way.
HINT_GAIN = 2.0

_FOUR_LEVELS: dict[str, Any] = {
    "channel_mult": [1, 1, 2, 2],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "adm_in_channels": None,
}
_LAYOUTS: dict[str, dict[str, Any]] = {
    "sd15": {**_FOUR_LEVELS, "use_linear_in_transformer": False},
    "sd21": {**_FOUR_LEVELS, "use_linear_in_transformer": True},
    "sdxl": {
        "channel_mult": [1, 1, 2],
        "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 1, 1, 2, 2],
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
        "transformer_depth_middle": 2,
        "use_linear_in_transformer": True,
        "num_classes": "sequential",
        "adm_in_channels": POOLED + 6 * 256,  # the pooled text and six embedded sizes
    },
}


class _SD15(comfy.supported_models.SD15):
    unet_extra_config = comfy.supported_models.SD20.unet_extra_config  # heads of 64 channels instead of 8 heads


class _SD21(comfy.supported_models.SD20):
    def model_type(self, state_dict: dict, prefix: str = "") -> Any:
        return comfy.model_base.ModelType.V_PREDICTION


_CLASSES = {"sd15": _SD15, "sd21": _SD21, "sdxl": comfy.supported_models.SDXL}


def unet_config(family: str, width: int = WIDTH) -> dict[str, Any]:
    """The host's UNet arguments for a tiny model of `family`."""
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": width,
        "use_spatial_transformer": True,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        "use_checkpoint": False,
        "legacy": False,
        "context_dim": CONTEXT,
        **_LAYOUTS[family],
    }


def randomise(module: torch.nn.Module, seed: int, control_gain: float = CONTROL_GAIN) -> None:
    """Give every parameter a seeded value that keeps signals near unit size."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            gain = 1.0
            if name.startswith(("zero_convs", "middle_block_out")):
                gain = control_gain
            elif name.startswith("input_hint_block"):
                gain = HINT_GAIN
            noise *= gain / parameter[0].numel() ** 0.5
        elif name.endswith("weight"):
            noise = 1 + 0.1 * noise
        else:
            noise *= 0.1
        parameter.data = noise.to(parameter.dtype)


@torch.inference_mode()
def tiny_model(family: str, seed: int = 11, channel_mult: list[int] | None = None) -> comfy.model_patcher.ModelPatcher:
    """A tiny random model of `family` in a ModelPatcher: the MODEL socket's value; `None` is its usual channels."""
    layout = unet_config(family)
    config = _CLASSES[family](layout | {"channel_mult": channel_mult or layout["channel_mult"]})
    management = comfy.model_management
    config.set_inference_dtype(management.unet_dtype(), None)  # fp32 on a CPU
    model = config.get_model({}, "", device=torch.device("cpu"))
    randomise(model.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(
        model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


def control_state_dict(
    family: str, seed: int, control_gain: float = CONTROL_GAIN, width: int = WIDTH
) -> dict[str, torch.Tensor]:
    """A random ControlNet for the tiny model of `family`, ldm names; gain 0 leaves its zero convolutions zero."""
    config = unet_config(family, width)
    del config["out_channels"]
    net = comfy.cldm.cldm.ControlNet(
        **config, num_heads=-1, num_head_channels=64, hint_channels=3, operations=comfy.ops.disable_weight_init
    )
    randomise(net, seed, control_gain)
    state = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    if control_gain == 0:
        for name in state:
            if name.startswith(("zero_convs", "middle_block_out")):
                state[name].zero_()
    return state


_SEEDS = {"depth": 101, "pose": 202, "zero": 303}


def write_control(folder: Path, name: str) -> None:
    """Write the control file `name` ("sd15_depth.safetensors", "sdxl_pose_fp16.safetensors") unless it is there."""
    path = folder / name
    if path.exists():
        return
    family, kind, *variant = path.stem.split("_")
    state = control_state_dict(family, _SEEDS[kind], 0.0 if kind == "zero" else CONTROL_GAIN)
    if variant == ["fp16"]:
        state = {key: tensor.half() for key, tensor in state.items()}
    save_file(state, path)
