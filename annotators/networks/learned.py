"""What annotators with a network of our own share: a file becomes a network, a picture a tensor, a map a hint."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..images import PADDED, AnnotatorError, to_picture

UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, KeyError, struct.error, pickle.UnpicklingError)
"""What torch.load raises for files that are none of its own, or not whole."""


def build(
    make: Callable[[], nn.Module],
    path: Path,
    renamed: Mapping[str, str] | None = None,
    unread: Callable[[str], bool] | None = None,
) -> nn.Module:
    """The network that `make` gives, with the weights of a *.pth or *.safetensors file: eval, fp32, CPU, no gradients.

    The file's keys must be the network's own; the "module." that torch's DataParallel puts before them is taken off,
    those that are `unread` are left out, and parts of names are `renamed`.
    Raises AnnotatorError for a file that is no weights, or those of another network, naming the keys.
    """
    weights = {key: weight for key, weight in read_weights(path).items() if not (unread and unread(key))}
    for part, new in (renamed or {}).items():
        weights = {key.replace(part, new): weight for key, weight in weights.items()}
    with torch.device("meta"):  # no memory and no random numbers for weights that the file replaces anyway
        network = make()
    wanted = f"{path.name} is not the weights of {type(network).__name__}"
    todo = "put the published file in its place, or delete this one so that it is fetched"
    try:
        missing, unknown = network.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        raise AnnotatorError(f"{wanted}: {_one_line(error)}: {todo}") from error
    if missing or unknown:
        raise AnnotatorError(f"{wanted}: it lacks {_some(missing)} and has unknown {_some(unknown)}: {todo}")
    return network.float().requires_grad_(False).eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch or safetensors wrote. Raises AnnotatorError for anything else."""
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, *UNREADABLE) as error:
        raise AnnotatorError(
            f"{path} cannot be read as weights ({_one_line(error)}): it may be a part of a download, or a page in its "
            "place: delete it, so that it is fetched again"
        ) from error
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise AnnotatorError(f"{path.name} is no dictionary of tensors: put the published file in its place")
    return {key.removeprefix("module."): value for key, value in found.items()}


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:3]) or "none"
    return shown + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def to_tensor(image: np.ndarray, network: nn.Module) -> Tensor:
    """Pictures (B,H,W,3), or one, that `images.to_picture` reads, as (B,3,H,W), 0..1, where and as the network is.

    Raises AnnotatorError for pictures whose sides are not multiples of 64, to which `pipeline.see` pads.
    """
    pictures = np.stack([to_picture(one) for one in (image if image.ndim == 4 else [image])])
    height, width = pictures.shape[1:3]
    if height % PADDED or width % PADDED:
        raise AnnotatorError(
            f"image is {width}x{height}; a learned annotator reads sides that are multiples of {PADDED}: pad it with "
            "images.pad_to_multiple, as pipeline.see does"
        )
    place = next(network.parameters())
    # Channels first in memory, as the published preprocessors: with channels last HED is faster by a quarter on a CPU,
    # and its last bits are others.
    tensor = rearrange(torch.from_numpy(pictures), "b h w c -> b c h w").contiguous()
    return tensor.to(place.device, place.dtype)


def to_maps(values: Tensor, image: np.ndarray) -> np.ndarray:
    """Maps (B,1,H,W) as (B,H,W) float32, or as (H,W) where the image was one."""
    return values.float().cpu().numpy().reshape(image.shape[:-1])
