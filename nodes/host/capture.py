"""How a function is captured on a device and run beside what the device does otherwise: CUDA's graphs and streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ...controlnet_core.networks.residuals import Residuals

Function = Callable[..., Residuals]
"""Tensors, or `None` in their places, to residuals; it depends on these tensors alone."""


class Mark(Protocol):
    """A moment of the side stream."""

    def wait(self) -> None:
        """Let the current stream go on only after that moment, and keep what was made until it has read it."""
        ...


class Captured(Protocol):
    """A function with the tensors that it reads and writes: `nbytes` of them are held."""

    nbytes: int

    def replay(self, inputs: Sequence[Tensor | None]) -> Residuals:
        """The function of other inputs of the same shapes; what it gives is fresh."""
        ...


class Backend(Protocol):
    """What graphs need of a device."""

    def refuses(self, device: torch.device) -> str | None:
        """Why nothing is captured on this device now; `None` when it may be."""
        ...

    def side(self, device: torch.device) -> Any:
        """A context: what is launched in it runs after what was launched before, and beside what comes."""
        ...

    def join(self, device: torch.device) -> None:
        """Let the current stream go on only after all that was launched beside."""
        ...

    def mark(self, device: torch.device, tensors: Sequence[Tensor]) -> Mark:
        """This moment of the side stream, on which `tensors` were made."""
        ...

    def capture(self, function: Function, inputs: Sequence[Tensor | None]) -> Captured:
        """The function as a graph; raises what the device says where it cannot be one."""
        ...

    def free(self, device: torch.device) -> float:
        """Bytes that are free on a device."""
        ...

    def total(self, device: torch.device) -> float:
        """Bytes that a device has."""
        ...


def static(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Copies of the inputs, to be written over at every replay: no inference tensors, which only some may write to."""
    with torch.inference_mode(False), torch.no_grad():
        return [None if one is None else torch.empty_like(one).copy_(one) for one in inputs]


@torch.no_grad()
def write(inputs: Sequence[Tensor | None], into: Sequence[Tensor | None]) -> None:
    """Write other inputs over static ones."""
    for given, kept in zip(inputs, into, strict=True):
        if given is not None and kept is not None:
            kept.copy_(given, non_blocking=True)


def fresh(residuals: Residuals) -> Residuals:
    """Copies, in as few launches as there are: the next replay writes over what a graph gives."""
    places = [*residuals, *residuals.encoder]
    given = [one for one in places if one is not None]
    copies = [torch.empty_like(one) for one in given]
    torch._foreach_copy_(copies, given)  # type: ignore[attr-defined] - torch has no public name for it
    left = iter(copies)
    made = [None if one is None else next(left) for one in places]
    return Residuals.of(made[: len(residuals)], made[len(residuals) :])


# -- CUDA -------------------------------------------------------------------------------------------------------------


class CudaBackend:
    """One side stream for each device: controls on it run one after the other, beside the UNet."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def refuses(self, device: torch.device) -> str | None:
        """All devices but NVIDIA's; and what is being captured as a part of another graph."""
        if device.type != "cuda" or torch.version.cuda is None:
            return "graphs are for NVIDIA's devices"
        if torch.cuda.is_current_stream_capturing():
            return "it is captured by somebody else"
        return None

    @contextmanager
    def side(self, device: torch.device) -> Iterator[None]:
        """The device's side stream."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield

    def join(self, device: torch.device) -> None:
        """Nothing where no side stream was used."""
        if device in self._streams:
            torch.cuda.current_stream(device).wait_stream(self._streams[device])

    def mark(self, device: torch.device, tensors: Sequence[Tensor]) -> CudaMark:
        """An event of the current stream, which is the side stream."""
        return CudaMark(device, tensors)

    def capture(self, function: Function, inputs: Sequence[Tensor | None]) -> CudaCaptured:
        """Captured on the current stream, which has run the function before."""
        device = next(one.device for one in inputs if one is not None)
        return CudaCaptured(function, inputs, device)

    def free(self, device: torch.device) -> float:
        """As the driver and the allocator say."""
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held

    def total(self, device: torch.device) -> float:
        """As the driver says."""
        return torch.cuda.mem_get_info(device)[1]


class CudaMark:
    """An event of the side stream, and the tensors that were made on it until then."""

    def __init__(self, device: torch.device, tensors: Sequence[Tensor]):
        self._device, self._tensors = device, tensors
        self._stream = torch.cuda.current_stream(device)
        self._event = torch.cuda.Event()
        self._event.record(self._stream)

    def wait(self) -> None:
        """Of the streams that read, one is the UNet's; the other is the side stream, which need not wait for itself."""
        stream = torch.cuda.current_stream(self._device)
        if stream == self._stream:
            return
        stream.wait_event(self._event)
        for tensor in self._tensors:
            tensor.record_stream(stream)
        self._tensors = ()  # each is the UNet's alone from now on, and goes when that has read it


class CudaCaptured:
    """A torch.cuda.CUDAGraph and the tensors that it reads and writes."""

    def __init__(self, function: Function, inputs: Sequence[Tensor | None], device: torch.device):
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        self._inputs = static(inputs)
        self._graph = torch.cuda.CUDAGraph()
        # Its memory is its own, so that it goes with it. Other threads, such as a second device's, may go on meanwhile.
        with torch.cuda.graph(self._graph, stream=torch.cuda.current_stream(device), capture_error_mode="thread_local"):
            self._outputs = function(*self._inputs)
        own = self._outputs.nbytes + sum(one.nbytes for one in self._inputs if one is not None)
        self.nbytes = max(own, torch.cuda.memory_reserved(device) - before)

    def replay(self, inputs: Sequence[Tensor | None]) -> Residuals:
        """On the current stream, which is the side stream."""
        write(inputs, self._inputs)
        for one in inputs:
            if one is not None:
                one.record_stream(torch.cuda.current_stream(one.device))
        self._graph.replay()
        return fresh(self._outputs)
