"""Where residuals meet the UNet: the one place that knows the positions, their order and their shapes.

Residual i is added to skip connection i as the decoder reads it, the last one after the middle block (paper, section
3.2; lllyasviel/ControlNet cldm/cldm.py). Our own UNet calls `inject`; a host that takes the residuals as a dictionary
of lists, popped from the end, gets them from `as_host_control`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .residuals import Residuals


class InjectionError(ValueError):
    """Residuals that do not fit the UNet that they are added to."""


def check(residuals: Residuals, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise `InjectionError` unless every residual has the (C, H, W) that its place in the UNet asks for."""
    if len(residuals) != len(shapes):
        raise InjectionError(
            f"the UNet has {len(shapes) - 1} skip connections and a middle block, the control brings "
            f"{len(residuals) - 1} residuals and a middle one: use a control made for this family of models"
        )
    for i, (residual, shape) in enumerate(zip(residuals, shapes, strict=True)):
        if residual is not None and tuple(residual.shape[1:]) != tuple(shape):
            place = "the middle block" if i == len(shapes) - 1 else f"skip connection {i}"
            raise InjectionError(
                f"{place} of the UNet has shape {_times(shape)}, the residual for it {_times(residual.shape[1:])}: "
                "the hint must be 8 times the latent's size and the control made for this family of models"
            )


def inject(middle: Tensor, skips: Sequence[Tensor], residuals: Residuals | None) -> tuple[Tensor, list[Tensor]]:
    """Add `residuals` to the middle block's output and to the skip connections; the arguments stay as they are."""
    if residuals is None:
        return middle, list(skips)
    check(residuals, [tuple(t.shape[1:]) for t in (*skips, middle)])
    *joined, middle = (
        target if residual is None else target + residual.to(target.dtype)
        for target, residual in zip((*skips, middle), residuals, strict=True)
    )
    return middle, joined


def as_host_control(residuals: Residuals, shapes: Sequence[tuple[int, ...]]) -> dict[str, list[Tensor | None]]:
    """The dictionary that ComfyUI's UNet pops from the end of: checked first, since it only logs what does not fit."""
    check(residuals, shapes)
    return {"input": [], "middle": [residuals.middle], "output": list(residuals.skips)}


def _times(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape)
