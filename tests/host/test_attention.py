"""Controls use the attention that the user started the host with, in the precision that their models ask for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import CONTEXT, POOLED, Control, assert_same
from torch import Tensor, nn

if TYPE_CHECKING:
    from hosting import Host

STARTED = {"--use-split-cross-attention": "attention_split", "--use-quad-cross-attention": "attention_sub_quad"}
"""The host's flags, and the function that it then attends with."""

ARGS = os.environ.get("ZEROCONV_HOST_ARGS", "--cpu").split()


@pytest.mark.skipif(any(flag in ARGS for flag in STARTED), reason="this is such a host")
@pytest.mark.parametrize("flag", STARTED)
def test_in_a_host_started_with(comfy_path: Path, flag: str):
    """All tests of this file, in a host of its own: it chooses its attention when it starts."""
    environment = {"ZEROCONV_HOST_ARGS": " ".join([*ARGS, flag]), "COMFYUI_PATH": str(comfy_path)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


class Calls:
    """Listens to the host's attention: `made` has (its name, heads, precision) of each call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        from comfy.ldm.modules import attention

        theirs = attention.optimized_attention
        self.made: list[tuple[str, int, torch.dtype | None]] = []

        def counted(q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **settings: Any) -> Tensor:
            self.made.append((theirs.__name__, heads, settings.get("attn_precision")))
            return theirs(q, k, v, heads, *args, **settings)

        monkeypatch.setattr(attention, "optimized_attention", counted)


def network_of(host: Host, kind: str) -> nn.Module:
    """A network of ours, loaded through the host."""
    from tiny_kinds import lora_state, union_state

    if kind == "union":
        return host.load_made("attention_union", union_state).network
    if kind == "lora":
        network = host.load_made("attention_lora", lora_state).network
        network.bind(host.model("sd15").model.diffusion_model)
        return network
    return host.load(f"{kind}_depth").network


@torch.inference_mode()
def run(network: Any, **types: Any) -> Any:
    """One forward pass on two samples of a quarter of the usual size."""
    random = torch.Generator().manual_seed(3)
    pooled = torch.randn(2, POOLED + 6 * 256, generator=random) if network.family == "SDXL" else None
    features = network.encode_hint(torch.rand(2, 3, 64, 64, generator=random))
    if types:
        features = network.fuse([features], strengths=[1.0], **types)
    x, context = (torch.randn(shape, generator=random) for shape in ((2, 4, 8, 8), (2, 7, CONTEXT)))
    return network(x, torch.tensor([500.0, 20.0]), context, features, pooled, **types)


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl", "union", "lora"])
def test_every_attention_is_the_hosts(host: Host, kind: str, monkeypatch: pytest.MonkeyPatch):
    network = network_of(host, kind)
    layers = [name for name, _ in network.named_modules() if name.endswith((".attn1", ".attn2", ".attn"))]
    calls = Calls(monkeypatch)
    run(network, **({"types": [1]} if kind == "union" else {}))
    assert len(calls.made) == len(layers) >= 6
    (name,) = {name for name, _, _ in calls.made}
    assert [STARTED[flag] for flag in STARTED if flag in ARGS] in ([], [name])
    if kind == "union":
        assert sum(layer.endswith(".attn") for layer in layers) == 1


@pytest.mark.parametrize(("kind", "model"), [("sd15", "SD15"), ("sd21", "SD20"), ("sdxl", "SDXL")])
def test_the_precision_is_what_the_host_asks_for(host: Host, kind: str, model: str, monkeypatch: pytest.MonkeyPatch):
    import comfy.supported_models

    calls = Calls(monkeypatch)
    run(network_of(host, kind))
    extra = getattr(comfy.supported_models, model).unet_extra_config
    assert {precision for _, _, precision in calls.made} == {extra.get("attn_precision")}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_graph_gives_what_the_native_one_gives(host: Host, family: str, monkeypatch: pytest.MonkeyPatch):
    scene = host.scene(family)
    without = host.sample(scene)
    calls = Calls(monkeypatch)
    native = host.sample(host.native(scene, family, Control()))
    theirs = list(calls.made)
    calls.made.clear()
    assert_same(host.sample(host.apply("ApplyControl", scene, family, Control())), native, without)
    assert calls.made == theirs
