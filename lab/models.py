"""The embedded model's networks and the files that hold them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..controlnet_core.unet import UNetConfig
from .text_encoder import WIDTH

UNET = UNetConfig(model_channels=64, channel_mult=(1, 1, 1, 2), context_dim=WIDTH, num_heads=0)
"""A small SD1.x UNet: four levels, 12 encoder blocks, 64 channels a head as the host assumes for sizes it does not know."""

WEIGHTS = Path(__file__).parent / "weights"
SIZE = 128
"""Side in pixels of the pictures that the model was trained on."""


def save_weights(module: nn.Module, name: str, metadata: dict[str, str] | None = None) -> Path:
    """`module` as `weights/<name>.safetensors`, floats as fp16."""
    WEIGHTS.mkdir(exist_ok=True)
    path = WEIGHTS / f"{name}.safetensors"
    state = {k: v.detach().half().contiguous() if v.is_floating_point() else v for k, v in module.state_dict().items()}
    save_file(state, path, metadata={"format": "pt", **(metadata or {})})
    return path


def load_weights(module: nn.Module, name: str) -> nn.Module:
    """`module` with the weights of `weights/<name>.safetensors` in its own dtype, ready for inference."""
    state = {key: value.float() for key, value in load_file(WEIGHTS / f"{name}.safetensors").items()}
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
