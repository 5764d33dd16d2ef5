"""A ComfyUI that believes in the second device (tests/second_device.py), as in a GPU with 8 GiB."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from graphs import Run

from .. import second_device
from ..second_device import Transfer

if TYPE_CHECKING:
    from hosting import Host

MEMORY = 8 << 30


@contextmanager
def believed() -> Iterator[None]:
    """A block in which the host, which must be imported, computes on the second device."""
    import comfy.model_management

    management: Any = comfy.model_management

    def free(dev: Any = None, torch_free_too: bool = False, **_: Any) -> Any:
        return (MEMORY, MEMORY) if torch_free_too else MEMORY

    with second_device.on() as device, pytest.MonkeyPatch.context() as patch:
        states = management.VRAMState.NORMAL_VRAM
        answers: dict[str, Any] = {
            name: lambda *_, **__: False
            for name in ("should_use_fp16", "should_use_bf16", "xformers_enabled", "is_nvidia", "is_device_cuda")
        }
        answers |= {"get_torch_device": lambda: device, "cpu_state": management.CPUState.GPU}
        answers |= {"get_free_memory": free, "get_total_memory": lambda *_, **__: MEMORY}
        answers |= {"vram_state": states, "set_vram_to": states, "soft_empty_cache": lambda *_, **__: None}
        for name, value in answers.items():
            patch.setattr(management, name, value)
        yield


@dataclass
class SecondHost:
    """The same host with models, controls and files of its own, which lie on the second device when they run."""

    host: Host
    moves: list[Transfer] = field(default_factory=list)
    calls: list[tuple[float | None, int]] = field(default_factory=list)

    @classmethod
    def beside(cls, folder: Path) -> SecondHost:
        """One whose control files lie in `folder`."""
        from hosting import Host

        return cls(Host(folder))

    def run(self, case: Callable[[Host], Run]) -> Run:
        """What a case gives there; `moves` are then its transfers, `calls` sigma and their number at each UNet call."""
        import folder_paths

        with believed(), pytest.MonkeyPatch.context() as patch, second_device.transfers() as self.moves:
            extensions = folder_paths.supported_pt_extensions
            patch.setitem(folder_paths.folder_names_and_paths, "controlnet", ([str(self.host.folder)], extensions))
            sample = self.host.sample

            def counted(*args: Any, **inputs: Any) -> Run:
                self.calls = []  # of the last sampling
                return sample(*args, before_unet=self._count, **inputs)

            patch.setattr(self.host, "sample", counted)
            return case(self.host)

    def _count(self, _: int) -> None:
        self.calls.append((self.host._sigma, len(self.moves)))

    def later(self, way: str) -> list[str]:
        """What moved this way by lines of the pack after the first sigma's calls of the UNet: shape and line."""
        first = [moves for sigma, moves in self.calls if sigma == self.calls[0][0]]
        between = self.moves[first[-1] : self.calls[-1][1]]
        return [f"{move.shape} {move.line}" for move in between if move.way == way and move.ours]
