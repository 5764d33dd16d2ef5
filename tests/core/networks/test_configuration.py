"""What the shapes of weights say about a network, and which control fits which model."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from zeroconv.controlnet_core.networks.configuration import (
    ConfigurationError,
    describe_mismatch,
    read_unet_config,
)
from zeroconv.controlnet_core.networks.controlnet import ControlNet
from zeroconv.controlnet_core.networks.unet import SD15, SD21, SDXL, UNet, UNetConfig

TINY = UNetConfig(model_channels=32, channel_mult=(1, 2, 2), transformer_depth=(1, 1, 0), context_dim=16, num_heads=0)


def weights(config: UNetConfig, network: type = ControlNet) -> dict[str, Tensor]:
    """Shapes alone: on the meta device even SDXL costs nothing."""
    return dict(network(config, device="meta").state_dict())


# -- read_unet_config -------------------------------------------------------------------------------------------------

LAYOUTS = {
    "SD1.5": SD15,
    "SD2.1": SD21,
    "SDXL": SDXL,
    "SDXL mid": replace(SDXL, transformer_depth=(0, 0, 1), transformer_depth_middle=1),
    "SDXL small": replace(SDXL, transformer_depth=(0, 0, 0), transformer_depth_middle=0, context_dim=0),
    "no attention": replace(
        SDXL, transformer_depth=(0, 0, 0), transformer_depth_middle=-1, context_dim=0, use_linear=False
    ),
    "inpainting": replace(SD15, in_channels=9),
    "narrow": TINY,
    "one ResBlock a level": replace(TINY, num_res_blocks=1),
    "three ResBlocks, odd multipliers": replace(TINY, num_res_blocks=3, channel_mult=(2, 3, 5)),
    "two levels": replace(TINY, channel_mult=(1, 1), transformer_depth=(2, 3)),
    "a transformer without blocks in the middle": replace(TINY, transformer_depth_middle=0),
    "one ResBlock in the middle": replace(TINY, transformer_depth_middle=-1),
    "narrow SDXL": replace(TINY, use_linear=True, adm_in_channels=40),
}


@pytest.mark.parametrize("network", [ControlNet, UNet])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_hyperparameter_is_read_from_the_shapes(layout: str, network: type):
    assert read_unet_config(weights(LAYOUTS[layout], network)) == LAYOUTS[layout]


def test_only_a_unet_tells_its_output_channels():
    config = replace(TINY, out_channels=8)
    assert read_unet_config(weights(config, UNet)).out_channels == 8
    assert read_unet_config(weights(config, ControlNet)).out_channels == 4


@pytest.mark.parametrize(
    ("config", "metadata", "heads", "head_dim"),
    [
        (SD15, None, 8, 64),
        (SD21, None, 0, 64),
        (SDXL, None, 0, 64),
        (replace(SD15, model_channels=64), None, 0, 64),
        (TINY, {"num_heads": "4"}, 4, 64),
        (TINY, {"head_dim": "32"}, 0, 32),
        (SD15, {"head_dim": "40"}, 0, 40),
        (TINY, {"format": "pt"}, 0, 64),
    ],
)
def test_heads_come_from_the_metadata_or_from_the_family(
    config: UNetConfig, metadata: dict[str, str] | None, heads: int, head_dim: int
):
    read = read_unet_config(weights(config), metadata)
    assert (read.num_heads, read.head_dim) == (heads, head_dim)


@pytest.mark.parametrize("text", ["four", "0", "-1", "2.5", ""])
@pytest.mark.parametrize("name", ["num_heads", "head_dim"])
def test_metadata_that_is_no_number_is_an_error(name: str, text: str):
    with pytest.raises(ConfigurationError, match=f"metadata has {name} {text!r}: expected a whole number from 1 up"):
        read_unet_config(weights(TINY), {name: text})


def missing(key: str):
    def edit(state: dict[str, Tensor]) -> None:
        del state[key]

    return edit


def reshaped(key: str, *shape: int):
    def edit(state: dict[str, Tensor]) -> None:
        state[key] = torch.empty(shape, device="meta")

    return edit


def without(prefix: str):
    def edit(state: dict[str, Tensor]) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]

    return edit


def shifted_downsampling(state: dict[str, Tensor]) -> None:
    """Blocks 2 and 3 change places: one ResBlock on level 0, three on level 1."""
    for key in [key for key in state if key.startswith(("input_blocks.2.", "input_blocks.3."))]:
        block, rest = key.removeprefix("input_blocks.")[0], key.removeprefix("input_blocks.")[1:]
        state[f"moved.{5 - int(block)}{rest}"] = state.pop(key)
    for key in [key for key in state if key.startswith("moved.")]:
        state[key.replace("moved.", "input_blocks.")] = state.pop(key)


CONVOLUTION = "input_blocks.1.0.in_layers.2.weight"
ODD = {
    "no stem": (missing("input_blocks.0.0.weight"), "input_blocks.0.0.weight is missing"),
    "stem of two dimensions": (reshaped("input_blocks.0.0.weight", 32, 4), "input_blocks.0.0.weight has shape 32x4"),
    "stem of no channels": (
        reshaped("input_blocks.0.0.weight", 0, 4, 3, 3),
        "input_blocks.0.0.weight has shape 0x4x3x3",
    ),
    "no convolution": (missing(CONVOLUTION), f"input_blocks.1 is neither .* expected {CONVOLUTION}"),
    "no multiple": (reshaped(CONVOLUTION, 48, 32, 3, 3), f"{CONVOLUTION} has 48 output channels: .* multiple of 32"),
    "uneven level": (reshaped(CONVOLUTION, 64, 32, 3, 3), "input_blocks.2 has 32 channels .* input_blocks.1 64"),
    "uneven depth": (
        without("input_blocks.5.1."),
        "input_blocks.5 has 64 channels and 0 transformer .* input_blocks.4 64 and 1",
    ),
    "uneven levels": (shifted_downsampling, "level 1 of input_blocks has 3 ResBlocks and level 0 has 1"),
    "ends with a downsampling": (without("input_blocks.7."), "input_blocks.7 is neither a ResBlock nor"),
    "no middle": (without("middle_block."), "middle_block has 0 parts: expected a ResBlock, a transformer and another"),
    "two parts in the middle": (without("middle_block.2."), "middle_block has 2 parts: .* or one ResBlock alone"),
    "two ResBlocks in the middle": (
        without("middle_block.1."),
        "middle_block has 3 parts and no middle_block.1.proj_in.weight: expected",
    ),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_layout_is_an_error_that_names_the_place(odd: str):
    edit, says = ODD[odd]
    state = weights(TINY)
    edit(state)
    with pytest.raises(ConfigurationError, match=says) as caught:
        read_unet_config(state)
    assert "\n" not in str(caught.value)


def test_reading_leaves_the_weights_alone():
    state = weights(TINY)
    before = dict(state)
    read_unet_config(state)
    assert list(state) == list(before)
    assert all(state[key] is before[key] for key in before)


# -- family and describe_mismatch -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (SD15, "SD1.x"),
        (SD21, "SD2.x"),
        (SDXL, "SDXL"),
        (TINY, "SD1.x"),
        (replace(TINY, use_linear=True), "SD2.x"),
        (LAYOUTS["narrow SDXL"], "SDXL"),
        (LAYOUTS["SDXL small"], "SDXL"),
        (LAYOUTS["no attention"], "SDXL"),
    ],
)
def test_family(config: UNetConfig, name: str):
    assert config.family == name


@pytest.mark.parametrize(
    ("control", "model"),
    [
        (SD15, SD15),
        (SD21, SD21),
        (SDXL, SDXL),
        (TINY, replace(TINY, num_heads=4)),  # heads are the control's own affair
        (SD15, LAYOUTS["inpainting"]),  # the control gets the latent alone
        (LAYOUTS["SDXL mid"], SDXL),
        (LAYOUTS["SDXL small"], SDXL),
        (LAYOUTS["no attention"], SDXL),
    ],
)
def test_these_fit(control: UNetConfig, model: UNetConfig):
    assert describe_mismatch(control, model) is None


OTHER_FAMILY = "this ControlNet is made for {0}, the model is {1}: load a control made for {1}"
OTHER_SIZE = "this {0} ControlNet has {1}, the {0} model {2}: load a control made for this model"


@pytest.mark.parametrize(
    ("control", "model", "says"),
    [
        (SD15, SDXL, OTHER_FAMILY.format("SD1.x", "SDXL")),
        (SD15, SD21, OTHER_FAMILY.format("SD1.x", "SD2.x")),
        (SD21, SD15, OTHER_FAMILY.format("SD2.x", "SD1.x")),
        (SD21, SDXL, OTHER_FAMILY.format("SD2.x", "SDXL")),
        (SDXL, SD15, OTHER_FAMILY.format("SDXL", "SD1.x")),
        (SDXL, SD21, OTHER_FAMILY.format("SDXL", "SD2.x")),
        (
            replace(TINY, model_channels=128),
            replace(TINY, model_channels=64),
            OTHER_SIZE.format("SD1.x", "128 channels at the top level", 64),
        ),
        (
            SD15,
            replace(SD15, channel_mult=(1, 2, 4, 8)),
            OTHER_SIZE.format("SD1.x", "1 2 4 4 channel multipliers", "1 2 4 8"),
        ),
        (TINY, replace(TINY, num_res_blocks=3), OTHER_SIZE.format("SD1.x", "2 ResBlocks on each level", 3)),
        (SD15, replace(SD15, context_dim=64), OTHER_SIZE.format("SD1.x", "768 numbers for each text token", 64)),
        (SDXL, replace(SDXL, adm_in_channels=9), OTHER_SIZE.format("SDXL", "2816 numbers in the pooled vector", 9)),
        # On an inpainting model too: a control gets the latent alone.
        *(
            (LAYOUTS["inpainting"], model, OTHER_SIZE.format("SD1.x", "9 latent channels", 4))
            for model in (SD15, LAYOUTS["inpainting"])
        ),
    ],
)
def test_these_do_not_fit(control: UNetConfig, model: UNetConfig, says: str):
    assert describe_mismatch(control, model) == says


def test_a_mismatch_is_one_sentence():
    text = describe_mismatch(SD15, replace(SD15, channel_mult=(1, 2, 4, 8)))
    assert text is not None
    assert not re.search(r"[.!?](\s+[A-Z]|$)", text)
