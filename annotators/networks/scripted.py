"""Networks that are published as TorchScript: programs, which torch's own interpreter runs as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..images import AnnotatorError
from .learned import UNREADABLE


def build(path: Path) -> nn.Module:
    """The network of a TorchScript file: eval, fp32, CPU, no gradients. Raises AnnotatorError for another file.

    Its files in `NETWORKS` are marked as programs, so that only the known ones get here.
    """
    try:
        network: Any = torch.jit.load(path, map_location="cpu")
    except UNREADABLE as error:
        raise AnnotatorError(
            f"{path} cannot be read as TorchScript ({' '.join(str(error).split())[:200]}): delete it, so that it is "
            "fetched again"
        ) from error
    for weight in network.parameters():  # the module itself cannot be told
        weight.requires_grad_(False)
    return network.float().eval()


def run(network: nn.Module, *inputs: Tensor) -> Any:
    """What the network answers. As written: optimised for the shapes of its first runs, its last bits would change."""
    with torch.jit.optimized_execution(False):  # pyright: ignore[reportPrivateImportUsage]
        return network(*inputs)
