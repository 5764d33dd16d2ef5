"""A second device without a GPU: tensors that say they live on `second:0`, and whose numbers lie on the CPU.

What mixes tensors of two devices raises, as on CUDA; so does what Apple's MPS and DirectML cannot do. What moves from
one device to the other is told to whoever listens (`transfers`), for on a GPU it costs, or makes the CPU wait.

    with second_device.on(), second_device.transfers() as moves:
        y = network.to(DEVICE)(x.to(DEVICE))

The numbers are the CPU's own, so that a result is the CPU's to rounding. Built on torch's backend for Python
(torch.utils.backend_registration); there is one in a process, and it stays registered.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, library
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "second"
PACK = Path(__file__).resolve().parent.parent
OURS = tuple(str(PACK / part) for part in ("nodes", "controlnet_core", "annotators", "lab"))

MOVES = {"aten::_to_copy", "aten::copy_", "aten::to", "aten::type_as"}
"""Operations are as autograd sees them or, within inference_mode, as they are written."""
READS = {"aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::nonzero", "aten::is_nonzero"}
POOLS = {"aten::_adaptive_avg_pool2d", "aten::adaptive_avg_pool2d"}
WIDE = {torch.float64, torch.complex128}
"""What MPS has no numbers for."""


class DeviceError(RuntimeError):
    """What a GPU would not have done."""


@dataclass(frozen=True)
class Transfer:
    """Something that went to the device ("upload") or was waited for ("read"), by which line; `ours` is the pack's."""

    way: str
    operation: str
    shape: tuple[int, ...]
    line: str
    ours: bool


_listening: list[list[Transfer]] = []


class Second(Tensor):
    """A tensor there; `inner` has its numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> Second:
        if inner.dtype in WIDE:
            raise DeviceError(f"a device such as MPS has no {inner.dtype}")
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=torch.device(NAME, 0)
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Second:
        copy = Second(self.inner.clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copy._is_param = True  # type: ignore[attr-defined] - torch.nn.Parameter is told by it
        memo[id(self)] = copy
        return copy  # type: ignore[return-value]

    def __repr__(self, **_: Any) -> str:
        return f"Second({self.inner})"

    def tolist(self) -> Any:
        _tell("read", "tolist", self)
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert second:0 device type tensor to numpy: copy it to the CPU first")


def there(value: object) -> TypeGuard[Second]:
    """Whether it is a tensor of the second device."""
    return isinstance(value, Second)


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What `func` gives, on the second device if its tensors are, or where it is told to make one there."""
    name, leaves = func._schema.name, pytree.tree_leaves((args, kwargs))
    if name == "aten::_has_compatible_shallow_copy_type":
        return False
    if name == "aten::detach" and there(args[0]):
        return Second(args[0].inner)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    target = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    if target is None and name in MOVES and len(tensors) > 1:
        target = tensors[0 if name == "aten::copy_" else 1].device
    on_second = any(map(there, tensors)) if target is None else target.type == NAME
    moved = name in MOVES and name != "aten::copy_" and there(args[0]) != on_second
    _check(name, args, tensors)
    _count(name, args, tensors, on_second)
    given = {id(tensor.inner if there(tensor) else tensor): tensor for tensor in reversed(tensors)}

    def plain(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == NAME:
            return torch.device("cpu")
        return value.inner if there(value) else value

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in given:  # changed in place, or as it was
            if not moved:
                return given[id(value)]
            value = value.clone()
        return Second(value) if on_second else value

    args, kwargs = pytree.tree_map(plain, (args, kwargs))
    return pytree.tree_map(placed, func(*args, **kwargs))


def _check(name: str, args: tuple, tensors: list[Tensor]) -> None:
    """Raise DeviceError for what a GPU, MPS or DirectML refuses."""
    if name.startswith("aten::index"):  # indices may be on the CPU or where the indexed tensor is
        indices = [i for i in (args[1] if isinstance(args[1], (list, tuple)) else args[1:2]) if isinstance(i, Tensor)]
        if not there(args[0]) and any(map(there, indices)):
            raise DeviceError(f"{name}: the indexed tensor is on the CPU, an index is not")
        if name.startswith("aten::index_put") and there(args[2]) != there(args[0]) and args[2].dim():
            raise DeviceError(f"{name}: values of another device")
    elif name not in MOVES and len({there(tensor) for tensor in tensors if tensor.dim() or there(tensor)}) > 1:
        found = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise DeviceError(f"{name}: tensors of two devices: {found}")
    if name in POOLS and there(args[0]):
        sizes = [(max(pair), min(pair)) for pair in zip(args[0].shape[-2:], args[1])]
        if any(large % small for large, small in sizes):
            raise DeviceError(f"MPS cannot pool {tuple(args[0].shape)} to {tuple(args[1])}: sizes must divide")


def _count(name: str, args: tuple, tensors: list[Tensor], on_second: bool) -> None:
    if not _listening:
        return
    if name in MOVES:
        source = args[1 if name == "aten::copy_" else 0]
        if there(source) != on_second:
            _tell("upload" if on_second else "read", name, source)
    elif name.startswith("aten::index") and there(args[0]):
        for tensor in tensors[1:]:
            if not there(tensor) and tensor.dim():
                _tell("upload", name, tensor)
    elif name in READS and any(map(there, tensors)):
        _tell("read", name, tensors[0])


def _tell(way: str, operation: str, tensor: Tensor) -> None:
    if not _listening:
        return
    frame: Any = sys._getframe(1)
    while frame is not None and not _is_somebodys(frame.f_code.co_filename):
        frame = frame.f_back
    file = "" if frame is None else frame.f_code.co_filename
    line = "nobody" if frame is None else f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
    for heard in _listening:
        heard.append(Transfer(way, operation, tuple(tensor.shape), line, file.startswith(OURS)))


@cache
def _is_somebodys(file: str) -> bool:
    """Whether a file is neither torch's nor Python's nor this one."""
    return file != __file__ and "site-packages" not in file and "/lib/python" not in file and not file.startswith("<")


class _Dispatched(TorchDispatchMode):
    """Catches what makes or moves tensors from the CPU's side."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in pytree.tree_leaves((args, kwargs)):
            if there(leaf) or (isinstance(leaf, torch.device) and leaf.type == NAME):
                return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _indices(index: Any) -> Any:
    """An index with tensors for its lists of numbers: uploads, as they would be."""
    if isinstance(index, list) and all(isinstance(each, int) for each in index):
        return torch.tensor(index)
    return tuple(map(_indices, index)) if isinstance(index, (list, tuple)) else index


class _Made(TorchFunctionMode):
    """torch.tensor, a list as an index and their like move what they made out of a dispatch mode's sight."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and there(args[0]):
            args = (args[0], _indices(args[1]), *args[2:])
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            like = args[0] if func is torch.Tensor.new_tensor else None
            device = torch.device(kwargs.pop("device", None) or (like.device if like is not None else "cpu"))
            if like is not None:
                func, args, kwargs = torch.tensor, args[1:], {"dtype": like.dtype, **kwargs}
            made = func(*args, **kwargs)
            return made.to(device) if device.type == NAME else func(*args, device=device, **kwargs)
        if func is attention and not torch.is_grad_enabled() and all(map(there, args)):
            # By the CPU's own kernel: torch gives a device that it does not know another, which rounds otherwise.
            plain = {key: value.inner if there(value) else value for key, value in kwargs.items()}
            return Second(func(*(each.inner for each in args), **plain))
        return func(*args, **kwargs)


class _Module:
    """What torch asks of `torch.second`; its random numbers are the CPU's."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield


_kept: list[Any] = []


@cache
def device() -> torch.device:
    """The second device, which torch knows from the first call on: the one at the end of this file."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    _kept.append(library.Library("_", "IMPL", "AutocastPrivateUse1"))
    _kept[0].fallback(library.fallthrough_kernel)  # autocast is there, and changes no numbers
    return torch.device(NAME, 0)


@contextmanager
def on() -> Iterator[torch.device]:
    """A block in which tensors can be made on the second device, and moved to it and back."""
    there = device()
    with _Made(), _Dispatched():
        yield there


@contextmanager
def transfers() -> Iterator[list[Transfer]]:
    """A list that hears of everything that goes to the device and is read from it within the block."""
    heard: list[Transfer] = []
    _listening.append(heard)
    try:
        yield heard
    finally:
        _listening.remove(heard)


device()  # on import: torch's autograd counts devices at the first backward pass and takes no later ones
