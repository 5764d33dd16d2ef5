"""A CONTROL_NET in words."""

from __future__ import annotations

from typing import Any

from ...controlnet_core.dosing.block_weights import BlockWeightsError
from ...controlnet_core.networks.configuration import family
from ...controlnet_core.networks.control_lora import ControlLora
from ...controlnet_core.networks.controlnet import ControlNet
from ...controlnet_core.networks.lite import ControlNetLite
from ...controlnet_core.networks.lllite import ControlLLLite
from ...controlnet_core.networks.t2i_adapter import T2IAdapter
from ...controlnet_core.networks.unet import SD15, SD21, SDXL, UNetConfig
from ...controlnet_core.networks.union import TYPES, UnionControlNet
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
    facts["format"] = f"{type(control).__name__} of another loader" if foreign else loaded.format
    facts |= _size(network)
    if isinstance(control, NetworkControl):
        facts["computes in"] = _name(control.compute_dtype)
    facts |= _of_kind(network)
    if isinstance(control, UnionControl) and control.type_number is not None:
        facts["control_type"] = TYPES[control.type_number]
    if getattr(control, "global_average_pooling", False):
        facts["control_type"] = "shuffle: its residuals are averaged over the picture, on the prompt's half alone"
    if loaded.format == "difference":
        facts["base"] = "added to the differences, from the model connected to the loader"
    elif loaded.dropped and not foreign and not isinstance(network, ControlLora):  # of which only the marker goes
        facts["left out"] = f"{loaded.dropped} tensors in the file that are no part of the control"
    fits = [name for name, config in PUBLISHED.items() if network.mismatch(config) is None]
    facts["published models"] = ", ".join(fits) or "none, it is made for a model of another size"
    if model is not None:
        facts["fits"] = _fits(control, network, model)
    return _lines(facts)


def _size(network: Any) -> dict[str, str]:
    """How many weights there are and how they are kept."""
    parameters = list(network.parameters())
    count, size = (sum(numbers) for numbers in zip(*((p.numel(), p.nbytes) for p in parameters), strict=True))
    return {
        "parameters": f"{count / 1e6:.1f} M in {len(parameters)} tensors",
        "weights": f"{', '.join(sorted({_name(p.dtype) for p in parameters}))}, {size / 2**20:.1f} MiB",
    }


def _of_kind(network: Any) -> dict[str, str]:
    """What a network takes and gives, and what only its kind has."""
    hint = f"{network.hint_channels} channel{'s' * (network.hint_channels > 1)}, 8 times the latent's size"
    facts: dict[str, str] = {}
    if isinstance(network, T2IAdapter):
        config, sockets = network.config, network.sockets
        multiple = network.hint_multiple
        facts["variant"] = "light" if config.light else "full"
        facts["hint"] = hint + (f" rounded up to a multiple of {multiple}" if multiple > 8 else "")
        places = ("the middle" if i == sockets.encoder_blocks else str(i) for i in sockets.places)
        facts["features"] = f"{_numbers(config.channels)} channels, after encoder blocks {', '.join(places)}"
    elif isinstance(network, ControlLLLite):
        facts["hint"] = hint
        facts["modules"] = f"{len(network)}, each shifts what one layer of the model is given"
    elif isinstance(network, ControlNet | ControlNetLite):
        facts["hint"] = hint
        facts |= _controlnet(network.config)
        if isinstance(network, UnionControlNet):
            facts["types"] = f"{network.n_types}: {', '.join(TYPES[: network.n_types])}"
        if isinstance(network, ControlLora):
            smallest, largest = network.ranks
            facts["rank"] = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
            layers = sum(1 for _ in network.borrowed())
            facts["base"] = f"{layers} layers are borrowed from the model that it is applied to"
    return facts


def _controlnet(config: UNetConfig) -> dict[str, str]:
    return {
        "residuals": f"{len(config.skip_channels)}+1",
        "width": f"{config.model_channels} channels, multipliers {_numbers(config.channel_mult)}",
        "text": f"{config.context_dim} numbers a token"
        if config.context_dim
        else "not read, it has no attention to it",
    }


def _fits(control: Any, network: Any, model: Any) -> str:
    """Whether the control fits the host's MODEL, or why not."""
    try:
        if isinstance(control, NetworkControl):
            config = control.check_fits(model.model)
            return f"yes, the model is {family(config)}"
        config = unet_config(model.model, "this control", network.family)
    except (ControlError, ModelError, BlockWeightsError) as error:
        return f"no: {error}"
    mismatch = network.mismatch(config)
    return f"no: {mismatch}" if mismatch else f"yes, the model is {family(config)}"


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _numbers(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))


def _lines(facts: dict[str, str]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in facts.items())
