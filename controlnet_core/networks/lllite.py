"""ControlLLLite: a small network in front of single layers of an SDXL UNet, which shifts what they are given.

Each one looks at the hint, embedded once, and at its layer's own input x, and the layer sees x + delta instead of x
(kohya-ss/sd-scripts, networks/control_net_lllite.py, the authors' own).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import ZeroConvError
from ..keys import State
from .configuration import ConfigurationError, shape_of
from .network import describe_hint
from .unet import UNet, UNetConfig

PREFIX = "lllite_unet_"
"""What every name in a file begins with, before the path of the layer; files for transformers have another."""

STRIDES = {1: 8, 2: 16, 3: 32}
"""Pixels of the hint, on a side, for one pixel of the embedding: by the depth of a network's conditioning1."""

Scale = Callable[[int, Tensor], Tensor | None]
"""Scales the delta (B,C,h,w) of encoder block i as `strength.ControlScales` does a residual; `None`: nothing's left."""


class LLLiteError(ZeroConvError):
    """A ControlLLLite and a UNet, or a hint, that do not go together."""


class LLLite(nn.Module):
    """The network of one layer: (its input x, the hint's embedding) -> delta, shaped like x.

    `channels` are x's; `width` those between down and up; `embedding` those of the embedded hint. With `convolution` x
    is (B, channels, h, w), the input of a convolution, else (B, h * w, channels), that of a linear layer.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        embedding: int,
        depth: int,
        convolution: bool,
        *,
        operations: Any = nn,
        **place: Any,
    ):
        super().__init__()
        self.channels, self.convolution, self.stride = channels, convolution, STRIDES[depth]
        half = embedding // 2
        # (channels out, size and stride of the kernel): its patches do not overlap.
        kernels = [(half, 4), *{1: [(embedding, 2)], 2: [(embedding, 4)], 3: [(half, 4), (embedding, 2)]}[depth]]
        layers: list[nn.Module] = []
        for i, (out, kernel) in enumerate(kernels):
            layers += [nn.ReLU()] * (i > 0)
            layers.append(operations.Conv2d(3 if i == 0 else half, out, kernel, stride=kernel, **place))
        self.conditioning1 = nn.Sequential(*layers)

        def project(inner: int, outer: int) -> nn.Module:
            return (
                operations.Conv2d(inner, outer, 1, **place) if convolution else operations.Linear(inner, outer, **place)
            )

        self.down = nn.Sequential(project(channels, width), nn.ReLU())
        self.mid = nn.Sequential(project(width + embedding, width), nn.ReLU())
        self.up = nn.Sequential(project(width, channels))

    def encode_hint(self, hint: Tensor) -> Tensor:
        """Hint (B,3,H,W) in -1..1 -> (B, embedding, ceil(H / stride), ceil(W / stride)).

        The authors' where H and W are multiples of the stride. Elsewhere their embedding lacks the last row or column
        that the UNet's own, rounded up, has: there the hint goes on like its border, and all else stays theirs.
        """
        height, width = hint.shape[2:]
        return self.conditioning1(F.pad(hint, (0, -width % self.stride, 0, -height % self.stride), mode="replicate"))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if not self.convolution:
            embedding = rearrange(embedding, "b c h w -> b (h w) c")
        # The channels are last in a linear layer's input.
        axis = 1 if self.convolution else -1
        embedding = embedding.expand(x.shape[0], *embedding.shape[1:])
        return self.up(self.mid(torch.cat([embedding, self.down(x)], dim=axis)))


class ControlLLLite(nn.ModuleDict):
    """The networks of one file by their names in it, `lllite_unet_` and the path of the layer."""

    kind = "ControlLLLite"
    family = "SDXL"
    hint_channels = 3

    def networks(self) -> Iterator[tuple[str, LLLite]]:
        """Each network with its name."""
        yield from self.items()  # type: ignore[misc]

    def describe(self) -> dict[str, str]:
        """What it takes and gives, in a user's words."""
        return {
            "hint": describe_hint(self.hint_channels),
            "modules": f"{len(self)}, each shifts what one layer of the model is given",
        }

    def encode_hint(self, hint: Tensor) -> dict[str, Tensor]:
        """The embeddings of a hint (B,3,8H,8W) in 0..1, by layer, (B,e,h,w) at the layer's own size; once per size."""
        height, width = hint.shape[2:]
        if hint.shape[1] != self.hint_channels or height % 8 or width % 8:
            raise LLLiteError(
                f"hint has {hint.shape[1]} channels of {width}x{height}; a ControlLLLite takes {self.hint_channels} "
                "channels, and width and height must be multiples of 8: resize the hint to 8 times the latent's size"
            )
        signed = hint * 2 - 1
        return {name: net.encode_hint(signed) for name, net in self.networks()}

    def delta(self, name: str, x: Tensor, embedding: Tensor) -> Tensor:
        """What is added, at strength 1, to the input x of the layer `name`: shaped like x, in the embedding's dtype.

        x is (B, h * w, C) or, for a convolution, (B,C,h,w); `embedding` (B or 1,e,h,w) is that of `encode_hint`.
        Raises LLLiteError where their sizes differ.
        """
        net = self[name]
        height, width = embedding.shape[2:]
        expected = (net.channels, height, width) if net.convolution else (height * width, net.channels)
        if tuple(x.shape[1:]) != expected:
            found, wanted = ("x".join(map(str, shape)) for shape in (x.shape[1:], expected))
            raise LLLiteError(
                f"{name} expects {wanted}, its layer is given {found}: the hint must be 8 times the latent's size, and "
                "no other node may merge or tile what this layer is given"
            )
        return net(x.to(embedding.dtype), embedding)

    def shifted(self, name: str, block: int, x: Tensor, embedding: Tensor, scale: Scale) -> Tensor:
        """x and its delta, dosed by `scale` as a residual of encoder block `block`; x stays as it is."""
        delta = self.delta(name, x, embedding)
        if self[name].convolution:
            dosed = scale(block, delta)
            return x if dosed is None else x + dosed.to(x.dtype)
        dosed = scale(block, rearrange(delta, "b (h w) c -> b c h w", h=embedding.shape[2]))
        return x if dosed is None else x + rearrange(dosed, "b c h w -> b (h w) c").to(x.dtype)

    def mismatch(self, model: UNetConfig, unet: nn.Module | None = None) -> str | None:
        """Why this does not fit a model of that configuration, in one sentence; `None` when it fits.

        Its layers are looked for in `unet`, or, without one, in what a UNet of that configuration would have.
        """
        theirs = model.family
        if theirs != self.family:
            return (
                f"this ControlLLLite is made for {self.family}, the model is {theirs}: use it with an {self.family} "
                f"model, or load a ControlNet made for {theirs}"
            )
        try:
            targets(unet or UNet(model, device="meta"), self)
        except LLLiteError as error:
            return str(error)
        return None


# -- files ------------------------------------------------------------------------------------------------------------


def build(
    weights: State, _metadata: Mapping[str, str] | None = None, *, operations: Any = nn, **place: Any
) -> ControlLLLite:
    """The networks that `weights` are for; raises ConfigurationError naming what one of them lacks."""
    names = dict.fromkeys(key.partition(".")[0] for key in weights if key.startswith(PREFIX))
    return ControlLLLite({name: _build(weights, name, operations, place) for name in names})


def _build(weights: State, name: str, operations: Any, place: dict[str, Any]) -> LLLite:
    def shape(part: str, *ndims: int) -> tuple[int, ...]:
        key = f"{name}.{part}.weight"
        if key not in weights:
            raise ConfigurationError(
                f"{key} is missing: expected all weights of each layer's network; download it again"
            )
        return shape_of(weights, key, weights[key].ndim if weights[key].ndim in ndims else ndims[0])

    width, channels, *kernel = shape("down.0", 2, 4)
    deepest = f"{name}.conditioning1.4.weight" in weights
    return LLLite(
        channels,
        width,
        embedding=shape("conditioning1.0", 4)[0] * 2,
        depth=3 if deepest else 2 if shape("conditioning1.2", 4)[-1] == 4 else 1,
        convolution=bool(kernel),
        operations=operations,
        **place,
    )


# -- a UNet's layers --------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A layer, its path in the UNet, and the number of the encoder block as which its delta is dosed."""

    path: str
    layer: nn.Module
    block: int


def targets(unet: nn.Module, control: ControlLLLite) -> dict[str, Target]:
    """The layer of `unet`, in the ldm layout, for each network's name; raises LLLiteError naming those it lacks.

    A layer of an encoder block has its block's number, one of the middle block the number after the last, and one of
    decoder block j that of the encoder block whose skip connection it reads.
    """
    layers = {PREFIX + path.replace(".", "_"): (path, layer) for path, layer in unet.named_modules() if path}
    blocks = len(getattr(unet, "input_blocks", ()))
    found, missing = {}, []
    for name, net in control.networks():
        path, layer = layers.get(name, ("", None))
        channels = "in_channels" if net.convolution else "in_features"
        block = _block(path, blocks)
        if layer is None or block is None or getattr(layer, channels, None) != net.channels:
            missing.append((name, net))
        else:
            found[name] = Target(path, layer, block)
    if missing:
        name, net = missing[0]
        raise LLLiteError(
            f"the model lacks {len(missing)} of the {len(control)} layers that this ControlLLLite is made for, the "
            f"first {name.removeprefix(PREFIX)}, a {'convolution' if net.convolution else 'linear layer'} of "
            f"{net.channels} channels: use a model of the family and size that it was made for"
        )
    return found


def _block(path: str, blocks: int) -> int | None:
    part, _, rest = path.partition(".")
    number = rest.partition(".")[0]
    if part == "input_blocks":
        return int(number)
    if part == "output_blocks":
        return blocks - 1 - int(number)
    return blocks if part == "middle_block" else None


@contextmanager
def hooked(layers: Mapping[str, nn.Module], shift: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Within, each layer is given `shift(name, x)` for x; afterwards, whatever happens, all is as it was."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda _, args: (shift(name, args[0]), *args[1:])

    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def applied(
    unet: nn.Module, control: ControlLLLite, embeddings: Mapping[str, Tensor], scale: Scale = lambda _, delta: delta
) -> Iterator[None]:
    """Within, `control` acts on `unet` with the embeddings of its hint.

    Several act one after the other: the second sees what the first has done to x, as in the authors' own node.
    """
    places = targets(unet, control)

    def shift(name: str, x: Tensor) -> Tensor:
        return control.shifted(name, places[name].block, x, embeddings[name], scale)

    with hooked({name: place.layer for name, place in places.items()}, shift):
        yield
