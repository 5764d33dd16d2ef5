"""The networks of learned annotators under the host's memory management: found or fetched once, kept, offloaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch

from ...annotators.fetching import fetch
from ...annotators.images import AnnotatorError
from ...annotators.networks import NETWORKS, Network
from .models import patcher_of
from .progress import transfer

KEPT = 4 << 30
"""Bytes of networks that stay in memory between runs; the ones used last are kept."""

_patchers: dict[str, Any] = {}
"""The ModelPatcher of each network that is kept, the one used last at the end."""


def networks(names: Sequence[str], node_id: str | None) -> list[torch.nn.Module]:
    """The networks of these names, on the device where the host wants them, in fp32.

    A network is found or fetched (with the progress bar of node `node_id`) and built when it is first asked for; after
    that it is kept, and the host moves it as it needs its memory. Raises AnnotatorError for files that cannot be had
    or read.
    """
    by_name = {network.name: network for network in NETWORKS}
    new = [by_name[name] for name in names if name not in _patchers]
    files = dict(zip((network.name for network in new), fetch(new, folders(), transfer(node_id)) if new else []))
    for name in names:
        _patchers[name] = _patchers.pop(name, None) or patcher_of(_Held(_built(by_name[name], files[name])))
    chosen = [_patchers[name] for name in names]
    _let_go_of_the_oldest(chosen)
    if chosen:
        # Whole: these are plain torch layers, which the host cannot run from two devices.
        comfy.model_management.load_models_gpu(chosen, force_full_load=True)
    for patcher in chosen:
        patcher.model.to(patcher.load_device)  # what --novram leaves behind even so
    return [patcher.model.network for patcher in chosen]


def folders() -> list[Path]:
    """Where weights of annotators lie: the host's `annotators` folders, then those of comfyui_controlnet_aux."""
    folder_paths.add_model_folder_path("annotators", str(Path(folder_paths.models_dir) / "annotators"))
    found = [Path(folder) for folder in folder_paths.get_folder_paths("annotators")]
    if "AUX_ANNOTATOR_CKPTS_PATH" in os.environ:  # set by a user, or by that pack as its own settings say
        found.append(Path(os.environ["AUX_ANNOTATOR_CKPTS_PATH"]))
    for packs in folder_paths.get_folder_paths("custom_nodes"):
        found += sorted(Path(packs).glob("*/ckpts"))
    return list(dict.fromkeys(found))


class _Held(torch.nn.Module):
    """A network as the host takes it: it sets attributes such as `device`, which some networks have as their own."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network


def _built(network: Network, paths: Sequence[Path]) -> torch.nn.Module:
    """The network, fresh from its files."""
    try:
        return network.load(paths)
    except (AnnotatorError, ImportError):
        raise
    except Exception as error:
        raise AnnotatorError(_unreadable(network, paths, error)) from error


def _unreadable(network: Network, paths: Sequence[Path], error: Exception) -> str:
    files = ", ".join(str(path) for path in paths)
    return (
        f"{network.name} cannot be built from {files}: {type(error).__name__}: {error}. If a download broke off there, "
        "delete the file: the next run fetches it again"
    )


def _let_go_of_the_oldest(needed: Sequence[Any]) -> None:
    """Forgets the networks that were used longest ago, until the kept ones fit; never one that is needed now."""
    for name, patcher in list(_patchers.items()):
        if sum(kept.model_size() for kept in _patchers.values()) <= KEPT:
            return
        if patcher not in needed:
            del _patchers[name]
