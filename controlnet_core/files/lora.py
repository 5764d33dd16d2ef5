"""LoRAs in kohya-ss/sd-scripts' layout, merged into the weights that they were trained for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..keys import State, Weights, some
from ..networks.unet import UNetConfig
from .layouts import to_diffusers
from .reading import LoadError, read_weights

UNET = "lora_unet_"
TEXTS = {1: ("lora_te_",), 2: ("lora_te1_", "lora_te2_")}
"""How the keys of the UNet begin, and of the text encoders of a model that has so many."""

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


def merged(weights: State, names: Mapping[str, str], prefix: str, loras: Sequence[Path]) -> Weights:
    """`weights` with what each LoRA adds to the modules whose keys begin with `prefix`: alpha / rank up down, in fp32.

    `names` says what a LoRA calls the weights (`unet_names`, `text_names`). Raises LoadError for a file that is no
    LoRA of plain matrices, or one for another model.
    """
    found = dict(weights)
    for path in loras:
        lora, _ = read_weights(path)
        if not some(starts="lora_", ends=DOWN)(lora):
            raise LoadError(f"{path.name} holds no LoRA as sd-scripts writes it: expected keys lora_unet_*{DOWN}")
        own = {key: tensor for key, tensor in lora.items() if key.startswith(prefix)}
        modules = [key.removesuffix(DOWN) for key in own if key.endswith(DOWN)]
        known = {module + ending for module in modules for ending in (DOWN, UP, ALPHA)}
        strange = [key for key in own if key not in known]
        strange += [module for module in modules if module.removeprefix(prefix) not in names or module + UP not in own]
        if strange:
            raise LoadError(
                f"{path.name}: {strange[0]} is no part of a plain LoRA for this model: give one that was trained on "
                "it, or merge it where it was made and give the merged model as base"
            )
        for module in modules:
            key, down, up = names[module.removeprefix(prefix)], own[module + DOWN].float(), own[module + UP].float()
            scale = own[module + ALPHA].item() / len(down) if module + ALPHA in own else 1.0
            difference = (up.flatten(1) @ down.flatten(1)).reshape(found[key].shape)
            found[key] = (found[key].float() + scale * difference).to(found[key].dtype)
    return found


def unet_names(weights: State, config: UNetConfig) -> dict[str, str]:
    """The keys of a UNet (ldm) by what a LoRA calls them: after diffusers' names, or after ldm's."""
    theirs = zip(to_diffusers(weights, config), weights)
    return {**text_names(weights), **{_flat(name): key for name, key in theirs}}


def text_names(weights: State) -> dict[str, str]:
    """Keys by what a LoRA calls them: dots as underscores."""
    return {_flat(key): key for key in weights}


def _flat(key: str) -> str:
    return key.removesuffix(".weight").replace(".", "_")
