"""The core's ControlNet Union against ComfyUI's own network: the same for one hint, but not for a batch of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from zeroconv.controlnet_core.networks.residuals import Residuals
from zeroconv.controlnet_core.networks.union import TYPES, UnionControlNet, build

if TYPE_CHECKING:
    from hosting import Host

CONTEXT, POOLED = 24, 60
SIZE = (8, 12)
SETTINGS: dict[str, Any] = {  # the host's union has 320 channels at the top level
    "image_size": 32,
    "in_channels": 4,
    "model_channels": 320,
    "hint_channels": 3,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 1],
    "transformer_depth": [0, 1],
    "transformer_depth_middle": 1,
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "context_dim": CONTEXT,
    "num_classes": "sequential",
    "adm_in_channels": POOLED,
    "legacy": False,
}


class Pair(NamedTuple):
    """The host's network and ours, of the same random weights."""

    theirs: nn.Module
    ours: UnionControlNet


def pair(n_types: int) -> Pair:
    """The host's network and ours for these types."""
    import comfy.cldm.cldm
    import comfy.ops
    from tiny_models import randomise

    with torch.inference_mode(False):
        theirs = comfy.cldm.cldm.ControlNet(
            **SETTINGS, union_controlnet_num_control_type=n_types, operations=comfy.ops.disable_weight_init
        ).eval()
        randomise(theirs, seed=31)
        theirs.get_parameter("task_embedding").data.mul_(320)  # the spread that its authors begin with
        ours = build(theirs.state_dict(), {"head_dim": "64"}, device="meta")
        ours.load_state_dict(theirs.state_dict(), assign=True)
    return Pair(theirs, ours)


@pytest.fixture(scope="module", params=[6, 8])
def networks(host: Host, request: pytest.FixtureRequest) -> Pair:
    return pair(request.param)


class Inputs(NamedTuple):
    """Two pictures, of which the second has the first's hint when it is shared."""

    x: Tensor
    timesteps: Tensor
    context: Tensor
    y: Tensor
    hint: Tensor

    def by_host(self, network: nn.Module, types: list[int], hint: Tensor | None = None) -> list[Tensor]:
        found: dict[str, Any] = network(
            x=self.x,
            hint=self.hint if hint is None else hint,
            timesteps=self.timesteps,
            context=self.context,
            y=self.y,
            control_type=types,
        )
        return [*found["output"], *found["middle"]]

    def by_us(self, network: UnionControlNet, types: list[int]) -> list[Tensor]:
        features = network.encode_hint(self.hint)
        guided_hint = network.fuse([features], types, [1.0]) if types else features
        residuals: Residuals = network(self.x, self.timesteps, self.context, guided_hint, self.y, types=types)
        return [residual for residual in residuals if residual is not None]


def inputs(shared: bool) -> Inputs:
    random = torch.Generator().manual_seed(3)
    hint = torch.rand(2, 3, 8 * SIZE[0], 8 * SIZE[1], generator=random) * torch.tensor([1.0, 0.1])[:, None, None, None]
    return Inputs(
        x=torch.randn(2, 4, *SIZE, generator=random),
        timesteps=torch.tensor([871, 30]),
        context=torch.randn(2, 5, CONTEXT, generator=random),
        y=torch.randn(2, POOLED, generator=random),
        hint=hint[:1].expand(2, -1, -1, -1) if shared else hint,
    )


def change(before: Tensor, after: Tensor) -> float:
    return ((after - before).norm() / before.norm()).item()


def test_the_types_are_the_hosts(host: Host):
    from comfy.cldm.control_types import UNION_CONTROLNET_TYPES

    assert dict(zip(TYPES, range(8), strict=True)) == UNION_CONTROLNET_TYPES


@pytest.mark.parametrize("types", [[0], [3], [5], []], ids=str)
@torch.no_grad()
def test_one_hint_gives_the_hosts_residuals(networks: Pair, types: list[int]):
    given = inputs(shared=True)
    expected = given.by_host(networks.theirs, types)
    dark = given.by_host(networks.theirs, types, torch.zeros_like(given.hint))
    other = given.by_host(networks.theirs, [1])
    mine = given.by_us(networks.ours, types)
    assert len(mine) == len(expected) == 5
    for residual, wanted, without, otherwise in zip(mine, expected, dark, other, strict=True):
        assert change(without, wanted) >= 0.05, "the hint moves it"
        assert change(otherwise, wanted) >= 0.05, "the type moves it"
        assert (residual - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@torch.no_grad()
def test_pictures_of_different_hints_differ_from_the_hosts(networks: Pair):
    """There the host attends to each picture alone and the authors' network to the batch, as ours does."""
    given = inputs(shared=False)
    for mine, theirs in zip(given.by_us(networks.ours, [3]), given.by_host(networks.theirs, [3]), strict=True):
        assert 1e-3 <= change(theirs, mine) <= 0.5
