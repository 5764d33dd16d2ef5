"""Networks of controls as CUDA graphs on a side stream: launched once a call, waited for at the first residual read.

A small UNet step is bound by its launches, and a control beside it by its own. So a pass of a network is captured as
one graph for each set of shapes, and a whole control - inputs, graph, dose, sum - runs on a side stream while the
UNet's encoder runs on the main one. What is captured depends on its static inputs alone. The dose stays outside of it:
strengths, schedules and masks need no new capture, and round as they do without.

Every doubt falls back to the plain path, which gives the same picture: see `Runner._doubt` and `Weights`. No GPU has
run this yet. It is off until the environment says `ZEROCONV_GRAPHS=auto`.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor, nn

from ...controlnet_core.errors import ZeroConvError
from ...controlnet_core.networks.injection import HostControl
from ...controlnet_core.networks.residuals import Residuals
from .capture import Backend, Captured, CudaBackend, Function, Mark

log = logging.getLogger(__name__)

KEY = "zeroconv_graphs"
SWITCH = "ZEROCONV_GRAPHS"
MODES = ("off", "auto")

SHARE = 1 / 10
"""Of a device's memory: all graphs together hold no more; those unused for longest go first."""

MOST = 32
"""Graphs that are held, and shapes that are remembered as met once, however little memory they take."""

COMPILED = "torch.compile"
"""The host's name for its wrapper of a model that is compiled."""


class GraphsError(ZeroConvError):
    """A switch that cannot be meant."""


def mode() -> str:
    """What the environment says: "off", or "auto" where it is to be tried."""
    found = os.environ.get(SWITCH, "off")
    if found not in MODES:
        raise GraphsError(f"{SWITCH} is {found!r}; it is {' or '.join(MODES)}: unset it or choose one of these")
    return found


class Waited(list):
    """Residuals that are waited for before anything of them is read, however somebody reads them."""

    def __init__(self, residuals: Sequence[Tensor | None], mark: Mark):
        super().__init__(residuals)
        self._mark = mark

    def pop(self, *place: Any) -> Any:
        """As a list's."""
        self._mark.wait()
        return super().pop(*place)

    def copy(self) -> list[Any]:
        """As a list's."""
        self._mark.wait()
        return super().copy()

    def __getitem__(self, place: Any) -> Any:
        self._mark.wait()
        return super().__getitem__(place)

    def __iter__(self) -> Iterator[Any]:
        self._mark.wait()
        return super().__iter__()

    def __reversed__(self) -> Iterator[Any]:
        self._mark.wait()
        return super().__reversed__()

    def __add__(self, other: Any) -> Any:
        self._mark.wait()
        return super().__add__(other)


class Weights:
    """The weights that a control reads: the first of `models` is its network's, a second one what that borrows from.

    They are looked at once a run, and whenever the host says that it has moved or patched some.
    """

    def __init__(self, patcher: Any, *models: Any):
        self.patcher, self.models = patcher, models
        self._said: Hashable = None
        self._found: tuple[int, str | None] = (0, None)

    @property
    def network(self) -> nn.Module:
        """The control's own."""
        return self.models[0]

    def look(self, device: torch.device) -> tuple[int, str | None]:
        """A number that stands for the places of all weights, and why no graph may read them there; `None`: it may."""
        names = ("model_loaded_weight_memory", "current_weight_patches_uuid", "model_lowvram")
        said = (device, *(getattr(model, name, None) for model in self.models for name in names))
        if said != self._said:
            self._said, self._found = said, self._look(device)
        return self._found

    def _look(self, device: torch.device) -> tuple[int, str | None]:
        if type(self.patcher) is not comfy.model_patcher.ModelPatcher:
            return 0, "the host moves its weights while it runs"
        if any(getattr(model, "model_lowvram", False) for model in self.models):
            return 0, "its weights are partly offloaded"
        places = []
        for module in (module for model in self.models for module in model.modules()):
            if getattr(module, "weight_function", None) or getattr(module, "bias_function", None):
                return 0, "its weights are patched while it runs"
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.device != device:
                    return 0, "its weights are partly offloaded"
                places.append((tensor.data_ptr(), tensor.dtype))
        return hash(tuple(places)), None


@dataclass
class Held:
    """A graph that is held; `captured` is `None` for what has run once, and for what was given up in run `given_up`."""

    network: weakref.ref[nn.Module]
    places: int
    device: torch.device
    used: int  # in which run
    captured: Captured | None = None
    given_up: int | None = None


class Runner:
    """All graphs of this process, on what a `Backend` gives."""

    def __init__(self, backend: Backend):
        self.backend = backend
        self.held: OrderedDict[Hashable, Held] = OrderedDict()
        self._run = 0
        self._told: weakref.WeakSet[Any] = weakref.WeakSet()  # patchers that tell when they are detached
        self._said: set[tuple[str, str]] = set()

    def begin(self) -> None:
        """Begin a run. Raises GraphsError for a switch that cannot be meant."""
        mode()
        self._run += 1

    @contextmanager
    def beside(
        self, name: str, weights: Weights, device: torch.device, options: dict[str, Any]
    ) -> Iterator[Beside | None]:
        """Run what follows on the side stream, where that may be; else on the main one, with `None`.

        `name` is the control's, for the log; `options` are the host's for this call of the UNet.
        """
        places, doubt = 0, self._doubt(device, options)
        if doubt is None:
            places, doubt = weights.look(device)
            self._drop(lambda held: held.network() is weights.network and held.places != places)
        if doubt is not None:
            if mode() != "off":
                self._say(name, doubt)
            self.backend.join(device)  # what was made beside may be read from now on
            yield None
            return
        with self.backend.side(device):
            yield Beside(self, name, weights, places, device)

    def _doubt(self, device: torch.device, options: dict[str, Any]) -> str | None:
        """Why no graph may run in this call, whatever its weights; `None` when one may."""
        management = comfy.model_management
        if mode() == "off":
            return "it is switched off"
        if (why := self.backend.refuses(device)) is not None:
            return why
        if management.vram_state == management.VRAMState.NO_VRAM:
            return "the host keeps no weights on the device"
        compiled = options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).get(COMPILED)
        if compiled or torch.compiler.is_compiling():
            return "the model is compiled"
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return "gradients are wanted"
        return None

    def run(self, beside: Beside, function: Function, inputs: Sequence[Tensor | None], baked: Hashable) -> Residuals:
        """`function(*inputs)`, by its graph from the second time on that shapes, types and `baked` are the same.

        `baked` is all that it depends on besides its inputs and the weights. The residuals are fresh.
        """
        network = beside.weights.network
        shapes = tuple(None if one is None else (one.shape, one.dtype, one.device) for one in inputs)
        key = (id(network), beside.places, shapes, baked)
        held = self.held.get(key)
        if held is None:
            self._hold(key, Held(weakref.ref(network), beside.places, beside.device, self._run), beside.weights.patcher)
            return function(*inputs)
        self.held.move_to_end(key)
        held.used = self._run
        if held.captured is None and held.given_up != self._run:
            self._capture(beside.name, held, function, inputs)
        return function(*inputs) if held.captured is None else held.captured.replay(inputs)

    def _capture(self, name: str, held: Held, function: Function, inputs: Sequence[Tensor | None]) -> None:
        """Capture where there is room, and else give it up for this run."""
        held.given_up = self._run
        if self.backend.free(held.device) < comfy.model_management.minimum_inference_memory():
            self._say(name, "memory is short")
            return
        try:
            held.captured = self.backend.capture(function, inputs)
        except RuntimeError as error:  # whatever a kernel or another node's patch cannot do inside of a capture
            self._say(name, f"it cannot be captured ({str(error).partition(chr(10))[0]})")
            return
        limit = SHARE * self.backend.total(held.device)
        for key in [key for key, one in self.held.items() if one.used < self._run and one.device == held.device]:
            if self.nbytes(held.device) > limit:
                del self.held[key]
        if self.nbytes(held.device) > limit:
            held.captured = None
            self._say(name, f"graphs would hold more than {SHARE:.0%} of the device's memory")

    def _say(self, name: str, why: str) -> None:
        if (name, why) not in self._said:
            self._said.add((name, why))
            log.info("%s runs without a graph: %s", name, why)

    # -- what is held --------------------------------------------------------------------------------------------------

    def nbytes(self, device: torch.device | None = None) -> int:
        """Bytes that graphs hold, on one device or on all."""
        held = [one for one in self.held.values() if device is None or one.device == device]
        return sum(one.captured.nbytes for one in held if one.captured)

    def drop(self, network: nn.Module) -> None:
        """Let go of all graphs of a network."""
        self._drop(lambda held: held.network() is network)

    def _drop(self, which: Callable[[Held], bool]) -> None:
        for key in [key for key, held in self.held.items() if held.network() is None or which(held)]:
            del self.held[key]

    def _hold(self, key: Hashable, held: Held, patcher: Any) -> None:
        network = held.network
        if patcher not in self._told:
            self._told.add(patcher)
            weakref.finalize(network(), self._drop, lambda _: False)
            patcher.add_callback_with_key(
                CallbacksMP.ON_DETACH, KEY, lambda *_: self._drop(lambda held: held.network() is network())
            )
        self.held[key] = held
        while len(self.held) > MOST:
            self.held.popitem(last=False)


@dataclass
class Beside:
    """A control that runs on the side stream in one call of the UNet."""

    runner: Runner
    name: str
    weights: Weights
    places: int
    device: torch.device

    def run(self, function: Function, inputs: Sequence[Tensor | None], baked: Hashable) -> Residuals:
        """See `Runner.run`."""
        return self.runner.run(self, function, inputs, baked)

    def waited(self, control: HostControl) -> HostControl:
        """What the UNet is given, to be waited for when it is read."""
        tensors = [one for place in control.values() for one in place if one is not None]
        mark = self.runner.backend.mark(self.device, tensors)
        return {place: Waited(residuals, mark) if residuals else residuals for place, residuals in control.items()}


RUNNER = Runner(CudaBackend())
"""The one of this process."""
