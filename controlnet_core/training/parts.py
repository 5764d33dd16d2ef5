"""An optimizer that works on a part of the weights at a time, so that memory holds a part of what it needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

AT_ONCE = 2**24
"""How many numbers a part has, at least one parameter: 64 MiB of each thing that there is for it in fp32."""


class InParts(torch.optim.Optimizer):
    """`optimizer`, whose steps are made part by part; for those that treat each parameter for itself.

    `in_ram` keeps the state of each parameter in main memory, pinned where there is CUDA, while it is not stepped: the
    numbers stay the same. Weights in bf16 are stepped in fp32 and rounded stochastically: up or down, with the chances
    that make their mean exact, so that steps too small for bf16 are not lost (Gupta et al., 2015). These chances follow
    from `seed` and the number of the step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, in_ram: bool, seed: int):
        # Groups and state are those of the inner one: the base's beginning would make others.
        self.inner, self.in_ram, self.seed = optimizer, in_ram, seed
        self._kept: dict[tuple[nn.Parameter, str], Tensor] = {}
        self.param_groups[0]["parts_steps"] = 0

    param_groups = property(lambda self: self.inner.param_groups)  # type: ignore[assignment]
    state = property(lambda self: self.inner.state)  # type: ignore[assignment]
    defaults = property(lambda self: self.inner.defaults)  # type: ignore[assignment]

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        groups = self.param_groups
        number = groups[0]["parts_steps"]
        try:
            for i, (group, part) in enumerate(self._parts()):
                # In fp32 another parameter: one whose dtype changed would lose the hooks of DistributedDataParallel.
                stepped = {p: _in_fp32(p) if p.dtype == torch.bfloat16 else p for p in part}
                for p, other in stepped.items():
                    self._bring(p)
                    self._hand(p, other)
                self.inner.param_groups = [{**group, "params": list(stepped.values())}]
                self.inner.step()
                # Drawn where the weights are, if that is CUDA: other devices have no generators of one kind.
                drawn_on = part[0].device if part[0].is_cuda else torch.device("cpu")
                generator = torch.Generator(drawn_on).manual_seed(_seed(self.seed, number, i))
                for p, other in stepped.items():
                    self._hand(other, p)
                    self._leave(p)
                    if other is not p:
                        p.copy_(rounded(other.detach(), generator))
        finally:
            self.inner.param_groups = groups
        groups[0]["parts_steps"] = number + 1
        if self.in_ram and any(p.is_cuda for group in groups for p in group["params"]):
            torch.cuda.synchronize()  # from now on others may read what was copied to main memory

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """As torch's, but that the state keeps its dtype, and lies where it is kept."""
        order = [(group, p) for group in self.param_groups for p in group["params"]]
        self.state.clear()
        for i, state in state_dict["state"].items():
            group, p = order[i]
            on_device = bool(group.get("fused") or group.get("capturable"))
            self.state[p] = {
                key: value.to(p.device if key != "step" or on_device else "cpu") if isinstance(value, Tensor) else value
                for key, value in state.items()
            }
            self._leave(p)

    def _parts(self) -> Iterator[tuple[dict[str, Any], list[nn.Parameter]]]:
        """The parameters that have gradients, in parts of a group."""
        for group in self.param_groups:
            part: list[nn.Parameter] = []
            for p in [p for p in group["params"] if p.grad is not None]:
                if part and sum(each.numel() for each in part) + p.numel() > AT_ONCE:
                    yield group, part
                    part = []
                part.append(p)
            if part:
                yield group, part

    def _hand(self, p: nn.Parameter, other: nn.Parameter) -> None:
        """The parameter's state to another parameter, which is stepped in its place."""
        if other is not p and p in self.state:
            self.state[other] = self.state.pop(p)

    def _bring(self, p: nn.Parameter) -> None:
        """The parameter's state to where it is stepped."""
        if self.in_ram:
            for key, value in _large(self.state.get(p, {})):
                self.state[p][key] = value.to(p.device, non_blocking=True)

    def _leave(self, p: nn.Parameter) -> None:
        """The parameter's state to where it is kept."""
        if self.in_ram and p.device.type != "cpu":
            for key, value in _large(self.state.get(p, {})):
                if (p, key) not in self._kept:
                    self._kept[p, key] = torch.empty_like(value, device="cpu", pin_memory=p.is_cuda)
                self.state[p][key] = self._kept[p, key].copy_(value, non_blocking=True)


def rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """x (fp32) in bf16, rounded up or down at random so that its mean is x.

    bf16 is the upper half of fp32: a random number added to the lower half carries as often as that half is large.
    """
    chance = torch.randint(0, 2**16, x.shape, dtype=torch.int32, device=generator.device, generator=generator)
    return ((x.view(torch.int32) + chance.to(x.device)) & -(2**16)).view(torch.float32).to(torch.bfloat16)


def _in_fp32(p: nn.Parameter) -> nn.Parameter:
    """A copy of a parameter in fp32, with its gradient, which it then has no more."""
    other = nn.Parameter(p.detach().float())
    other.grad, p.grad = None if p.grad is None else p.grad.float(), None
    return other


def _large(state: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """What of a state takes memory."""
    return [(key, value) for key, value in state.items() if isinstance(value, Tensor) and value.numel() > 1]


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
