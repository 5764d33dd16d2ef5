"""Control-LoRA: a ControlNet kept as low-rank differences from its base UNet, whose layers it borrows while it runs.

Where a file has `NAME.up` and `NAME.down`, the weight is base + up @ down (ComfyUI, comfy/controlnet.py; files as
Stability-AI/stability-ComfyUI-nodes, control_lora_save.py, writes them). Nothing is ever merged or copied: the base's
own layers are called, so that whatever the host does to them (offloading, casting, LoRA patches) holds for the control
as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import ZeroConvError
from ..keys import State, Weights, times
from .configuration import ConfigurationError, check_heads, read_unet_config, shape_of
from .controlnet import HINT_ENCODERS, BaseMismatch, ControlNet, read_hint_encoder
from .unet import UNetConfig

BORROWED = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.")
"""The parts that a base UNet has too; the rest of a ControlNet is always its own."""


class NotBound(ZeroConvError, RuntimeError):
    """A Control-LoRA was run without the base UNet whose layers it borrows."""


class BorrowedLayer(nn.Module):
    """A layer of the base UNet as the control has it: base(x) + up(down(x)), with a bias of its own or the base's.

    `like` is a layer of the same sizes. `rank` 0 leaves the weight as the base has it; `own_bias` says whether there is
    a bias that replaces the base's. Takes and gives what `like` does.
    """

    def __init__(self, name: str, like: nn.Module, rank: int, own_bias: bool, *, operations: Any = nn, **place: Any):
        super().__init__()
        self.name = name
        self.sizes = _sizes(like)
        self.own_bias = own_bias
        # Weak, and no child: the base stays out of the state dict, and is freed even when an error prevents `unbind`.
        self._base: weakref.ref[nn.Module] | None = None
        self._base_bias: Tensor | None = None
        if rank and isinstance(like, nn.Conv2d):
            same = {"stride": like.stride, "padding": like.padding}
            self.down = operations.Conv2d(like.in_channels, rank, like.kernel_size, **same, bias=False, **place)
            self.up = operations.Conv2d(rank, like.out_channels, 1, bias=own_bias, **place)
        elif rank and isinstance(like, nn.Linear):
            self.down = operations.Linear(like.in_features, rank, bias=False, **place)
            self.up = operations.Linear(rank, like.out_features, bias=own_bias, **place)
        elif rank:
            raise ConfigurationError(f"{name} is a {type(like).__name__}, of which there is no low-rank difference")
        elif own_bias:
            self.bias = nn.Parameter(torch.empty_like(like.bias))  # type: ignore[arg-type]
        self.rank = rank

    def find(self, base: nn.Module) -> nn.Module:
        """The layer of this name in `base`; raises BaseMismatch where there is none of these sizes."""
        try:
            layer = base.get_submodule(self.name)
        except AttributeError:
            layer = None
        found = {} if layer is None else _sizes(layer)
        if layer is None or found != self.sizes:
            raise BaseMismatch(
                f"{self.name} of the base UNet has {_text(found)}, this Control-LoRA borrows one with "
                f"{_text(self.sizes)}: use it with a model of the family and size it was made for"
            )
        return layer

    def bind(self, layer: nn.Module | None) -> None:
        """Borrow `layer`, or nothing from now on."""
        self._base = None if layer is None else weakref.ref(layer)
        self._base_bias = None

    def forward(self, x: Tensor) -> Tensor:
        base = self._base and self._base()
        if base is None:
            raise NotBound(
                f"this Control-LoRA is bound to no base UNet, and {self.name} is the base's: call bind(unet) first, "
                "and keep that UNet while the control runs"
            )
        y = _frozen(base, x)
        if self.own_bias:
            y = y - self._bias_of(base, x)
        if self.rank:
            return y + self.up(self.down(x))
        return y + _over_channels(self.bias.to(y), x) if self.own_bias else y

    @torch.no_grad()
    def _bias_of(self, base: nn.Module, x: Tensor) -> Tensor:
        """The bias with which `base` runs: its answer to zeros, asked once after each bind.

        Its attribute would not do: it may lie on another device, in another type, or wait for a patch.
        """
        found = self._base_bias
        if found is None or (found.dtype, found.device) != (x.dtype, x.device):
            if x.ndim == 4:
                found = base(x.new_zeros(1, x.shape[1], 2, 2))[:, :, :1, :1]
            else:
                found = base(x.new_zeros(1, x.shape[-1]))
            self._base_bias = found
        return found


class ControlLora(ControlNet):
    """A ControlNet whose encoder is the base UNet's, changed by low-rank differences.

    `ranks` gives the rank of each layer that has a difference, `own` the state-dict keys that the control has itself;
    every other parameter of the encoder is the base's. `bind` it to a base before it runs, in the base's dtype; without
    one it raises NotBound.
    """

    kind = "Control-LoRA"

    def __init__(
        self,
        config: UNetConfig,
        ranks: Mapping[str, int],
        own: Collection[str],
        hint_channels: int = 3,
        hint_encoder: str = "released",
        *,
        operations: Any = nn,
        **place: Any,
    ):
        super().__init__(config, hint_channels, hint_encoder, operations=operations, **place)
        for name, layer in list(self.named_modules()):
            if not name.startswith(BORROWED) or not layer._parameters or f"{name}.weight" in own:
                continue
            rank = ranks.get(name, 0)
            own_bias = f"{name}.up.bias" in own or f"{name}.bias" in own
            parent, _, child = name.rpartition(".")
            borrowed = BorrowedLayer(name, layer, rank, own_bias, operations=operations, **place)
            setattr(self.get_submodule(parent), child, borrowed)

    @classmethod
    def fresh(
        cls,
        config: UNetConfig,
        rank: int,
        hint_channels: int = 3,
        hint_encoder: str = "released",
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> ControlLora:
        """A Control-LoRA as training begins: its encoder is exactly the base's, its zero convolutions are 0.

        Every linear layer and convolution gets a difference of `rank`, or of its in or out channels where there are
        fewer, as published files have it; norms and biases are the base's.
        """
        ranks = {
            name: min(rank, *layer.weight.shape[:2])
            for name, layer in ControlNet(config, device="meta").named_modules()
            if name.startswith(BORROWED) and isinstance(layer, (nn.Linear, nn.Conv2d))
        }
        own = [f"{name}.{part}.weight" for name in ranks for part in ("up", "down")]
        control = cls(config, ranks, own, hint_channels, hint_encoder, dtype=dtype, device="meta")
        for module in control.modules():
            # By hand, not by to_empty: tensors without numbers, on which memory is counted, are not to be swapped.
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty_like(p, device=device)))
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.reset_parameters()
        # A hint encoder as it begins: the paper's has Gaussian weights.
        encoder = HINT_ENCODERS[hint_encoder](hint_channels, config.model_channels, dtype=dtype, device=device)
        control.input_hint_block = encoder
        for module in (*control.connections(), *(layer.up for layer in control.borrowed() if layer.rank)):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
        return control

    def borrowed(self) -> Iterator[BorrowedLayer]:
        """The layers that call the base's."""
        return (module for module in self.modules() if isinstance(module, BorrowedLayer))

    @property
    def ranks(self) -> tuple[int, int]:
        """The smallest and the largest rank of a difference; (0, 0) when there is none."""
        ranks = [layer.rank for layer in self.borrowed() if layer.rank] or [0]
        return min(ranks), max(ranks)

    def mismatch(self, model: UNetConfig) -> str | None:
        """Why it does not fit the model, in one sentence; `None` when it fits.

        Stricter than for a ControlNet: what it borrows must be there in the same sizes.
        """
        found = super().mismatch(model)
        if found:
            return found
        for what, of in (
            ("transformer blocks (on each level and in the middle)", _depths),
            ("heads in its attentions (on each level and in the middle)", _heads),
            ("input channels", lambda config: (config.in_channels,)),
        ):
            ours, theirs = (" ".join(map(str, of(config))) for config in (self.config, model))
            if ours != theirs:
                return (
                    f"this {self.family} Control-LoRA runs on the layers of a model with {ours} {what}, the "
                    f"{model.family} model has {theirs}: load one made for this model"
                )
        return None

    def describe(self) -> dict[str, str]:
        """What it takes and gives, in a user's words; also its ranks, and how much of it is the base's."""
        smallest, largest = self.ranks
        layers = sum(1 for _ in self.borrowed())
        return super().describe() | {
            "rank": f"{smallest}" if smallest == largest else f"{smallest} to {largest}",
            "base": f"{layers} layers are borrowed from the model that it is applied to",
        }

    def bind(self, base: nn.Module) -> None:
        """Borrow the layers of `base`, any module tree with ldm names, until `unbind` or the next `bind`.

        Cheap. The base stays as it is, belongs to its owner and must be kept by it. A patch to its biases counts from
        the bind on, one to its weights at once. Raises BaseMismatch, and then nothing has changed.
        """
        for layer, found in [(layer, layer.find(base)) for layer in self.borrowed()]:
            layer.bind(found)

    def unbind(self) -> None:
        """Let go of the base."""
        for layer in self.borrowed():
            layer.bind(None)

    def merged(self, base_weights: State) -> Weights:
        """The weights of the full ControlNet, ldm names, fp32, for this base UNet's (keys without prefix).

        Raises BaseMismatch naming the first parameter that the base lacks.
        """
        weights = {key: tensor.detach().float() for key, tensor in self.state_dict().items()}
        full = {}
        like_this = ControlNet(self.config, *read_hint_encoder(weights), device="meta")
        for key, like in like_this.state_dict().items():
            name, _, part = key.rpartition(".")
            up, down = weights.get(f"{name}.up.weight"), weights.get(f"{name}.down.weight")
            own = weights.get(key, weights.get(f"{name}.up.bias") if part == "bias" else None)
            if own is not None:
                full[key] = own
                continue
            if key not in base_weights or base_weights[key].shape != like.shape:
                raise BaseMismatch(
                    f"the base UNet lacks {key} of {times(like.shape)}: give the weights of the model that this "
                    "Control-LoRA was made for"
                )
            full[key] = base_weights[key].detach().float()
            if part == "weight" and up is not None and down is not None:
                full[key] = full[key].to(up.device) + (up.flatten(1) @ down.flatten(1)).reshape(like.shape)
        return full


# -- weights ----------------------------------------------------------------------------------------------------------

MARKER = "lora_controlnet"
"""The key by which a file says what it is."""


def from_control_lora(state: State) -> Weights:
    """The canonical weights of a Control-LoRA file: the marker left out, `NAME.up` and `NAME.down` as layers.

    Their biases go to the layer `up`, and factors that were stored flat get the shapes of convolution weights. Raises
    ConfigurationError naming a factor without its other, or of another rank.
    """
    weights = {}
    for key, tensor in state.items():
        name, _, part = key.rpartition(".")
        if part in ("up", "down"):
            weights[f"{key}.weight"] = _factor(state, name, part)
        elif part == "bias" and f"{name}.up" in state:
            weights[f"{name}.up.bias"] = tensor
        elif key != MARKER:
            weights[key] = tensor
    return weights


def to_control_lora(weights: State) -> Weights:
    """The inverse, for saving: the tensors of the file, its marker included."""
    file = {MARKER: torch.empty(0)}
    for key, tensor in weights.items():
        for inner, outer in ((".up.weight", ".up"), (".down.weight", ".down"), (".up.bias", ".bias")):
            if key.endswith(inner):
                key = key.removesuffix(inner) + outer
        file[key] = tensor
    return file


def full_shapes(weights: State) -> Weights:
    """Canonical `weights` with an empty tensor in the place of each weight that they only hold a difference from.

    For whoever reads sizes: `configuration.read_unet_config`.
    """
    shapes = dict(weights)
    for key, down in weights.items():
        if key.endswith(".down.weight"):
            name = key.removesuffix(".down.weight")
            up = shape_of(weights, f"{name}.up.weight", down.ndim)
            shapes[f"{name}.weight"] = torch.empty(up[0], *shape_of(weights, key, down.ndim)[1:], device="meta")
    return shapes


def build(
    weights: State, metadata: Mapping[str, str] | None = None, *, operations: Any = nn, **place: Any
) -> ControlLora:
    """The network for these canonical weights, without them. Raises ConfigurationError as `read_unet_config` does."""
    config = read_unet_config(full_shapes(weights), metadata)
    check_heads(config)
    ranks = {
        key.removesuffix(".down.weight"): tensor.shape[0]
        for key, tensor in weights.items()
        if key.endswith(".down.weight")
    }
    return ControlLora(config, ranks, weights.keys(), *read_hint_encoder(weights), operations=operations, **place)


def _factor(state: State, name: str, part: str) -> Tensor:
    """`NAME.up` (out, rank) or `NAME.down` (rank, in), with the trailing dimensions of NAME's weight."""
    missing = [key for key in (f"{name}.up", f"{name}.down") if key not in state]
    if missing:
        raise ConfigurationError(f"{missing[0]} is missing: {name} has the other factor of its low-rank difference")
    up, down = state[f"{name}.up"], state[f"{name}.down"]
    kernel = _kernel(state, name)
    # Scalars and what is empty have no rank.
    (rows, rank), (rank_down, columns) = (
        t.flatten(1).shape if t.ndim > 1 and t.numel() else (0, 0) for t in (up, down)
    )
    if rows == 0 or columns == 0 or rank != rank_down or columns % (kernel or 1) ** 2:
        raise ConfigurationError(
            f"{name}.up is {times(up.shape)} and {name}.down {times(down.shape)}: expected out x rank and rank x in, "
            "for a convolution rank x in x height x width of its kernel"
        )
    if kernel is not None:
        down = down.reshape(down.shape[0], -1, kernel, kernel)
    return down if part == "down" else up.reshape(up.shape[0], down.shape[0], *[1] * (down.ndim - 2))


def _kernel(state: State, name: str) -> int | None:
    """The side of a convolution's kernel; `None` for what may be linear, where the factor's own shape tells."""
    if name == "input_blocks.0.0" or name.endswith((".in_layers.2", ".out_layers.3", ".op")):
        return 3
    if name.endswith(".skip_connection"):
        return 1
    # Projections are linear but for SD1.x, which alone has text tokens of 768 numbers.
    context = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    tokens = state.get(f"{context}.down", state.get(f"{context}.weight"))
    is_sd1 = tokens is not None and tokens.shape[-1:] == (768,)
    return 1 if is_sd1 and name.endswith((".1.proj_in", ".1.proj_out")) else None


# -- layers -----------------------------------------------------------------------------------------------------------


def _frozen(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x); gradients reach x, never the layer."""
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in layer.parameters()):
        return functional_call(layer, {name: p.detach() for name, p in layer.named_parameters()}, (x,))
    return layer(x)


def _over_channels(bias: Tensor, x: Tensor) -> Tensor:
    return bias[:, None, None] if x.ndim == 4 else bias


SIZES = (
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "kernel_size",
    "num_channels",
    "normalized_shape",
)
"""What a layer says of itself: its weight's shape may be another when a host keeps it quantised."""


def _sizes(layer: nn.Module) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in SIZES if hasattr(layer, name)}


def _text(sizes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in sizes.items()) or "no such layer"


def _depths(config: UNetConfig) -> tuple[int, ...]:
    return (*config.transformer_depth, config.transformer_depth_middle)


def _heads(config: UNetConfig) -> tuple[int, ...]:
    """Heads of the attentions on each level and in the middle, 0 where there are none."""
    mults = (*config.channel_mult, config.channel_mult[-1])
    return tuple(
        config.heads(config.model_channels * mult) if depth > 0 else 0
        for mult, depth in zip(mults, _depths(config), strict=True)
    )
