"""ControlLLLite in the host: it returns no residuals, but shifts what single layers of the UNet are given."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.patcher_extension
from torch import Tensor

from ...controlnet_core.dosing.strength import Dose
from ...controlnet_core.networks.injection import HostControl
from ...controlnet_core.networks.lllite import PREFIX, ControlLLLite, LLLiteError, hooked, targets
from ...controlnet_core.networks.unet import UNetConfig
from .control import RECORD, ControlError, Step
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

    def _act(self, step: Step, previous: HostControl | None) -> HostControl | None:
        calls: dict[LLLiteControl, _Call] = step.options.setdefault(KEY, {})
        # Samplers that work in tiles may ask again with the same options: what is there already then goes on.
        if self not in calls:
            calls[self] = _Call(self)
            calls[self].install(step.options)
        calls[self].begin(step, self._dose(step.now, step.size, self._mask(step)), self._encode(step))
        return previous


class _Call:
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

    def begin(self, step: Step, dose: Dose, embeddings: dict[str, Tensor]) -> None:
        """Say what the next run of the UNet is given."""
        self.step, self.dose, self.embeddings = step, dose, embeddings

    def shift(self, name: str, x: Tensor) -> Tensor:
        """What the layer is given for x: shifted in the rows that control acts on, the others as they are."""
        self.acted.add(name)
        if x.shape[0] != self.step.total:
            raise LLLiteError(
                f"{name} expects {self.step.total} samples, its layer is given {x.shape[0]}: no other node may merge "
                "or tile what this layer is given"
            )
        rows = self.step.rows
        embedding = self.step.of_frames(self.embeddings[name])
        part = x if rows is None else x[rows]
        shifted = self.network.shifted(name, self.places[name][1], part, embedding, self.dose.weigh)
        if RECORD in self.step.options:
            power = (shifted - part).float().square().mean() / part.float().square().mean()
            self.ratios.setdefault(self.places[name][1], []).append(power.sqrt().item())
        if rows is None:
            return shifted
        whole = x.clone()
        whole[rows] = shifted
        return whole

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
        if RECORD in self.step.options:
            means = {block: sum(ratios) / len(ratios) for block, ratios in self.ratios.items()}
            self.step.options[RECORD].shifted(self.name, self.step.t[0].item(), means)
        return result


def _patched(path: str) -> bool:
    *block, attention, layer = path.split(".")
    return layer in PATCHED.get(attention, ()) and block[-2] == "transformer_blocks"
