"""Stand-ins for optimizers of libraries: the interface, and a state that is kept where theirs is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """lion_pytorch.Lion: the sign of an average of gradients (Chen et al., 2023); state `exp_avg`."""

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * average.lerp(p.grad, 1 - first).sign())
                average.lerp_(p.grad, 1 - second)


class Prodigy(torch.optim.Optimizer):
    """prodigyopt.Prodigy's bookkeeping: a step size `d` in the groups, `step` a plain number, `p0` of no dimension."""

    def __init__(self, params: Any, lr: float = 1.0, weight_decay: float = 0, d0: float = 2**-8):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "d": d0, "d0": d0, "k": 0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        grown = self.param_groups[0]["d"] * 1.125
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "p0": p.flatten().clone() if p.any() else torch.tensor(0.0)}
                state["step"] += 1
                p.sub_(group["d"] * group["lr"] * p.grad / state["step"])
                p.lerp_(state["p0"].expand(p.numel()).view_as(p), 0.01)
            group["d"], group["k"], group["d_hat"] = grown, group["k"] + 1, grown / 3


class AdamW8bit(torch.optim.Optimizer):
    """bitsandbytes.optim.AdamW8bit's bookkeeping: bytes and their scale in the state, which are not cast on loading."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 1e-2):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {
                        "step": 0,
                        "state1": torch.full(p.shape, 128, dtype=torch.uint8),
                        "absmax1": p.new_zeros(1),
                    }
                moved = (state["state1"].float() - 128) / 127 * state["absmax1"] * 0.9 + p.grad * 0.1
                state["absmax1"] = moved.abs().max().clamp(min=1e-12)[None]
                state["state1"] = (moved / state["absmax1"] * 127 + 128).round().to(torch.uint8)
                state["step"] += 1
                p.sub_(group["lr"] * moved.sign())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        order = [p for group in self.param_groups for p in group["params"]]
        self.state.update({order[i]: _kept(state) for i, state in state_dict["state"].items()})


def _kept(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
