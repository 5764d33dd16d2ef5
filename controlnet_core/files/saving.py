"""A network becomes a weights file: its tensors in a published layout, moved to another base, or as differences."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import ZeroConvError
from ..keys import State, Weights, times
from ..networks.control_lora import BORROWED
from ..networks.controlnet import ControlNet, copy_encoder
from ..networks.network import ControlNetwork
from ..networks.unet import UNetConfig
from .kinds import kind_of
from .layouts import CONTROL
from .loading import usual_dtype
from .writing import replacing


class SaveError(ZeroConvError):
    """Weights that cannot be written as asked; the message says what to choose instead."""


# -- tensors ----------------------------------------------------------------------------------------------------------


def to_file(
    network: ControlNetwork,
    layout: str = "ldm",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    weights: State | None = None,
) -> tuple[Weights, dict[str, str]]:
    """The tensors of the file of a network of ours, on the CPU, and its metadata, for `write`.

    `layout` is one of those in the record of its kind. `dtype` None keeps what each tensor has. `metadata` is that of
    the file that the network was loaded from: it is kept, with what shapes do not tell and the plain facts added.
    `weights` take the place of the network's own. Loading the file gives each tensor back bit for bit, at the file's
    dtype.

    Raises SaveError for a layout that this kind of network does not have, and for numbers beyond `dtype`'s range.
    """
    return _file(network, network.state_dict() if weights is None else weights, layout, dtype, metadata)


def to_transferred_file(
    network: ControlNetwork,
    base: State,
    target: State,
    layout: str = "ldm",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[Weights, dict[str, str]]:
    """As `to_file`, moved from the UNet weights `base` to those of `target` (`transfer`)."""
    if not kind_of(network).copies_encoder:
        raise SaveError(
            f"a {network.kind} holds no copy of a base model to exchange: use it with the other model as is"
        )
    return _file(network, transfer(network.state_dict(), base, target), layout, dtype, metadata)


def to_difference_file(
    network: ControlNetwork, base: State, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
) -> tuple[Weights, dict[str, str]]:
    """As `to_file`, holding what a ControlNet adds to the UNet weights `base` (`difference`); `dtype` None is fp32."""
    if not any(form.needs_base for form in kind_of(network).formats):
        raise SaveError(f"difference files exist of ControlNets only, found a {network.kind}: save its own weights")
    weights, metadata = _file(network, network.state_dict(), "ldm", None, metadata)
    return _cast(difference(weights, base), dtype or torch.float32), {**metadata, "content": "difference"}


def _file(
    network: ControlNetwork, weights: State, layout: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None
) -> tuple[Weights, dict[str, str]]:
    kind = kind_of(network)
    if layout not in kind.layouts:
        choices = " or ".join(kind.layouts)
        raise SaveError(f"a {network.kind} is not published in the {layout} layout: choose {choices}")
    facts = {
        "format": "pt",  # what torch's own tools look for
        "made_by": "ZeroConv",
        "kind": network.kind,
        "family": network.family,
        "layout": layout,
        "content": "control",
    }
    return _cast(kind.layouts[layout](network, weights), dtype), {**(metadata or {}), **kind.metadata(network), **facts}


def _cast(weights: State, dtype: torch.dtype | None) -> Weights:
    """`weights` on the CPU, floating ones as `dtype`; raises SaveError where a finite number would become infinite."""
    cast = {}
    for key, tensor in weights.items():
        cast[key] = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
        if cast[key].dtype != tensor.dtype and not cast[key].isfinite().all():
            largest = tensor.float().abs().max().item()
            if isfinite(largest):
                raise SaveError(f"{key} holds {largest:g}, too large for {dtype}: save it as bf16 or fp32")
    return cast


# -- arithmetic with base models --------------------------------------------------------------------------------------


def transfer(control: State, base: State, target: State) -> Weights:
    """A control of one base model for another: p + target - base for every parameter p that the base has.

    Canonical names; UNet keys without prefix. Computed in fp32, each result in its tensor's own dtype (lllyasviel/
    ControlNet, tool_transfer_control.py). Raises SaveError naming the first key that one of the three lacks or has in
    another shape.
    """
    shared = _in_base(control, base, "base")
    _in_base(control, target, "target")
    moved = dict(control)
    for key in shared:
        offset = target[key].to("cpu", torch.float32) - base[key].to("cpu", torch.float32)
        moved[key] = (control[key].to("cpu", torch.float32) + offset).to(control[key].dtype)
    return moved


def difference(control: State, base: State) -> Weights:
    """What a control adds to its base, as a difference file has it: p - base in fp32 for what the base has.

    Keys get the prefix `control_model.`, and the marker `difference` joins them; what the base lacks stays as it is.
    Adding the same base again in fp32, as loading does, gives p to within 2^-24 (|p - base| + |p|), and p itself where
    base / 2 <= p <= 2 base. Raises SaveError as `transfer` does.
    """
    shared = _in_base(control, base, "base")
    file = {
        CONTROL + key: p.to("cpu", torch.float32) - base[key].to("cpu", torch.float32) if key in shared else p
        for key, p in control.items()
    }
    return {**file, "difference": torch.ones(1)}


def _in_base(control: State, base: State, name: str) -> set[str]:
    """The keys of `control` that come from a base UNet, all of which `base` has in the same shapes."""
    shared = {key for key in control if key.startswith(BORROWED)}
    for key in sorted(shared):
        found = "no such weights" if key not in base else times(base[key].shape)
        if found != times(control[key].shape):
            raise SaveError(
                f"the {name} model does not fit the control: expected {key} of {times(control[key].shape)}, found "
                f"{found}: connect a model of the size and family that the control was made for"
            )
    return shared


def fresh(config: UNetConfig, base: State, hint_channels: int = 3, hint_encoder: str = "released") -> ControlNet:
    """A ControlNet as training begins: a copy of the base UNet's encoder (`config`, ldm keys without prefix).

    Its zero convolutions are 0, so that it changes nothing yet; its dtype is the base's. Of a base that takes more
    than the latent (inpainting) it takes the latent's channels, since no more is handed to a control.
    Raises controlnet.BaseMismatch when the base has other shapes than `config` says.
    """
    first, latent = "input_blocks.0.0.weight", config.out_channels
    control = ControlNet(replace(config, in_channels=latent), hint_channels, hint_encoder, dtype=usual_dtype(base))
    copy_encoder(control, {**base, first: base[first][:, :latent]} if first in base else base)
    return control


# -- files ------------------------------------------------------------------------------------------------------------


def write(path: Path, weights: State, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all; folders that are missing are made, an older file is replaced.

    Raises SaveError with the system's reason and the room that there is.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(_apart(weights), temporary, dict(metadata or {}))
    except (OSError, SafetensorError) as error:
        raise SaveError(_failure(path, weights, error)) from error


def _apart(weights: State) -> Weights:
    """Contiguous tensors that share no memory, as safetensors asks for."""
    apart: Weights = {}
    seen: set[int] = set()
    for key, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        apart[key] = tensor
    return apart


def _failure(path: Path, weights: State, error: Exception) -> str:
    """What `write` could not do, with what is needed and free on the nearest folder that exists."""
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    size = sum(tensor.nbytes for tensor in weights.values())
    return (
        f"{path.name} cannot be written into {path.parent}: {' '.join(str(error).split())}. It needs "
        f"{size / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free: make room there, or choose a folder that can be "
        "written to"
    )
