"""`reuse`: at a part of the steps a control is told from the steps before, whatever piece of a run a call is about."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import CONTEXT, MOVES, WAYS, Control, latent, moved, off_by, picture
from torch import Tensor

from .neighbours.callers import cut
from .neighbours.controls import KINDS, apply, ours
from .neighbours.test_frames import assert_each_follows_its_own
from .neighbours.test_memory import Counted, share

if TYPE_CHECKING:
    from hosting import Host

SIGMAS = (12.0, 9.0, 6.5, 4.5, 3.0, 2.0, 1.2, 0.6, 0.0)
COMPUTED = (0, 1, 2, 4, 6)  # of eight steps at reuse 0.5
EACH_STEP = tuple(kind for kind in KINDS if kind not in ("adapter", "lllite"))
"""Kinds that compute residuals at every step."""


def on_prompt(host: Host, kind: str, image: Tensor, **options: Any) -> Any:
    """The control object that ApplyControlToPrompt puts on a prompt."""
    scene = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, kind), image, **options)
    return scene.positive[0][1]["control"]


def begin(host: Host, control: Any) -> Any:
    """The control, its run begun, with `passes`, in which each pass of its network leaves its sigma."""
    model = host.model("sdxl").model
    control.pre_run(model, model.model_sampling.percent_to_sigma)
    control.passes, computed = [], control._residuals

    def counted(call: Any) -> Any:
        control.passes.append(float(call.t[0]))
        return computed(call)

    control._residuals = counted
    return control


@torch.inference_mode()
def ask(
    host: Host, control: Any, k: int, seed: int = 0, numbers: tuple[int, ...] = (0,), size: int = 16, **told: Any
) -> list[Tensor]:
    """What it gives at step k for a latent that goes with the sigma; `seed` is the latent's and the prompt's."""
    generator = torch.Generator().manual_seed(seed)
    count = len(numbers)
    clean, noise = (torch.randn(count, 4, size, size, generator=generator) for _ in range(2))
    width = host.model("sdxl").model.model_config.unet_config["adm_in_channels"]
    context, y = torch.randn(count, 7, CONTEXT, generator=generator), torch.randn(count, width, generator=generator)
    t = torch.full((count,), SIGMAS[k])
    options = {
        "cond_or_uncond": list(numbers),
        "uuids": [f"prompt {seed} {number}" for number in numbers],
        "sigmas": t[:1],
        "sample_sigmas": torch.tensor(SIGMAS),
        **told,
    }
    given = control.get_control(clean + SIGMAS[k] * noise, t, {"c_crossattn": context, "y": y}, count, options)
    return [] if given is None else [r for key in ("input", "output", "middle") for r in given[key] if r is not None]


def run_of(host: Host, kind: str, image: Tensor, **options: Any) -> tuple[Any, list[list[Tensor]]]:
    """A control and what it gave at each of the eight steps."""
    control = begin(host, on_prompt(host, kind, image, **options))
    return control, [ask(host, control, k) for k in range(8)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


# -- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_part_of_the_steps_is_computed_whatever_node_says_so(host: Host, way: str):
    scene = host.apply(way, host.scene(), "sd15", Control(options={"reuse": 0.5}))
    run = host.sample(scene, steps=8)
    assert [run.sigmas.index(sigma) for sigma, _ in run.calls("control") if sigma is not None] == list(COMPUTED)
    every = host.sample(host.apply(way, host.scene(), "sd15", Control()), steps=8)
    without = host.once("eight steps", lambda: host.sample(host.scene(), steps=8))
    assert moved(every, without) >= MOVES
    assert 0 < moved(run, every) <= 0.25 * moved(every, without)


@pytest.mark.parametrize("kind", KINDS)
def test_at_zero_nothing_changes(host: Host, kind: str):
    runs = [
        host.sample(apply(host, "ApplyControl", host.scene("sdxl"), ours(host, kind), picture(1), **given))
        for given in ({}, {"reuse": 0.0})
    ]
    assert torch.equal(runs[0].latent, runs[1].latent)


@pytest.mark.parametrize("kind", ["adapter", "lllite"])
def test_kinds_that_compute_nothing_again_take_no_notice(host: Host, kind: str):
    runs = [
        host.sample(apply(host, "ApplyControl", host.scene("sdxl"), ours(host, kind), picture(1), reuse=reuse))
        for reuse in (0.0, 0.75)
    ]
    assert torch.equal(runs[0].latent, runs[1].latent)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m_sde", "euler_ancestral"])
def test_samplers_that_evaluate_a_step_twice_compute_it_once(host: Host, sampler: str):
    scene = host.apply("ApplyControl", host.scene(), "sd15", Control(options={"reuse": 0.5}))
    run = host.sample(scene, steps=8, sampler_name=sampler)
    assert run.count("control") == len(COMPUTED)


@pytest.mark.parametrize("kind", EACH_STEP)
def test_told_residuals_lie_on_the_line_through_the_last_two(host: Host, kind: str):
    control, found = run_of(host, kind, picture(1), reuse=0.5)
    _, every = run_of(host, kind, picture(1))
    assert control.passes == pytest.approx([SIGMAS[k] for k in COMPUTED])
    for k in COMPUTED:
        assert_equal(found[k], every[k])
    (first, last, at) = torch.tensor(SIGMAS)[[4, 6, 7]].log()
    weight = 1 + min(1.0, float((at - last) / (last - first)))
    for told, a, b in zip(found[7], every[4], every[6], strict=True):
        torch.testing.assert_close(told, torch.lerp(a, b, weight), rtol=1e-4, atol=1e-5)


# -- the dose of a step acts at that step -----------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", ["both", "cond_only", "cfg_resolution"])
def test_schedules_masks_and_weights_act_at_every_step(host: Host, guidance: str):
    """What is told is told at strength 1: the dose of a step multiplies it as it does without."""
    (schedule,) = host.call("ControlSchedule", curve="fade out", keyframes="", unit="window")
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:96, :64] = 1.0
    dose = {"schedule": schedule, "mask": mask, "strength": 0.7, "guidance": guidance, "end": 1.0}
    _, plain = run_of(host, "controlnet", picture(1), reuse=0.5)
    _, dosed = run_of(host, "controlnet", picture(1), reuse=0.5, **dose)
    values = []
    for k in range(7):
        inside = [
            (d * p).sum() / (p * p).sum()
            for d, p in zip((cut(r, _inside(r)) for r in dosed[k]), (cut(r, _inside(r)) for r in plain[k]), strict=True)
        ]
        scale = [16 / r.shape[2] if guidance == "cfg_resolution" else 1.0 for r in plain[k]]
        ratios = [float(i) / s for i, s in zip(inside, scale, strict=True)]
        assert max(ratios) - min(ratios) < 1e-3
        values.append(ratios[0])
        assert not cut(dosed[k][0], (0, 10, 16, 6)).any()
    assert values == sorted(values, reverse=True) and len({round(value, 4) for value in values}) == 7


def _inside(residual: Tensor) -> tuple[int, int, int, int]:
    """The box in which the mask is 1 at this residual's size."""
    size = residual.shape[2]
    return size // 4, 0, size // 2, size // 2


def test_what_is_told_is_nobody_elses_to_change(host: Host):
    control = begin(host, on_prompt(host, "controlnet", picture(1), reuse=0.75))
    for k in range(2):
        with torch.inference_mode():
            for residual in ask(host, control, k):
                residual.mul_(100.0)  # as the host's own controls do with theirs
    _, expected = run_of(host, "controlnet", picture(1), reuse=0.75)
    assert_equal(ask(host, control, 2), expected[2])
    assert_equal(ask(host, control, 3), expected[3])


# -- the piece of a call is that piece's ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EACH_STEP)
def test_prompts_halves_sizes_and_hints_keep_their_own(host: Host, kind: str):
    """Asked in turns, each gets what it gets alone."""
    calls: list[dict[str, Any]] = [{}, {"seed": 5}, {"numbers": (1, 0)}, {"numbers": (1,)}, {"size": 24}]
    alone = []
    for given in calls:
        control = begin(host, on_prompt(host, kind, picture(1), reuse=0.5))
        alone.append([ask(host, control, k, **given) for k in range(8)])
        assert len(control.passes) == len(COMPUTED)
    control = begin(host, on_prompt(host, kind, picture(1), reuse=0.5))
    for k in range(8):
        for given, expected in zip(calls, alone, strict=True):
            assert_equal(ask(host, control, k, **given), expected[k])


def test_slices_of_tiles_keep_their_own(host: Host):
    slices = [picture(seed).movedim(-1, 1) for seed in (1, 2)]
    alone = [run_of(host, "controlnet", picture(seed), reuse=0.5)[1] for seed in (1, 2)]
    control = begin(host, on_prompt(host, "controlnet", picture(3, 1, 256, 256), reuse=0.5))
    for k in range(8):
        for given, expected in zip(slices, alone, strict=True):
            control.cond_hint = given
            assert_equal(ask(host, control, k), expected[k])


def test_tiles_that_nothing_tells_apart_are_told_apart_by_their_order(host: Host):
    """Two latents with one hint and one prompt in one evaluation of the model."""
    control = begin(host, on_prompt(host, "controlnet", picture(1), reuse=0.5))
    alone = [begin(host, on_prompt(host, "controlnet", picture(1), reuse=0.5)) for _ in range(2)]
    for k in range(8):
        sigmas = torch.tensor([SIGMAS[k]])
        for tile in (0, 1):
            told = {"sigmas": sigmas, "uuids": ["one"]}
            assert_equal(ask(host, control, k, tile, **told), ask(host, alone[tile], k, tile, uuids=["one"]))


@pytest.mark.parametrize("caller", ["core windows", "looped", "AnimateDiff"])
@pytest.mark.parametrize("kind", ["controlnet", "foreign", "lite"])
def test_each_frame_of_a_window_follows_its_own_hint(host: Host, kind: str, caller: str):
    assert_each_follows_its_own(
        host,
        caller,
        lambda image: apply(host, "ApplyControl", host.scene("sdxl"), ours(host, kind), image, reuse=0.5),
    )


def test_windows_are_computed_at_a_part_of_the_steps(host: Host):
    scene = apply(host, "ApplyControl", host.scene("sdxl"), ours(host, "controlnet"), picture(1, 9), reuse=0.5)
    windowed = replace(scene, model=host.windows(scene.model, 4, 2))
    run = host.sample(windowed, latent_image=latent(9), steps=8)  # as many frames as sigmas: see FRAMES
    assert run.count("control") * 8 == run.count("unet") * len(COMPUTED)


def test_of_fused_hints_a_strength_that_changes_is_computed(host: Host):
    """A Union's strengths go into the fuse, so nothing of another strength may be told."""
    from .test_union import DEPTH, POSE, entry, sample

    (schedule,) = host.call("ControlSchedule", curve="fade out", keyframes="", unit="window")
    given = {"reuse": 0.5}
    steady = sample(host, entry(host, DEPTH, 1, **given), entry(host, POSE, 2, **given))
    fading = sample(host, entry(host, DEPTH, 1, **given), entry(host, POSE, 2, schedule=schedule, **given))
    assert steady.count("control") < steady.count("unet") == fading.count("control")
    apart = sample(host, entry(host, DEPTH, 1, **given), entry(host, POSE, 2))
    assert apart.count("control") > apart.count("unet"), "one that is computed less is no part of the other's pass"


# -- runs and memory --------------------------------------------------------------------------------------------------


def test_a_new_run_begins_anew(host: Host):
    scene = host.apply("ApplyControl", host.scene(), "sd15", Control(options={"reuse": 0.5}))
    first = host.sample(scene, steps=8)
    other = host.sample(scene, steps=8, latent_image=latent(2, 24, 16), seed=6)
    assert other.count("control") == len(COMPUTED)
    assert torch.equal(host.sample(scene, steps=8).latent, first.latent)


@pytest.mark.parametrize("frames", [1, 3])
def test_what_is_held_is_reckoned_and_given_back(host: Host, frames: int, monkeypatch: pytest.MonkeyPatch):
    def scene(reuse: float) -> Any:
        return apply(
            host, "ApplyControl", host.scene("sdxl"), ours(host, "controlnet"), picture(1, frames), reuse=reuse
        )

    given = {"latent_image": latent(frames)}
    without, told = (share(host, scene(reuse), monkeypatch, **given) for reuse in (0.0, 0.5))
    control = begin(host, on_prompt(host, "controlnet", picture(1), reuse=0.5))
    with torch.inference_mode(), Counted() as counted:
        for k in range(5):
            found = ask(host, control, k, numbers=(1, 0))
    size = sum(residual.nbytes for residual in found)
    del found
    assert 2 * size <= counted.alive <= 2.2 * size
    assert told - without == pytest.approx(2 * size * frames, rel=0.01)
    control.cleanup()
    assert counted.alive <= 2**16


def test_controls_of_a_chain_each_hold_their_own(host: Host, monkeypatch: pytest.MonkeyPatch):
    def scene(count: int, reuse: float) -> Any:
        scene = host.scene("sdxl")
        for i in range(count):
            scene = apply(host, "ApplyControl", scene, ours(host, "controlnet"), picture(i), reuse=reuse)
        return scene

    def asked(count: int, reuse: float) -> float:
        return share(host, scene(count, reuse), monkeypatch, latent_image=latent())

    one = asked(1, 0.5) - asked(1, 0.0)
    assert asked(3, 0.5) - asked(3, 0.0) == pytest.approx(3 * one, rel=0.01)


def test_less_work_is_still_the_same_picture(host: Host):
    """Smooth in what it leaves out: the less is computed, the farther it goes from the picture of all steps."""
    runs = [
        host.sample(host.apply("ApplyControl", host.scene(), "sd15", Control(options={"reuse": reuse})), steps=12)
        for reuse in (0.0, 0.5, 0.9)
    ]
    assert off_by(runs[1], runs[0]) < off_by(runs[2], runs[0])
