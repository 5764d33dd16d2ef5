"""SDXL controls with less attention than their base: mid, small, and those whose middle block is one ResBlock."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zeroconv.controlnet_core.files.layouts import to_diffusers
from zeroconv.controlnet_core.files.loading import LoadError, load_control
from zeroconv.controlnet_core.networks.configuration import read_unet_config
from zeroconv.controlnet_core.networks.controlnet import ControlNet
from zeroconv.controlnet_core.networks.unet import UNet, UNetConfig

from ..small import SMALL, relative_change, tensors
from .test_parity_diffusers import case, compare, ours, random_weights, settings, their_unet

BASE = SMALL["SDXL"]
LAYOUTS = {
    "mid": replace(BASE, transformer_depth=(0, 0, 1), transformer_depth_middle=1),
    "small": replace(BASE, transformer_depth=(0, 0, 0), transformer_depth_middle=0),
    "small, one ResBlock in the middle": replace(BASE, transformer_depth=(0, 0, 0), transformer_depth_middle=-1),
    "SSD-1B": replace(BASE, transformer_depth=(0, 1, 2), transformer_depth_middle=-1),
}


def their_control(config: UNetConfig) -> nn.Module:
    from diffusers.models.controlnets.controlnet import ControlNetModel

    arguments: dict[str, Any] = settings(config)
    if config.transformer_depth_middle == -1:
        arguments["mid_block_type"] = "UNetMidBlock2D"
    else:  # diffusers gives the middle block the depth of the deepest level
        arguments["transformer_layers_per_block"][-1] = config.transformer_depth_middle
    return ControlNetModel(**arguments)


@cache
def unets() -> tuple[nn.Module, UNet]:
    theirs = random_weights(their_unet, BASE)
    return theirs, ours(UNet, BASE, theirs)


@cache
def theirs(layout: str) -> nn.Module:
    return random_weights(their_control, LAYOUTS[layout])


def load(state: dict[str, Tensor]) -> ControlNet:
    control = load_control(state).control
    assert isinstance(control, ControlNet)
    return control


def written(layout: str) -> dict[str, dict[str, Tensor]]:
    """The weights in every layout that the loader takes; diffusers' are its own, not made by us."""
    diffusers = dict(theirs(layout).state_dict())
    ldm = {key: tensor.clone() for key, tensor in load(diffusers).state_dict().items()}
    return {"diffusers": diffusers, "ldm": ldm, "prefixed": {f"control_model.{key}": t for key, t in ldm.items()}}


@pytest.mark.parametrize("size", [(16, 24), (13, 9)], ids=["even", "odd"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_control_is_that_of_diffusers(layout: str, size: tuple[int, int]):
    their_unet, unet = unets()
    for state in written(layout).values():
        compare(case(BASE, *size), their_unet, theirs(layout), unet, load(state))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_configuration_is_read_from_the_keys(layout: str):
    config = LAYOUTS[layout]
    if not any((*config.transformer_depth, config.transformer_depth_middle > 0)):
        config = replace(config, context_dim=0)  # nothing tells it, and nothing reads it
    if layout == "small, one ResBlock in the middle":
        config = replace(config, use_linear=False)  # as little
    for state in written(layout).values():
        loaded = load_control(state)
        assert loaded.control.config == config
        assert loaded.control.family == "SDXL"
        assert len(loaded.control.zero_convs) == 9
        assert len(loaded.control.middle_block) == (1 if config.transformer_depth_middle == -1 else 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trips_are_exact(layout: str):
    for name, state in written(layout).items():
        control = load(state)
        back = control.state_dict()
        if name == "diffusers":
            back = to_diffusers(back, control.config)
        elif name == "prefixed":
            back = {f"control_model.{key}": tensor for key, tensor in back.items()}
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("middle_block.1.proj_out.bias", "1 missing: middle_block.1.proj_out.bias$"),
        ("middle_block.1.norm.weight", "1 missing: middle_block.1.norm.weight$"),
        ("middle_block.1.proj_in.weight", "middle_block has 3 parts and no middle_block.1.proj_in.weight"),
    ],
)
def test_the_projections_around_no_blocks_must_all_be_there(missing: str, says: str):
    state = written("small")["ldm"]
    del state[missing]
    with pytest.raises(LoadError, match=says):
        load_control(state)


@torch.no_grad()
def test_the_projections_around_no_blocks_act():
    """The transformer of depth 0 is no passage: without its last projection the middle residual is another."""
    given, control = case(BASE, 16, 16).numbers, load(written("small")["ldm"])
    whole = tensors(given.control(control))
    control.middle_block[1].proj_out.weight.zero_()
    halved = tensors(given.control(control))
    assert relative_change(whole[-1], halved[-1]) >= 0.05
    assert all(torch.equal(a, b) for a, b in zip(whole[:-1], halved[:-1], strict=True))


@torch.no_grad()
def test_a_middle_of_one_resblock_makes_a_unet_too():
    """Segmind's Vega: an SDXL UNet without attention in the middle."""
    config = replace(BASE, transformer_depth_middle=-1)
    unet = UNet(config, device="meta")
    assert [type(part).__name__ for part in unet.middle_block] == ["ResBlock"]
    assert read_unet_config(dict(unet.state_dict())) == config
    shapes = [tuple(t.shape) for t in tensors(case(BASE, 16, 16).numbers.control(ControlNet(config)))]
    assert shapes[-1] == (2, 256, 4, 4)
