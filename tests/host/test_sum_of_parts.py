"""Controls of different kinds, each dosed its own way, give the sum of their parts in any order."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import CONTEXT, MOVES, TOLERANCE, WAYS, Control, Run, Scene, moved, off_by, picture
from torch import Tensor

from zeroconv.controlnet_core.dosing.block_weights import BlockWeights
from zeroconv.controlnet_core.dosing.schedule import Keyframe, Schedule
from zeroconv.controlnet_core.networks.residuals import Residuals

if TYPE_CHECKING:
    from hosting import Host

FAMILIES = ("sd15", "sdxl")


def half(left: bool) -> Tensor:
    """A mask of the left or the right half with a soft edge."""
    ramp = torch.linspace(1.5, -0.5, 128).clamp(0, 1).expand(1, 128, 128)
    return ramp if left else 1 - ramp


def load(host: Host, family: str, kind: str) -> Any:
    """The CONTROL_NET of a T2I-Adapter or a Control-LoRA for the tiny model."""
    from tiny_kinds import adapter_state, lora_state

    make = {"adapter": adapter_state, "lora": lora_state}[kind]
    return host.load_made(f"{family}_{kind}", lambda: make(family))


def parts(host: Host, family: str) -> list[dict[str, Any]]:
    """What StackControls takes for a T2I-Adapter, a Control-LoRA and two ControlNets."""
    falling = Schedule((Keyframe(0, 1), Keyframe(1, 0.2, "ease")))
    rising = Schedule((Keyframe(0, 0.3, "hold"), Keyframe(0.5, 1)), "percent")
    skips = 9 if family == "sdxl" else 12
    custom = BlockWeights("custom", skips=tuple(0.5 + i / skips for i in range(skips)), middle=0.7)
    return [
        {"control_net": load(host, family, "adapter"), "image": picture(3), "strength": 0.8, "mask": half(True)},
        {"control_net": load(host, family, "lora"), "image": picture(4), "strength": 0.6, "schedule": falling},
        {**host.inputs(Control("depth", strength=0.7, end=0.8), family), "mask": half(False), "schedule": rising},
        {**host.inputs(Control("pose", 2), family), "guidance": "cfg_resolution", "block_weights": custom},
    ]


def stack(host: Host, entries: list[dict[str, Any]]) -> list:
    """A CONTROL_NET_STACK of these entries."""
    made: dict[str, Any] = {}
    for inputs in entries:
        made = {"stack": host.call("StackControls", **made, **inputs)[0]}
    return made["stack"]


def handed_over(host: Host, family: str, entries: list[dict[str, Any]]) -> Residuals:
    """What the UNet is given by a stack of these entries at one call of it, both halves of guidance at once."""
    from zeroconv.controlnet_core.networks.injection import from_host_control
    from zeroconv.nodes.host.stack import controls

    chain: Any = None
    for control in controls(stack(host, entries)):
        control.set_previous_controlnet(chain)
        chain = control
    model = host.model(family).model
    random = torch.Generator().manual_seed(8)
    sigma = 3.0
    cond = {"c_crossattn": torch.randn(2, 7, CONTEXT, generator=random)}
    if family == "sdxl":
        cond["y"] = torch.randn(2, model.model_config.unet_config["adm_in_channels"], generator=random)
    options = {"cond_or_uncond": [1, 0], "sample_sigmas": torch.tensor([14.6, 5.0, 3.0, 1.0, 0.0])}
    chain.pre_run(model, model.model_sampling.percent_to_sigma)
    with torch.inference_mode():
        x = torch.randn(2, 4, 16, 16, generator=random) * sigma
        control = chain.get_control(x, torch.tensor([sigma] * 2), cond, 2, options)
    return from_host_control(control, 9 if family == "sdxl" else 12)


def every(residuals: Residuals) -> list[Tensor | None]:
    return [*residuals.encoder, *residuals]


@pytest.mark.parametrize("family", FAMILIES)
def test_residuals_are_the_sum_of_each_ones_own(host: Host, family: str):
    entries = parts(host, family)
    alone = [handed_over(host, family, [inputs]) for inputs in entries]
    expected = alone[0] + alone[1] + alone[2] + alone[3]
    together = every(handed_over(host, family, entries))
    assert any(t is not None for t in expected.encoder), "the adapter acts"
    for mine, wanted in zip(together, every(expected), strict=True):
        assert (mine is None) == (wanted is None)
        if mine is not None and wanted is not None:
            assert (mine - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    for one in alone:  # and none of them is lost in the sum
        assert any(t is not None and t.abs().max() >= 1e-3 for t in every(one))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_order_gives_the_same_residuals(host: Host, family: str):
    entries = parts(host, family)
    reference = every(handed_over(host, family, entries))
    for order in permutations(entries):
        for mine, wanted in zip(every(handed_over(host, family, list(order))), reference, strict=True):
            assert (mine is None) == (wanted is None)
            if mine is not None and wanted is not None:
                assert (mine - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def sample(host: Host, family: str, way: str, entries: list[dict[str, Any]]) -> Run:
    scene = host.scene(family)
    given = [{"stack": stack(host, entries)}] if way.startswith("Stack") else entries
    for inputs in given:
        if way.endswith("ToPrompt"):
            scene = Scene(
                scene.model,
                *host.call("ApplyControlToPrompt", positive=scene.positive, negative=scene.negative, **inputs),
            )
        else:
            (model,) = host.call("ApplyControl", model=scene.model, **inputs)
            scene = Scene(model, scene.positive, scene.negative)
    return host.sample(scene)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_order_and_any_way_gives_the_same_latent(host: Host, family: str):
    entries = parts(host, family)
    reference = sample(host, family, "StackControls", entries)
    without = host.sample(host.scene(family))
    assert moved(reference, without) >= MOVES
    for i in range(4):
        three = sample(host, family, "StackControls", entries[:i] + entries[i + 1 :])
        assert moved(reference, three) >= 1e-3, f"part {i} does nothing"
    for way in WAYS:
        run = sample(host, family, way, entries[::-1])
        assert off_by(run, reference) <= TOLERANCE
        assert run.calls("unet") == reference.calls("unet") == without.calls("unet")


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_and_the_hosts_own_controls_add(host: Host, family: str):
    """A native ControlNet on the conds, and our adapter and Control-LoRA on top of it, in both orders of the nodes."""
    scene = host.native(host.scene(family), family, Control("depth", strength=0.7))
    adapter, lora, *_ = parts(host, family)
    before = scene
    for inputs in (adapter, lora):
        before = Scene(host.call("ApplyControl", model=before.model, **inputs)[0], before.positive, before.negative)
    mine = Control("depth", strength=0.7)
    expected = sample(host, family, "StackControls", [host.inputs(mine, family), adapter, lora])
    assert moved(expected, host.sample(scene)) >= 1e-3
    assert off_by(host.sample(before), expected) <= TOLERANCE
