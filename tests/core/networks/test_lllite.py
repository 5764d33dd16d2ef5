"""ControlLLLite: the formula by hand, the authors' own code beside ours, and a UNet that comes out as it went in.

The authors' code is on no package registry: ZEROCONV_SD_SCRIPTS names a checkout of kohya-ss/sd-scripts to run it from.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zeroconv.controlnet_core.dosing.block_weights import BlockWeights
from zeroconv.controlnet_core.dosing.strength import Strength
from zeroconv.controlnet_core.files.kinds import detect
from zeroconv.controlnet_core.networks.configuration import ConfigurationError
from zeroconv.controlnet_core.networks.lllite import (
    ControlLLLite,
    LLLiteError,
    applied,
    build,
    targets,
)
from zeroconv.controlnet_core.networks.unet import UNet

from ..small import FULL, SMALL, assert_within, inputs, relative_change, seeded

CONFIG = SMALL["SDXL"]  # nine encoder blocks on three levels
BLOCKS = 9
QUERY = "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


# -- files of random weights, as the authors name and shape them ------------------------------------------------------


def depth_of(path: str) -> int:
    """The authors' depth for a layer: 1, 2, 3 from the latent's own size down."""
    part, number, place = (*path.split("."), "0", "0")[:3]
    if part == "middle_block":
        return 3
    if part == "input_blocks":
        return 1 if int(number) <= 2 else 2 if int(number) <= 5 else 3
    return (3 if int(number) <= 2 else 2 if int(number) <= 5 else 1) - (int(place) >= 2)  # an Upsample comes third


def published(path: str, layer: nn.Module) -> bool:
    """The layers of the published files: what makes queries of all attention, keys and values of self-attention."""
    encoder = path.startswith(("input_blocks.", "middle_block."))
    return encoder and path.endswith((".attn1.to_q", ".attn1.to_k", ".attn1.to_v", ".attn2.to_q"))


def everything(path: str, layer: nn.Module) -> bool:
    """Every layer that the authors' code can shift: those that see the picture at a size that its depth tells."""
    other = ("time_embed", "label_emb", "out.", "input_blocks.0.")
    sized = ".emb_layers." not in path and not path.endswith((".op", ".attn2.to_k", ".attn2.to_v"))
    return isinstance(layer, nn.Linear | nn.Conv2d) and not path.startswith(other) and sized


CHOICES = {"published": published, "everything": everything}


def convolutions(layer: nn.Module) -> tuple[int, tuple[int, ...]]:
    """Channels of its input, and what the kernel of a projection beside it ends with."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, (1, 1)
    assert isinstance(layer, nn.Linear)
    return layer.in_features, ()


def layer_state(
    name: str, channels: int, kernel: tuple[int, ...], depth: int, e: int, m: int, random: torch.Generator
) -> dict[str, Tensor]:
    """The weights of one layer's network."""
    shapes = {"conditioning1.0": (e // 2, 3, 4, 4), "down.0": (m, channels, *kernel)}
    shapes |= {"mid.0": (m, m + e, *kernel), "up.0": (channels, m, *kernel)}
    if depth == 1:
        shapes["conditioning1.2"] = (e, e // 2, 2, 2)
    elif depth == 2:
        shapes["conditioning1.2"] = (e, e // 2, 4, 4)
    else:
        shapes |= {"conditioning1.2": (e // 2, e // 2, 4, 4), "conditioning1.4": (e, e // 2, 2, 2)}
    state = {}
    for part, shape in shapes.items():
        weight = torch.randn(shape, generator=random)
        state[f"{name}.{part}.weight"] = weight * (3 / weight[0].numel()) ** 0.5
        state[f"{name}.{part}.bias"] = 0.1 * torch.randn(shape[0], generator=random)
    return state


def file_for(unet: nn.Module, choice: Callable[[str, nn.Module], bool], e: int = 8, m: int = 12) -> dict[str, Tensor]:
    """The tensors of a file for these layers of `unet`."""
    random = torch.Generator().manual_seed(23)
    state = {}
    for path, layer in unet.named_modules():
        if path and choice(path, layer):
            channels, kernel = convolutions(layer)
            name = "lllite_unet_" + path.replace(".", "_")
            state |= layer_state(name, channels, kernel, depth_of(path), e, m, random)
    return state


def loaded(state: dict[str, Tensor]) -> ControlLLLite:
    """As a file is loaded: built without memory, then filled strictly."""
    control = build(detect(state)[1].canonicalize(state), {}, device="meta")
    control.load_state_dict(state, assign=True)
    return control


@pytest.fixture(scope="module")
def unet() -> UNet:
    return seeded(UNet, CONFIG)


# -- the formula, in functional calls ---------------------------------------------------------------------------------


def embedding_by_hand(state: dict[str, Tensor], name: str, hint: Tensor) -> Tensor:
    """Convolutions whose stride is their kernel, ReLU between them; the hint goes in as -1..1."""
    cx = hint * 2 - 1
    for i in (0, 2, 4):
        weight = state.get(f"{name}.conditioning1.{i}.weight")
        if weight is not None:
            cx = F.conv2d(
                cx if i == 0 else cx.relu(), weight, state[f"{name}.conditioning1.{i}.bias"], weight.shape[-1]
            )
    return cx


def delta_by_hand(state: dict[str, Tensor], name: str, x: Tensor, hint: Tensor) -> Tensor:
    """up(relu(mid(cat[embedding, relu(down(x))])))."""
    cx = embedding_by_hand(state, name, hint)
    cx = cx.repeat(x.shape[0] // cx.shape[0], 1, 1, 1)
    if x.ndim == 3:
        cx = cx.flatten(2).transpose(1, 2)
    project = F.conv2d if x.ndim == 4 else F.linear
    axis = 1 if x.ndim == 4 else 2

    def weights(part: str) -> tuple[Tensor, Tensor]:
        return state[f"{name}.{part}.0.weight"], state[f"{name}.{part}.0.bias"]

    hidden = torch.cat([cx, project(x, *weights("down")).relu()], dim=axis)
    return project(project(hidden, *weights("mid")).relu(), *weights("up"))


def by_hand(
    unet: UNet, state: dict[str, Tensor], hint: Tensor, scale: Callable[[str], float | Tensor] = lambda _: 1.0
) -> UNet:
    """A copy of `unet` whose layers are replaced by ones that shift their input by `scale(name)` times its delta."""

    class Shifted(nn.Module):
        def __init__(self, layer: nn.Module, name: str):
            super().__init__()
            self.layer, self.name = layer, name

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + scale(self.name) * delta_by_hand(state, self.name, x, hint))

    names = {key.partition(".")[0] for key in state}
    result = copy.deepcopy(unet)
    for path, layer in list(result.named_modules()):
        name = "lllite_unet_" + path.replace(".", "_")
        if name in names:
            parent, _, child = path.rpartition(".")
            setattr(result.get_submodule(parent), child, Shifted(layer, name))
    return result


@pytest.mark.parametrize("kernel", [(), (1, 1)], ids=["linear", "convolution"])
@pytest.mark.parametrize(("depth", "stride"), [(1, 8), (2, 16), (3, 32)])
@torch.no_grad()
def test_each_layers_network_is_the_formula(depth: int, stride: int, kernel: tuple[int, ...]):
    random = torch.Generator().manual_seed(depth)
    state = layer_state(QUERY, 20, kernel, depth, 6, 10, random)
    control, hint = loaded(state), torch.rand(2, 3, 128, 64, generator=random)
    height, width = 128 // stride, 64 // stride
    x = torch.randn((2, 20, height, width) if kernel else (2, height * width, 20), generator=random)
    before = x.clone(), hint.clone()

    embedding = control.encode_hint(hint)[QUERY]
    assert embedding.shape == (2, 6, height, width)
    assert_within(embedding, embedding_by_hand(state, QUERY, hint), 1e-6)
    delta, expected = control.delta(QUERY, x, embedding), delta_by_hand(state, QUERY, x, hint)
    assert delta.shape == x.shape
    assert relative_change(delta_by_hand(state, QUERY, x, 1 - hint), expected) >= 0.05
    assert relative_change(delta_by_hand(state, QUERY, -x, hint), expected) >= 0.05
    assert_within(delta, expected, 1e-4)
    assert_within(control.shifted(QUERY, 4, x, embedding, lambda _, d: d / 2), x + expected / 2, 1e-4)
    assert torch.equal(x, before[0]) and torch.equal(hint, before[1])


@pytest.mark.parametrize("hints", [1, 2])
@pytest.mark.parametrize("choice", CHOICES)
@torch.no_grad()
def test_a_whole_unet_is_the_formula(unet: UNet, choice: str, hints: int):
    given, state = inputs(CONFIG, 16, 24), file_for(unet, CHOICES[choice])
    control, hint = loaded(state), given.hint[:hints]
    expected = given.predict(by_hand(unet, state, hint))
    assert relative_change(given.predict(unet), expected) >= 0.05
    assert relative_change(given.predict(by_hand(unet, state, torch.zeros_like(hint))), expected) >= 0.05
    with applied(unet, control, control.encode_hint(hint)):
        assert_within(given.predict(unet), expected, 1e-4)


@torch.no_grad()
def test_two_act_one_after_the_other(unet: UNet):
    given, state = inputs(CONFIG), file_for(unet, published)
    other = {key: -tensor for key, tensor in state.items()}
    first, second = loaded(state), loaded(other)
    # The outer of two nested layers gets x first.
    expected = given.predict(by_hand(by_hand(unet, other, 1 - given.hint), state, given.hint))
    alone = given.predict(by_hand(unet, state, given.hint))
    with applied(unet, first, first.encode_hint(given.hint)):
        assert_within(given.predict(unet), alone, 1e-4)
        with applied(unet, second, second.encode_hint(1 - given.hint)):
            both = given.predict(unet)
        assert_within(given.predict(unet), alone, 1e-4)
    assert relative_change(alone, both) >= 0.05
    assert_within(both, expected, 1e-4)


# -- dosing -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_dose_weighs_deltas_as_residuals(unet: UNet):
    """0.7 on the left half, block i times its weight, and 64/h relative to the latent: 2 and 4 at an SDXL's levels."""
    given, state = inputs(CONFIG), file_for(unet, published)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    weights = BlockWeights("custom", skips=(9.0, 9.0, 9.0, 9.0, 0.5, 0.0, 9.0, 0.25, 1.0), middle=2.0)
    strength = Strength(0.7, guidance="cfg_resolution", mask=mask, block_weights=weights)
    by_block = {"input_blocks_4": 0.5, "input_blocks_5": 0.0, "input_blocks_7": 0.25, "input_blocks_8": 1.0}

    def scale(name: str) -> Tensor:
        weight = next((value for block, value in by_block.items() if block in name), 2.0)
        size = 4 if f"{name}.conditioning1.4.weight" in state else 8
        left = torch.zeros(1, size, size, 1)
        left[:, :, : size // 2] = 1
        return 0.7 * weight * 16 / size * left.flatten(1, 2)

    control, scales = loaded(state), strength.scales(0.7, BLOCKS, 16, mask)
    expected = given.predict(by_hand(unet, state, given.hint, scale))
    with applied(unet, control, control.encode_hint(given.hint), scales.scaled):
        assert_within(given.predict(unet), expected, 1e-4)
    assert relative_change(given.predict(unet), expected) >= 0.05
    assert relative_change(given.predict(by_hand(unet, state, given.hint)), expected) >= 0.05


@torch.no_grad()
def test_which_block_a_delta_is_dosed_as(unet: UNet):
    control, given = loaded(file_for(unet, everything)), inputs(CONFIG, 16, 24)
    seen: dict[int, set[tuple[int, ...]]] = {}

    def weigh(block: int, delta: Tensor) -> None:
        seen.setdefault(block, set()).add(tuple(delta.shape[2:]))

    with applied(unet, control, control.encode_hint(given.hint), weigh):
        given.predict(unet)
    # 3 and 6 only make smaller, but decoder blocks 5 and 2 read their skips, and end by making larger.
    top, half, quarter = (16, 24), (8, 12), (4, 6)
    assert seen == {
        **{i: {top} for i in (0, 1, 2)}, 3: {half, top}, 4: {half}, 5: {half}, 6: {quarter, half},
        **{i: {quarter} for i in (7, 8, 9)},
    }  # fmt: skip
    found = targets(unet, control)
    assert found[QUERY].block == 4
    assert found["lllite_unet_middle_block_0_in_layers_2"].block == 9
    assert found["lllite_unet_output_blocks_0_0_in_layers_2"].block == 8
    assert found["lllite_unet_output_blocks_8_0_in_layers_2"].block == 0


@torch.no_grad()
def test_nothing_left_of_a_dose_is_bit_equal_to_no_control(unet: UNet):
    control, given = loaded(file_for(unet, everything)), inputs(CONFIG)
    with applied(unet, control, control.encode_hint(given.hint), lambda *_: None):
        found = given.predict(unet)
    assert torch.equal(found, given.predict(unet))


# -- a UNet comes out as it went in -----------------------------------------------------------------------------------


class Broken(Exception):
    """What the test raises."""


def hooks(unet: nn.Module) -> list[int]:
    return [len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in unet.modules()]


@pytest.mark.parametrize("ending", ["success", "exception inside", "exception in a layer", "a layer is missing"])
@torch.no_grad()
def test_apply_and_remove_are_inverses(unet: UNet, ending: str):
    state, given = file_for(unet, everything), inputs(CONFIG)
    control = loaded(state)
    plain, weights = given.predict(unet), {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    embeddings = control.encode_hint(given.hint)

    def breaks(block: int, delta: Tensor) -> Tensor:
        raise Broken

    if ending == "success":
        with applied(unet, control, embeddings):
            assert sum(hooks(unet)) == len(control)
            assert relative_change(plain, given.predict(unet)) >= 0.05
    elif ending == "exception inside":
        with pytest.raises(Broken), applied(unet, control, embeddings):
            raise Broken
    elif ending == "exception in a layer":
        with pytest.raises(Broken), applied(unet, control, embeddings, breaks):
            given.predict(unet)
    else:
        more = loaded(state | layer_state("lllite_unet_nowhere", 8, (), 1, 4, 4, torch.Generator()))
        with pytest.raises(LLLiteError, match="lacks 1 of"), applied(unet, more, embeddings):
            raise AssertionError("must not be entered")
    assert sum(hooks(unet)) == 0
    assert torch.equal(given.predict(unet), plain)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in unet.state_dict().items())


# -- sizes ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_odd_latents(unet: UNet):
    """Embeddings have the UNet's sizes, rounded up; what the authors' sizes, rounded down, hold of them is theirs."""
    state, given = file_for(unet, everything), inputs(CONFIG, 13, 9)
    control = loaded(state)
    embeddings = control.encode_hint(given.hint)
    sizes = {8: (13, 9), 16: (7, 5), 32: (4, 3)}
    assert {(net.stride, tuple(embeddings[name].shape[2:])) for name, net in control.networks()} == set(sizes.items())
    continued = F.pad(given.hint, (0, 24, 0, 24), mode="replicate")  # to 128x96
    for name, embedding in embeddings.items():
        theirs = embedding_by_hand(state, name, given.hint)
        assert_within(embedding[:, :, : theirs.shape[2], : theirs.shape[3]], theirs, 1e-6)
        whole = embedding_by_hand(state, name, continued)
        assert_within(embedding, whole[:, :, : embedding.shape[2], : embedding.shape[3]], 1e-6)
    without = given.predict(unet)
    with applied(unet, control, embeddings):
        assert relative_change(without, given.predict(unet)) >= 0.05


@torch.no_grad()
def test_a_hint_of_another_size_than_the_latent(unet: UNet):
    control, given = loaded(file_for(unet, published)), inputs(CONFIG)
    embeddings = control.encode_hint(given.hint[..., :64])
    expected = f"{QUERY} expects 32x128, its layer is given 64x128: the hint must be 8 times the latent's size"
    with pytest.raises(LLLiteError, match=expected), applied(unet, control, embeddings):
        given.predict(unet)


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (1, 3, 60, 64), (1, 3, 64, 60)])
def test_a_hint_that_no_latent_has(unet: UNet, shape: tuple[int, ...]):
    control = loaded(file_for(unet, published))
    with pytest.raises(
        LLLiteError, match=f"hint has {shape[1]} channels of {shape[3]}x{shape[2]}; .* takes 3 channels"
    ):
        control.encode_hint(torch.rand(shape))


# -- files ------------------------------------------------------------------------------------------------------------


def test_each_networks_sizes_are_read_from_its_own_weights():
    random = torch.Generator().manual_seed(0)
    sizes = {"a": (20, (), 1, 6, 10), "b": (7, (1, 1), 2, 4, 3), "c": (9, (), 3, 8, 5), "d": (6, (1, 1), 3, 2, 4)}
    state = {}
    for name, (channels, kernel, depth, e, m) in sizes.items():
        state |= layer_state(f"lllite_unet_{name}", channels, kernel, depth, e, m, random)
    before = dict(state)
    control = loaded(state)
    assert [(net.channels, net.convolution, net.stride) for _, net in control.networks()] == [
        (20, False, 8), (7, True, 16), (9, False, 32), (6, True, 32)
    ]  # fmt: skip
    assert control.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in control.state_dict().items())
    assert list(before) == list(state) and all(before[key] is state[key] for key in state)
    assert (control.kind, control.family, control.hint_channels) == ("ControlLLLite", "SDXL", 3)


def test_a_file_without_some_weight():
    state = layer_state(QUERY, 20, (), 1, 6, 10, torch.Generator())
    del state[f"{QUERY}.down.0.weight"]
    with pytest.raises(ConfigurationError, match=rf"^{QUERY}.down.0.weight is missing: expected all weights"):
        build(state, {})


def test_unknown_keys_are_left_to_be_named():
    state = layer_state(QUERY, 20, (), 1, 6, 10, torch.Generator()) | {"stray": torch.zeros(1)}
    assert "stray" in detect(state)[1].canonicalize(state)
    with pytest.raises(RuntimeError, match='Unexpected key.*"stray"'):
        build(state, {}).load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "channels", "kernel", "says"),
    [
        ("input_blocks_4_1_transformer_blocks_7_attn1_to_q", 128, (), "a linear layer of 128 channels"),
        ("input_blocks_4_1_transformer_blocks_0_attn1_to_q", 640, (), "a linear layer of 640 channels"),
        ("input_blocks_4_1_transformer_blocks_0_attn1_to_q", 128, (1, 1), "a convolution of 128 channels"),
        ("time_embed_0", 64, (), "a linear layer of 64 channels"),
    ],
)
def test_a_model_without_the_layer(unet: UNet, name: str, channels: int, kernel: tuple[int, ...], says: str):
    state = file_for(unet, published) | layer_state(f"lllite_unet_{name}", channels, kernel, 1, 4, 4, torch.Generator())
    expected = f"the model lacks 1 of the .* layers that this ControlLLLite is made for, the first {name}, {says}: use"
    control = loaded(state)
    with pytest.raises(LLLiteError, match=expected):
        targets(unet, control)
    assert str(control.mismatch(CONFIG)).startswith("the model lacks 1 of ")


def test_which_models_it_fits(unet: UNet):
    control = loaded(file_for(unet, published))
    assert control.mismatch(CONFIG) is None
    assert control.mismatch(FULL["SDXL"], unet) is None
    assert str(control.mismatch(CONFIG, unet.middle_block)).startswith(f"the model lacks {len(control)} of ")
    for family in ("SD1.x", "SD2.x"):
        assert control.mismatch(SMALL[family]) == (
            f"this ControlLLLite is made for SDXL, the model is {family}: use it with an SDXL model, or load a "
            f"ControlNet made for {family}"
        )
    assert str(control.mismatch(FULL["SDXL"])).startswith(
        f"the model lacks {len(control)} of the {len(control)} layers"
    )


# -- the authors' own code --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authors() -> ModuleType:
    """networks/control_net_lllite.py of the checkout that ZEROCONV_SD_SCRIPTS names."""
    checkout = os.environ.get("ZEROCONV_SD_SCRIPTS")
    if not checkout:
        pytest.skip("no checkout of kohya-ss/sd-scripts, which no package registry has: ZEROCONV_SD_SCRIPTS names one")
    # Of its own library, which wants much more, it takes a class for an annotation and a function for logging.
    needed = {
        "library": SimpleNamespace(sdxl_original_unet=SimpleNamespace(SdxlUNet2DConditionModel=nn.Module)),
        "library.utils": SimpleNamespace(setup_logging=lambda: None),
    }
    path = Path(checkout) / "networks" / "control_net_lllite.py"
    spec = importlib.util.spec_from_file_location("control_net_lllite", path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in needed.items():
            patch.setitem(sys.modules, name, stand_in)
        spec.loader.exec_module(module)
    # What their UNet calls Transformer2DModel, ResnetBlock2D and Upsample2D is called otherwise in ours.
    module.ControlNetLLLite.UNET_TARGET_REPLACE_MODULE = ["SpatialTransformer"]
    module.ControlNetLLLite.UNET_TARGET_REPLACE_MODULE_CONV2D_3X3 = ["ResBlock", "Upsample"]
    return module


@pytest.mark.parametrize("hints", [1, 2])
@pytest.mark.parametrize("choice", CHOICES)
@torch.no_grad()
def test_the_authors_own_code_gives_the_same(
    authors: Any, unet: UNet, choice: str, hints: int, monkeypatch: pytest.MonkeyPatch
):
    """Their ControlNetLLLite finds its layers in our UNet, names and runs them; ours loads what it saves."""
    for flag in ("SKIP_OUTPUT_BLOCKS", "TRANSFORMER_ONLY", "ATTN1_2_ONLY"):
        monkeypatch.setattr(authors, flag, choice == "published")
    their_unet = copy.deepcopy(unet)
    theirs = authors.ControlNetLLLite(their_unet, cond_emb_dim=8, mlp_dim=12)
    theirs.apply_to()
    state = file_for(unet, CHOICES[choice])
    assert {key: tensor.shape for key, tensor in theirs.state_dict().items()} == {
        key: tensor.shape for key, tensor in state.items()
    }
    theirs.load_state_dict(state)

    given = inputs(CONFIG, 16, 24)
    hint = given.hint[:hints]
    theirs.set_cond_image(torch.zeros_like(hint) * 2 - 1)
    dark = given.predict(their_unet)
    theirs.set_cond_image(hint * 2 - 1)
    expected = given.predict(their_unet)
    assert relative_change(given.predict(unet), expected) >= 0.05
    assert relative_change(dark, expected) >= 0.05
    control = loaded({key: tensor.detach() for key, tensor in theirs.state_dict().items()})
    with applied(unet, control, control.encode_hint(hint)):
        assert_within(given.predict(unet), expected, 1e-4)
    theirs.set_multiplier(0.6)
    with applied(unet, control, control.encode_hint(hint), lambda _, delta: delta * 0.6):
        assert_within(given.predict(unet), given.predict(their_unet), 1e-4)
