"""Windows of frames, the host's own and AnimateDiff-Evolved's: every frame is controlled by its own hint."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import MOVES, Scene, latent, moved, off_by, picture
from torch import Tensor

from .callers import animatediff, chain, pack
from .controls import KINDS, NATIVE, WAYS, apply, native, ours

if TYPE_CHECKING:
    from hosting import Host

# ComfyUI 0.3.75 compares the list of sigmas with one sigma for each frame: it takes one frame more than steps only.
FRAMES: dict[str, Any] = {"latent_image": latent(6), "steps": 5}
ORDER = (1, 2, 2, 1, 2, 1)  # which hint each of the six frames has: no two windows are alike
HINTS = torch.cat([picture(seed) for seed in ORDER])
PER_FRAME = tuple(kind for kind in KINDS if kind != "union")
"""A Union is left out: its authors let the pictures of a batch see each other's hints."""

CALLERS = ("core windows", "looped", "AnimateDiff")


def windowed(host: Host, scene: Scene, caller: str) -> Scene:
    """The same, four of six frames at a time."""
    if caller == "AnimateDiff":
        return replace(scene, model=animatediff(scene.model))
    looped = {"context_schedule": "looped_uniform", "closed_loop": True} if caller == "looped" else {}
    return replace(scene, model=host.windows(scene.model, 4, 2, **looped))


def assert_each_follows_its_own(host: Host, caller: str, scene: Any) -> None:
    """`scene` takes hints; every frame comes out as in a run in which its hint is everyone's."""
    run = {name: host.sample(windowed(host, scene(image), caller), **FRAMES) for name, image in (
        ("each", HINTS), (1, picture(1)), (2, picture(2)),
    )}  # fmt: skip
    largest = run[1].latent.abs().max()
    assert moved(run[1], run[2]) >= 0.01
    for frame, seed in enumerate(ORDER):
        off = (run["each"].latent[frame] - run[seed].latent[frame]).abs().max() / largest
        assert off <= 1e-4, f"frame {frame} is off by {off:.2}"


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("kind", PER_FRAME)
def test_each_frame_follows_its_own_hint(host: Host, kind: str, caller: str):
    control = ours(host, kind)
    assert_each_follows_its_own(
        host, caller, lambda image: apply(host, "ApplyControl", host.scene("sdxl"), control, image)
    )


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("kind", ["controlnet", "foreign"])
def test_on_prompts_and_on_one_half_too(host: Host, kind: str, caller: str):
    control = ours(host, kind)

    def scene(image: Tensor) -> Scene:
        return apply(host, "ApplyControlToPrompt", host.scene("sdxl"), control, image, guidance="cond_only")

    assert_each_follows_its_own(host, caller, scene)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", NATIVE)
def test_in_core_windows_one_hint_for_all_is_native(host: Host, kind: str, way: str):
    """With one hint the host's own control is right in windows, and the premise of the tests above."""
    expected = apply(host, "ControlNetApplyAdvanced", host.scene("sdxl"), native(host, kind), picture(1))
    run = apply(host, way, host.scene("sdxl"), ours(host, kind), picture(1))
    reference = host.sample(windowed(host, expected, "core windows"), **FRAMES)
    assert off_by(host.sample(windowed(host, run, "core windows"), **FRAMES), reference) <= 1e-4


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("kind", ["controlnet", "foreign", "adapter", "lllite"])
def test_hints_for_fewer_frames_start_over(host: Host, kind: str, caller: str):
    """As the host's own do over a batch: never again from the first one at every window."""
    runs = []
    for hints in (HINTS[:4], torch.cat([HINTS[:4], HINTS[:2]])):
        scene = apply(host, "ApplyControl", host.scene("sdxl"), ours(host, kind), hints)
        runs.append(host.sample(windowed(host, scene, caller), **FRAMES))
    assert off_by(*runs) <= 1e-4


@pytest.mark.parametrize("kind", ["controlnet", "foreign", "adapter", "lllite"])
def test_a_window_of_another_length_than_the_call_is_refused(host: Host, kind: str):
    """Frames are never made up: another node that drops one inside a window."""
    from comfy.patcher_extension import WrappersMP

    def dropped(executor: Any, base: Any, conds: list, x: Tensor, timestep: Tensor, options: dict[str, Any]) -> Any:
        return [torch.cat([part, part[-1:]]) for part in executor(base, conds, x[:-1], timestep[:-1], options)]

    scene = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, kind), HINTS)
    scene = windowed(host, scene, "AnimateDiff")
    scene.model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "drops a frame", dropped)
    with pytest.raises(Exception, match="is called with 3 frames, and the window that it is about has 4"):
        host.sample(scene, **FRAMES)


@pytest.mark.parametrize("caller", CALLERS)
def test_masks_and_strengths_of_each_frame(host: Host, caller: str):
    (schedule,) = host.call("ControlSchedule", curve="constant", per_image="1, 0, 0, 1, 0, 1")
    masks = torch.tensor([float(seed == 1) for seed in ORDER]).reshape(-1, 1, 1).expand(-1, 128, 128)
    control = ours(host, "controlnet")

    def run(**options: Any) -> Tensor:
        scene = apply(host, "ApplyControl", host.scene("sdxl"), control, picture(1), **options)
        return host.sample(windowed(host, scene, caller), **FRAMES).latent

    full, off = run(), run(strength=0.0)
    for options in ({"mask": masks}, {"schedule": schedule}):
        each = run(**options)
        for frame, seed in enumerate(ORDER):
            expected = full if seed == 1 else off
            assert (each[frame] - expected[frame]).abs().max() <= 1e-4 * full.abs().max()


def test_what_animatediff_told_is_of_its_run_alone(host: Host):
    """It resets nothing: the same prompts without windows, and with fewer frames, are as if it had never been."""
    scene = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, "controlnet"), HINTS)
    two: dict[str, Any] = {"latent_image": latent(2), "steps": 2}
    before = host.sample(scene, **two)
    host.sample(windowed(host, scene, "AnimateDiff"), **FRAMES)
    assert off_by(host.sample(scene, **two), before) <= 1e-6


def test_a_chain_of_two_under_animatediff(host: Host):
    """The host's own control refuses there without Advanced-ControlNet; ours in a chain are told one by one."""
    control = ours(host, "controlnet")

    def scene(image: Tensor) -> Scene:
        first = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), control, picture(5), strength=0.5)
        return apply(host, "ApplyControlToPrompt", first, ours(host, "lite"), image)

    assert_each_follows_its_own(host, "AnimateDiff", scene)


# -- the packs themselves ---------------------------------------------------------------------------------------------


def evolved(host: Host, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """The scene under AnimateDiff-Evolved's own windows; no motion model is needed for them."""
    nodes = pack("ZEROCONV_ANIMATEDIFF", monkeypatch).NODE_CLASS_MAPPINGS
    (options,) = nodes["ADE_StandardStaticContextOptions"]().create_options(4, 2)
    (model,) = nodes["ADE_UseEvolvedSampling"]().use_evolved_sampling(
        scene.model, "use existing", context_options=options
    )
    return replace(scene, model=model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", PER_FRAME)
def test_animatediff_evolved_itself(host: Host, kind: str, way: str, monkeypatch: pytest.MonkeyPatch):
    """In front of its wrappers and behind them."""
    runs: dict[Any, Any] = {}
    for name, image in (("each", HINTS), (1, picture(1)), (2, picture(2))):
        if way == "ApplyControl":
            scene = apply(host, way, evolved(host, host.scene("sdxl"), monkeypatch), ours(host, kind), image)
        else:
            scene = evolved(host, apply(host, way, host.scene("sdxl"), ours(host, kind), image), monkeypatch)
        runs[name] = host.sample(scene, **FRAMES)
    assert moved(runs[1], runs[2]) >= 0.01
    for frame, seed in enumerate(ORDER):
        off = (runs["each"].latent[frame] - runs[seed].latent[frame]).abs().max() / runs[1].latent.abs().max()
        assert off <= 1e-4, f"frame {frame} is off by {off:.2}"


def advanced(host: Host, scene: Scene, control: Any, image: Tensor, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """The scene under a control by Advanced-ControlNet's own apply node."""
    import asyncio

    extension = asyncio.run(pack("ZEROCONV_ADVANCED_CONTROLNET", monkeypatch).comfy_entrypoint())
    nodes = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}
    node = nodes["ACN_AdvancedControlNetApply_v2"]
    positive, negative = node.execute(scene.positive, scene.negative, control, image, 1.0, 0.0, 1.0).args[:2]
    return replace(scene, positive=positive, negative=negative)


@pytest.mark.parametrize("kind", KINDS)
def test_advanced_controlnets_own_node(host: Host, kind: str, monkeypatch: pytest.MonkeyPatch):
    """It takes ours as the host's own node does."""
    scene = advanced(host, host.scene("sdxl"), ours(host, kind), picture(1), monkeypatch)
    expected = apply(host, "ControlNetApplyAdvanced", host.scene("sdxl"), ours(host, kind), picture(1))
    assert off_by(host.sample(scene), host.sample(expected)) <= 1e-5


@pytest.mark.parametrize("kind", NATIVE)
def test_a_control_of_theirs_in_windows_and_ours(host: Host, kind: str, monkeypatch: pytest.MonkeyPatch):
    """Their control, made of a native one, is what native is under AnimateDiff-Evolved."""
    scene = advanced(host, host.scene("sdxl"), native(host, kind), HINTS, monkeypatch)
    expected = host.sample(evolved(host, scene, monkeypatch), **FRAMES)
    scene = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, kind), HINTS)
    assert off_by(host.sample(evolved(host, scene, monkeypatch), **FRAMES), expected) <= 1e-4


def test_a_control_of_theirs_in_our_node(host: Host, monkeypatch: pytest.MonkeyPatch):
    """It cuts its own hints under AnimateDiff-Evolved's windows, and none under the host's."""
    scene = advanced(host, host.scene("sdxl"), native(host, "controlnet"), HINTS, monkeypatch)
    theirs = scene.positive[0][1]["control"]
    expected = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, "controlnet"), HINTS)
    run = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), theirs, HINTS)
    for caller in ("AnimateDiff", "core windows"):
        made, reference = (host.sample(windowed(host, one, caller), **FRAMES) for one in (run, expected))
        assert off_by(made, reference) <= 1e-4, caller


# -- Advanced-ControlNet ----------------------------------------------------------------------------------------------

ADVANCED = ("disarm", "allow_condhint_latents", "require_vae", "verify_all_weights", "set_cond_hint_mask")


@pytest.mark.parametrize("kind", KINDS)
def test_advanced_controlnet_does_not_take_ours_for_its_own(host: Host, kind: str):
    """It takes whatever has `sub_idxs` for one of its own, and calls what else those have, outside of a run."""
    scene = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, kind), picture(1))
    host.sample(scene, latent_image=latent(1), steps=1)
    for control in chain(scene.positive[0][1]["control"]):
        copy = control.copy()
        assert not hasattr(copy, "sub_idxs") or all(hasattr(copy, name) for name in ADVANCED)


# -- a host that keeps prepared hints by their size, as core 0.38 does ------------------------------------------------


def keep_prepared_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native ControlNet of core 0.38: prepared hints by size, dropped by set_cond_hint and cleanup alone."""
    import comfy.controlnet
    import comfy.utils

    kind = comfy.controlnet.ControlNet
    get_control, cleanup, set_cond_hint = kind.get_control, kind.cleanup, kind.set_cond_hint

    def cached(self: Any, x: Tensor, *args: Any) -> Any:
        hints, (height, width) = self.__dict__.setdefault("cond_hints", {}), x.shape[2:]
        if (height, width) not in hints:
            whole, method = self.cond_hint_original, self.upscale_algorithm
            hints[height, width] = comfy.utils.common_upscale(whole, 8 * width, 8 * height, method, "center")
        self.cond_hint = hints[height, width]
        return get_control(self, x, *args)

    def emptied(whole: Any) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.cond_hints = {}
            return whole(self, *args, **kwargs)

        return method

    monkeypatch.setattr(kind, "get_control", cached)
    monkeypatch.setattr(kind, "cleanup", emptied(cleanup))
    monkeypatch.setattr(kind, "set_cond_hint", emptied(set_cond_hint))


@pytest.mark.parametrize("caller", CALLERS)
def test_a_native_control_that_keeps_its_hints(host: Host, monkeypatch: pytest.MonkeyPatch, caller: str):
    keep_prepared_hints(monkeypatch)
    control = ours(host, "foreign")
    assert_each_follows_its_own(
        host, caller, lambda image: apply(host, "ApplyControl", host.scene("sdxl"), control, image)
    )


def test_it_moves_the_latent(host: Host):
    """The hints of these tests are told apart by the tiny model."""
    scenes = [
        apply(host, "ApplyControl", host.scene("sdxl"), ours(host, "controlnet"), picture(seed)) for seed in (1, 2)
    ]
    first, second = (host.sample(scene, latent_image=latent(1), steps=2) for scene in scenes)
    assert moved(first, second) >= MOVES
