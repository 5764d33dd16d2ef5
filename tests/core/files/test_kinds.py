"""Each record of `KINDS` is complete: a network that keeps the contract, formats, and layouts that load back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from zeroconv.controlnet_core.files.kinds import KINDS, ControlKind, detect, kind_of
from zeroconv.controlnet_core.files.loading import load_control
from zeroconv.controlnet_core.files.saving import to_file
from zeroconv.controlnet_core.networks.control_lora import ControlLora
from zeroconv.controlnet_core.networks.controlnet import ControlNet
from zeroconv.controlnet_core.networks.lite import ControlNetLite
from zeroconv.controlnet_core.networks.lllite import ControlLLLite, LLLite
from zeroconv.controlnet_core.networks.network import ControlNetwork
from zeroconv.controlnet_core.networks.t2i_adapter import AdapterConfig, T2IAdapter
from zeroconv.controlnet_core.networks.unet import SD15, SD21, SDXL, UNetConfig
from zeroconv.controlnet_core.networks.union import UnionControlNet

CONFIG = UNetConfig(
    model_channels=32, channel_mult=(1, 2), transformer_depth=(0, 1), context_dim=8, num_heads=2, num_res_blocks=1
)

NETWORKS: dict[type, Callable[[], ControlNetwork]] = {
    ControlNet: lambda: ControlNet(CONFIG),
    UnionControlNet: lambda: UnionControlNet(CONFIG, n_types=6),
    ControlLora: lambda: ControlLora.fresh(CONFIG, rank=2),
    ControlNetLite: lambda: ControlNetLite(replace(CONFIG, context_dim=0)),  # it has no attention to a text
    T2IAdapter: lambda: T2IAdapter(AdapterConfig(channels=(32, 64, 64, 64))),
    ControlLLLite: lambda: ControlLLLite(
        {"lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q": LLLite(64, 8, 8, 1, False)}
    ),
}


def kind_name(kind: ControlKind) -> str:
    return kind.network.__name__


def test_each_kind_is_here_once():
    assert [kind.network for kind in KINDS] == list(dict.fromkeys(kind.network for kind in KINDS))
    assert {kind.network for kind in KINDS} == set(NETWORKS)
    names = [form.name for kind in KINDS for form in kind.formats]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_a_record_is_complete(kind: ControlKind):
    network = NETWORKS[kind.network]()
    assert isinstance(network, ControlNetwork)
    assert kind_of(network) is kind
    assert kind.formats
    assert "ldm" in kind.layouts
    assert network.kind
    assert network.family in ("SD1.x", "SD2.x", "SDXL")
    assert network.hint_channels == 3


@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_a_network_tells_its_hint_and_what_it_does_not_fit(kind: ControlKind):
    network = NETWORKS[kind.network]()
    told = network.describe()
    assert told["hint"].startswith("3 channels, 8 times the latent's size")
    assert len(told) > 1
    assert all(isinstance(value, str) and value and "\n" not in value for value in told.values())
    for config in (SD15, SD21, SDXL):  # all networks here are too narrow for any of them
        reason = network.mismatch(config)
        assert reason and "\n" not in reason


@pytest.mark.parametrize(
    ("kind", "layout"),
    [(kind, layout) for kind in KINDS for layout in kind.layouts],
    ids=lambda value: value if isinstance(value, str) else kind_name(value),
)
def test_each_layout_is_told_and_loads_back(kind: ControlKind, layout: str):
    network = NETWORKS[kind.network]()
    weights, metadata = to_file(network, layout)
    found, form = detect(weights)
    assert found is kind
    assert form in kind.formats
    assert not form.needs_base
    assert form.marker is None or form.marker in weights
    loaded = load_control(weights, metadata)
    assert type(loaded.control) is kind.network
    assert loaded.format is form
    assert loaded.dropped == (form.marker is not None)
    assert loaded.control.describe() == network.describe()
    before, after = network.state_dict(), loaded.control.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_module_that_is_no_control_does_not_pass_for_one():
    assert not isinstance(torch.nn.Linear(1, 1), ControlNetwork)
