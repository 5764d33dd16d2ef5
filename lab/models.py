"""The embedded model's networks and the files that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..controlnet_core.errors import ZeroConvError
from ..controlnet_core.networks.unet import UNetConfig
from .text_encoder import WIDTH

Module = TypeVar("Module", bound=nn.Module)

UNET = UNetConfig(model_channels=64, channel_mult=(1, 1, 1, 2), context_dim=WIDTH, num_heads=0)
"""A small SD1.x UNet: four levels, 12 encoder blocks, 64 channels a head as the host assumes for unknown sizes."""

WEIGHTS = Path(__file__).parent / "weights"
CONTROLS = WEIGHTS / "controlnet"
"""The controls' own folder, which the host lists with the user's."""

SIZE = 128
"""Side in pixels of the pictures that the model was trained on."""


class MissingWeights(ZeroConvError):
    """A file of the embedded model is not there."""


def control_name(hint: str) -> str:
    """The name under `weights/` of the control for a hint (canny, depth or pose)."""
    return f"{CONTROLS.name}/lab_{hint}"


def save_weights(module: nn.Module, name: str, metadata: dict[str, str] | None = None) -> Path:
    """`module` as `weights/<name>.safetensors`, floats as fp16."""
    path = WEIGHTS / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().half().contiguous() if v.is_floating_point() else v for k, v in module.state_dict().items()}
    save_file(state, path, metadata={"format": "pt", **(metadata or {})})
    return path


def read_weights(name: str) -> dict[str, Tensor]:
    """The tensors of `weights/<name>.safetensors`; raises MissingWeights when there is no such file."""
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        raise MissingWeights(f"{path} is missing; `python dev.py lab train` makes the files of the embedded model")
    return load_file(path)


def load_weights(module: Module, name: str) -> Module:
    """`module` with the weights of `weights/<name>.safetensors` as fp32, ready for inference."""
    module.load_state_dict({key: value.float() for key, value in read_weights(name).items()})
    return module.eval().requires_grad_(False)


def device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
