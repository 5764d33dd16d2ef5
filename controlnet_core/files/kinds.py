"""The kinds of control: how each is told from its keys, becomes a network, and becomes a file again.

`KINDS` is the whole list. A new kind is one more record in it, and a network beside the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ZeroConvError
from ..keys import Condition, State, Weights, has, some
from ..limits import WRAPPINGS
from ..networks import control_lora, controlnet, lite, lllite, t2i_adapter, union
from ..networks.configuration import heads_metadata
from ..networks.network import ControlNetwork
from .diagnosis import OTHER_CONTROLS, diagnose
from .layouts import CONTROL, from_difference, from_diffusers, from_ldm, to_diffusers


class UnknownFormat(ZeroConvError):
    """No format claims these weights; the message says what they are and where they belong."""


@dataclass(frozen=True)
class Format:
    """A form in which a kind is published: its name, the question to the keys that tells it, and the way to our names.

    `canonicalize` gives the keys of the network, its argument stays as it is. With `needs_base`, its result holds
    differences from a base UNet. `marker` is a key that is no weight, and only says what the file is.
    """

    name: str
    matches: Condition
    canonicalize: Callable[[State], Weights]
    needs_base: bool = False
    marker: str | None = None


Layout = Callable[[Any, State], Weights]
"""(network, its weights in canonical names) -> the tensors of a file."""


@dataclass(frozen=True)
class ControlKind:
    """A kind of control: its network, the formats that it is read from, and the layouts that it is written in.

    `build` makes the network, not yet filled, from the shapes of its canonical weights and the metadata of their file;
    `metadata` gives of a network what that needs to know and no shape tells. In `layouts`, ldm stands for the authors'
    own. `copies_encoder`: it holds a whole copy of its base's encoder, which can be exchanged for another's.
    """

    network: type[ControlNetwork]
    build: Callable[..., ControlNetwork]
    formats: tuple[Format, ...]
    layouts: Mapping[str, Layout]
    metadata: Callable[[Any], dict[str, str]] = lambda _: {}
    copies_encoder: bool = False


def detect(state: State) -> tuple[ControlKind, Format]:
    """The kind of these weights and their format; raises UnknownFormat, which says what they are instead."""
    found = _claimed(state)
    if found is None:
        raise UnknownFormat(diagnose(state))
    return found


def unwrapped(state: State) -> State:
    """`state` without what stands before every key, such as `module.`, where that makes it one of `KINDS`.

    Of several ways to read it the kind that is asked first is taken, and of one kind the longest names. Of a checkpoint
    of a training of this pack it is the control that is left: the averages of its weights, where it has them.
    """
    if some(starts=TRAINED[0])(state) and all(key.startswith(CHECKPOINT) for key in state):
        return _trained(state)
    readings = [state]
    while len(readings) <= WRAPPINGS:
        *_, bare = readings
        prefix = next(iter(bare), "").partition(".")[0] + "."
        if not all(key.startswith(prefix) for key in bare):
            break
        readings.append({key.removeprefix(prefix): tensor for key, tensor in bare.items()})
    found = [_claimed(reading) for reading in readings]
    places = [len(KINDS) if claim is None else KINDS.index(claim[0]) for claim in found]
    return readings[places.index(min(places))]


CHECKPOINT = ("model.", "optimizer.", "average.")
"""How the tensors of a training's checkpoint begin (`training.checkpoint`)."""

TRAINED = ("model.control.", "average.control.")
"""Those of the control in it, the later in place of the earlier."""


def _trained(state: State) -> Weights:
    weights: Weights = {}
    for part in TRAINED:
        weights |= {key.removeprefix(part): tensor for key, tensor in state.items() if key.startswith(part)}
    lora = some(ends=".down.weight")(weights)
    return control_lora.to_control_lora(weights) if lora else weights


def _claimed(state: State) -> tuple[ControlKind, Format] | None:
    if not OTHER_CONTROLS(state):
        for kind in KINDS:
            for candidate in kind.formats:
                if candidate.matches(state):
                    return kind, candidate
    return None


def kind_of(network: ControlNetwork) -> ControlKind:
    """The record of a network of ours."""
    return next(kind for kind in KINDS if kind.network is type(network))


# -- the list ---------------------------------------------------------------------------------------------------------


def _canonical(_: ControlNetwork, weights: State) -> Weights:
    return dict(weights)


def _diffusers(network: controlnet.ControlNet, weights: State) -> Weights:
    return to_diffusers(weights, network.config)


def _heads(network: controlnet.ControlNet) -> dict[str, str]:
    return heads_metadata(network.config)


DIFFUSERS = some(starts="controlnet_cond_embedding.")
PREFIXED, BARE = some(starts=CONTROL + "zero_convs."), some(starts="zero_convs.")
UNION = some(ends="task_embedding") & some(contains="control_add_embedding.")

KINDS: tuple[ControlKind, ...] = (
    ControlKind(
        control_lora.ControlLora,
        control_lora.build,
        formats=(
            Format(
                "Control-LoRA",
                has(control_lora.MARKER),
                control_lora.from_control_lora,
                marker=control_lora.MARKER,
            ),
        ),
        layouts={"ldm": lambda _, weights: control_lora.to_control_lora(weights)},
        metadata=_heads,
    ),
    ControlKind(
        lllite.ControlLLLite,
        lllite.build,
        formats=(Format("ControlLLLite", some(starts=lllite.PREFIX), dict),),
        layouts={"ldm": _canonical},
    ),
    ControlKind(
        union.UnionControlNet,
        union.build,
        formats=(
            Format("Union, diffusers", DIFFUSERS & UNION, from_diffusers),
            Format("Union, ldm", (PREFIXED | BARE) & UNION, from_ldm),
        ),
        layouts={"ldm": _canonical, "diffusers": _diffusers},
        metadata=_heads,
        copies_encoder=True,
    ),
    ControlKind(
        lite.ControlNetLite,
        lite.build,
        formats=(Format("ControlNet-lite", lite.LITE & ~DIFFUSERS, dict),),
        layouts={"ldm": _canonical},
    ),
    ControlKind(
        controlnet.ControlNet,
        controlnet.build,
        formats=(
            Format("diffusers", DIFFUSERS, from_diffusers),
            Format(
                "difference",
                has("difference") & (PREFIXED | BARE),
                from_difference,
                needs_base=True,
                marker="difference",
            ),
            Format("ldm with prefix", PREFIXED, from_ldm),
            Format("ldm", BARE, from_ldm),
        ),
        layouts={"ldm": _canonical, "diffusers": _diffusers},
        metadata=_heads,
        copies_encoder=True,
    ),
    ControlKind(
        t2i_adapter.T2IAdapter,
        t2i_adapter.build,
        formats=(
            Format("T2I-Adapter, diffusers", t2i_adapter.DIFFUSERS, t2i_adapter.from_diffusers),
            Format("T2I-Adapter", t2i_adapter.TENCENTARC | t2i_adapter.WRAPPED, t2i_adapter.from_tencentarc),
        ),
        layouts={"ldm": _canonical, "diffusers": lambda _, weights: t2i_adapter.to_diffusers(weights)},
    ),
)
"""All kinds, in the order in which they are asked: a Union, a Control-LoRA and a ControlNet-lite have a ControlNet's
keys too."""
