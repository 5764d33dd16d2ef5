"""T2I-Adapters: every layout loads to the same network, which gives what diffusers' and the host's networks give."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zeroconv.controlnet_core.networks.configuration import ConfigurationError
from zeroconv.controlnet_core.networks.residuals import Residuals
from zeroconv.controlnet_core.networks.t2i_adapter import (
    DIFFUSERS,
    TENCENTARC,
    WRAPPED,
    AdapterConfig,
    AdapterError,
    T2IAdapter,
    build,
    from_diffusers,
    from_tencentarc,
    read_adapter_config,
    to_diffusers,
)
from zeroconv.controlnet_core.networks.unet import SD15, SD21, SDXL, UNet

from ..small import FULL, SMALL, TINY, assert_within, inputs, relative_change, seeded
from .test_parity_diffusers import Case, case, ours, random_weights, their_unet

SIZES = {"full": (32, 64, 128, 128), "light": (32, 64, 128, 128), "XL": (64, 128, 256, 256)}
"""The small UNets' channels where the features go."""
FAMILIES = {"full": "SD1.x", "light": "SD1.x", "XL": "SDXL"}
MULTIPLES = {"full": 8, "light": 8, "XL": 16}
BLOCKS = {"full": 2, "light": 4, "XL": 2}
KINDS = tuple(SIZES)


def randomise(network: nn.Module) -> nn.Module:
    """Seeded weights that keep a signal near unit size, so that the hint is not lost among the biases."""
    random = torch.Generator().manual_seed(23)
    for _, parameter in sorted(network.named_parameters()):
        noise = torch.randn(parameter.shape, generator=random)
        parameter.data = noise * (2 / parameter[0].numel()) ** 0.5 if parameter.ndim == 4 else 0.1 * noise
    return network.eval()


@cache
def theirs(kind: str, hint_channels: int = 3, channels: tuple[int, ...] = ()) -> nn.Module:
    """diffusers' adapter with random weights."""
    from diffusers.models.adapter import T2IAdapter as Theirs

    sizes = list(channels or SIZES[kind])
    return randomise(
        Theirs(
            in_channels=hint_channels,
            channels=sizes[:3] if kind == "light" else sizes,  # it repeats the last one itself
            num_res_blocks=BLOCKS[kind],
            downscale_factor=MULTIPLES[kind],
            adapter_type={"full": "full_adapter", "light": "light_adapter", "XL": "full_adapter_xl"}[kind],
        )
    )


def loaded(weights: Mapping[str, Tensor]) -> T2IAdapter:
    """Our network with these canonical weights, built as `loading` builds it."""
    network = build(weights, {}, device="meta")
    network.load_state_dict(dict(weights), assign=True)
    return network


def hint(kind: str, height: int, width: int, channels: int = 3) -> Tensor:
    """A seeded hint for a latent of this size, its own size rounded up as the caller does."""
    multiple = MULTIPLES[kind]
    sides = (-(-8 * side // multiple) * multiple for side in (height, width))
    return torch.rand(2, channels, *sides, generator=torch.Generator().manual_seed(9))


def features(residuals: Residuals) -> list[Tensor]:
    """What is there, from the first socket to the last."""
    return [residual for residual in (*residuals.encoder, residuals.middle) if residual is not None]


# -- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 24), (13, 9)], ids=["even", "odd"])
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_are_those_of_diffusers(kind: str, channels: int, size: tuple[int, int]):
    reference = theirs(kind, channels)
    picture = hint(kind, *size, channels)
    before = picture.clone()
    expected = reference(picture)
    for dark, lit in zip(reference(torch.zeros_like(picture)), expected, strict=True):
        assert relative_change(dark, lit) >= 0.05
    adapter = loaded(from_diffusers(reference.state_dict()))
    assert (adapter.hint_channels, adapter.hint_multiple, adapter.family) == (channels, MULTIPLES[kind], FAMILIES[kind])
    given = features(adapter(picture))
    assert len(given) == len(expected) == 4
    for mine, wanted in zip(given, expected, strict=True):
        assert_within(mine, wanted, 1e-4)
    assert torch.equal(picture, before)


@pytest.mark.parametrize("size", [(16, 24), (13, 9)], ids=["even", "odd"])
@pytest.mark.parametrize(
    ("kind", "layout"),
    [("full", "SD1.x"), ("light", "SD1.x"), ("full", "SD2.x"), ("light", "SD2.x"), ("XL", "SDXL")],
)
@torch.no_grad()
def test_the_picture_is_that_of_diffusers(kind: str, layout: str, size: tuple[int, int]):
    """The features in diffusers' UNet, and in ours as residuals that join the encoder."""
    config = SMALL[layout]
    channels = SIZES[kind] if layout != "SD2.x" else (64, 128, 128, 128)
    reference, unet = theirs(kind, 3, channels), random_weights(their_unet, config)
    given = case(config, *size)
    picture = hint(kind, *size)
    adapter = loaded(from_diffusers(reference.state_dict()))
    assert adapter.mismatch(config) is None

    def adapted(picture: Tensor) -> Tensor:
        n = given.numbers
        return unet(
            n.x,
            n.timesteps,
            n.context,
            added_cond_kwargs=given.added,
            down_intrablock_additional_residuals=[feature.clone() for feature in reference(picture)],
            return_dict=False,
        )[0]

    expected = adapted(picture)
    assert relative_change(given.their_output(unet), expected) >= 0.05
    assert relative_change(adapted(torch.zeros_like(picture)), expected) >= 0.05
    assert_within(given.numbers.predict(ours(UNet, config, unet), adapter(picture)), expected, 1e-4)


@torch.no_grad()
def test_the_sum_of_an_adapter_and_a_controlnet_is_that_of_diffusers():
    """Both at once: the adapter joins the encoder, the ControlNet what the decoder reads."""
    from zeroconv.controlnet_core.networks.controlnet import ControlNet

    from .test_parity_diffusers import their_control

    config = SMALL["SD1.x"]
    given, picture = case(config, 16, 24), hint("full", 16, 24)
    reference, unet, net = theirs("full"), random_weights(their_unet, config), random_weights(their_control, config)
    residuals = given.their_residuals(net)
    expected = _with_both(given, unet, reference(picture), residuals)
    for alone in (_with_both(given, unet, reference(picture), None), given.their_output(unet, residuals)):
        assert relative_change(alone, expected) >= 0.05
    adapter = loaded(from_diffusers(reference.state_dict()))
    control = ours(ControlNet, config, net)
    mine = ours(UNet, config, unet)
    for total in (given.numbers.control(control) + adapter(picture), adapter(picture) + given.numbers.control(control)):
        assert_within(given.numbers.predict(mine, total), expected, 1e-4)


def _with_both(given: Case, unet: nn.Module, added: list[Tensor], residuals: Residuals | None) -> Tensor:
    n = given.numbers
    more = {} if residuals is None else {
        "down_block_additional_residuals": residuals.skips,
        "mid_block_additional_residual": residuals.middle,
    }  # fmt: skip
    return unet(
        n.x,
        n.timesteps,
        n.context,
        down_intrablock_additional_residuals=[feature.clone() for feature in added],
        return_dict=False,
        **more,
    )[0]


@pytest.fixture(scope="module")
def host_networks(comfy_path: Path) -> ModuleType:
    """The host's own adapters, whose keys are the authors'; that file needs torch alone."""
    spec = importlib.util.spec_from_file_location("host_adapters", comfy_path / "comfy" / "t2i_adapter" / "adapter.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.host
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("full", {"ksize": 1, "use_conv": False}),
        ("full", {"ksize": 3, "use_conv": False}),
        ("full", {"ksize": 3, "use_conv": True}),
        ("XL", {"ksize": 1, "use_conv": False}),
        ("XL", {"ksize": 3, "use_conv": True}),
        ("light", {}),
    ],
)
@pytest.mark.parametrize("channels", [3, 1])
@torch.no_grad()
def test_features_and_their_places_are_those_of_the_host(
    host_networks: ModuleType, kind: str, settings: dict[str, Any], channels: int
):
    """At even sizes; at odd ones the host pads both edges before it averages, and diffusers, like us, does not."""
    sizes = {"channels": list(SIZES[kind]), "nums_rb": BLOCKS[kind], "cin": channels * MULTIPLES[kind] ** 2}
    if kind == "light":
        reference = host_networks.Adapter_light(**sizes)
    else:
        reference = host_networks.Adapter(**sizes, **settings, sk=True, xl=kind == "XL")
    randomise(reference)
    weights = reference.state_dict()
    adapter = loaded(from_tencentarc(weights))
    assert adapter.config.learned_halving == settings.get("use_conv", False)
    picture = hint(kind, 16, 32, channels)
    expected = reference(picture)
    dark = reference(torch.zeros_like(picture))
    given = adapter(picture)
    encoder = list(reversed(expected["input"]))  # the host pops from the end
    places = [i for i, feature in enumerate(encoder) if feature is not None]
    assert places == [i for i, feature in enumerate(given.encoder) if feature is not None]
    assert bool(expected.get("middle")) == (given.middle is not None) == (kind == "XL")
    wanted = [encoder[i] for i in places] + expected.get("middle", [])
    unlit = [feature for feature in reversed(dark["input"]) if feature is not None] + dark.get("middle", [])
    for mine, theirs_, without in zip(features(given), wanted, unlit, strict=True):
        assert relative_change(without, theirs_) >= 0.05
        assert_within(mine, theirs_, 1e-4)


# -- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_layout_and_back_is_exact(kind: str, channels: int):
    state = theirs(kind, channels).state_dict()
    names = list(state)
    weights = from_diffusers(state)
    assert list(state) == names
    assert DIFFUSERS(state) and not TENCENTARC(state) and not WRAPPED(state)
    assert TENCENTARC(weights) and not DIFFUSERS(weights) and not WRAPPED(weights)
    back = to_diffusers(weights)
    assert list(back) == names
    assert all(back[key] is state[key] for key in names)


@pytest.mark.parametrize("kind", KINDS)
def test_the_authors_prefix_is_taken_off(kind: str):
    weights = from_diffusers(theirs(kind).state_dict())
    wrapped = {f"adapter.{key}": tensor for key, tensor in weights.items()}
    assert WRAPPED(wrapped) and not DIFFUSERS(wrapped) and not TENCENTARC(wrapped)
    for given in (weights, wrapped):
        taken = from_tencentarc(given)
        assert list(taken) == list(weights)
        assert all(taken[key] is weights[key] for key in weights)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("full", AdapterConfig((32, 64, 128, 128))),
        ("light", AdapterConfig((32, 64, 128, 128), blocks=4, kernel=3, light=True)),
        ("XL", AdapterConfig((64, 128, 256, 256), hint_multiple=16)),
    ],
)
def test_the_configuration_is_read_from_the_shapes(kind: str, expected: AdapterConfig):
    for channels in (3, 1):
        weights = from_diffusers(theirs(kind, channels).state_dict())
        assert read_adapter_config(weights) == replace(expected, hint_channels=channels)


@pytest.mark.parametrize("kind", KINDS)
def test_published_networks_have_the_same_parameters(kind: str):
    config = FULL[FAMILIES[kind]]
    with torch.device("meta"):
        from diffusers.models.adapter import T2IAdapter as Theirs

        channels = [320, 640, 1280] if kind == "light" else [320, 640, 1280, 1280]
        name = {"full": "full_adapter", "light": "light_adapter", "XL": "full_adapter_xl"}[kind]
        reference = Theirs(3, channels, BLOCKS[kind], MULTIPLES[kind], name)
    weights = from_diffusers(reference.state_dict())
    adapter = build(weights, {}, device="meta")
    assert {key: tensor.shape for key, tensor in adapter.state_dict().items()} == {
        key: tensor.shape for key, tensor in weights.items()
    }
    assert adapter.config.channels == (320, 640, 1280, 1280)
    assert adapter.mismatch(config) is None


def test_what_diffusers_cannot_express_is_not_written_in_its_layout():
    for settings, says in (
        ({"kernel": 3}, "has 3x3 kernels where diffusers has 1x1"),
        ({"learned_halving": True}, "halves with convolutions"),
    ):
        weights = T2IAdapter(AdapterConfig(SIZES["full"], **settings), device="meta").state_dict()
        with pytest.raises(AdapterError, match=re.escape(says) + r".* save it in its own layout \(ldm\)"):
            to_diffusers(weights)


@pytest.mark.parametrize(
    ("key", "shape", "says"),
    [
        ("conv_in.weight", None, "conv_in.weight is missing, of which the network's size is read"),
        ("conv_in.weight", (32, 4, 3, 3), "conv_in.weight reads 4 channels: expected 64 or 192"),
        ("conv_in.weight", (32, 192), "conv_in.weight has shape 32x192: expected 4 dimensions"),
        ("body.8.block1.weight", (1, 1, 1, 1), "body has 9 entries: expected 4 stages of equal length"),
    ],
)
def test_odd_weights_are_named(key: str, shape: tuple[int, ...] | None, says: str):
    weights = from_diffusers(theirs("full").state_dict())
    if shape is None:
        del weights[key]
    else:
        weights[key] = torch.zeros(shape)
    with pytest.raises(ConfigurationError, match=re.escape(says)):
        build(weights, {})


# -- what it gives and what it takes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "size", "places", "shapes"),
    [
        ("full", (16, 24), (2, 5, 8, 11), ((32, 16, 24), (64, 8, 12), (128, 4, 6), (128, 2, 3))),
        ("light", (13, 9), (2, 5, 8, 11), ((32, 13, 9), (64, 7, 5), (128, 4, 3), (128, 2, 2))),
        ("XL", (13, 9), (3, 5, 8, 9), ((64, 7, 5), (128, 7, 5), (256, 4, 3), (256, 4, 3))),
    ],
)
@torch.no_grad()
def test_features_have_the_encoders_own_places_and_sizes(
    kind: str, size: tuple[int, int], places: tuple[int, ...], shapes: tuple[tuple[int, ...], ...]
):
    config = SMALL[FAMILIES[kind]]
    given = loaded(from_diffusers(theirs(kind).state_dict()))(hint(kind, *size))
    blocks = len(config.skip_channels)
    assert given.skips == (None,) * blocks
    assert len(given.encoder) == blocks
    found = {i: tuple(t.shape) for i, t in enumerate((*given.encoder, given.middle)) if t is not None}
    assert found == {place: (2, *shape) for place, shape in zip(places, shapes, strict=True)}
    assert all(config.residual_shapes(*size)[place] == shape for place, shape in zip(places, shapes, strict=True))


@torch.no_grad()
def test_nothing_is_added_where_the_features_are_zero():
    config = SMALL["SD1.x"]
    adapter = T2IAdapter(AdapterConfig(SIZES["light"], blocks=4, kernel=3, light=True))
    for parameter in adapter.parameters():
        nn.init.zeros_(parameter)
    unet, given = seeded(UNet, config), inputs(config)
    assert torch.equal(given.predict(unet, adapter(given.hint)), given.predict(unet))


@pytest.mark.parametrize(
    ("kind", "shape", "says"),
    [
        (
            "full",
            (1, 1, 64, 64),
            "hint has 1 channels of 64x64; this T2I-Adapter takes 3, and width and height must be",
        ),
        ("full", (1, 3, 60, 64), "hint has 3 channels of 64x60;"),
        ("XL", (1, 3, 72, 104), "must be multiples of 16: resize the hint to 112x80"),
    ],
)
def test_another_hint_is_refused(kind: str, shape: tuple[int, ...], says: str):
    adapter = loaded(from_diffusers(theirs(kind).state_dict()))
    with pytest.raises(AdapterError, match=re.escape(says)):
        adapter(torch.zeros(shape))


def test_an_adapter_says_what_it_fits():
    sd, xl = (T2IAdapter(AdapterConfig(hint_multiple=multiple), device="meta") for multiple in (8, 16))
    assert (sd.kind, sd.family, xl.family) == ("T2I-Adapter", "SD1.x", "SDXL")
    assert [sd.mismatch(model) for model in (SD15, SD21)] == [None, None]
    assert xl.mismatch(SDXL) is None
    assert sd.mismatch(SDXL) == (
        "this T2I-Adapter is made for SD1.x, the model is SDXL: load a T2I-Adapter made for SDXL"
    )
    assert xl.mismatch(SD15) == (
        "this T2I-Adapter is made for SDXL, the model is SD1.x: load a T2I-Adapter made for SD1.x"
    )
    assert xl.mismatch(SD21) == (
        "this T2I-Adapter is made for SDXL, the model is SD2.x: "
        "load a T2I-Adapter made for SD1.x, which SD2.x takes too"
    )
    assert sd.mismatch(SMALL["SD1.x"]) == (
        "the features of this SD1.x T2I-Adapter have 320 640 1280 1280 channels, the SD1.x model's encoder has "
        "32 64 128 128 there: load a T2I-Adapter made for this model"
    )
    assert sd.mismatch(TINY) == (
        "this SD1.x T2I-Adapter joins a UNet of 12 encoder blocks, the SD1.x model has 9: "
        "load a T2I-Adapter made for this model"
    )
    other_levels = replace(SD15, channel_mult=(1, 2, 4), num_res_blocks=3, transformer_depth=(1, 1, 1))
    channels = tuple(other_levels.skip_channels[i] for i in (2, 5, 8, 11))
    assert T2IAdapter(AdapterConfig(channels), device="meta").mismatch(other_levels) == (
        "the features of this SD1.x T2I-Adapter have 0 1 2 3 halvings of the latent, the SD1.x model's encoder has "
        "0 1 2 2 there: load a T2I-Adapter made for this model"
    )
