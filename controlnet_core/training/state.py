"""What a training changes from step to step: what a checkpoint holds of it, and goes on from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..keys import State
from .checkpoint import Checkpoint, optimizer_tensors, restore_optimizer
from .convergence import best, has_fallen, sudden_convergence
from .distributed import ALONE, Process
from .optimizer import average, counted, local, share


@dataclass
class TrainingState:
    """A training after `step` optimizer steps: all that its further losses depend on, the base and the data excepted.

    `weights` are what is trained, by name, with buffers that change along; they are the network's own and change in
    place. `averages` follow them by `decay`, from where they are when the state is made or restored; without `decay`
    there are none. `seconds` is the time in training steps, `measured` the fidelity after each step at which it was
    measured, and `converged` the step at which it jumped, once that is seen.
    """

    weights: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))
    decay: float = 0.0
    step: int = 0
    seconds: float = 0.0
    measured: list[tuple[int, float]] = field(default_factory=list)
    converged: int | None = None
    averages: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.averages = {name: _copy(weight) for name, weight in self.weights.items()} if self.decay else {}

    def clip_gradients(self, largest: float) -> Tensor:
        """Scale the gradients down to a norm of `largest` over all of them, 0 for no limit; gives the norm before."""
        self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.weights.values(), largest or float("inf"))

    def advance(self) -> None:
        """Make the step that the gradients say, forget them, and let the averages follow."""
        self.step += 1
        self.update(share(self.decay, self.step))

    def update(self, share: float | Tensor, keep_gradients: bool = False) -> None:
        """As `advance`, which counts too; the averages take a `share` of the weights.

        With `keep_gradients` these become 0 where they are, for what is captured in a graph.
        """
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=not keep_gradients)
        average(self.averages, self.weights, share)

    def add_fidelity(self, fidelity: float) -> None:
        """Take down what was measured after this step."""
        self.measured.append((self.step, fidelity))
        self.converged = _converged(self.measured)

    @property
    def best(self) -> tuple[int, float] | None:
        """The step after which fidelity was highest, and that fidelity; None before the first of them after a step."""
        return best(self.measured)

    @property
    def has_fallen(self) -> bool:
        """Whether fidelity is well below its best, and stays there."""
        return has_fallen(self.measured)

    @property
    def result(self) -> Mapping[str, Tensor]:
        """What the training would end with now: the averages where there are any, else the weights."""
        return self.averages or self.weights

    def use_averages(self) -> None:
        """Put the averages in the weights' place, where there are any: what a training ends with."""
        _fill(self.weights, self.averages)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the network has the averages, where there are any: what is judged is what is saved."""
        # Weights in bf16 would round averages that were left in their place.
        rounded = {name for name, kept in self.averages.items() if kept.dtype != self.weights[name].dtype}
        own = {name: self.weights[name].detach().clone() for name in rounded}
        _fill(self.weights, {name: self.averages[name] for name in rounded})
        self._exchange(self.averages.keys() - rounded)
        try:
            yield
        finally:
            _fill(self.weights, own)
            self._exchange(self.averages.keys() - rounded)

    @torch.no_grad()
    def _exchange(self, names: Iterable[str]) -> None:
        for name in names:
            weight = self.weights[name].detach().clone()
            self.weights[name].copy_(self.averages[name])
            self.averages[name].copy_(weight)

    @property
    def is_sharded(self) -> bool:
        """Whether this process has a part of the optimizer's state alone."""
        return local(self.optimizer) is not self.optimizer

    def to_checkpoint(self, facts: Mapping[str, Any], process: Process = ALONE) -> Checkpoint:
        """The checkpoint of this step; `facts` say of which training it is.

        Where processes have divided the optimizer's state, all of them ask for it, and the first one has it whole.
        """
        names = {weight: name for name, weight in self.weights.items()}
        own_state = optimizer_tensors(local(self.optimizer), names)
        whole_state = process.collect(own_state) if self.is_sharded else own_state
        tensors = {f"model.{name}": weight.detach() for name, weight in self.weights.items()}
        tensors |= {f"optimizer.{key}": tensor for key, tensor in whole_state.items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.averages.items()}
        own = {"seconds": self.seconds, "measured": list(self.measured), "scaler": self.scaler.state_dict()}
        own["groups"] = counted(local(self.optimizer))
        return Checkpoint(self.step, tensors, {**facts, **own})

    def restore(self, saved: Checkpoint, optimizer: bool = True) -> None:
        """Go back or ahead to a checkpoint; the inverse of `to_checkpoint`. Without `optimizer`, its state is new."""
        self.step, self.seconds = saved.step, saved.facts["seconds"]
        self.measured = [(step, fidelity) for step, fidelity in saved.facts["measured"]]
        self.converged = _converged(self.measured)
        _fill(self.weights, saved.part("model."))
        if self.averages:  # where they are new, they begin at the weights of now
            _fill(self.averages, {**saved.part("model."), **saved.part("average.")})
        if optimizer:
            names = {weight: name for name, weight in self.weights.items()}
            restore_optimizer(local(self.optimizer), saved.part("optimizer."), names)
            for group, numbers in zip(self.optimizer.param_groups, saved.facts.get("groups", [])):
                group.update(numbers)
        if saved.facts["scaler"]:
            self.scaler.load_state_dict(saved.facts["scaler"])


def _copy(weight: Tensor) -> Tensor:
    """A copy that an average can be kept in: bf16, in which small moves are lost, becomes fp32."""
    return weight.detach().to(torch.float32 if weight.dtype == torch.bfloat16 else weight.dtype, copy=True)


@torch.no_grad()
def _fill(tensors: Mapping[str, Tensor], values: State) -> None:
    for name, value in values.items():
        tensors[name].copy_(value)


def _converged(measured: list[tuple[int, float]]) -> int | None:
    return sudden_convergence([step for step, _ in measured], [fidelity for _, fidelity in measured])
