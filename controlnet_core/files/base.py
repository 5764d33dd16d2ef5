"""A base model as training takes it: its UNet, what that predicts, and the noise that it was trained with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..diffusion import alphas_cumprod, zero_terminal_snr
from ..keys import State, has, some
from ..networks.unet import UNet
from .loading import LoadError, load_unet, read_weights
from .lora import UNET, merged, unet_names

PREFIX = "model.diffusion_model."
WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet.safetensors",
)
"""Where a folder keeps the UNet: a model in diffusers' layout, and the lab's."""

V_BIAS = 0.09
"""SD2.x says nowhere whether it predicts the noise or the velocity; where this bias spreads wider, it is the velocity
(found by ComfyUI's authors, comfy/supported_models.py; so both read a file alike)."""
V_BIAS_KEY = "output_blocks.11.1.transformer_blocks.0.norm1.bias"

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
"""What a UNet predicts: diffusers' word -> ours."""


@dataclass(frozen=True)
class Base:
    """A base model. `prediction` is "eps" or "v", for the reason `why`; `alphas` (1000,) is its noise schedule."""

    unet: UNet
    prediction: str
    alphas: Tensor
    why: str


def read_base(path: Path, loras: Sequence[Path] = ()) -> Base:
    """The base model in a checkpoint, in a UNet's own file, or in a folder in diffusers' layout, with `loras` merged.

    Raises LoadError, also for a model that is trained in another way than SD1.x, SD2.x and SDXL are.
    """
    file = next((path / name for name in WEIGHTS if (path / name).is_file()), None) if path.is_dir() else path
    if file is None:
        raise LoadError(f"{path} holds no UNet: expected {WEIGHTS[0]}, as diffusers saves a model")
    if not file.is_file():
        raise LoadError(f"{path}: there is no such file: give the path of the base model's weights")
    state, metadata = read_weights(file)
    settings = _json(path / "unet" / "config.json")
    heads = settings.get("num_attention_heads") or settings.get("attention_head_dim")  # diffusers' names are mixed up
    if isinstance(heads, int):
        metadata = {"num_heads": str(heads)} | metadata
    unet = load_unet(state, metadata, name=path.name)
    if loras:
        weights = unet.state_dict()
        unet.load_state_dict(merged(weights, unet_names(weights, unet.config), UNET, loras), assign=True)
    return Base(unet, *(_said_by_scheduler(path) if path.is_dir() else _said_by_keys(state, unet, path.name)))


def _said_by_keys(state: State, unet: UNet, name: str) -> tuple[str, Tensor, str]:
    """What a checkpoint is marked with, as by sd-scripts and ComfyUI, or known by."""
    if has("edm_mean")(state) or some(starts="edm_vpred.")(state):
        raise LoadError(f"{name} is trained with EDM's noise: train on a model with SD's")
    bias = state.get(PREFIX + V_BIAS_KEY, state.get(V_BIAS_KEY))
    if "v_pred" in state:
        zero = "ztsnr" in state
        alphas = zero_terminal_snr(alphas_cumprod()) if zero else alphas_cumprod()
        return "v", alphas, "its key v_pred" + (", and ztsnr: zero terminal SNR" if zero else "")
    if unet.config.context_dim == 1024 and bias is not None and bias.float().std(unbiased=False) > V_BIAS:
        return "v", alphas_cumprod(), "SD2.x, by its last attention's bias"
    return "eps", alphas_cumprod(), "no key says otherwise"


def _said_by_scheduler(folder: Path) -> tuple[str, Tensor, str]:
    """What the scheduler of a model in diffusers' layout is set to."""
    file = folder / "scheduler" / "scheduler_config.json"
    said = _json(file)
    named = said.get("prediction_type", "epsilon")
    schedule = said.get("beta_schedule", "scaled_linear")
    if named not in PREDICTIONS or schedule != "scaled_linear" or said.get("trained_betas") is not None:
        raise LoadError(
            f"{file} says prediction_type {named} and beta_schedule {schedule}: expected {' or '.join(PREDICTIONS)}, "
            "and scaled_linear, as SD1.x, SD2.x and SDXL have them"
        )
    alphas = alphas_cumprod(
        said.get("num_train_timesteps", 1000), said.get("beta_start", 0.00085), said.get("beta_end", 0.012)
    )
    zero = bool(said.get("rescale_betas_zero_snr", False))
    why = f"prediction_type of {file.name}" if said else "no scheduler says otherwise"
    return PREDICTIONS[named], zero_terminal_snr(alphas) if zero else alphas, why + ", zero terminal SNR" * zero


def _json(file: Path) -> dict[str, Any]:
    """What a file of settings says; nothing where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise LoadError(f"{file} cannot be read ({error}): download the model again") from error
    return found if isinstance(found, dict) else {}
