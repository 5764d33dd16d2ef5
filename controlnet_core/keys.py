"""Questions to the keys of a state dict, which compose: `has("a") & ~some(starts="b.")`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .limits import BLOCKS

State = Mapping[str, Tensor]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Condition:
    """A yes-or-no question to a state dict; `&`, `|` and `~` compose."""

    ask: Callable[[State], bool]

    def __call__(self, state: State) -> bool:
        return self.ask(state)

    def __and__(self, other: Condition) -> Condition:
        return Condition(lambda state: self(state) and other(state))

    def __or__(self, other: Condition) -> Condition:
        return Condition(lambda state: self(state) or other(state))

    def __invert__(self) -> Condition:
        return Condition(lambda state: not self(state))


def has(*keys: str) -> Condition:
    """Are all of these keys there?"""
    return Condition(lambda state: all(key in state for key in keys))


def some(*, starts: str = "", contains: str = "", ends: str = "") -> Condition:
    """Is there a key that starts, goes on and ends like this?"""
    return Condition(
        lambda state: any(key.startswith(starts) and contains in key and key.endswith(ends) for key in state)
    )


def numbered(state: State, prefix: str) -> int:
    """How many children with numbers there are under `prefix`: one more than the highest number, 0 for none.

    With the keys `blocks.0.weight` and `blocks.11.0.bias`, `blocks.` has 12. A number from `limits.BLOCKS` up is none:
    whoever counts to it would never end.
    """
    digits = (key[len(prefix) :].partition(".")[0] for key in state if key.startswith(prefix))
    numbers = (int(number) for number in digits if number.isdecimal() and len(number) <= len(str(BLOCKS)))
    return max((number + 1 for number in numbers if number < BLOCKS), default=0)


def renamed(state: State, names: Mapping[str, str]) -> Weights:
    """`state` with the longest known module name that each key begins with replaced; unknown keys stay."""

    def new_name(key: str) -> str:
        module = key
        while module and module not in names:
            module = module.rpartition(".")[0]
        return names[module] + key.removeprefix(module) if module else key

    return {new_name(key): tensor for key, tensor in state.items()}


def times(shape: Sequence[int]) -> str:
    """A shape as errors write it, such as 320x4x3x3."""
    return "x".join(map(str, shape)) or "a number"
