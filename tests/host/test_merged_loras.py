"""A LoRA that is merged into a base gives the weights that the host makes of the same two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from hosting import Host

from zeroconv.controlnet_core.files import lora
from zeroconv.controlnet_core.files.layouts import to_diffusers
from zeroconv.controlnet_core.files.loading import LoadError


def write_lora(path: Path, weights: dict[str, torch.Tensor], names: dict[str, str], rank: int = 2) -> Path:
    """Random matrices for the attentions and a few convolutions; `names` are what it calls the keys of the weights."""
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, key in names.items():
        weight = weights[key]
        if key.endswith("to_q.weight") or (weight.ndim == 4 and "in_layers" in key):
            ones = [1] * (weight.ndim - 2)
            state[f"lora_unet_{name}.lora_down.weight"] = torch.randn(rank, *weight.shape[1:], generator=generator)
            state[f"lora_unet_{name}.lora_up.weight"] = torch.randn(len(weight), rank, *ones, generator=generator)
            state[f"lora_unet_{name}.alpha"] = torch.tensor(0.5 * rank)
    assert len(state) > 30
    save_file(state, path)
    return path


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_merged_weights_are_the_hosts(host: Host, family: str, tmp_path: Path):
    import comfy.sd
    from safetensors.torch import load_file

    from zeroconv.nodes.host.models import unet_config
    from zeroconv.nodes.host.weights import unet_weights

    model = host.model(family)
    config, weights = unet_config(model.model, "it", None), unet_weights(model)
    theirs = {name.removesuffix(".weight").replace(".", "_"): key
              for name, key in zip(to_diffusers(weights, config), weights)}  # fmt: skip
    path = write_lora(tmp_path / "lora.safetensors", weights, theirs)
    patched, _ = comfy.sd.load_lora_for_models(model, None, load_file(path), 1.0, 0.0)
    expected = unet_weights(patched)
    found = lora.merged(weights, lora.unet_names(weights, config), lora.UNET, [path])
    changed = [key for key in weights if not torch.equal(expected[key], weights[key])]
    assert len(changed) > 10
    for key in weights:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(found[key], weights[key]) for key in weights if key not in changed)

    other = write_lora(tmp_path / "other.safetensors", weights, {f"not_{name}": key for name, key in theirs.items()})
    with pytest.raises(LoadError, match="is no part of a plain LoRA for this model: give one that was trained on it"):
        lora.merged(weights, lora.unet_names(weights, config), lora.UNET, [other])
    save_file({"x": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(LoadError, match=r"none.safetensors holds no LoRA as sd-scripts writes it"):
        lora.merged(weights, {}, lora.UNET, [tmp_path / "none.safetensors"])
