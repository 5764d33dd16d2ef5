"""ControlNet: a trainable copy of the UNet's encoder and middle block between zero convolutions (paper, section 3)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ZeroConvError
from ..keys import State
from .configuration import check_heads, describe_mismatch, read_unet_config
from .layers import add
from .network import describe_hint
from .recompute import recomputed
from .residuals import Residuals
from .unet import Encoder, UNetConfig


def zero_convolution(
    in_channels: int, out_channels: int, *, kernel: int = 1, operations: Any = nn, **place: Any
) -> nn.Module:
    """A convolution whose weight and bias start at 0; 1x1 in the paper, 3x3 at the end of the released hint encoder."""
    convolution = operations.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, **place)
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)
    return convolution


class ControlledBlock(nn.Module):
    """y_c = F(x; O) + Z(F(x + Z(c; O_z1); O_c); O_z2), on any module F (paper, equation 2).

    `block` maps (B, in_channels, H, W) to (B, out_channels, H', W'); it is locked and a copy of it is trained. The
    hint's features c are (B, hint_channels, H, W). At the start the output is exactly `block`'s.
    """

    def __init__(
        self,
        block: nn.Module,
        hint_channels: int,
        in_channels: int,
        out_channels: int,
        *,
        operations: Any = nn,
        **place: Any,
    ):
        super().__init__()
        self.copy = copy.deepcopy(block).requires_grad_(True)
        self.locked = block.requires_grad_(False)
        self.zero_in = zero_convolution(hint_channels, in_channels, operations=operations, **place)
        self.zero_out = zero_convolution(out_channels, out_channels, operations=operations, **place)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.locked(x) + self.zero_out(self.copy(x + self.zero_in(c)))


def released_hint_encoder(hint_channels: int, channels: int, *, operations: Any = nn, **place: Any) -> nn.Sequential:
    """The hint encoder of the published weights: (B, hint_channels, H, W) -> (B, channels, H/8, W/8).

    Eight 3x3 convolutions with SiLU between them, the last one zero (lllyasviel/ControlNet, cldm/cldm.py).
    """
    layers: list[nn.Module] = []
    width = hint_channels
    for out, stride in ((16, 1), (16, 1), (32, 2), (32, 1), (96, 2), (96, 1), (256, 2)):
        layers += [operations.Conv2d(width, out, 3, stride=stride, padding=1, **place), nn.SiLU()]
        width = out
    return nn.Sequential(*layers, zero_convolution(width, channels, kernel=3, operations=operations, **place))


def paper_hint_encoder(hint_channels: int, channels: int, *, operations: Any = nn, **place: Any) -> nn.Sequential:
    """The hint encoder of the paper's text: (B, hint_channels, H, W) -> (B, channels, H/8, W/8).

    Four 4x4 convolutions of 16, 32, 64 and 128 channels with ReLU, Gaussian weights (section 3.2), then the zero
    convolution of the hint. Four strides of 2 would end at 1/16 where the text says 1/8, so the fourth has stride 1.
    """
    layers: list[nn.Module] = []
    width = hint_channels
    for out, stride, padding in ((16, 2, 1), (32, 2, 1), (64, 2, 1), (128, 1, 0)):
        convolution = operations.Conv2d(width, out, 4, stride=stride, padding=padding, **place)
        nn.init.normal_(convolution.weight, std=(2.0 / (16 * width)) ** 0.5)
        nn.init.zeros_(convolution.bias)
        layers += [convolution, nn.ReLU()]
        width = out
    # A 4x4 kernel at stride 1 keeps the size only with one more pixel on one side. The padding shares its place with
    # the activation before it, so that every second entry is a convolution, as in the released one: indices are keys.
    layers[5] = nn.Sequential(nn.ReLU(), nn.ZeroPad2d((1, 2, 1, 2)))
    return nn.Sequential(*layers, zero_convolution(width, channels, operations=operations, **place))


HINT_ENCODERS = {"released": released_hint_encoder, "paper": paper_hint_encoder}


class ControlBranch(nn.Module):
    """How a control is joined to its UNet: the hint goes in behind the first block, zero convolutions lead out.

    `_connect` makes them; the rest of a control is a row of blocks and a middle one, which `_collect` runs.
    """

    kind: str
    config: UNetConfig
    recomputing = True

    def _connect(
        self, config: UNetConfig, hint_channels: int, hint_encoder: str, *, operations: Any = nn, **place: Any
    ) -> None:
        """Add the hint encoder (a name in `HINT_ENCODERS`) and a zero convolution for each block of `config`."""
        self.hint_channels = hint_channels
        self.input_hint_block = HINT_ENCODERS[hint_encoder](
            hint_channels, config.model_channels, operations=operations, **place
        )
        self.zero_convs = nn.ModuleList(
            nn.Sequential(zero_convolution(channels, channels, operations=operations, **place))
            for channels in config.skip_channels
        )
        deepest = config.skip_channels[-1]
        self.middle_block_out = nn.Sequential(zero_convolution(deepest, deepest, operations=operations, **place))

    def describe(self) -> dict[str, str]:
        """What it takes and gives, in a user's words."""
        config = self.config
        return {
            "hint": describe_hint(self.hint_channels),
            "residuals": f"{len(config.skip_channels)}+1",
            "width": f"{config.model_channels} channels, multipliers {' '.join(map(str, config.channel_mult))}",
            "text": f"{config.context_dim} numbers a token"
            if config.context_dim
            else "not read, it has no attention to it",
        }

    def connections(self) -> Iterator[nn.Module]:
        """The convolutions that start at 0: the hint encoder's last, one for each encoder block, the middle's."""
        yield self.input_hint_block[-1]
        for connection in (*self.zero_convs, self.middle_block_out):
            yield from connection.children()

    def encode_hint(self, hint: Tensor) -> Tensor:
        """Hint (B, hint_channels, 8H, 8W) in [0,1] -> guided hint (B, model_channels, H, W); once per sampling."""
        height, width = hint.shape[2:]
        if hint.shape[1] != self.hint_channels or height % 8 or width % 8:
            raise ZeroConvError(
                f"hint has {hint.shape[1]} channels of {width}x{height}; this {self.kind} takes {self.hint_channels} "
                "channels, and width and height must be multiples of 8: resize the hint to 8 times the latent's size"
            )
        first, *rest = self.input_hint_block
        h = first(hint)
        for activation, convolution in zip(rest[::2], rest[1::2], strict=True):
            h = recomputed((activation, convolution), h, self.recomputing)
        return h

    def _collect(
        self, x: Tensor, guided_hint: Tensor, blocks: Iterable[nn.Module], middle: nn.Module, *inputs: Tensor
    ) -> Residuals:
        """x through `blocks` and `middle`, each of which takes `inputs` as well, and out through the connections."""
        h = x
        skips = []
        for i, (block, zero) in enumerate(zip(blocks, self.zero_convs, strict=True)):
            h = block(h, *inputs)
            if i == 0:
                if guided_hint.shape[1:] != h.shape[1:]:
                    found, expected = ("x".join(map(str, t.shape[1:])) for t in (guided_hint, h))
                    raise ZeroConvError(
                        f"the guided hint is {found}, this latent needs {expected}: "
                        "encode a hint of 8 times the latent's size"
                    )
                h = add(h, guided_hint)
            skips.append(zero(h))
        return Residuals(tuple(skips), self.middle_block_out(middle(h, *inputs)))


CONNECTIONS = ("zero", "gaussian")
"""How the connections of a new control begin."""


@torch.no_grad()
def connect(control: ControlBranch, connections: str, generator: torch.Generator | None = None) -> None:
    """Set the connections of a new control: "zero" as the paper has them, or "gaussian" as in its ablation.

    Gaussian weights are N(0, 1 / fan-in), so that residuals begin as large as the features that they come from; biases
    are 0. They are drawn on the CPU, from `generator` or torch's own, and so are the same on every device.
    """
    if connections not in CONNECTIONS:
        raise ZeroConvError(f"connections are {' or '.join(CONNECTIONS)}, found {connections!r}: choose one of these")
    for convolution in control.connections():
        for parameter in convolution.parameters():
            nn.init.zeros_(parameter)
            if connections == "gaussian" and parameter.ndim == 4:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)


class ControlNet(Encoder, ControlBranch):
    """The trainable copy with 12+1 (SDXL 9+1) zero convolutions.

    `hint_encoder` is "released" (published weights) or "paper" (the text's own). A new ControlNet's zero convolutions
    are 0; `copy_encoder` gives it a base model's weights.
    """

    kind = "ControlNet"

    def __init__(
        self,
        config: UNetConfig,
        hint_channels: int = 3,
        hint_encoder: str = "released",
        *,
        operations: Any = nn,
        **place: Any,
    ):
        super().__init__(config, operations=operations, **place)
        self._connect(config, hint_channels, hint_encoder, operations=operations, **place)

    @property
    def family(self) -> str:
        """SD1.x, SD2.x or SDXL."""
        return self.config.family

    def mismatch(self, model: UNetConfig) -> str | None:
        """Why this does not fit the model, in one sentence; `None` when it fits."""
        return describe_mismatch(self.config, model, self.kind)

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, guided_hint: Tensor, y: Tensor | None = None
    ) -> Residuals:
        """Noisy latent (B,4,H,W), timestep (B,), context (B,T,C) and guided hint (B or 1,C,H,W) -> residuals.

        Where the samples fall into halves of guidance, which differ in their text alone, one half of the latents,
        timesteps and hints is enough: R of each for a multiple of R contexts (and vectors y), one half after the other.
        What comes before the first attention to the text is then computed once.
        """
        return self._residuals(x, self.embed(x, timesteps, y), context, guided_hint)

    def _residuals(self, x: Tensor, emb: Tensor, context: Tensor, guided_hint: Tensor) -> Residuals:
        residuals = self._collect(x, guided_hint, self.input_blocks, self.middle_block, emb, context)
        return residuals.repeated(len(context))


def build(
    weights: State, metadata: Mapping[str, str] | None = None, *, operations: Any = nn, **place: Any
) -> ControlNet:
    """The ControlNet, not yet filled, whose ldm weights these are; its sizes are read from their shapes."""
    config = read_unet_config(weights, metadata)
    check_heads(config)
    return ControlNet(config, *read_hint_encoder(weights), operations=operations, **place)


def read_hint_encoder(weights: State) -> tuple[int, str]:
    """Channels of the hint, and the name in `HINT_ENCODERS` of what reads it: 4x4 kernels are the paper's."""
    first = weights.get("input_hint_block.0.weight")
    _, hint_channels, *kernel = first.shape if first is not None and first.ndim == 4 else (16, 3, 3, 3)
    return hint_channels, "paper" if kernel == [4, 4] else "released"


class BaseMismatch(ZeroConvError):
    """A base UNet that a control cannot begin as a copy of, or run on."""


def copy_encoder(control: ControlNet, unet_weights: Mapping[str, Tensor]) -> None:
    """Give `control` the encoder and middle block of a base UNet's weights (keys without prefix), as training begins.

    Raises BaseMismatch naming the first parameter that the base lacks.
    """
    own = control.state_dict()
    added = ("zero_convs.", "middle_block_out.", "input_hint_block.")
    copied = [key for key in own if not key.startswith(added)]
    missing = [key for key in copied if key not in unet_weights or unet_weights[key].shape != own[key].shape]
    if missing:
        raise BaseMismatch(
            f"the base UNet lacks {len(missing)} of {len(copied)} encoder weights in the control's shapes, the first "
            f"{missing[0]}: make the control from the base's own configuration"
        )
    control.load_state_dict({key: unet_weights[key] for key in copied}, strict=False)
