"""The weights behind the host's objects: what a MODEL's encoder holds, and the network of a CONTROL_NET."""

from __future__ import annotations

from typing import Any

import comfy.lora
import torch
from torch import Tensor

from ...controlnet_core.files.loading import LoadedControl, LoadError, load_control
from ...controlnet_core.networks.control_lora import BORROWED
from .control import ControlError
from .foreign import ForeignControl
from .networks import NetworkControl


def base_weights(model: Any) -> dict[str, Tensor]:
    """What a control can copy of the host's MODEL: encoder and middle block, ldm names without prefix.

    As sampling sees them, LoRAs and merges included, wherever the host keeps them just now; fp8 comes as fp16, which
    holds the same numbers.
    """
    return _weights(model, BORROWED)


@torch.inference_mode(False)
@torch.no_grad()
def unet_weights(model: Any) -> dict[str, Tensor]:
    """As `base_weights`, of the whole UNet: tensors of their own on the CPU, which autograd takes."""
    return {name: weight.to("cpu", copy=True) for name, weight in _weights(model, ("",)).items()}


@torch.no_grad()
def _weights(model: Any, parts: tuple[str, ...]) -> dict[str, Tensor]:
    prefix = "diffusion_model."
    weights = {}
    for key, (original, *patches) in model.get_key_patches(prefix).items():
        name = key.removeprefix(prefix)
        if name.startswith(parts):
            weight, convert = original
            if patches:
                # The weights may be patched already, so begin with the original; into fp32 and back, as the host does.
                full = convert(weight.to("cpu", torch.float32, copy=True), inplace=True)
                weight = comfy.lora.calculate_weight(patches, full, key).to(weight.dtype)
            else:
                weight = convert(weight, inplace=False)
            weights[name] = weight.half() if weight.dtype.itemsize == 1 else weight
    return weights


def loaded_control(control: Any) -> LoadedControl:
    """The network of a CONTROL_NET, ours or of another loader; ControlError where it is none that this pack knows."""
    if isinstance(control, NetworkControl):
        return control.loaded
    inner = control.inner if isinstance(control, ForeignControl) else control
    name = f"the {type(inner).__name__} of another loader"
    state = getattr(inner, "control_weights", None)  # the host's Control-LoRA, which has no network between its runs
    for attribute in ("control_model", "t2i_model"):
        network = getattr(inner, attribute, None)
        if isinstance(network, torch.nn.Module):
            state = network.state_dict()
    if state is None:
        raise ControlError(
            f"{name} holds no weights that this pack knows: load its file with Load ControlNet (ZeroConv)"
        )
    try:
        return load_control(state, name=name)
    except LoadError as error:
        raise ControlError(str(error)) from error
