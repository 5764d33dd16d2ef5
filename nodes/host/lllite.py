"""ControlLLLite in the host: it returns no residuals, but shifts what single layers of the UNet are given."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.patcher_extension
import torch
from torch import Tensor

from ...controlnet_core.dosing.clock import Moment
from ...controlnet_core.dosing.strength import ControlScales
from ...controlnet_core.networks.injection import HostControl
from ...controlnet_core.networks.lllite import PREFIX, ControlLLLite, LLLiteError, hooked, targets
from ...controlnet_core.networks.unet import UNetConfig
from .call import Call, Hint
from .control import RECORD, ControlError
from .models import unet_config
from .networks import NetworkControl

KEY = "zeroconv_lllite"
"""Key in `transformer_options`: what each control does in this call of the UNet."""

PATCHED = {"attn1": ("to_q", "to_k", "to_v"), "attn2": ("to_q",)}
"""Layers that are given the tokens which the host's patches of that attention may change, in the patch's order."""


class LLLiteControl(NetworkControl):
    """A ControlLLLite.

    At each step it adds to the options of this one call of the UNet: the host's own attention patches for the queries,
    keys and values, and a wrapper of the call that hooks the layers for which the host has no patch.
    """

    network: ControlLLLite

    def _forget_run(self) -> None:
        super()._forget_run()
        self._places: dict[str, tuple[str, int]] = {}  # path and block of each layer, which is the model's own

    def _config_of(self, model: Any) -> UNetConfig:
        config = unet_config(model, self.name, self.network.family)
        mismatch = self.network.mismatch(config, model.diffusion_model)
        if mismatch:
            raise ControlError(f"{self.name}: {mismatch}")
        return config

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """Begin a run."""
        super().pre_run(model, percent_to_timestep_function)
        found = targets(model.diffusion_model, self.network)
        self._places = {name: (target.path, target.block) for name, target in found.items()}

    def _joined(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _act(self, call: Call, previous: HostControl | None) -> HostControl | None:
        shifts: dict[LLLiteControl, _Shifts] = call.options.setdefault(KEY, {})
        # Samplers that work in tiles may ask again with the same options: what is there already then goes on.
        if self not in shifts:
            shifts[self] = _Shifts(self)
            shifts[self].install(call.options)
        moment = self._moment(call.options, call.t) if RECORD in call.options else None
        shifts[self].begin(call, self._scales(call), *self._encode(call), moment)
        return previous


class _Shifts:
    """One call of the UNet: which layers' inputs have been shifted in it, and how."""

    def __init__(self, control: LLLiteControl):
        self.network, self.name, self.places = control.network, control.name, control._places
        self.acted: set[str] = set()
        self.ratios: dict[int, list[float]] = {}

    def install(self, options: dict[str, Any]) -> None:
        """Add patches and the wrapper to the options of this call; lists in them that may be the model's stay alone."""
        patches = dict(options.get("patches", {}))
        for attention in PATCHED:
            key = f"{attention}_patch"
            patches[key] = [*patches.get(key, ()), partial(self.patch, attention)]
        options["patches"] = patches
        options["wrappers"] = comfy.patcher_extension.copy_nested_dicts(options.get("wrappers", {}))
        comfy.patcher_extension.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, KEY, self.run, options
        )

    def begin(
        self, call: Call, scales: ControlScales, hint: Hint, embeddings: dict[str, Tensor], moment: Moment | None
    ) -> None:
        """Say what the next run of the UNet is given, and when that is where it is recorded."""
        self.call, self.scales, self.hint, self.embeddings, self.moment = call, scales, hint, embeddings, moment

    def shift(self, name: str, x: Tensor) -> Tensor:
        """What the layer is given for x: shifted in the rows that control acts on, the others as they are."""
        self.acted.add(name)
        piece = self.call.piece
        if x.shape[0] != piece.samples:
            raise LLLiteError(
                f"{name} expects {piece.samples} samples, its layer is given {x.shape[0]}: no other node may merge "
                "or tile what this layer is given"
            )
        embedding = self.hint.of(piece, self.embeddings[name])
        part = piece.take(x)
        shifted = self.network.shifted(name, self.places[name][1], part, embedding, self.scales.scaled)
        if self.moment is not None:
            power = (shifted - part).float().square().mean() / part.float().square().mean()
            self.ratios.setdefault(self.places[name][1], []).append(power.sqrt().item())
        return piece.scatter(shifted, into=x)

    def patch(self, attention: str, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
        """The host's attention patch: what makes the queries, the keys and the values."""
        part, number = options["block"]
        block = "middle_block" if part == "middle" else f"{part}_blocks.{number}"
        path = f"{block}.1.transformer_blocks.{options['block_index']}.{attention}"
        given = [q, k, v]
        for i, layer in enumerate(PATCHED[attention]):
            name = PREFIX + f"{path}.{layer}".replace(".", "_")
            if name in self.places:
                given[i] = self.shift(name, given[i])
        return tuple(given)

    def run(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's wrapper around the UNet: all other layers of the file are hooked for this call."""
        unpatched = {
            name: executor.class_obj.get_submodule(path)
            for name, (path, _) in self.places.items()
            if not _patched(path)
        }
        self.acted.clear()
        self.ratios.clear()
        with hooked(unpatched, self.shift):
            result = executor(*args, **kwargs)
        idle = [name for name in self.places if name not in self.acted]
        if idle:
            raise ControlError(
                f"{self.name}: {len(idle)} of its {len(self.places)} layers were not reached in this call of the "
                f"model, the first {idle[0].removeprefix(PREFIX)}: take off what makes the model skip blocks"
            )
        if self.moment is not None:
            means = {block: sum(ratios) / len(ratios) for block, ratios in self.ratios.items()}
            self.call.options[RECORD].shifted(self.name, self.moment, means)
        return result


def _patched(path: str) -> bool:
    *block, attention, layer = path.split(".")
    return layer in PATCHED.get(attention, ()) and block[-2] == "transformer_blocks"
