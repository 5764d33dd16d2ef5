"""CONTROL_NET_STACK: a plain list of plain five-tuples, as other packs unpack it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...controlnet_core.dosing.block_weights import BlockWeights
from ...controlnet_core.dosing.strength import Strength
from ...controlnet_core.errors import ZeroConvError
from . import files
from .control import Control
from .foreign import ForeignControl
from .networks import UnionControl
from .resize import Resize

Entry = tuple[Any, Tensor, float, float, float]
"""(control_net, image (B,H,W,3) in 0..1, strength, start, end); the rest rides on control_net."""


class StackError(ZeroConvError):
    """Something in the place of a CONTROL_NET_STACK, or of what one is made of."""


def entry(control_net: Any, image: Tensor | None, strength: Strength, resize: Resize) -> Entry:
    """One entry; raises for a missing image."""
    if image is None:
        raise StackError("control_net is connected and its image is not: connect the hint that it shall follow")
    made = _control(control_net).with_dosing(strength, resize)
    return made, image, strength.value, strength.window.start, strength.window.end


def read(stack: Any) -> list[Entry]:
    """The entries of a stack of ours or of another pack, as fives, in a list of their own; the stack stays as it was.

    Entries may name the file of their control, as Comfyroll's and Easy-Use's do. A stack that is switched off is `None`
    or empty, or has entries that are called None.
    """
    if stack is None:
        return []
    if not isinstance(stack, (list, tuple)):
        raise StackError(f"a CONTROL_NET_STACK is a list, found {type(stack).__name__}: connect a stack node")
    return [_read(i, found) for i, found in enumerate(stack) if not _switched_off(found)]


def _switched_off(found: Any) -> bool:
    return isinstance(found, (list, tuple)) and len(found) in (5, 7) and found[0] in ("None", None)


def _read(i: int, found: Any) -> Entry:
    fields = tuple(found) if isinstance(found, (list, tuple)) else ()
    if len(fields) == 7 and isinstance(fields[0], str):  # Easy-Use
        name, strength, start, end, soft, image, _ = fields
        net: Any = files.load(name)
        if soft != 1:  # each block's weight is that of the next deeper one times this
            net = net.with_dosing(replace(net.dosing, block_weights=BlockWeights("soft", soft)), net.resize)
    elif len(fields) == 5:
        net, image, strength, start, end = fields
        net = files.load(net) if isinstance(net, str) else net
    else:
        raise StackError(
            f"entry {i} of the control_net stack is {_what(found)}; expected (control_net, image, strength, "
            "start_percent, end_percent): connect a stack made by ZeroConv, Comfyroll, Efficiency or Easy-Use"
        )
    if image is None:
        raise StackError(f"entry {i} of the control_net stack has no image: connect the hint that it shall follow")
    return net, image, strength, start, end


def _what(found: Any) -> str:
    return f"a tuple of {len(found)}" if isinstance(found, (list, tuple)) else f"a {type(found).__name__}"


def controls(stack: Sequence[Entry], vae: Any = None) -> list[Control]:
    """The controls of the entries, with their hints and strengths; those that can never act are left out.

    Neighbours that share one Union net will be fused in one pass.
    """
    made: list[Control] = []
    for net, image, strength, start, end in stack:
        control = _dosed(_control(net), image, strength, start, end, vae)
        if control.full_strength().off:
            continue
        if made and isinstance(control, UnionControl):
            control.joins = control.fuses_with(made[-1])
        made.append(control)
    return made


def _control(control_net: Any) -> Control:
    if isinstance(control_net, Control):
        return control_net
    if callable(getattr(control_net, "get_control", None)):
        return ForeignControl(control_net)
    raise StackError(
        f"control_net in the stack is a {type(control_net).__name__}, expected a CONTROL_NET: connect a loader"
    )


def _dosed(control: Control, image: Tensor, strength: float, start: float, end: float, vae: Any = None) -> Control:
    """A copy of `control` with this hint and strength; `image` (B,H,W,C) as nodes hand it on."""
    copy = control.copy()
    copy.set_cond_hint(image.movedim(-1, 1), strength, (start, end), vae=vae)
    copy.full_strength()  # says what is wrong with the window while the node is at hand
    return copy
