"""What stands in for CUDA's graphs and streams on a CPU: a tape of operations, and residuals that come late.

A capture records every operation that torch is asked for, with the tensors that it was given; a replay does the same
operations on the same tensors, with only the static inputs written over. So whatever a pass reads besides them - a
value of Python, a weight that somebody has replaced - is as it was at the capture, as in a CUDA graph.

What runs beside is there at once on a CPU. So the residuals are taken out, and come back where they are waited for:
who reads earlier gets NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

if TYPE_CHECKING:
    from zeroconv.controlnet_core.networks.residuals import Residuals
    from zeroconv.nodes.host.capture import Function

GIB = 2**30


class NotCapturable(RuntimeError):
    """What no graph can do."""


class Recorder(TorchDispatchMode):
    """Keeps every operation in `tape`; one that reads the device or brings numbers from outside raises."""

    READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select")
    BRINGS = ("lift_fresh", "lift_fresh_copy", "lift", "_pin_memory")

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name == "index" and any(one is not None and one.dtype == torch.bool for one in args[1])
        if name in self.READS or name in self.BRINGS or masks:
            raise NotCapturable(f"operation not permitted when stream is capturing: {name}")
        result = func(*args, **(kwargs or {}))
        self.tape.append((func, args, kwargs or {}, tree_flatten(result)[0]))
        return result


class Tape:
    """A captured function."""

    def __init__(self, function: Function, inputs: Sequence[Tensor | None]):
        from zeroconv.nodes.host.capture import static

        self.inputs = static(inputs)
        with Recorder() as recorder:
            self.outputs = function(*self.inputs)
        self.tape = recorder.tape
        self.nbytes = self.outputs.nbytes + sum(one.nbytes for one in self.inputs if one is not None)
        self.replays = 0

    def replay(self, inputs: Sequence[Tensor | None]) -> Residuals:
        """The same operations on the same tensors."""
        from zeroconv.nodes.host.capture import fresh, write

        write(inputs, self.inputs)
        made: dict[int, Tensor] = {}

        def now(tensor: Tensor) -> Tensor:
            return made.get(id(tensor), tensor)

        for func, args, kwargs, results in self.tape:
            again = func(*tree_map_only(Tensor, now, args), **tree_map_only(Tensor, now, kwargs))
            for was, new in zip(results, tree_flatten(again)[0], strict=True):
                if isinstance(was, Tensor):
                    made[id(was)] = new
        self.replays += 1
        return fresh(self.outputs.mapped(lambda _, residual: now(residual)))


class LateMark:
    """A moment at which `tensors` come back; until then there is nothing in them."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.waits = 0
        self._late = [(tensor, tensor.clone()) for tensor in tensors]
        for tensor, _ in self._late:
            tensor.fill_(torch.nan)

    def wait(self) -> None:
        """Bring them back, once."""
        self.waits += 1
        for tensor, value in self._late:
            with torch.inference_mode(tensor.is_inference()):
                tensor.copy_(value)
        self._late = []


class StandIn:
    """A backend on the CPU."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []  # all that were captured
        self.marks: list[LateMark] = []
        self.entered = self.joined = 0
        self.why: str | None = None
        self.room, self.size = 8 * GIB, 8 * GIB
        self._inside = False

    @property
    def replays(self) -> int:
        """How many passes were replayed."""
        return sum(tape.replays for tape in self.tapes)

    def refuses(self, device: torch.device) -> str | None:
        """As the test says."""
        return self.why

    @contextmanager
    def side(self, device: torch.device) -> Iterator[None]:
        """Nothing is nested in it."""
        assert not self._inside
        self._inside = True
        self.entered += 1
        try:
            yield
        finally:
            self._inside = False

    def join(self, device: torch.device) -> None:
        """Counted."""
        self.joined += 1

    def mark(self, device: torch.device, tensors: Sequence[Tensor]) -> LateMark:
        """Recorded on the side stream."""
        assert self._inside
        self.marks.append(LateMark(tensors))
        return self.marks[-1]

    def capture(self, function: Function, inputs: Sequence[Tensor | None]) -> Tape:
        """Captured on the side stream."""
        assert self._inside
        self.tapes.append(Tape(function, inputs))
        return self.tapes[-1]

    def free(self, device: torch.device) -> float:
        """As the test says."""
        return self.room

    def total(self, device: torch.device) -> float:
        """As the test says."""
        return self.size
