"""The halves of guidance, which differ in their texts alone: the same numbers as in full, for fewer operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zeroconv.controlnet_core.networks.control_lora import ControlLora
from zeroconv.controlnet_core.networks.controlnet import ControlNet
from zeroconv.controlnet_core.networks.layers import add, repeated
from zeroconv.controlnet_core.networks.lite import ControlNetLite
from zeroconv.controlnet_core.networks.residuals import Residuals
from zeroconv.controlnet_core.networks.unet import UNet
from zeroconv.controlnet_core.networks.union import UnionControlNet

from ..small import SMALL, Inputs, assert_within, inputs, randomise_zeros, seeded, tensors

HALVES = 2


def half(layout: str) -> Inputs:
    """Two pictures, for two halves of guidance with texts of their own."""
    given, other = inputs(SMALL[layout]), torch.Generator().manual_seed(8)
    context = torch.randn(given.context.shape, generator=other)
    y = None if given.y is None else torch.cat([given.y, torch.randn(given.y.shape, generator=other)])
    return Inputs(given.x, given.timesteps, torch.cat([given.context, context]), given.hint, y)


def full(given: Inputs) -> Inputs:
    """The same with everything written out for each half."""
    x, hint = (tensor.repeat(HALVES, 1, 1, 1) for tensor in (given.x, given.hint))
    return Inputs(x, given.timesteps.repeat(HALVES), given.context, hint, given.y)


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of products, two for each multiplication."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def control(kind: str, layout: str) -> Any:
    """A network of this kind with nothing left at zero; a Control-LoRA is bound to a UNet that it holds."""
    config = SMALL[layout]
    if kind == "Control-LoRA":
        network, unet = ControlLora.fresh(config, rank=2), seeded(UNet, config)
        network.bind(unet)
        network.__dict__["kept"] = unet
        return randomise_zeros(network)
    return randomise_zeros(
        seeded({"ControlNet": ControlNet, "Union": UnionControlNet, "lite": ControlNetLite}[kind], config)
    )


CASES = [("ControlNet", layout) for layout in SMALL] + [("Union", "SDXL"), ("Control-LoRA", "SD1.x"), ("lite", "SD1.x")]


@pytest.mark.parametrize(("kind", "layout"), CASES)
@torch.no_grad()
def test_one_half_of_what_they_share_gives_the_residuals_of_both(kind: str, layout: str):
    network, given = control(kind, layout), half(layout)
    short, long = given.control(network), full(given).control(network)
    if kind == "lite":  # which does not read the text: one half is all there is
        short = short.repeated(len(given.context))
    assert not torch.equal(long.middle[:2], long.middle[2:]) or kind == "lite"
    for found, expected in zip(tensors(short), tensors(long), strict=True):
        assert_within(found, expected, 1e-5)


@torch.no_grad()
def test_what_comes_before_the_text_is_computed_once():
    network, given = control("ControlNet", "SD1.x"), half("SD1.x")
    guided, long = network.encode_hint(given.hint), full(given)
    emb = network.embed(given.x, given.timesteps, None)
    block, transformer = network.input_blocks[1]
    h = network.input_blocks[0](given.x, emb, given.context)
    tokens = h.flatten(2).movedim(1, 2)
    attention = transformer.transformer_blocks[0]
    residual_blocks = [part for each in (*network.input_blocks, network.middle_block) for part in each]
    once = [
        lambda: network.embed(given.x, given.timesteps, None),
        lambda: network.input_blocks[0](given.x, emb, given.context),
        lambda: network.zero_convs[0](h),
        lambda: (block.in_layers(h), block.out_layers(h), block.skip_connection(h)),
        lambda: transformer.proj_in(h),
        lambda: attention.attn1(tokens),
        lambda: attention.attn2.to_q(tokens),
        lambda: [part.emb_layers(emb) for part in residual_blocks if hasattr(part, "emb_layers")],
    ]
    short = flops(lambda: network(given.x, given.timesteps, given.context, guided))
    whole = flops(lambda: network(long.x, long.timesteps, long.context, guided.repeat(HALVES, 1, 1, 1)))
    assert whole - short == sum(map(flops, once)) > 0.05 * whole


@torch.no_grad()
def test_a_pooled_vector_of_its_own_parts_them_where_it_comes_in():
    network, given = control("ControlNet", "SDXL"), half("SDXL")
    guided, long = network.encode_hint(given.hint), full(given)
    block = network.input_blocks[1][0]
    h = network.input_blocks[0](given.x, given.x, given.context)
    once = [
        lambda: network.time_embed(torch.zeros(len(given.x), network.config.model_channels)),
        lambda: network.input_blocks[0](given.x, given.x, given.context),
        lambda: network.zero_convs[0](h),
        lambda: (block.in_layers(h), block.skip_connection(h)),
    ]
    short = flops(lambda: network(given.x, given.timesteps, given.context, guided, given.y))
    whole = flops(lambda: network(long.x, long.timesteps, long.context, guided.repeat(HALVES, 1, 1, 1), given.y))
    assert whole - short == sum(map(flops, once)) > 0


def test_adding_counts_the_fewer_samples_over_and_over():
    few, many = torch.randn(2, 3), torch.randn(6, 3)
    assert torch.equal(add(few, many), few.repeat(3, 1) + many)
    assert torch.equal(add(many, few), add(few, many))
    assert torch.equal(add(few, few), 2 * few)


def test_repeating_goes_from_the_first_to_the_last_and_over_again():
    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(repeated(x, 4), torch.cat([x, x]))
    assert repeated(x, 2) is x

    def ones(samples: int) -> Tensor:
        return torch.ones(samples, 1, 1, 1)

    assert [len(tensor) for tensor in Residuals((ones(1), ones(2)), ones(4)).repeated(4)] == [4, 4, 4]
