"""Hosts that sample on two devices at once: each has its own copy of the control, and its own half of the conds.

A CPU stands for two: "cpu" and "cpu:0" are two devices to the host, and one to torch.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import MOVES, assert_same, latent, moved, off_by, picture

from .controls import KINDS, WAYS, apply, native, ours

if TYPE_CHECKING:
    from hosting import Host

SECOND = torch.device("cpu", 0)
TWO: dict[str, Any] = {"latent_image": latent(2), "steps": 2}
HINTS = picture(1, 2)


def needs_two_devices() -> None:
    """Skip where the host knows of one device only."""
    import comfy.controlnet

    if not hasattr(comfy.controlnet.ControlBase, "deepclone_multigpu"):
        pytest.skip("this ComfyUI samples on one device (newer than 0.15 on several)")


def on_two(model: Any, ran: list[torch.device]) -> Any:
    """A clone of the tiny SDXL `model` for two devices; `ran` hears of each call on the second."""
    from tiny_models import tiny_model

    clone = model.clone()
    clone.cached_patcher_init = (tiny_model, ("sdxl",))  # how the host makes the same model again
    second = clone.deepclone_multigpu(new_load_device=SECOND)
    second.is_multigpu_base_clone = True
    second.model.diffusion_model.register_forward_pre_hook(lambda *_: ran.append(SECOND))
    clone.set_additional_models("multigpu", [second])
    return clone


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_devices_give_the_latent_of_one(host: Host, kind: str, way: str):
    needs_two_devices()
    scene, ran = apply(host, way, host.scene("sdxl"), ours(host, kind), HINTS), []
    expected = host.sample(scene, **TWO)
    run = host.sample(replace(scene, model=on_two(scene.model, ran)), **TWO)
    assert ran, "the second device was left idle"
    assert off_by(run, expected) <= 1e-4
    assert moved(expected, host.sample(host.scene("sdxl"), **TWO)) >= 0.01


def test_two_devices_with_native_and_ours_in_one_chain(host: Host):
    needs_two_devices()
    theirs = native(host, "controlnet")
    first = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, "lora"), HINTS)
    scene = apply(host, "ControlNetApplyAdvanced", first, theirs, picture(2))
    expected = host.sample(scene, **TWO)
    run = host.sample(replace(scene, model=on_two(scene.model, [])), **TWO)
    assert off_by(run, expected) <= 1e-4
    assert moved(expected, host.sample(host.scene("sdxl"), **TWO)) >= MOVES


@pytest.mark.parametrize("dose", ["cond_only", "schedule", "mask"])
def test_two_devices_and_the_dose(host: Host, dose: str):
    needs_two_devices()
    given: dict[str, Any] = {
        "cond_only": lambda: {"guidance": "cond_only"},
        "mask": lambda: {"mask": torch.eye(2).repeat_interleave(64, 0).repeat_interleave(64, 1)[None]},
        "schedule": lambda: {"schedule": host.call("ControlSchedule", curve="linear", per_image="1, 0.3")[0]},
    }[dose]()
    scene = apply(host, "ApplyControl", host.scene("sdxl"), ours(host, "controlnet"), HINTS, **given)
    expected = host.sample(scene, **TWO)
    assert_same(
        host.sample(replace(scene, model=on_two(scene.model, [])), **TWO),
        expected,
        host.sample(host.scene("sdxl"), **TWO),
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "foreign"])
def test_a_copy_for_another_device(host: Host, kind: str):
    """What such a host asks for, on every host: a network of its own, copied once, with the same settings."""
    control = ours(host, kind).copy().set_cond_hint(HINTS.movedim(-1, 1), 0.6, (0.1, 0.9))
    copy, again = (control.deepclone_multigpu(SECOND, autoregister=False) for _ in range(2))
    (patcher,), (own,) = copy.get_models(), control.get_models()
    assert patcher is again.get_models()[0]
    assert patcher.load_device == SECOND and patcher.model is not own.model
    for name, tensor in patcher.model.state_dict().items():
        assert torch.equal(tensor, own.model.state_dict()[name])
    assert (copy.strength, copy.timestep_percent_range) == (0.6, (0.1, 0.9))
    assert copy.cond_hint_original is control.cond_hint_original


@pytest.mark.parametrize("kind", ["controlnet", "union", "lora", "lite", "adapter"])
def test_calls_at_the_same_time_do_not_disturb_each_other(host: Host, kind: str):
    """As a host with two devices makes them: the control and its copy in threads of their own, each with one half."""
    from .test_pieces import Asked, residuals

    control = ours(host, kind).copy().set_cond_hint(HINTS.movedim(-1, 1))
    copy = control.deepclone_multigpu(SECOND, autoregister=False)
    asked = [Asked(torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(i)), (i,)) for i in range(2)]
    expected = [residuals(host, control, one) for one in asked]
    found: list[Any] = [None, None]

    def ask(i: int, one: Any) -> None:
        with torch.inference_mode():
            for _ in range(5):
                found[i] = residuals(host, one, asked[i])

    threads = [threading.Thread(target=ask, args=(i, one)) for i, one in enumerate((control, copy))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()
