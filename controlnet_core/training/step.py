"""One optimizer step: its passes, and what their gradients say; op by op, or as graphs that a device replays."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.dataset import in_unit, to_device
from ..diffusion import add_noise
from . import objective, optimizer
from .distributed import Process
from .inputs import Ahead, Inputs, Passes
from .options import TrainingOptions
from .state import TrainingState

log = logging.getLogger(__name__)

MOST_SHAPES = 16
"""Shapes of a pass that are captured; those that come later run op by op."""


class Backend(Protocol):
    """What graphs need of a device."""

    def refuses(self, device: torch.device) -> str | None:
        """Why nothing is captured on this device; `None` when it may be."""
        ...

    def stream(self) -> AbstractContextManager[Any]:
        """A context for all that is captured, and for all that runs between, after what came before."""
        ...

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """What does again, on the same tensors, all that the function does; the function itself changes nothing."""
        ...


class CudaGraphs:
    """NVIDIA's: one stream, and one pool of memory, since graphs run one after the other."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def refuses(self, device: torch.device) -> str | None:
        """All devices but NVIDIA's."""
        if device.type != "cuda" or torch.version.cuda is None:
            return "graphs are for NVIDIA's devices"
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        return None

    @contextmanager
    def stream(self) -> Any:
        """Ours, between two waits."""
        assert self._stream is not None
        own, other = self._stream, torch.cuda.current_stream(self._stream.device)
        own.wait_stream(other)
        with torch.cuda.stream(own):
            yield
        other.wait_stream(own)

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """A torch.cuda.CUDAGraph."""
        graph = torch.cuda.CUDAGraph()
        # Others go on meanwhile: one thread reads the next pass, one writes a checkpoint.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            function()
        return graph.replay


class Reading:
    """The loss of a step and the norm of its gradient; with `late`, on their way to the CPU from now on."""

    def __init__(self, loss: Tensor, norm: Tensor, late: bool):
        self._numbers, self._arrived = [loss, norm], None
        if late:
            self._numbers = [number.to("cpu", non_blocking=number.is_cuda) for number in self._numbers]
        if late and loss.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(loss.device))

    def wait(self) -> tuple[float, float]:
        """Both, once the device has come that far; late ones do not wait for what it was given since."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, norm = (number.item() for number in self._numbers)
        return loss, norm


class Steps:
    """The steps of a training, each made by `take`.

    With a `backend` that takes the training's device, a pass of each shape and the end of a step run once op by op and
    are captured when they come again: what was launched a thousand times is launched once. What changes from step to
    step (inputs, learning rate, decay) then lies in tensors, and gradients stay where they are. It is given up, with a
    line in the log, where the training cannot be captured; numbers are the same to rounding. The device may then be
    handed the passes of a step (`begin`) before anybody reads the numbers of the one before it.
    """

    def __init__(
        self,
        network: nn.Module,
        state: TrainingState,
        passes: Passes | Ahead,
        alphas: Tensor,
        options: TrainingOptions,
        process: Process,
        backend: Backend | None = None,
    ):
        self._network, self._state, self._passes, self._alphas = network, state, passes, alphas
        self._options, self._process = options, process
        self._total, self._norm, self._share = torch.zeros(3, device=process.device).unbind()
        self._backend = None if backend is None or self._refused(backend) else backend
        self._met: set[Any] = set()
        self._graphs: dict[Any, tuple[Inputs | None, Callable[[], None]]] = {}
        self._has_begun = False
        if self._backend:
            for group in state.optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"], device=process.device)
                group["capturable"] = process.device.type == "cuda"

    def take(self) -> Reading:
        """Make the next step: its loss over all examples, before the weights changed, and the norm of its gradient.

        The norm is that of all gradients before clipping.
        """
        state, options = self._state, self._options
        if not self._has_begun:
            self._make_passes()
        self._has_begun = False
        with self._on_stream():
            for group in state.optimizer.param_groups:
                optimizer.set_rate(group, group["initial_lr"] * optimizer.factor(options, state.step))
            self._share.fill_(optimizer.share(state.decay, state.step + 1))
            self._run("end", None)
        state.step += 1
        return Reading(self._process.mean(self._total), self._norm, late=self._backend is not None)

    def begin(self) -> None:
        """Give the device the passes of the next step, which change no weights; nothing where it is not that fast."""
        if self._backend and self._process.device.type != "cpu":
            self._make_passes()
            self._has_begun = True

    def _make_passes(self) -> None:
        self._total.zero_()
        first = self._state.step * self._options.accumulation
        with self._on_stream():
            for i in range(self._options.accumulation):
                inputs = to_device(self._passes[first + i], self._process.device)
                self._run(_shapes(inputs), inputs, last=i + 1 == self._options.accumulation)

    def _on_stream(self) -> AbstractContextManager[Any]:
        return self._backend.stream() if self._backend else nullcontext()

    def _run(self, key: Any, inputs: Inputs | None, last: bool = True) -> None:
        """A pass over `inputs`, or without any the end of a step; as a graph from the second time on."""
        if key not in self._graphs and self._backend and key in self._met:
            self._capture(key, inputs)
        self._met.add(key)
        if key not in self._graphs:
            with nullcontext() if last else _gradients_apart(self._network):
                self._pass(inputs) if inputs else self._end()
            return
        kept, replay = self._graphs[key]
        if inputs and kept:
            _write(inputs, kept)
        replay()

    def _capture(self, key: Any, inputs: Inputs | None) -> None:
        assert self._backend
        if len(self._graphs) > MOST_SHAPES:
            return
        kept = None if inputs is None else to_device(inputs, self._process.device, copy=True)
        try:
            replay = self._backend.capture(lambda: self._pass(kept) if kept else self._end())
        except RuntimeError as error:
            log.info("graphs are given up (%s): steps run op by op", " ".join(str(error).split())[:200])
            self._backend = None
            self._graphs.clear()  # they write gradients where those of now no longer lie
            return
        self._graphs[key] = kept, replay

    def _pass(self, inputs: Inputs) -> None:
        """Add a pass's share to the gradients and to the loss."""
        loss = pass_loss(self._network, inputs, self._alphas, self._options) / self._options.accumulation
        self._state.scaler.scale(loss).backward()
        self._total += loss.detach()

    def _end(self) -> None:
        """Do what the gradients say."""
        self._norm.copy_(self._state.clip_gradients(self._options.clip))
        self._state.update(self._share, keep_gradients=self._backend is not None)

    def _refused(self, backend: Backend) -> bool:
        reason = backend.refuses(self._process.device)
        if self._process.world > 1:
            reason = "several processes share this training"
        if self._state.scaler.is_enabled():
            reason = "fp16 waits for the device at each step: choose bf16"
        if not isinstance(self._state.optimizer, torch.optim.AdamW):
            reason = "of the optimizers only torch's AdamW can be captured, with its state on the device"
        if reason:
            log.info("no graphs: %s", reason)
        return reason is not None


def pass_loss(network: nn.Module, inputs: Inputs, alphas: Tensor, options: TrainingOptions) -> Tensor:
    """The loss of one pass of a `ControlledUNet` (paper, equation 3)."""
    noisy = add_noise(inputs.latents, inputs.noise, inputs.timesteps, alphas)
    with options.autocast(alphas.device):
        predicted = network(noisy, inputs.timesteps, inputs.context, in_unit(inputs.hint_bytes), inputs.y)
    target = objective.target(options.prediction, inputs.latents, inputs.noise, inputs.timesteps, alphas)
    weights = objective.weights(options, inputs.timesteps, alphas)
    return objective.loss(predicted, target, weights, options.huber)


def _gradients_apart(network: nn.Module) -> AbstractContextManager[Any]:
    """Within it each process adds up its own gradients; the next pass outside exchanges their sum."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


def _tensors(inputs: Inputs) -> list[Tensor | None]:
    return [getattr(inputs, field.name) for field in fields(inputs)]


def _shapes(inputs: Inputs) -> tuple[Any, ...]:
    return tuple(None if each is None else each.shape for each in _tensors(inputs))


def _write(inputs: Inputs, into: Inputs) -> None:
    """Write other inputs of the same shapes over those that a graph reads."""
    for given, kept in zip(_tensors(inputs), _tensors(into), strict=True):
        if given is not None and kept is not None:
            kept.copy_(given, non_blocking=True)
