"""The same seeded random weights in diffusers and in our networks give the same residuals and the same pictures."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from zeroconv.controlnet_core.files.layouts import from_diffusers
from zeroconv.controlnet_core.networks.controlnet import ControlNet
from zeroconv.controlnet_core.networks.residuals import Residuals
from zeroconv.controlnet_core.networks.unet import UNet, UNetConfig

from ..small import FULL, SMALL, Inputs, Module, assert_within, inputs, randomise_zeros, relative_change, tensors

TIME_IDS = 6
"""SDXL's pooled vector is a text embedding and the sinusoids of six sizes: original height, width, crop, target."""


def time_dim(config: UNetConfig) -> int:
    """Numbers for each of the six sizes: 256 as published, and 8 in the small model."""
    return 256 if config.adm_in_channels == 2816 else 8


def settings(config: UNetConfig) -> dict[str, Any]:
    """What diffusers' networks are built with for our configuration."""
    channels = [config.model_channels * mult for mult in config.channel_mult]
    common = {
        "block_out_channels": channels,
        "layers_per_block": config.num_res_blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.transformer_depth],
        "transformer_layers_per_block": [max(depth, 1) for depth in config.transformer_depth],
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": [config.heads(width) for width in channels],  # the number of heads, despite its name
        "use_linear_projection": config.use_linear,
    }
    if config.adm_in_channels is None:
        return common
    return common | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time_dim(config),
        "projection_class_embeddings_input_dim": config.adm_in_channels,
    }


def their_unet(config: UNetConfig) -> nn.Module:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(config.transformer_depth)]
    arguments: dict[str, Any] = settings(config) | {"up_block_types": up}
    return UNet2DConditionModel(**arguments)


def their_control(config: UNetConfig) -> nn.Module:
    from diffusers.models.controlnets.controlnet import ControlNetModel

    return ControlNetModel(**settings(config))


def random_weights(build: Any, config: UNetConfig) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = build(config)
        for name, weight in network.named_parameters():
            if name.startswith("controlnet_cond_embedding.") and weight.ndim == 4:
                nn.init.kaiming_normal_(weight)  # torch's own choice would lose the hint on its way through the layers
    return randomise_zeros(network).eval()


def ours(build: type[Module], config: UNetConfig, theirs: nn.Module) -> Module:
    """Our network on the very tensors of theirs: no second copy in memory, and every key must find its place."""
    network = build(config, device="meta")
    network.load_state_dict(from_diffusers(theirs.state_dict()), assign=True)
    return network


class Case(NamedTuple):
    """One input for both sides: `numbers.y` is what `added` amounts to."""

    numbers: Inputs
    added: dict[str, Tensor] | None

    def in_the_dark(self) -> Case:
        """The same with a black hint."""
        return self._replace(numbers=replace(self.numbers, hint=torch.zeros_like(self.numbers.hint)))

    def their_residuals(self, control: nn.Module) -> Residuals:
        n = self.numbers
        skips, middle = control(n.x, n.timesteps, n.context, n.hint, added_cond_kwargs=self.added, return_dict=False)
        return Residuals(tuple(skips), middle)

    def their_output(self, unet: nn.Module, residuals: Residuals | None = None) -> Tensor:
        n = self.numbers
        added = {} if residuals is None else {
            "down_block_additional_residuals": residuals.skips,
            "mid_block_additional_residual": residuals.middle,
        }  # fmt: skip
        return unet(n.x, n.timesteps, n.context, added_cond_kwargs=self.added, return_dict=False, **added)[0]


def case(config: UNetConfig, height: int, width: int) -> Case:
    numbers = inputs(config, height, width)
    if config.adm_in_channels is None:
        return Case(numbers, None)
    from diffusers.models.embeddings import get_timestep_embedding

    sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024], [512, 768, 4, 0, 1024, 896]], dtype=torch.float32)
    sinusoids = get_timestep_embedding(sizes.flatten(), time_dim(config), flip_sin_to_cos=True, downscale_freq_shift=0)
    text = numbers.y[:, : config.adm_in_channels - TIME_IDS * time_dim(config)] if numbers.y is not None else None
    assert text is not None
    y = torch.cat([text, sinusoids.reshape(2, -1)], dim=1)
    return Case(replace(numbers, y=y), {"text_embeds": text, "time_ids": sizes})


@cache
def networks(layout: str) -> tuple[nn.Module, nn.Module, UNet, ControlNet]:
    """diffusers' small UNet and ControlNet, and ours on the same weights."""
    config = SMALL[layout]
    unet, control = random_weights(their_unet, config), random_weights(their_control, config)
    return unet, control, ours(UNet, config, unet), ours(ControlNet, config, control)


def compare(given: Case, their_unet: nn.Module, their_control: nn.Module, unet: UNet, control: ControlNet) -> None:
    """Control moves their picture by 5 % or more, and ours is theirs: residuals, and the UNet with and without them."""
    plain, residuals = given.their_output(their_unet), given.their_residuals(their_control)
    controlled = given.their_output(their_unet, residuals)
    assert relative_change(plain, controlled) >= 0.05

    compare_residuals(given, their_control, control)
    assert_within(given.numbers.predict(unet), plain, 1e-4)
    assert_within(given.numbers.predict(unet, given.numbers.control(control)), controlled, 1e-4)


def compare_residuals(given: Case, their_control: nn.Module, control: ControlNet) -> None:
    """The hint moves each of their residuals by 5 % or more, and ours are theirs."""
    expected = tensors(given.their_residuals(their_control))
    for dark, lit in zip(tensors(given.in_the_dark().their_residuals(their_control)), expected, strict=True):
        assert relative_change(dark, lit) >= 0.05
    for mine, theirs in zip(tensors(given.numbers.control(control)), expected, strict=True):
        assert_within(mine, theirs, 1e-4)


@pytest.mark.parametrize("size", [(16, 24), (13, 9)], ids=["even", "odd"])
@pytest.mark.parametrize("layout", SMALL)
@torch.no_grad()
def test_small_networks_agree(layout: str, size: tuple[int, int]):
    compare(case(SMALL[layout], *size), *networks(layout))


@torch.no_grad()
def test_the_comparison_tells_a_wrong_place_from_the_right_one():
    given = case(SMALL["SD1.x"], 16, 16)
    unet, control, _, _ = networks("SD1.x")
    residuals = given.their_residuals(control)
    right = given.their_output(unet, residuals)
    skips = list(residuals.skips)
    skips[1], skips[2] = skips[2], skips[1]  # the same shape
    wrong = given.their_output(unet, Residuals(tuple(skips), residuals.middle))
    with pytest.raises(AssertionError, match="off by"):
        assert_within(wrong, right, 1e-4)


@pytest.mark.parametrize("layout", FULL)
@pytest.mark.parametrize(("build", "theirs"), [(UNet, their_unet), (ControlNet, their_control)])
def test_published_networks_have_the_same_parameters(build: type[UNet | ControlNet], theirs: Any, layout: str):
    config = FULL[layout]
    with torch.device("meta"):
        expected = {key: weight.shape for key, weight in from_diffusers(theirs(config).state_dict()).items()}
    assert {key: weight.shape for key, weight in build(config, device="meta").state_dict().items()} == expected


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["SD1.x", "SD2.x"])
@torch.no_grad()
def test_full_width_agrees(layout: str):
    """About 5 GiB: both sides share their weights."""
    config = FULL[layout]
    unet, control = random_weights(their_unet, config), random_weights(their_control, config)
    compare(case(config, 16, 16), unet, control, ours(UNet, config, unet), ours(ControlNet, config, control))


@pytest.mark.slow
@torch.no_grad()
def test_full_width_sdxl_control_agrees():
    """About 5 GiB: the ControlNet alone, since its UNet needs twice as much again."""
    config = FULL["SDXL"]
    theirs = random_weights(their_control, config)
    compare_residuals(case(config, 16, 16), theirs, ours(ControlNet, config, theirs))
