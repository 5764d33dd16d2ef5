"""Control files in the host's folders, loaded through the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import comfy.model_management
import comfy.ops
import comfy.utils
import folder_paths
import torch

from ...controlnet_core.files.kinds import unwrapped
from ...controlnet_core.files.layouts import OTHER_PARTS
from ...controlnet_core.files.loading import LoadedControl, load_control, usual_dtype
from ...controlnet_core.files.reading import (
    ContentError,
    LoadError,
    check_plain,
    forms,
    joined,
    read_weights,
    tensors_of,
)
from ...controlnet_core.files.scales import unscaled
from ...controlnet_core.networks.control_lora import MARKER, ControlLora
from ...controlnet_core.networks.controlnet import ControlNet
from ...controlnet_core.networks.lite import ControlNetLite
from ...controlnet_core.networks.lllite import ControlLLLite
from ...controlnet_core.networks.network import ControlNetwork
from ...controlnet_core.networks.t2i_adapter import T2IAdapter
from ...controlnet_core.networks.union import UnionControlNet
from ...lab.models import CONTROLS
from .lllite import LLLiteControl
from .models import dtypes, patcher_of, with_attention
from .networks import (
    AdapterControl,
    ControlLoraControl,
    ControlNetControl,
    NetworkControl,
    UnionControl,
    set_control_type,
)
from .weights import base_weights

HOST_CLASSES: dict[type[ControlNetwork], type[NetworkControl]] = {
    ControlNet: ControlNetControl,
    UnionControlNet: UnionControl,
    ControlLora: ControlLoraControl,
    T2IAdapter: AdapterControl,
    ControlLLLite: LLLiteControl,
    ControlNetLite: ControlNetControl,
}
"""What runs each kind of network (`kinds.KINDS`) as a CONTROL_NET."""


def register_lab() -> None:
    """Let the host list the embedded model's controls with the user's own."""
    folder_paths.add_model_folder_path("controlnet", str(CONTROLS))


def names() -> list[str]:
    """Every control file that the host knows of."""
    return folder_paths.get_filename_list("controlnet")


def path_of(name: str) -> Path:
    """The file that `name` means; FileNotFoundError says where it was looked for."""
    found = folder_paths.get_full_path("controlnet", name)
    if found is None:
        folders = ", ".join(folder_paths.get_folder_paths("controlnet"))
        raise FileNotFoundError(f"control file {name!r} is in none of the controlnet folders ({folders}): put it there")
    return Path(found)


_PATCHERS: WeakValueDictionary[tuple[Path, int, int, torch.dtype | None], Any] = WeakValueDictionary()
_LOADED: WeakKeyDictionary[Any, tuple[LoadedControl, torch.dtype]] = WeakKeyDictionary()
"""Networks in use: a file that two nodes load is one network, which a stack can fuse and memory holds once."""


def load(
    name: str, weight_dtype: torch.dtype | None = None, model: Any = None, control_type: str = "auto"
) -> NetworkControl:
    """The control in file `name`; `model` is the host's MODEL, for weights that are differences from a base."""
    path = path_of(name)
    key = (path, path.stat().st_mtime_ns, path.stat().st_size, weight_dtype)
    patcher = _PATCHERS.get(key) if model is None else None
    if patcher is None:
        loaded, compute = _load(path, name, weight_dtype, model)
        patcher = patcher_of(loaded.control)
        _LOADED[patcher] = loaded, compute
        if model is None:
            _PATCHERS[key] = patcher
    loaded, compute = _LOADED[patcher]
    control = HOST_CLASSES[type(loaded.control)](name, loaded, patcher, compute)
    set_control_type(control, control_type)
    return control


def _load(path: Path, name: str, weight_dtype: torch.dtype | None, model: Any) -> tuple[LoadedControl, torch.dtype]:
    """The network in a file, in the dtypes that the host would choose, and the one that it computes in."""
    state, metadata = _read(path)
    try:
        check_plain(state)
        state = unwrapped(unscaled(state))
    except ContentError as error:
        raise LoadError(f"{name}: {error}") from error
    own = {key: tensor for key, tensor in state.items() if not key.startswith(OTHER_PARTS)}
    stored, compute, operations = dtypes(weight_dtype, usual_dtype(own))
    if MARKER in state:
        # It computes in its model's dtype, which only a run tells.
        operations = with_attention(comfy.ops.manual_cast)
    loaded = load_control(
        state,
        metadata,
        name=name,
        base=None if model is None else base_weights(model),
        operations=operations,
        dtype=stored,
        device=comfy.model_management.unet_offload_device(),
    )
    return loaded, compute


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The file's tensors through the host's loader, and through our own what that takes for another kind of file."""
    found = []
    for part, safetensors in forms(path):
        named = part.suffix.lower() in (".safetensors", ".sft")
        try:
            if safetensors != named:
                return read_weights(path)
            state, metadata = comfy.utils.load_torch_file(str(part), safe_load=True, return_metadata=True)
            found.append((tensors_of(state), metadata or {}))
        except Exception:  # noqa: BLE001 - whatever the host's loader says of a file, our own reads it or says it better
            return read_weights(path)
    return joined(found)
