"""A weights file becomes a control or a UNet: read, tell the format, bring to our names, build, load strictly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..keys import State, Weights, has, times
from ..networks.configuration import ConfigurationError, check_heads, read_unet_config
from ..networks.network import ControlNetwork
from ..networks.unet import UNet
from .kinds import Format, UnknownFormat, detect, unwrapped
from .layouts import from_diffusers
from .reading import ContentError, LoadError, check_plain, read_weights
from .scales import unscaled

__all__ = ["LoadError", "LoadedControl", "load_control", "load_unet", "read_weights", "usual_dtype"]

NEW = ("zero_convs.", "middle_block_out.", "input_hint_block.")
"""The parts of a ControlNet that its base UNet lacks."""


@dataclass(frozen=True)
class LoadedControl:
    """A control and where it came from.

    `control` is a network of one of `kinds.KINDS`, `format` the record that the file was told by, `dropped` the
    number of tensors in the file that are no part of the control (a base model beside it, a marker).
    """

    control: ControlNetwork
    format: Format
    dropped: int
    metadata: dict[str, str]


def load_control(
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    name: str = "weights",
    base: Mapping[str, Tensor] | None = None,
    operations: Any = nn,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LoadedControl:
    """The control in a file's tensors, of any kind and layout that `kinds.KINDS` knows.

    `base` is the UNet (ldm keys, no prefix) that difference files add to. `dtype` None is the file's own, `device`
    None where the tensors are; those that need no conversion are shared with `state`, not copied. `name` goes into
    errors. Raises LoadError when no format claims the weights or any key is missing, unknown or of a wrong shape.
    """
    metadata = dict(metadata or {})
    try:
        check_plain(state)
        state = unwrapped(unscaled(state))
        kind, found = detect(state)
        weights = found.canonicalize(state)
        dropped = len(state) - len(weights)
        _check_types(weights)
        dtype = dtype or usual_dtype(weights)
        if found.needs_base:
            weights = _add_base(weights, base, name)
        elif base is not None:
            raise LoadError(
                f"{name}: a base model is given, and these weights hold no differences from one: leave it out (a "
                "Control-LoRA takes what it needs from the model that it is applied to)"
            )
        control = kind.build(weights, metadata, operations=operations, dtype=dtype, device="meta")
    except (UnknownFormat, ConfigurationError, ContentError) as error:
        raise LoadError(f"{name}: {error}") from error
    _fill(control, weights, name, dtype, device)
    return LoadedControl(control, found, dropped, metadata)


def load_unet(
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    prefix: str = "model.diffusion_model.",
    name: str = "weights",
    operations: Any = nn,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> UNet:
    """The UNet of a base model: of a checkpoint, where its keys begin with `prefix`, or alone (ldm or diffusers).

    The other arguments and the errors are those of `load_control`.
    """
    weights = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    try:
        check_plain(weights or state)
        weights = unscaled(weights or state)
        if has("down_blocks.0.resnets.0.conv1.weight")(weights):
            weights = from_diffusers(weights)
        _check_types(weights)
        config = read_unet_config(weights, metadata)
        check_heads(config)
    except (ConfigurationError, ContentError) as error:
        raise LoadError(f"{name}: {error}") from error
    dtype = dtype or usual_dtype(weights)
    unet = UNet(config, operations=operations, dtype=dtype, device="meta")
    _fill(unet, weights, name, dtype, device)
    return unet


def usual_dtype(state: State) -> torch.dtype:
    """The floating dtype that most of these tensors have; fp32 where none has one."""
    counts = Counter(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    return counts.most_common(1)[0][0] if counts else torch.float32


def _add_base(differences: State, base: State | None, name: str) -> Weights:
    """`differences` with the base UNet's weights added where it has them, computed in fp32."""
    connect = "connect the model that the differences were taken from"
    if base is None:
        raise LoadError(f"{name}: these weights are differences from a base model, and no model is given: {connect}")
    weights = {}
    for key, difference in differences.items():
        if key not in base:
            if not key.startswith(NEW):
                raise LoadError(f"{name}: these weights are differences from a base model with {key}: {connect}")
            weights[key] = difference
        elif base[key].shape != difference.shape:
            raise LoadError(
                f"{name}: these weights are differences from a base model whose {key} is {times(difference.shape)}, "
                f"the given model's is {times(base[key].shape)}: {connect}"
            )
        else:
            weights[key] = difference.float() + base[key].to(difference.device, torch.float32)
    return weights


def _fill(
    network: ControlNetwork | UNet, weights: State, name: str, dtype: torch.dtype, device: torch.device | str | None
) -> None:
    """Give `network`, which is on the meta device, exactly these weights; raises LoadError naming what differs."""
    own = network.state_dict()
    faults = {
        "missing": [key for key in own if key not in weights],
        "unknown": [key for key in weights if key not in own],
        "of a wrong shape": [
            f"{key} (expected {times(own[key].shape)}, found {times(tensor.shape)})"
            for key, tensor in weights.items()
            if key in own and tensor.shape != own[key].shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {what}: {_few(keys)}" for what, keys in faults.items() if keys)
        raise LoadError(f"{name}: these are not all the weights of a {type(network).__name__}: {listed}")
    _check_numbers(weights, name, dtype)
    placed = {key: tensor.to(device, dtype) for key, tensor in weights.items()}
    network.load_state_dict(placed, assign=True)


def _check_types(weights: State) -> None:
    """Raise ContentError for weights that are no numbers to compute with, or none at all."""
    for what, wrong in (
        ("no floating numbers", [key for key, tensor in weights.items() if not tensor.is_floating_point()]),
        ("empty", [key for key, tensor in weights.items() if tensor.numel() == 0]),
    ):
        if wrong:
            first = weights[wrong[0]]
            raise ContentError(
                f"{len(wrong)} of {len(weights)} weights are {what}, the first {wrong[0]} of {times(first.shape)} "
                f"{_name(first.dtype)}: load the control's file in fp16, bf16 or fp32"
            )


def _check_numbers(weights: State, name: str, dtype: torch.dtype) -> None:
    """Raise LoadError where a weight is not finite, or would not be as `dtype`. Reads each weight once."""
    wrong, beyond = [], []
    for key, tensor in weights.items():
        if tensor.is_meta:
            continue
        largest = _largest(tensor)
        if not largest.isfinite():
            wrong.append(key)
        elif dtype != tensor.dtype and largest > torch.finfo(dtype).max:
            beyond.append(f"{key}, up to {largest.item():g}")
    if wrong:
        raise LoadError(
            f"{name}: {len(wrong)} of {len(weights)} weights are not finite (NaN or infinite), the first {wrong[0]}, "
            "and every picture would be black: the file is damaged or its training failed, load another"
        )
    if beyond:
        raise LoadError(
            f"{name}: {len(beyond)} of {len(weights)} weights are too large for {_name(dtype)}, the first {beyond[0]}: "
            "choose bf16 or fp32 as weight_dtype"
        )


def _largest(tensor: Tensor) -> Tensor:
    """The largest of the numbers' absolute values; NaN where one of them is."""
    if tensor.dtype.itemsize == 1:  # torch has no order of fp8, whose bits without the sign have it
        return (tensor.view(torch.uint8) & 0x7F).max().view(tensor.dtype).float()
    low, high = torch.aminmax(tensor)
    return torch.maximum(low.abs(), high.abs())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:3] + ["..."] * (len(keys) > 3))
