"""Whether a control's residuals are finite numbers in a run, seen without waiting for a device at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from ...controlnet_core.errors import ZeroConvError
from ...controlnet_core.networks.residuals import Residuals

MOST_UNREAD = 256
"""Calls, after which their sums are read, so that a long video does not heap them up."""


class NotFiniteError(ZeroConvError):
    """A control whose residuals are not finite: every picture would be black."""


class Finite:
    """The residuals of one control in one run.

    Each call leaves two sums on the device; they are read in the second call (whatever is wrong with weights or hint
    shows in the first) and when the run ends. The latent's sum tells who began: what is not finite in one call makes
    everything of the next one so.
    """

    def __init__(self, name: str):
        self._name = name
        self._sums: list[Tensor] = []
        self._read = 0

    def see(self, x: Tensor, residuals: Residuals) -> None:
        """Take note of the residuals that a call with the latent `x` has given; raises for an earlier call's."""
        if len(self._sums) - self._read >= (MOST_UNREAD if self._read else 1):
            self.check()
        given = [residual for residual in (*residuals.encoder, *residuals) if residual is not None]
        if given:
            # All of them once: zero convolutions differ. What goes wrong later does so in the features, and shows in
            # the last.
            latent, *sums = (tensor.sum(dtype=torch.float32) for tensor in (x, *(given[-1:] if self._sums else given)))
            self._sums.append(torch.stack([latent, sums[0] if len(sums) == 1 else torch.stack(sums).sum()]))

    def check(self) -> None:
        """Raise NotFiniteError where the control was the first to give what is not finite."""
        if self._read == len(self._sums):
            return
        first, self._read = self._read, len(self._sums)
        for call, (latent, given) in enumerate(torch.stack(self._sums[first:]).isfinite().tolist(), first + 1):
            if latent and not given:
                raise NotFiniteError(
                    f"{self._name}: its residuals are not finite (NaN or infinite) from call {call} of the model on, "
                    "and the picture would be black: load it with weight_dtype bf16 or fp32, or take another file"
                )
