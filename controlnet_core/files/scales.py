"""Weights in fp8 beside their scales, as quantizers write them: the numbers that they stand for."""

from __future__ import annotations

import json
from collections import Counter

import torch
from torch import Tensor

from ..keys import State, times
from .reading import ContentError

SCALES = (".weight_scale", ".scale_weight")
"""What ComfyUI's newer and older files call the factor of the `.weight` beside it."""

BESIDE = (".input_scale", ".scale_input", ".comfy_quant")
"""What they keep there for programs that multiply in fp8: we compute in the model's dtype."""

MARKER = "scaled_fp8"
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def unscaled(state: State) -> State:
    """`state` with each weight multiplied by its scale, and neither scales nor marks of a quantizer: all kinds of
    control and all layouts are read from it as from any file.

    Multiplied in fp32 and kept in the file's own 16 bits, those of its norms and biases, else fp16. Where there are no
    scales it is `state`. Raises ContentError for a format other than fp8 and for scales that fit no weight.
    """
    found = {key: tensor for key, tensor in state.items() if key.endswith(SCALES)}
    marks = [key for key in state if key.endswith(BESIDE) or key.rpartition(".")[2] == MARKER]
    if not found and not marks:
        return state
    for key in marks:
        if key.endswith(".comfy_quant"):
            _check_format(key, state[key])
    bare = {key: tensor for key, tensor in state.items() if key not in found and key not in set(marks)}
    kept = _kept(bare)
    for key, scale in found.items():
        weight = key.rpartition(".")[0] + ".weight"
        if weight not in bare or bare[weight].dtype not in FP8:
            raise ContentError(f"{key} has no fp8 weight beside it: load the control's file in fp16, bf16 or fp32")
        bare[weight] = _times(bare[weight], scale, key).to(kept)
    return bare


def _times(weight: Tensor, scale: Tensor, key: str) -> Tensor:
    """`weight` times one scale, or one for each of its first axis, in fp32."""
    if not scale.is_floating_point() or scale.numel() not in (1, weight.shape[0]):
        raise ContentError(
            f"{key} is {times(scale.shape)} for a weight of {times(weight.shape)}, expected one number or one for each "
            "output: load the control's file in fp16, bf16 or fp32"
        )
    return weight.float() * scale.float().reshape(-1, *[1] * (weight.ndim - 1))


def _kept(bare: State) -> torch.dtype:
    counts = Counter(tensor.dtype for tensor in bare.values() if tensor.dtype in (torch.float16, torch.bfloat16))
    return counts.most_common(1)[0][0] if counts else torch.float16


def _check_format(key: str, said: Tensor) -> None:
    """Raise ContentError unless the JSON in these bytes names fp8."""
    try:
        name = json.loads(bytes(said.to(torch.uint8).flatten().tolist()))["format"]
    except (ValueError, KeyError, TypeError):
        name = "unknown"
    if name not in {str(dtype).removeprefix("torch.") for dtype in FP8}:
        raise ContentError(
            f"{key} says that the weights are {str(name)[:40]!a}: load the control's file in fp8, fp16, bf16 or fp32"
        )
