"""CONTROL_NETs as files in the host's `controlnet` folder, and new ones from a MODEL."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch

from ...controlnet_core.files import saving
from ...controlnet_core.files.loading import load_control, usual_dtype
from ...controlnet_core.files.saving import SaveError
from ...controlnet_core.limits import FOLDERS, NAME
from ...lab.models import CONTROLS
from .models import dtypes, patcher_of, unet_config
from .networks import ControlNetControl
from .weights import base_weights, loaded_control

SUFFIX = ".safetensors"

RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names that Windows keeps for devices, in every folder and with every suffix."""


@dataclass(frozen=True)
class Saved:
    """A file that was written: its name as LoadControlNet lists it, where it lies, and its size in bytes.

    `rounded` is the dtype in which the control was in memory, where the file's is wider.
    """

    name: str
    folder: Path
    size: int
    rounded: torch.dtype | None

    def __str__(self) -> str:
        text = f"saved {self.name}\n{self.size / 2**20:.1f} MiB in {self.folder}"
        if self.rounded is None:
            return text
        return (
            f"{text}\nthe control was in memory as {str(self.rounded).removeprefix('torch.')}: if its own file is more "
            "exact than that, load it with a wider weight_dtype before you save it"
        )


def save(
    control: Any,
    filename: str,
    layout: str = "ldm",
    dtype: torch.dtype | None = None,
    content: str = "control",
    base: Any = None,
    target: Any = None,
) -> Saved:
    """Write a CONTROL_NET into the user's controlnet folder, never over a file that is there.

    `content` is "control", "difference" (from the MODEL `base`) or "transfer" (from `base` to `target`). Raises
    SaveError for inputs that do not go together, ControlError for a control that cannot be saved.
    """
    parts = name_parts(filename)
    _check_models(content, layout, base, target)
    loaded = loaded_control(control)
    network, metadata = loaded.control, dict(loaded.metadata)
    if getattr(control, "global_average_pooling", False):
        metadata["control_type"] = "shuffle"
    if content == "difference":
        written = saving.to_difference_file(network, base_weights(base), dtype, metadata)
    elif content == "transfer":
        models = base_weights(base), base_weights(target)
        written = saving.to_transferred_file(network, *models, layout, dtype, metadata)
    else:
        written = saving.to_file(network, layout, dtype, metadata)
    folder = users_folder()
    path = free_path(folder, parts)
    saving.write(path, *written)
    held, kept = usual_dtype(network.state_dict()), usual_dtype(written[0])
    return Saved(
        str(path.relative_to(folder)), folder, path.stat().st_size, held if held.itemsize < kept.itemsize else None
    )


def new_control(model: Any, hint_channels: int, hint_encoder: str) -> ControlNetControl:
    """A CONTROL_NET that begins as a copy of the encoder of the host's MODEL, and changes nothing yet."""
    name = "a new ControlNet"
    config = unet_config(model.model, name, None)
    weights, metadata = saving.to_file(saving.fresh(config, base_weights(model), hint_channels, hint_encoder))
    stored, compute, operations = dtypes(None, usual_dtype(weights))
    device = comfy.model_management.unet_offload_device()
    loaded = load_control(weights, metadata, name=name, operations=operations, dtype=stored, device=device)
    return ControlNetControl(name, loaded, patcher_of(loaded.control), compute)


def users_folder() -> Path:
    """The first folder of controls that is the user's: the embedded model's belongs to the pack."""
    for folder in map(Path, folder_paths.get_folder_paths("controlnet")):
        if folder.resolve() != CONTROLS.resolve():
            return folder
    raise SaveError("the host has no controlnet folder to save into: name one in extra_model_paths.yaml")


def name_parts(filename: str) -> tuple[str, ...]:
    """Folders and name of a file, as every system can have them; raises SaveError for others, and for ways out."""
    parts = re.split(r"[/\\]", filename.strip().removesuffix(SUFFIX))
    if len(parts) > FOLDERS or any(len(part.encode("utf-8", "replace")) > NAME for part in parts):
        raise SaveError(
            f"filename {filename!r} has {len(parts)} parts of up to {max(map(len, parts))} characters: expected at "
            f"most {FOLDERS} of {NAME} bytes"
        )
    for part in parts:
        if (
            not part
            or not part.isprintable()
            or re.search(r'[<>:"|?*]', part)
            or part[-1] in ". "
            or RESERVED.fullmatch(part)
        ):
            raise SaveError(
                f"filename {filename!r} has a part {part!r}: expected names with / between them, without "
                'what cannot be printed and < > : " | ? *, no dot or space at the end, and none that Windows reserves'
            )
    return tuple(parts)


def free_path(folder: Path, parts: tuple[str, ...]) -> Path:
    """The file of that name, or of the first of name_2, name_3, ... that is not there yet."""
    *folders, name = parts
    path, number = folder.joinpath(*folders, name + SUFFIX), 1
    while path.exists():
        number += 1
        path = path.with_name(f"{name}_{number}{SUFFIX}")
    return path


def _check_models(content: str, layout: str, base: Any, target: Any) -> None:
    """Nothing that is connected is ignored, and nothing that is needed is missing."""
    needed = {"control": (), "difference": ("base",), "transfer": ("base", "target")}[content]
    for name, model in {"base": base, "target": target}.items():
        if (model is not None) == (name in needed):
            continue
        if model is None:
            wanted = "the model that the control was made for" if name == "base" else "the model to move it to"
            raise SaveError(f"content {content} needs {name}: connect {wanted}")
        raise SaveError(
            f"{name} is connected, and content {content} takes no {name}: disconnect it, or choose "
            f"{'transfer' if name == 'target' else 'transfer or difference'}"
        )
    if content == "difference" and layout != "ldm":
        raise SaveError(f"difference files exist in the ldm layout alone, found {layout}: choose ldm")
