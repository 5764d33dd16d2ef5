"""A CONTROL_NET in words."""

from __future__ import annotations

from typing import Any

from ...controlnet_core.dosing.block_weights import BlockWeightsError
from ...controlnet_core.networks.network import ControlNetwork
from ...controlnet_core.networks.unet import SD15, SD21, SDXL
from ...controlnet_core.networks.union import TYPES
from .control import ControlError
from .models import ModelError, unet_config
from .networks import NetworkControl, UnionControl
from .weights import loaded_control

PUBLISHED = {"SD1.x": SD15, "SD2.x": SD21, "SDXL": SDXL}


def report(control: Any, model: Any = None) -> str:
    """Lines of "name: value" about a CONTROL_NET, and whether it fits the host's MODEL `model`."""
    facts: dict[str, str] = {}
    if isinstance(control, NetworkControl):
        facts["file"] = control.name
    try:
        loaded = loaded_control(control)
    except ControlError as error:
        return _lines({"format": f"{type(control).__name__} of another loader", "not known here": str(error)})
    network = loaded.control
    foreign = not isinstance(control, NetworkControl)
    facts["kind"] = network.kind
    facts["family"] = network.family
    facts["format"] = f"{type(control).__name__} of another loader" if foreign else loaded.format.name
    facts |= _size(network)
    if isinstance(control, NetworkControl):
        facts["computes in"] = _name(control.compute_dtype)
    facts |= network.describe()
    if isinstance(control, UnionControl) and control.type_number is not None:
        facts["control_type"] = TYPES[control.type_number]
    if getattr(control, "global_average_pooling", False):
        facts["control_type"] = "shuffle: its residuals are averaged over the picture, on the prompt's half alone"
    left_out = loaded.dropped - (loaded.format.marker is not None)
    if loaded.format.needs_base:
        facts["base"] = "added to the differences, from the model connected to the loader"
    elif left_out and not foreign:
        facts["left out"] = f"{left_out} tensors in the file that are no part of the control"
    fits = [name for name, config in PUBLISHED.items() if network.mismatch(config) is None]
    facts["published models"] = ", ".join(fits) or "none, it is made for a model of another size"
    if model is not None:
        facts["fits"] = _fits(control, network, model)
    return _lines(facts)


def _size(network: ControlNetwork) -> dict[str, str]:
    """How many weights there are and how they are kept."""
    parameters = list(network.parameters())
    count, size = (sum(numbers) for numbers in zip(*((p.numel(), p.nbytes) for p in parameters), strict=True))
    return {
        "parameters": f"{count / 1e6:.1f} M in {len(parameters)} tensors",
        "weights": f"{', '.join(sorted({_name(p.dtype) for p in parameters}))}, {size / 2**20:.1f} MiB",
    }


def _fits(control: Any, network: ControlNetwork, model: Any) -> str:
    """Whether the control fits the host's MODEL, or why not."""
    try:
        if isinstance(control, NetworkControl):
            config = control.check_fits(model.model)
            return f"yes, the model is {config.family}"
        config = unet_config(model.model, "this control", network.family)
    except (ControlError, ModelError, BlockWeightsError) as error:
        return f"no: {error}"
    mismatch = network.mismatch(config)
    return f"no: {mismatch}" if mismatch else f"yes, the model is {config.family}"


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _lines(facts: dict[str, str]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in facts.items())
