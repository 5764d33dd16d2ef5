"""A weights file becomes a control or a UNet: read, tell the format, bring to our names, build, load strictly."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import ZeroConvError
from ..keys import State, Weights, has, times
from ..networks.configuration import ConfigurationError, check_heads, read_unet_config
from ..networks.network import ControlNetwork
from ..networks.unet import UNet
from .kinds import Format, UnknownFormat, detect
from .layouts import from_diffusers

NEW = ("zero_convs.", "middle_block_out.", "input_hint_block.")
"""The parts of a ControlNet that its base UNet lacks."""


class LoadError(ZeroConvError):
    """Weights that cannot be read or loaded; the message begins with the file's name."""


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
        kind, found = detect(state)
        weights = found.canonicalize(state)
        dropped = len(state) - len(weights)
        dtype = dtype or usual_dtype(weights)
        if found.needs_base:
            weights = _add_base(weights, base, name)
        elif base is not None:
            raise LoadError(
                f"{name}: a base model is given, and these weights hold no differences from one: leave it out (a "
                "Control-LoRA takes what it needs from the model that it is applied to)"
            )
        control = kind.build(weights, metadata, operations=operations, dtype=dtype, device="meta")
    except (UnknownFormat, ConfigurationError) as error:
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
    if not weights:
        diffusers = has("down_blocks.0.resnets.0.conv1.weight")
        weights = from_diffusers(state) if diffusers(state) else dict(state)
    try:
        config = read_unet_config(weights, metadata)
        check_heads(config)
    except ConfigurationError as error:
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
    placed = {key: tensor.to(device, dtype) for key, tensor in weights.items()}
    network.load_state_dict(placed, assign=True)


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:3] + ["..."] * (len(keys) > 3))


# -- files ------------------------------------------------------------------------------------------------------------


def read_weights(path: Path) -> tuple[Weights, dict[str, str]]:
    """The tensors of a weights file, mapped into memory where the file allows it, and its safetensors metadata.

    Safetensors, and what torch.save writes (loaded with `weights_only`; {"state_dict": ...} is unwrapped); the first
    bytes tell which. Raises LoadError, which says what the file is instead or what is wrong with it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1024)
    if size == 0:
        raise LoadError(f"{path.name}: the file is empty, 0 bytes: download it again")
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise LoadError(f"{path.name}: this is an HTML page, not weights: download the file itself, not its web page")
    if text.startswith(b"version https://git-lfs"):
        raise LoadError(f"{path.name}: this is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
    if head[8:9] == b"{":
        return _read_safetensors(path, size, int.from_bytes(head[:8], "little"))
    if head.startswith((b"PK", b"\x80")):
        return _read_pickle(path, is_zip=head.startswith(b"PK")), {}
    raise LoadError(
        f"{path.name}: this is neither a safetensors file nor one that torch saved; it begins with "
        f"{head[:16]!r}: download it again"
    )


def _read_safetensors(path: Path, size: int, header_size: int) -> tuple[Weights, dict[str, str]]:
    start = 8 + header_size
    if size < start:
        raise LoadError(
            f"{path.name}: the file is truncated: its header alone needs {start} bytes, found {size}: download it again"
        )
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(start)[8:])
        needed = start + max(
            (entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0
        )
        if size < needed:
            raise LoadError(
                f"{path.name}: the file is truncated: expected {needed} bytes, found {size}: download it again"
            )
        with safe_open(path, framework="pt") as file:
            names = file.keys()  # the open file itself is no iterable
            return {key: file.get_tensor(key) for key in names}, dict(file.metadata() or {})
    except (SafetensorError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{path.name}: this file is damaged, {_one_line(error)}: download it again") from error


def _read_pickle(path: Path, is_zip: bool) -> Weights:
    if is_zip and not zipfile.is_zipfile(path):
        raise LoadError(f"{path.name}: the file is truncated: the end of its zip archive is missing: download it again")
    # Only a zip archive with a name can be mapped, and torch hands every *.safetensors to the safetensors library.
    mapped = is_zip and path.suffix != ".safetensors"
    try:
        with path.open("rb") as file:
            loaded = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise LoadError(
            f"{path.name}: the file holds more than tensors, which torch refuses to load because it could run code: "
            "convert it to safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, struct.error) as error:
        raise LoadError(f"{path.name}: torch cannot read this file, {_one_line(error)}: download it again") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    entries = loaded if isinstance(loaded, dict) else {}
    weights = {str(key): value for key, value in entries.items() if isinstance(value, Tensor)}
    if not weights:
        raise LoadError(f"{path.name}: expected a dictionary of tensors, found a {type(loaded).__name__} without any")
    return weights


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
