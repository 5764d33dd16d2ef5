"""ControlNet-lite: each copied block replaced by one convolution that has nothing of the base (paper, ablations)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..keys import State, numbered, some
from .configuration import ConfigurationError, shape_of
from .controlnet import ControlBranch, read_hint_encoder
from .layers import Downsample
from .residuals import Residuals
from .unet import UNetConfig

LITE = some(starts="lite_blocks.")
"""The question that tells these weights; the keys are ours, since none were ever published."""

GAIN = 1.68
"""1 / sqrt(E[silu(z)^2]) for normal z: with weights N(0, GAIN^2 / fan-in) the deepest features are as large as the
first. torch's own beginning shrinks them a hundredfold, and leaves nothing to learn from but the biases."""


class ControlNetLite(ControlBranch):
    """A ControlNet of one 3x3 convolution and SiLU for each encoder block and the middle block; stride 2 as they have.

    No attention, timestep or text: of `config` it depends on the latent's channels and on the channels and levels of
    the skip connections. Its convolutions begin random, its connections at 0. It is called as a ControlNet is.
    """

    kind = "ControlNet-lite"

    def __init__(
        self,
        config: UNetConfig,
        hint_channels: int = 3,
        hint_encoder: str = "released",
        *,
        operations: Any = nn,
        **place: Any,
    ):
        super().__init__()
        self.config = config
        self.lite_blocks = nn.ModuleList()
        channels, level = config.in_channels, 0
        for width, depth in zip(config.skip_channels, config.skip_levels, strict=True):
            # Where the level is deeper, the key ends in .op, as the UNet's own halving does: so files tell strides.
            if depth > level:
                convolution = Downsample(channels, operations=operations, **place)
            else:
                convolution = operations.Conv2d(channels, width, 3, padding=1, **place)
            self.lite_blocks.append(nn.Sequential(convolution, nn.SiLU()))
            channels, level = width, depth
        self.lite_middle = nn.Sequential(operations.Conv2d(channels, channels, 3, padding=1, **place), nn.SiLU())
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
            if parameter.ndim == 4:
                nn.init.normal_(parameter, std=GAIN * parameter[0].numel() ** -0.5)
        self._connect(config, hint_channels, hint_encoder, operations=operations, **place)

    @property
    def family(self) -> str:
        """SD1.x, whose skip connections SD2.x has too, or SDXL: told from the number of levels."""
        return "SDXL" if len(self.config.channel_mult) == 3 else "SD1.x"

    def mismatch(self, model: UNetConfig) -> str | None:
        """Why it does not fit the model, in one sentence; `None` when it fits (SD2.x takes SD1.x's)."""
        theirs, config = model.family, self.config
        for what, found, expected in (
            ("encoder blocks", (len(config.skip_channels),), (len(model.skip_channels),)),
            ("halvings of the latent before its skip connections", config.skip_levels, model.skip_levels),
            ("channels in its skip connections", config.skip_channels, model.skip_channels),
            ("latent channels", (config.in_channels,), (model.out_channels,)),
        ):
            if found != expected:
                found, expected = (" ".join(map(str, numbers)) for numbers in (found, expected))
                return (
                    f"this {self.kind} is made for {self.family} with {found} {what}, the {theirs} model has "
                    f"{expected}: load a control made for this model"
                )
        return None

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,  # noqa: ARG002 - called as a ControlNet is
        context: Tensor,  # noqa: ARG002
        guided_hint: Tensor,
        y: Tensor | None = None,  # noqa: ARG002
    ) -> Residuals:
        """Noisy latent (B,4,H,W) and guided hint (B or 1,C,H,W) -> residuals; the rest is not read."""
        return self._collect(x, guided_hint, self.lite_blocks, self.lite_middle)


def build(
    weights: State, _metadata: Mapping[str, str] | None = None, *, operations: Any = nn, **place: Any
) -> ControlNetLite:
    """The ControlNet-lite, not yet filled, whose weights these are; its sizes are read from keys and shapes."""
    return ControlNetLite(read_config(weights), *read_hint_encoder(weights), operations=operations, **place)


def read_config(weights: State) -> UNetConfig:
    """What a ControlNet-lite depends on; the rest is that of a UNet with no attention and no text.

    Raises ConfigurationError where a level has other blocks than the first.
    """
    model_channels, in_channels = shape_of(weights, "lite_blocks.0.0.weight", 4)[:2]
    levels: list[list[int]] = [[]]
    for i in range(1, numbered(weights, "lite_blocks.")):
        if f"lite_blocks.{i}.0.op.weight" in weights:
            levels.append([])
        else:
            levels[-1].append(shape_of(weights, f"lite_blocks.{i}.0.weight", 4)[0])
    for number, level in enumerate(levels):
        if len(level) != len(levels[0]) or len(set(level)) != 1 or level[0] % model_channels:
            raise ConfigurationError(
                f"level {number} of lite_blocks has convolutions of {' '.join(map(str, level)) or 'no'} channels: "
                f"expected {len(levels[0])} of one multiple of {model_channels}"
            )
    return UNetConfig(
        in_channels=in_channels,
        model_channels=model_channels,
        channel_mult=tuple(level[0] // model_channels for level in levels),
        num_res_blocks=len(levels[0]),
        transformer_depth=(0,) * len(levels),
        transformer_depth_middle=-1,
        context_dim=0,
    )
