"""Control that is off costs nothing and changes nothing: no ControlNet runs, and the latent is the same bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import MOVES, WAYS, Control, Scene, moved

if TYPE_CHECKING:
    from hosting import Host

# What is off, and the sampling that never reaches it: KSamplerAdvanced that stops at step 2 of 6 never sees 80 %.
OFF: dict[str, tuple[Control, str, dict[str, Any]]] = {
    "strength 0": (Control(strength=0.0), "KSampler", {}),
    "percent window never reached": (
        Control(start=0.8, end=1.0),
        "KSamplerAdvanced",
        {"steps": 6, "end_at_step": 2, "return_with_leftover_noise": "enable"},
    ),
    "percent window before the start": (
        Control(start=0.0, end=0.05),
        "KSamplerAdvanced",
        {"steps": 6, "start_at_step": 3},
    ),
    "steps never reached": (Control(start=7, end=9, options={"unit": "step"}), "KSampler", {}),
    "no steps at all": (Control(start=2, end=2, options={"unit": "step"}), "KSampler", {}),
}


@pytest.mark.parametrize("name", ["percent window never reached", "percent window before the start"])
def test_native_control_does_not_run_there_either(host: Host, name: str):
    control, node, sampler = OFF[name]
    run = host.sample(host.native(host.scene(), "sd15", control), node, **sampler)
    assert run.count("control") == 0
    assert len(run.events) > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OFF)
def test_no_control_runs_and_the_latent_is_bit_identical(host: Host, name: str, way: str):
    control, node, sampler = OFF[name]
    without = host.once(("off", name), lambda: host.sample(host.scene(), node, **sampler))
    run = host.sample(host.apply(way, host.scene(), "sd15", control), node, **sampler)
    assert run.count("control") == 0
    assert run.count("hint") == 0
    assert run.calls("unet") == without.calls("unet")
    assert torch.equal(run.latent, without.latent)


@pytest.mark.parametrize("way", ["StackControls", "StackControlsToPrompt"])
def test_one_of_a_stack_off_leaves_the_other(host: Host, way: str):
    on, off = Control("pose", strength=0.8), Control("depth", strength=0.0)
    alone = host.sample(host.apply("ApplyControl", host.scene(), "sd15", on))
    run = host.sample(host.apply(way, host.scene(), "sd15", off, on))
    pose = id(host.load("sd15_pose").get_models()[-1].model)
    assert {event.module for event in run.events if event.what == "control"} == {pose}
    assert torch.equal(run.latent, alone.latent)


@pytest.mark.parametrize(
    ("family", "way"), [*(("sd15", way) for way in WAYS), ("sd21", "ApplyControl"), ("sdxl", "StackControlsToPrompt")]
)
def test_fresh_zero_convolutions_change_nothing(host: Host, family: str, way: str):
    """They run, and what they add is zero: bit for bit."""
    without = host.once(("zero", family), lambda: host.sample(host.scene(family)))
    run = host.sample(host.apply(way, host.scene(family), family, Control("zero")))
    assert run.count("control") > 0
    assert torch.equal(run.latent, without.latent)


def test_the_zero_file_would_move_the_latent_if_it_were_not_zero(host: Host):
    """The premise of the case above, with the host's own nodes: the same net with its zero convolutions filled."""
    run = host.sample(host.native(host.scene(), "sd15", Control("depth")))
    zero = host.sample(host.native(host.scene(), "sd15", Control("zero")))
    without = host.once(("zero", "sd15"), lambda: host.sample(host.scene("sd15")))
    assert moved(run, without) >= MOVES
    assert torch.equal(zero.latent, without.latent)


def test_turning_the_strength_to_zero_leaves_the_model_as_it_was(host: Host):
    """The MODEL that comes out samples as the one that went in, with other prompts too."""
    scene = host.apply("ApplyControl", host.scene(), "sd15", Control(strength=0.0))
    swapped = Scene(scene.model, scene.negative, scene.positive)
    plain = Scene(host.model("sd15"), scene.negative, scene.positive)
    assert torch.equal(host.sample(swapped).latent, host.sample(plain).latent)
