"""Where residuals meet the UNet: the one place that knows the positions, their order and their shapes.

A ControlNet's residual i is added to skip connection i as the decoder reads it, the last one after the middle block
(paper, section 3.2; lllyasviel/ControlNet cldm/cldm.py). A T2I-Adapter's are added to what the encoder's blocks give,
before it goes on (TencentARC/T2I-Adapter). Our own UNet calls `to_encoder` and `to_decoder`; a host that takes the
residuals as a dictionary of lists, popped from the end, gets them from `as_host_control`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..errors import ZeroConvError
from ..keys import times
from .residuals import Residuals

HostControl = dict[str, list[Tensor | None]]
"""What ComfyUI's UNet takes: "input" in the order of the decoder, "output" in that of the encoder, and "middle"."""


class InjectionError(ZeroConvError):
    """Residuals that do not fit the UNet that they are added to."""


def check(residuals: Residuals, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise `InjectionError` unless every residual has the (C, H, W) that its place in the UNet asks for."""
    if len(residuals) != len(shapes):
        raise InjectionError(
            f"the UNet has {len(shapes) - 1} skip connections and a middle block, the control brings "
            f"{len(residuals) - 1} residuals and a middle one: use a control made for this family of models"
        )
    for i, (residual, shape) in enumerate(zip(residuals, shapes, strict=True)):
        _check(residual, shape, "the middle block" if i == len(shapes) - 1 else f"skip connection {i}")
    for i, (residual, shape) in enumerate(zip(residuals.encoder, shapes, strict=False)):
        _check(residual, shape, f"encoder block {i}")


def to_encoder(h: Tensor, i: int, residuals: Residuals | None) -> Tensor:
    """The output `h` of encoder block i with the residual for it."""
    if residuals is None or not residuals.encoder or residuals.encoder[i] is None:
        return h
    _check(residuals.encoder[i], h.shape[1:], f"encoder block {i}")
    return h + residuals.encoder[i].to(h.dtype)  # type: ignore[union-attr]


def to_decoder(middle: Tensor, skips: Sequence[Tensor], residuals: Residuals | None) -> tuple[Tensor, list[Tensor]]:
    """The middle block's output and the skip connections with the residuals; the arguments stay as they are."""
    if residuals is None:
        return middle, list(skips)
    check(residuals, [tuple(t.shape[1:]) for t in (*skips, middle)])
    *joined, middle = (
        target if residual is None else target + residual.to(target.dtype)
        for target, residual in zip((*skips, middle), residuals, strict=True)
    )
    return middle, joined


def as_host_control(residuals: Residuals, shapes: Sequence[tuple[int, ...]]) -> HostControl:
    """The dictionary that ComfyUI's UNet pops from the end of: checked first, since it only logs what does not fit."""
    check(residuals, shapes)
    return {"input": list(reversed(residuals.encoder)), "middle": [residuals.middle], "output": list(residuals.skips)}


def from_host_control(control: Mapping[str, Sequence[Tensor | None]], skips: int) -> Residuals:
    """The inverse, for a UNet with so many `skips`; checked as the host pops them: an entry it never reaches raises."""
    output, middle, encoder = (list(control.get(place) or []) for place in ("output", "middle", "input"))
    encoder.reverse()
    beyond = [*output[: max(0, len(output) - skips)], *middle[:-1], *encoder[skips:]]
    if any(residual is not None for residual in beyond):
        raise InjectionError(
            f"the UNet has {skips} skip connections and a middle block, the control brings {len(output)} residuals for "
            f"the skips, {len(middle)} for the middle block and {len(encoder)} for the encoder's blocks: use a control "
            "made for this family of models"
        )
    output = [*[None] * (skips - len(output)), *output[-skips:]] if output else [None] * skips
    encoder = [*encoder, *[None] * (skips - len(encoder))][:skips] if encoder else []
    return Residuals(tuple(output), middle[-1] if middle else None, tuple(encoder))


def _check(residual: Tensor | None, shape: Sequence[int], place: str) -> None:
    if residual is not None and tuple(residual.shape[1:]) != tuple(shape):
        raise InjectionError(
            f"{place} of the UNet has shape {times(shape)}, the residual for it {times(residual.shape[1:])}: "
            "the hint must be 8 times the latent's size and the control made for this family of models"
        )
