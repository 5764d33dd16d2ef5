"""ControlNet Union does what diffusers' ControlNetUnionModel does, for any number of hints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from zeroconv.controlnet_core.files.layouts import from_diffusers, to_diffusers
from zeroconv.controlnet_core.files.loading import load_control
from zeroconv.controlnet_core.networks.configuration import ConfigurationError
from zeroconv.controlnet_core.networks.residuals import Residuals
from zeroconv.controlnet_core.networks.unet import SDXL, UNetConfig
from zeroconv.controlnet_core.networks.union import TYPES, UnionControlNet, UnionError, build

from ..small import SMALL, Inputs, assert_within, randomise_zeros, relative_change, tensors
from .test_parity_diffusers import case, settings, time_dim

CONFIG = replace(SMALL["SDXL"], transformer_depth=(0, 1, 1), transformer_depth_middle=1)
State = dict[str, Tensor]


def their_network(n_types: int, config: UNetConfig = CONFIG) -> nn.Module:
    from diffusers.models.controlnets.controlnet_union import ControlNetUnionModel

    depths = [max(depth, 1) for depth in config.transformer_depth]
    arguments: dict[str, Any] = settings(config) | {"transformer_layers_per_block": depths}
    return ControlNetUnionModel(
        **arguments,
        conditioning_embedding_out_channels=(16, 32, 96, 256),
        num_control_type=n_types,
        num_trans_channel=config.model_channels,
        num_proj_channel=config.model_channels,
    )


@cache
def theirs(n_types: int) -> nn.Module:
    """Random weights under which hints and types reach the result, and pictures of a batch each other."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = their_network(n_types)
        for name, weight in network.named_parameters():
            if name.startswith("controlnet_cond_embedding.") and weight.ndim == 4:
                nn.init.kaiming_normal_(weight)
            if name.startswith(("transformer_layes.", "spatial_ch_projs.")) and weight.ndim == 2:
                nn.init.normal_(weight, std=1.5 * weight.shape[1] ** -0.5)
            if name == "task_embedding":
                weight.data.mul_(0.2)  # published ones may be as small against the hint's mean: nothing fixes it
    randomise_zeros(network).controlnet_cond_embedding.conv_out.weight.data.mul_(5.0)  # type: ignore[union-attr]
    return network.eval()


def load(state: State) -> UnionControlNet:
    network = load_control(state).control
    assert isinstance(network, UnionControlNet)
    return network


@cache
def ours(n_types: int) -> UnionControlNet:
    return load(theirs(n_types).state_dict())


class Given(NamedTuple):
    """Hints with their types and strengths; `shared` is one hint for both pictures, `batch` the number of these."""

    n_types: int
    types: tuple[int, ...]
    strengths: tuple[float, ...]
    batch: int = 2
    shared: bool = False
    size: tuple[int, int] = (16, 24)

    @property
    def numbers(self) -> tuple[Inputs, dict[str, Tensor]]:
        """What both sides get beside the hints; the second is diffusers' own way to say `y`."""
        n, added = case(CONFIG, *self.size)
        assert n.y is not None
        assert added is not None
        added = {key: tensor[: self.batch] for key, tensor in added.items()}
        cut = [tensor[: self.batch] for tensor in (n.x, n.timesteps, n.context, n.hint, n.y)]
        return Inputs(*cut), added

    @property
    def hints(self) -> list[Tensor]:
        random = torch.Generator().manual_seed(23)
        shape = (1 if self.shared else self.batch, 3, *(8 * side for side in self.size))
        # of different brightness, as hints are: the transformer sees the mean of each
        bright = torch.linspace(1.0, 0.1, shape[0])[:, None, None, None]
        return [torch.rand(shape, generator=random) * bright for _ in self.types]

    def by_diffusers(self, hints: Sequence[Tensor], types: Sequence[int]) -> list[Tensor]:
        (n, added), network = self.numbers, theirs(self.n_types)
        used = torch.zeros(self.batch, self.n_types)
        used[:, list(types)] = 1.0
        whole = [hint.expand(self.batch, -1, -1, -1) for hint in hints]
        skips, middle = network(
            n.x,
            n.timesteps,
            n.context,
            whole,
            used,
            list(types),
            list(self.strengths[: len(hints)]),
            added_cond_kwargs=added,
            return_dict=False,
        )
        return [*skips, middle]

    def by_us(self, network: UnionControlNet) -> list[Tensor]:
        n, _ = self.numbers
        features = [network.encode_hint(hint) for hint in self.hints]
        guided_hint = network.fuse(features, self.types, self.strengths)
        residuals = network(n.x, n.timesteps, n.context, guided_hint, n.y, types=self.types)
        weight = self.strengths[0] if len(self.types) == 1 else 1.0
        return tensors(residuals.mapped(lambda _, residual: residual * weight))


CASES = {
    "one of 6": Given(6, (3,), (1.0,)),
    "one of 8": Given(8, (7,), (1.0,)),
    "one, weaker": Given(6, (0,), (0.6,)),
    "one, odd": Given(6, (5,), (1.0,), size=(13, 9)),
    "one, one picture": Given(6, (2,), (1.0,), batch=1),
    "one, shared": Given(6, (3,), (1.0,), shared=True),
    "two of 6": Given(6, (0, 1), (1.0, 1.0)),
    "two of 8, two strengths": Given(8, (6, 3), (0.7, 1.3)),
    "two, odd": Given(6, (4, 5), (0.7, 1.3), size=(13, 9)),
    "two, one picture": Given(6, (1, 3), (0.9, 0.4), batch=1),
    "two, shared": Given(8, (1, 7), (0.9, 0.4), shared=True),
    "three of 6": Given(6, (2, 0, 4), (0.5, 1.0, 1.5)),
    "three of 8": Given(8, (7, 1, 6), (0.5, 1.0, 0.8)),
    "three, one picture, odd": Given(8, (7, 1, 6), (0.5, 1.0, 0.8), batch=1, size=(13, 9)),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_residuals_are_those_of_diffusers(name: str):
    given = CASES[name]
    hints, types = given.hints, list(given.types)
    expected = given.by_diffusers(hints, types)

    def moves(other: list[Tensor]) -> bool:
        return all(relative_change(a, b) >= 0.05 for a, b in zip(other, expected, strict=True))

    assert moves(given.by_diffusers([torch.zeros_like(hint) for hint in hints], types)), "the hints move them"
    another = next(i for i in range(given.n_types) if i not in types)
    assert moves(given.by_diffusers(hints, [*types[:-1], another])), "the type moves them"
    if len(hints) > 1:
        without = given._replace(types=given.types[:-1], strengths=given.strengths[:-1])
        assert moves(without.by_diffusers(hints[:-1], types[:-1])), "the last hint moves them"
        assert moves(given._replace(strengths=(1.1,) * len(hints)).by_diffusers(hints, types)), "strengths move them"

    for mine, their in zip(given.by_us(ours(given.n_types)), expected, strict=True):
        assert_within(mine, their, 1e-4)


# -- what the transformer sees ----------------------------------------------------------------------------------------


def their_shifts(given: Given, noise: float = 1.0, dark: tuple[int, int] | None = None) -> Tensor:
    """What diffusers adds to each channel, (hints, batch, channels), with `noise` times the noisy latent.

    `dark` names a hint and a picture: there the hint is black.
    """
    (n, added), network, shifts = given.numbers, theirs(given.n_types), []
    hints = given.hints
    if dark is not None:
        hint, picture = dark
        hints[hint][picture] = 0.0
    used = torch.zeros(given.batch, given.n_types)
    used[:, list(given.types)] = 1.0
    hook = network.spatial_ch_projs.register_forward_hook(lambda _, __, shift: shifts.append(shift))  # type: ignore[union-attr]
    network(n.x * noise, n.timesteps, n.context, hints, used, list(given.types), 1.0, added_cond_kwargs=added)
    hook.remove()
    return torch.stack(shifts)


@torch.no_grad()
def test_the_latents_token_reaches_nothing_in_the_authors_network():
    """Their attention runs over the batch, for each token alone: that is why we need no latent to fuse."""
    given = CASES["two of 6"]
    shifts = their_shifts(given)
    assert shifts.shape == (2, 2, CONFIG.model_channels)
    assert torch.equal(their_shifts(given, noise=-20.0), shifts)

    other_hint = their_shifts(given, dark=(1, 0))
    assert torch.equal(other_hint[0], shifts[0])  # the first hint does not see the second
    assert relative_change(shifts[1, 0], other_hint[1, 0]) >= 0.05
    assert relative_change(shifts[1, 1], other_hint[1, 1]) >= 0.05  # but one picture sees the other


@torch.no_grad()
def test_a_picture_in_a_batch_of_other_hints_is_not_what_it_is_alone():
    """The authors' attention over the batch, which we follow; a shared hint gives what one picture gives."""
    network, (hint,) = ours(6), CASES["one of 6"].hints
    features = network.encode_hint(hint)
    both, alone = network.fuse([features], [3], [1.0]), network.fuse([features[:1]], [3], [1.0])
    assert relative_change(alone - features[:1], both[:1] - features[:1]) >= 0.05
    shared = network.fuse([features[:1].expand(2, -1, -1, -1)], [3], [1.0])
    assert_within(shared, alone.expand(2, -1, -1, -1), 1e-5)


@torch.no_grad()
def test_fusing_written_out():
    """guided = sum of s (f + P(T(s (mean f + e)))), the strength of a single hint being left out."""
    network, given = ours(8), CASES["two of 8, two strengths"]
    features = [network.encode_hint(hint) for hint in given.hints]
    before = [feature.clone() for feature in features]
    expected = torch.zeros_like(features[0])
    for feature, kind, s in zip(features, given.types, given.strengths, strict=True):
        token = s * (feature.mean((2, 3)) + network.task_embedding[kind])
        shift = network.spatial_ch_projs(network.transformer_layes(token))
        expected += s * (feature + shift[:, :, None, None])
    fused = network.fuse(features, given.types, given.strengths)
    assert fused.shape == (2, 64, 16, 24)
    assert_within(fused, expected, 1e-6)
    assert torch.equal(fused, network.fuse(features, given.types, given.strengths))
    assert all(torch.equal(a, b) for a, b in zip(features, before, strict=True))

    full, weak = (network.fuse(features[:1], [6], [s]) for s in (1.0, 0.3))
    assert torch.equal(full, weak)


@torch.no_grad()
def test_hints_of_one_picture_stand_for_all():
    network = ours(8)
    features = [network.encode_hint(hint) for hint in CASES["two of 8, two strengths"].hints]
    one, many = features[0][:1], features[1]
    fused = network.fuse([one, many], [6, 3], [0.7, 1.3])
    assert fused.shape == many.shape
    assert_within(fused, network.fuse([one.expand_as(many), many], [6, 3], [0.7, 1.3]), 1e-5)
    assert network.fuse([one, one], [6, 3], [0.7, 1.3]).shape == one.shape


# -- types ------------------------------------------------------------------------------------------------------------


def test_the_types_are_the_hosts_words_in_its_order():
    assert TYPES == (
        "openpose",
        "depth",
        "hed/pidi/scribble/ted",
        "canny/lineart/anime_lineart/mlsd",
        "normal",
        "segment",
        "tile",
        "repaint",
    )


@torch.no_grad()
def test_types_shift_the_timestep_embedding():
    """A set of types has no order; none of them ("auto") is an embedding too, that of eight zeros."""
    network, like = ours(8), torch.zeros(1)
    none, pose, both = (network.embed_types(types, like) for types in ((), (0,), (0, 1)))
    assert none.shape == (1, CONFIG.time_embed_dim)
    assert relative_change(none, pose) >= 0.05
    assert relative_change(pose, both) >= 0.05
    assert torch.equal(both, network.embed_types((1, 0), like))
    waves = torch.cat([torch.ones(4), torch.zeros(4)]).repeat(8)[None]  # cosines and sines of 0
    assert_within(none, network.control_add_embedding(waves), 1e-6)


@torch.no_grad()
def test_without_types_the_hint_is_plain():
    """ComfyUI's "auto": diffusers has no such call, but the network with no hint in its list is told the same."""
    given, network = CASES["one of 6"], ours(6)
    (n, _), (hint,) = given.numbers, given.hints
    plain = network.encode_hint(hint)
    auto = tensors(network(n.x, n.timesteps, n.context, plain, n.y))
    dark = tensors(network(n.x, n.timesteps, n.context, torch.zeros_like(plain), n.y))
    for residual, empty, theirs_empty in zip(auto, dark, given.by_diffusers([], []), strict=True):
        assert relative_change(empty, residual) >= 0.05
        assert_within(empty, theirs_empty, 1e-4)
    for residual, told in zip(auto, given.by_us(network), strict=True):
        assert relative_change(told, residual) >= 0.05


def test_a_type_that_the_file_lacks_is_an_error_that_names_promax():
    n, _ = CASES["one of 6"].numbers
    says = (
        r"^this ControlNet Union knows 6 types of hint, 0 to 5, and not type 6 \(tile\): choose one of openpose, "
        r"depth, hed/pidi/scribble/ted, canny/lineart/anime_lineart/mlsd, normal, segment "
        r"or load a ProMax file, which knows 8$"
    )
    guided_hint = torch.zeros(1, 64, 16, 24)
    with pytest.raises(UnionError, match=says):
        ours(6).fuse([guided_hint], [6], [1.0])
    with pytest.raises(UnionError, match=says):
        ours(6)(n.x, n.timesteps, n.context, guided_hint, n.y, types=[6])
    for kind in (8, -1):
        with pytest.raises(UnionError, match=rf"knows 8 types of hint, 0 to 7, and not type {kind}: .* tile, repaint$"):
            ours(8).fuse([guided_hint], [kind], [1.0])


@pytest.mark.parametrize(
    ("shapes", "n_types", "n_strengths", "says"),
    [
        ([], 0, 0, "at least one: found 0 hints, 0 types and 0 strengths"),
        ([(1, 64, 4, 4)], 2, 1, "each hint needs a type and a strength.* found 1 hints, 2 types and 1 strengths"),
        ([(1, 64, 4, 4)] * 2, 2, 1, "found 2 hints, 2 types and 1 strengths"),
        ([(1, 64, 4, 4), (1, 64, 4, 5)], 2, 2, "hint 2 of 2 has features of 1x64x4x5, another 1x64x4x4: .* one size"),
        (
            [(2, 64, 4, 4), (3, 64, 4, 4)],
            2,
            2,
            "hint 1 of 2 has features of 2x64x4x4, another 3x64x4x4: .* as many pic",
        ),
    ],
)
def test_hints_that_do_not_go_together(shapes: list[tuple[int, ...]], n_types: int, n_strengths: int, says: str):
    with pytest.raises(UnionError, match=says):
        ours(6).fuse([torch.zeros(shape) for shape in shapes], list(range(n_types)), [1.0] * n_strengths)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_types", [6, 8])
def test_sizes_are_read_from_the_shapes(n_types: int):
    network = ours(n_types)
    assert (network.kind, network.family, network.hint_channels) == ("ControlNet Union", "SDXL", 3)
    assert (network.n_types, network.type_dim, len(network.transformer_layes)) == (n_types, time_dim(CONFIG), 1)
    assert network.config == CONFIG
    assert network.mismatch(CONFIG) is None
    assert "SDXL" in (network.mismatch(SMALL["SD1.x"]) or "")


@pytest.mark.parametrize("n_types", [6, 8])
def test_the_published_network_has_the_same_parameters(n_types: int):
    with torch.device("meta"):
        published = from_diffusers(their_network(n_types, SDXL).state_dict())
    assert published["task_embedding"].shape == (n_types, 320)
    assert published["control_add_embedding.linear_1.weight"].shape == (1280, 256 * n_types)
    built = build(published, device="meta")
    assert built.type_dim == 256
    assert {key: tensor.shape for key, tensor in built.state_dict().items()} == {
        key: tensor.shape for key, tensor in published.items()
    }


@pytest.mark.parametrize("n_types", [6, 8])
@torch.no_grad()
def test_round_trips_are_exact(n_types: int):
    diffusers = theirs(n_types).state_dict()
    assert "transformer_layes.0.attn.in_proj_weight" in diffusers
    back = to_diffusers(ours(n_types).state_dict(), CONFIG)
    assert back.keys() == diffusers.keys()
    assert all(torch.equal(back[key], diffusers[key]) for key in diffusers)

    ldm = ours(n_types).state_dict()
    assert {"zero_convs.0.0.weight", "transformer_layes.0.attn.in_proj.weight", "task_embedding"} <= ldm.keys()
    back = load(ldm).state_dict()
    assert back.keys() == ldm.keys()
    assert all(torch.equal(back[key], ldm[key]) for key in ldm)


@pytest.mark.parametrize(
    "key", ["task_embedding", "control_add_embedding.linear_1.weight", "input_hint_block.0.weight"]
)
def test_a_size_that_cannot_be_read_is_named(key: str):
    state = dict(ours(6).state_dict())
    del state[key]
    with pytest.raises(ConfigurationError, match=f"^{key} is missing, of which the network's size is read$"):
        build(state, device="meta")


@torch.no_grad()
def test_a_fresh_union_adds_nothing():
    """Its zero convolutions are zero, and so is the shift that a type gives its hint."""
    network = UnionControlNet(CONFIG, 6, type_dim=8)
    n, _ = CASES["one of 6"].numbers
    features = torch.randn(2, 64, 16, 24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(network.fuse([features], [3], [1.0]), features)
    residuals: Residuals = network(n.x, n.timesteps, n.context, features, n.y, types=[3])
    assert len(residuals.skips) == 9
    assert not any(residual.any() for residual in tensors(residuals))
