"""T2I-Adapter: a small network that turns a hint into four feature maps, added to what the UNet's encoder computes.

TencentARC/T2I-Adapter, ldm/modules/encoders/adapter.py (Mou et al., "T2I-Adapter", arXiv:2302.08453). It sees neither
the noisy latent nor the time nor the prompt, so it runs once per sampling. Attribute names are the published keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ZeroConvError
from ..keys import Condition, State, Weights, has, numbered, renamed, some
from .configuration import ConfigurationError, shape_of
from .layers import Downsample
from .network import describe_hint
from .residuals import Residuals
from .unet import UNetConfig


class AdapterError(ZeroConvError):
    """A hint that an adapter cannot read, or an adapter that a layout cannot hold."""


@dataclass(frozen=True)
class InjectionPoints:
    """Where the four feature maps go in a UNet of `encoder_blocks` blocks.

    `places[i]` is the encoder block after which feature i is added, or `encoder_blocks` for the middle block; `levels`
    says how often the latent has been halved there.
    """

    family: str
    encoder_blocks: int
    places: tuple[int, ...]
    levels: tuple[int, ...]


INJECTION_POINTS = {
    8: InjectionPoints("SD1.x", encoder_blocks=12, places=(2, 5, 8, 11), levels=(0, 1, 2, 3)),
    16: InjectionPoints("SDXL", encoder_blocks=9, places=(3, 5, 8, 9), levels=(1, 1, 2, 2)),
}
"""By the side of the pixel blocks that an adapter unshuffles (TencentARC/T2I-Adapter, for SD1.x ldm/modules/
diffusionmodules/openaimodel.py and for SDXL models/unet.py; diffusers, unet_2d_condition.py, does the same)."""

STAGES = 4
"""Every published adapter has four stages; how many blocks a stage has follows from it."""

TAKES = {"SD1.x": "SD1.x", "SD2.x": "SD1.x", "SDXL": "SDXL"}
"""Which adapters a model takes. SD2.x's encoder has SD1.x's features and an adapter reads no text, so it runs there as
well; it was trained beside SD1.x all the same."""


@dataclass(frozen=True)
class AdapterConfig:
    """Hyperparameters of a T2I-Adapter; the defaults are the published full adapters for SD1.x.

    `channels` of the four feature maps; `hint_multiple` is the side of the pixel blocks that are unshuffled (8, or 16
    for SDXL); `blocks` residual blocks a stage; `kernel` of a full adapter's second convolution in each of them;
    `light` is the variant whose stages narrow to a quarter of their channels; `learned_halving` halves with strided
    convolutions instead of averages.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    hint_channels: int = 3
    hint_multiple: int = 8
    blocks: int = 2
    kernel: int = 1
    light: bool = False
    learned_halving: bool = False


class AdapterBlock(nn.Module):
    """Residual block of a full adapter: (B, channels, H, W) -> (B, out_channels, H, W), halved first by `halve`."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int,
        halve: nn.Module | None,
        *,
        operations: Any = nn,
        **place: Any,
    ):
        super().__init__()
        self.down_opt = halve
        same = {"padding": kernel // 2, **place}
        self.in_conv = None if channels == out_channels else operations.Conv2d(channels, out_channels, kernel, **same)
        self.block1 = operations.Conv2d(out_channels, out_channels, 3, padding=1, **place)
        self.block2 = operations.Conv2d(out_channels, out_channels, kernel, **same)

    def forward(self, x: Tensor) -> Tensor:
        if self.down_opt is not None:
            x = self.down_opt(x)
        if self.in_conv is not None:
            x = self.in_conv(x)
        return x + self.block2(F.relu(self.block1(x)))


class LightStage(nn.Module):
    """A whole stage of a light adapter: its residual blocks work on a quarter of `out_channels`."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        blocks: int,
        halve: nn.Module | None,
        *,
        operations: Any = nn,
        **place: Any,
    ):
        super().__init__()
        inner = out_channels // 4
        self.down_opt = halve
        self.in_conv = operations.Conv2d(channels, inner, 1, **place)
        self.body = nn.Sequential(
            *(AdapterBlock(inner, inner, 3, None, operations=operations, **place) for _ in range(blocks))
        )
        self.out_conv = operations.Conv2d(inner, out_channels, 1, **place)

    def forward(self, x: Tensor) -> Tensor:
        if self.down_opt is not None:
            x = self.down_opt(x)
        return self.out_conv(self.body(self.in_conv(x)))


class T2IAdapter(nn.Module):
    """A T2I-Adapter, full or light, for the UNets of SD1.x (SD2.x's encoder has the same features) or of SDXL."""

    kind = "T2I-Adapter"

    def __init__(self, config: AdapterConfig, *, operations: Any = nn, **place: Any):
        super().__init__()
        self.config = config
        self.points = INJECTION_POINTS[config.hint_multiple]
        unshuffled = config.hint_channels * config.hint_multiple**2
        first = unshuffled if config.light else config.channels[0]
        self.conv_in = None if config.light else operations.Conv2d(unshuffled, first, 3, padding=1, **place)
        self.body = nn.ModuleList()
        for stage, (channels, out_channels) in enumerate(zip((first, *config.channels), config.channels)):
            halve = None
            if stage > 0 and self.points.levels[stage] > self.points.levels[stage - 1]:
                halve = nn.AvgPool2d(2, ceil_mode=True)
                if config.learned_halving:
                    halve = Downsample(channels, operations=operations, **place)
            if config.light:
                self.body.append(
                    LightStage(channels, out_channels, config.blocks, halve, operations=operations, **place)
                )
                continue
            for i in range(config.blocks):
                ends = (channels, halve) if i == 0 else (out_channels, None)
                self.body.append(
                    AdapterBlock(ends[0], out_channels, config.kernel, ends[1], operations=operations, **place)
                )

    @property
    def family(self) -> str:
        """SD1.x or SDXL: the models that it was trained beside."""
        return self.points.family

    @property
    def hint_channels(self) -> int:
        """3, or 1: the caller then hands it the mean of red, green and blue."""
        return self.config.hint_channels

    @property
    def hint_multiple(self) -> int:
        """Width and height of a hint must be multiples of this: round 8 times the latent's size up to it."""
        return self.config.hint_multiple

    def describe(self) -> dict[str, str]:
        """What it takes and gives, in a user's words."""
        config, points = self.config, self.points
        places = ("the middle" if place == points.encoder_blocks else str(place) for place in points.places)
        return {
            "variant": "light" if config.light else "full",
            "hint": describe_hint(self.hint_channels, self.hint_multiple),
            "features": f"{' '.join(map(str, config.channels))} channels, after encoder blocks {', '.join(places)}",
        }

    def mismatch(self, model: UNetConfig) -> str | None:
        """Why the adapter does not fit the model, in one sentence; `None` when it fits (SD2.x takes SD1.x's)."""
        theirs, points = model.family, self.points
        if TAKES[theirs] != self.family:
            also = "" if TAKES[theirs] == theirs else f", which {theirs} takes too"
            return (
                f"this T2I-Adapter is made for {self.family}, the model is {theirs}: "
                f"load a T2I-Adapter made for {TAKES[theirs]}{also}"
            )
        load = "load a T2I-Adapter made for this model"
        blocks = len(model.skip_channels)
        if blocks != points.encoder_blocks:
            return (
                f"this {self.family} T2I-Adapter joins a UNet of {points.encoder_blocks} encoder blocks, "
                f"the {theirs} model has {blocks}: {load}"
            )
        deepest = [min(place, blocks - 1) for place in points.places]  # the middle block is as the last encoder block
        for what, found, expected in (
            ("channels", self.config.channels, [model.skip_channels[i] for i in deepest]),
            ("halvings of the latent", points.levels, [model.skip_levels[i] for i in deepest]),
        ):
            if tuple(found) != tuple(expected):
                found, expected = (" ".join(map(str, numbers)) for numbers in (found, expected))
                return (
                    f"the features of this {self.family} T2I-Adapter have {found} {what}, "
                    f"the {theirs} model's encoder has {expected} there: {load}"
                )
        return None

    def encode_hint(self, hint: Tensor) -> Residuals:
        """All that an adapter does: the residuals of a hint, which change with no step."""
        return self(hint)

    def forward(self, hint: Tensor) -> Residuals:
        """Hint (B, hint_channels, H, W) in 0..1 -> the four features as residuals that join the encoder itself.

        12 `encoder` entries (SDXL 9, and `middle`), the features' among them, the others `None`. H and W are multiples
        of `hint_multiple`; each feature is as large as the encoder there, odd sizes rounded up. Halving an odd size
        averages what is left at the far edge (diffusers); ComfyUI's own loader pads both edges there, so that it
        differs at odd sizes and agrees at even ones. Raises AdapterError for another hint.
        """
        multiple = self.hint_multiple
        height, width = hint.shape[2:]
        if hint.shape[1] != self.hint_channels or height % multiple or width % multiple:
            raise AdapterError(
                f"hint has {hint.shape[1]} channels of {width}x{height}; this T2I-Adapter takes {self.hint_channels}, "
                f"and width and height must be multiples of {multiple}: resize the hint to "
                f"{-(-width // multiple) * multiple}x{-(-height // multiple) * multiple}, average its channels for one"
            )
        x = F.pixel_unshuffle(hint, multiple)
        if self.conv_in is not None:
            x = self.conv_in(x)
        added: list[Tensor | None] = [None] * (self.points.encoder_blocks + 1)
        every = len(self.body) // STAGES
        for stage, place in enumerate(self.points.places):
            for block in self.body[every * stage : every * (stage + 1)]:
                x = block(x)
            added[place] = x
        *encoder, middle = added
        return Residuals((None,) * len(encoder), middle, tuple(encoder))


# -- weights ----------------------------------------------------------------------------------------------------------

LAYERS = {64: (1, 8), 192: (3, 8), 256: (1, 16), 768: (3, 16)}
"""Channels after the unshuffle: (hint channels, side of the pixel blocks)."""


def read_adapter_config(weights: State) -> AdapterConfig:
    """The configuration of the adapter whose canonical (TencentARC) weights these are.

    Raises ConfigurationError when a key is missing or a size is none that adapters have.
    """
    light = "body.0.out_conv.weight" in weights
    first = "body.0.in_conv.weight" if light else "conv_in.weight"
    unshuffled = shape_of(weights, first, 4)[1]
    if unshuffled not in LAYERS:
        raise ConfigurationError(
            f"{first} reads {unshuffled} channels: expected 64 or 192 (SD1.x, one or three hint channels) or 256 or "
            "768 (SDXL)"
        )
    entries = numbered(weights, "body.")
    if entries == 0 or entries % STAGES or (light and entries != STAGES):
        raise ConfigurationError(
            f"body has {entries} entries: expected {STAGES} stages of " + ("one each" if light else "equal length")
        )
    every = entries // STAGES
    last = "out_conv" if light else "block1"
    return AdapterConfig(
        channels=tuple(shape_of(weights, f"body.{every * stage}.{last}.weight", 4)[0] for stage in range(STAGES)),
        hint_channels=LAYERS[unshuffled][0],
        hint_multiple=LAYERS[unshuffled][1],
        blocks=numbered(weights, "body.0.body.") if light else every,
        kernel=3 if light else shape_of(weights, "body.0.block2.weight", 4)[2],
        light=light,
        learned_halving=some(ends=".down_opt.op.weight")(weights),
    )


def build(
    weights: State, _metadata: Mapping[str, str] | None = None, *, operations: Any = nn, **place: Any
) -> T2IAdapter:
    """The network for these canonical weights, without them; an adapter's metadata says nothing that shapes do not."""
    return T2IAdapter(read_adapter_config(weights), operations=operations, **place)


PREFIX = "adapter."
"""Before every key in diffusers' files, and in TencentARC's checkpoints that hold more than one part."""

TENCENTARC: Condition = has("body.0.out_conv.weight") | has("conv_in.weight", "body.0.block1.weight")
WRAPPED: Condition = has(f"{PREFIX}body.0.out_conv.weight", f"{PREFIX}body.0.body.0.block1.weight") | has(
    f"{PREFIX}conv_in.weight", f"{PREFIX}body.0.block1.weight"
)
DIFFUSERS: Condition = has(f"{PREFIX}body.0.resnets.0.block1.weight")


def from_tencentarc(state: State) -> Weights:
    """The canonical weights of an adapter in its authors' layout, with or without their prefix."""
    return {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}


def from_diffusers(state: State) -> Weights:
    """The canonical weights of a diffusers T2IAdapter; keys that it does not have stay, to be named on loading."""
    light = f"{PREFIX}body.0.out_conv.weight" in state
    names = dict(_names(light, numbered(state, f"{PREFIX}body."), numbered(state, f"{PREFIX}body.0.resnets.")))
    return renamed(state, names)


def to_diffusers(weights: State) -> Weights:
    """The inverse, for saving. Raises AdapterError for an adapter that diffusers' network cannot express."""
    config = read_adapter_config(weights)
    if config.learned_halving or (config.kernel == 3 and not config.light):
        what = "halves with convolutions" if config.learned_halving else "has 3x3 kernels where diffusers has 1x1"
        raise AdapterError(f"this T2I-Adapter {what}, which diffusers' network cannot: save it in its own layout (ldm)")
    names = _names(config.light, STAGES, config.blocks)
    return renamed(weights, {ours: theirs for theirs, ours in names})


def _names(light: bool, stages: int, blocks: int) -> Iterator[tuple[str, str]]:
    """Every module of an adapter: (its name in diffusers, its name in TencentARC's files)."""
    yield f"{PREFIX}conv_in", "conv_in"
    for i in range(stages):
        ours = f"body.{i}" if light else f"body.{blocks * i}"
        for part in ("in_conv", "out_conv"):
            yield f"{PREFIX}body.{i}.{part}", f"{ours}.{part}"
        for j in range(blocks):
            block = f"body.{i}.body.{j}" if light else f"body.{blocks * i + j}"
            for part in ("block1", "block2"):
                yield f"{PREFIX}body.{i}.resnets.{j}.{part}", f"{block}.{part}"
