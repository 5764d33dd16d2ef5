"""What the network of every kind of control tells of itself, whatever it computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from .unet import UNetConfig


@runtime_checkable
class ControlNetwork(Protocol):
    """A torch module that controls a UNet; what it takes and gives is its kind's own.

    `kind` is what people call it. `family` are the models that it was made for: SD1.x, SD2.x or SDXL. `hint_channels`
    are 3, or another number: of a hint for 1 it is handed the mean of red, green and blue.
    """

    @property
    def kind(self) -> str: ...

    @property
    def family(self) -> str: ...

    @property
    def hint_channels(self) -> int: ...

    def mismatch(self, model: UNetConfig) -> str | None:
        """Why this does not fit the model, in one sentence that says what to load; `None` when it fits."""
        ...

    def encode_hint(self, hint: Tensor) -> Any:
        """What the network makes of a hint (B, hint_channels, H, W) in [0,1] alone; once per sampling."""
        ...

    def describe(self) -> dict[str, str]:
        """What it takes and gives, and what only its kind has: name -> value, in a user's words."""
        ...

    # What follows has every torch module.

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any: ...


def describe_hint(channels: int, multiple: int = 8) -> str:
    """What a hint must be: its channels, and its size, which is a multiple of `multiple`."""
    rounded = f" rounded up to a multiple of {multiple}" if multiple > 8 else ""
    return f"{channels} channel{'s' * (channels > 1)}, 8 times the latent's size{rounded}"
