"""When control acts: a window in steps is exactly what DESIGN.md says, and percent and steps are never mixed up.

Step k is the interval of the run's `sample_sigmas` that holds the current sigma, counted from 0 within that sampler
call; a window in steps is start <= k < end, and end -1 means to the last.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from graphs import MOVES, WAYS, Control, Run, Scene, assert_same, latent, moved, off_by

if TYPE_CHECKING:
    from hosting import Host

STEPS = 5
SAMPLERS = ["euler", "heun", "dpm_2", "dpmpp_2m_sde", "dpmpp_sde"]


def steps(start: float, end: float, **options: Any) -> Control:
    """A control with its window in steps."""
    return Control(start=start, end=end, options={"unit": "step", **options})


def step_of(sigma: float, sigmas: list[float]) -> int:
    """The interval k with sigmas[k] >= sigma > sigmas[k + 1]."""
    return max(k for k, edge in enumerate(sigmas[:-1]) if edge >= sigma)


def evaluations(run: Run) -> list[tuple[float, bool]]:
    """(sigma, whether control ran) for each UNet call, in order."""
    out, controlled = [], False
    for event in run.events:
        if event.what == "control":
            controlled = True
        elif event.what == "unet":
            out.append((event.sigma, controlled))
            controlled = False
    return out


def assert_ran_in(run: Run, start: int, end: int) -> None:
    """Control ran at exactly the evaluations of steps start <= k < end."""
    expected = [(sigma, start <= step_of(sigma, run.sigmas) < end) for sigma, _ in evaluations(run)]
    assert any(on for _, on in expected), "the window holds no evaluation: the test proves nothing"
    assert evaluations(run) == expected


def test_heun_evaluates_a_sigma_twice(host: Host):
    """The premise of the Heun cases: the corrector of step i runs at the sigma of step i + 1."""
    run = host.once("heun, five steps", lambda: host.sample(host.scene(), sampler_name="heun", steps=STEPS))
    at = [step_of(sigma, run.sigmas) for sigma, _ in evaluations(run)]
    assert at == [0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("window", [(0, 1), (1, 3), (2, -1), (3, 99)], ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps(host: Host, sampler: str, window: tuple[int, int]):
    scene = host.apply("ApplyControl", host.scene(), "sd15", steps(*window))
    run = host.sample(scene, sampler_name=sampler, steps=STEPS)
    assert_ran_in(run, window[0], STEPS if window[1] == -1 else window[1])


@pytest.mark.parametrize("way", WAYS)
def test_steps_by_every_way(host: Host, way: str):
    run = host.sample(host.apply(way, host.scene(), "sd15", steps(1, 3)), steps=STEPS)
    assert_ran_in(run, 1, 3)


@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m_sde"])
def test_steps_count_from_the_sampler_calls_own_first_step(host: Host, sampler: str, way: str):
    """KSamplerAdvanced from step 2 of 5: its steps are 0 to 2."""
    scene = host.apply(way, host.scene(), "sd15", steps(1, 3))
    run = host.sample(scene, "KSamplerAdvanced", sampler_name=sampler, steps=STEPS, start_at_step=2)
    assert len(run.sigmas) == 4
    assert_ran_in(run, 1, 3)


@pytest.mark.parametrize("way", ["ApplyControl", "StackControlsToPrompt"])
def test_steps_give_the_latent_of_sampling_in_three_pieces(host: Host, way: str):
    """Steps 1 to 3 of 5 under control equal three native samplings in a row, the middle one with native control."""
    plain, controlled = host.scene(), host.native(host.scene(), "sd15", Control())
    state, pieces = latent(), []
    for scene, start, end in ((plain, 0, 1), (controlled, 1, 4), (plain, 4, 10000)):
        piece = host.sample(
            scene,
            "KSamplerAdvanced",
            steps=STEPS,
            latent_image=state,
            start_at_step=start,
            end_at_step=end,
            add_noise="enable" if start == 0 else "disable",
            return_with_leftover_noise="enable",
        )
        state = {"samples": piece.latent}
        pieces.append(piece)
    reference = Run(pieces[-1].latent, [], [event for piece in pieces for event in piece.events])
    run = host.sample(host.apply(way, host.scene(), "sd15", steps(1, 4)), steps=STEPS)
    without = host.once("five steps", lambda: host.sample(host.scene(), steps=STEPS))
    assert_same(run, reference, without)


def test_the_same_object_serves_a_longer_sampling(host: Host):
    """Steps are looked up in each run's own sigmas: 6 steps, then 3, then 6 through one patched model."""
    scene = host.apply("ApplyControl", host.scene(), "sd15", steps(1, -1))
    for count in (6, 3, 6):
        assert_ran_in(host.sample(scene, steps=count), 1, count)


# -- percent is not steps --------------------------------------------------------------------------------------------


def test_zero_to_one_is_everything_in_percent_and_the_first_step_in_steps(host: Host):
    percent = host.sample(host.apply("ApplyControl", host.scene(), "sd15", Control(start=0.0, end=1.0)), steps=STEPS)
    step = host.sample(host.apply("ApplyControl", host.scene(), "sd15", steps(0, 1)), steps=STEPS)
    assert percent.count("control") == STEPS
    assert step.count("control") == 1
    assert moved(percent, step) >= MOVES


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("window", [(0.0, 5.0), (2.0, 4.0), (-0.5, 1.0), (0.0, -1.0)], ids=str)
def test_percent_outside_zero_to_one_is_refused(host: Host, window: tuple[float, float], way: str):
    """3 is a step, never a percent; -1 means to the last in steps only."""
    with pytest.raises(Exception, match=r"(?i)percent.*step|step.*percent"):
        host.apply(way, host.scene(), "sd15", Control(start=window[0], end=window[1]))


@pytest.mark.parametrize("window", [(0.0, 0.5), (0.2, 0.7), (0.5, 1.0)], ids=str)
def test_percent_is_the_hosts_own(host: Host, window: tuple[float, float]):
    """Our control runs at exactly the evaluations at which the native one does."""
    control = Control(start=window[0], end=window[1])
    native = host.sample(host.native(host.scene(), "sd15", control), sampler_name="heun", steps=STEPS)
    ours = host.sample(host.apply("ApplyControl", host.scene(), "sd15", control), sampler_name="heun", steps=STEPS)
    assert 0 < sum(on for _, on in evaluations(native)) < len(evaluations(native))
    assert evaluations(ours) == evaluations(native)


def test_a_window_in_steps_and_one_in_percent_in_one_stack(host: Host):
    """Each control keeps its own unit."""
    first, second = Control("depth", start=0.0, end=0.5), replace(steps(3, 5), file="pose")
    scene = host.apply("StackControls", host.scene(), "sd15", first, second)
    native = host.sample(host.native(host.scene(), "sd15", first), steps=STEPS)
    run = host.sample(scene, steps=STEPS)
    own = {name: host.load(f"sd15_{name}").get_models()[-1].model for name in ("depth", "pose")}
    ran = {
        name: [event.sigma for event in run.events if event.what == "control" and event.module == id(net)]
        for name, net in own.items()
    }
    assert ran["depth"] == [sigma for sigma, on in evaluations(native) if on]
    assert ran["pose"] == run.sigmas[3:5]


def test_steps_survive_the_hosts_own_apply_node(host: Host):
    """A stack's control net that is unpacked into ControlNetApplyAdvanced keeps its window in steps."""
    ((control_net, image, strength, start, end),) = host.stack("sd15", steps(1, 3))
    positive, negative = host.call(
        "ControlNetApplyAdvanced",
        positive=host.scene().positive,
        negative=host.scene().negative,
        control_net=control_net,
        image=image,
        strength=strength,
        start_percent=start,
        end_percent=end,
    )
    run = host.sample(Scene(host.model("sd15"), positive, negative), steps=STEPS)
    assert_ran_in(run, 1, 3)
    ours = host.sample(host.apply("ApplyControl", host.scene(), "sd15", steps(1, 3)), steps=STEPS)
    assert off_by(run, ours) <= 1e-6
