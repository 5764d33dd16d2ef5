"""Which steps act, by every sampler of the host and on every kind of schedule, and what the counting costs."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import Control, Run
from test_window import evaluations, steps
from torch.utils._python_dispatch import TorchDispatchMode

from zeroconv.controlnet_core.dosing.schedule import CURVES, Schedule

if TYPE_CHECKING:
    from hosting import Host

STEPS = 5
AGAIN = [14.0, 7.0, 3.0, 8.0, 4.0, 1.0, 0.0]
ALL_WAYS = ["ApplyControl", "ApplyControlToPrompt", "ControlNetApplyAdvanced"]


def ksampler(name: str, options: dict[str, Any] | None = None) -> Any:
    """The host's sampler of this name."""
    import comfy.samplers

    return comfy.samplers.ksampler(name, options or {})


def begins_a_step(sigma: float, sigmas: list[float]) -> int:
    """The step that holds a sigma: the last whose own sigma is not below it, but for rounding."""
    return max((k for k, edge in enumerate(sigmas[:-1]) if edge >= sigma * (1 - 1e-5)), default=0)


def sampled(host: Host, way: str, control: Control, sampler: Any, sigmas: list[float]) -> Run:
    """A sampling over these sigmas with one control by one way."""
    scene = host.scene()
    if way == "ControlNetApplyAdvanced":
        ((net, image, strength, start, end),) = host.stack("sd15", control)
        given = {"control_net": net, "image": image, "strength": strength, "start_percent": start, "end_percent": end}
        positive, negative = host.call(way, positive=scene.positive, negative=scene.negative, **given)
        model = scene.model
    else:
        scene = host.apply(way, scene, "sd15", control)
        positive, negative, model = scene.positive, scene.negative, scene.model
    return host.sample_guided(
        model,
        "CFGGuider",
        sampler=sampler,
        sigmas=torch.tensor(sigmas),
        positive=positive,
        negative=negative,
        cfg=3.0,
    )


def acted(run: Run) -> list[int]:
    """The numbers of the UNet calls in which control ran."""
    return [i for i, (_, on) in enumerate(evaluations(run)) if on]


# -- falling ----------------------------------------------------------------------------------------------------------


def test_every_sampler_on_a_falling_schedule(host: Host):
    """Control runs at exactly the evaluations whose sigma lies in steps 1 and 2, and there are some of them."""
    import comfy.samplers

    scene = host.apply("ApplyControl", host.scene(), "sd15", steps(1, 3))
    wrong: dict[str, Any] = {}
    for name in comfy.samplers.SAMPLER_NAMES:
        run = host.sample(scene, sampler_name=name, steps=STEPS)
        found = evaluations(run)
        expected = [(sigma, 1 <= begins_a_step(sigma, run.sigmas) < 3) for sigma, _ in found]
        one_a_step = [sigma for sigma, _ in found] == run.sigmas[:-1]
        if found != expected or not acted(run) or (one_a_step and acted(run) != [1, 2]):
            wrong[name] = run.sigmas, found
    assert not wrong


# -- rising -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ALL_WAYS)
@pytest.mark.parametrize(("window", "acts"), [((0, 3), [0, 1, 2]), ((3, -1), [3, 4, 5])])
def test_flipped_sigmas(host: Host, way: str, window: tuple[int, int], acts: list[int]):
    falling = host.call("BasicScheduler", model=host.model("sd15"), scheduler="normal", steps=6, denoise=1.0)[0]
    (sigmas,) = host.call("FlipSigmas", sigmas=falling)
    run = sampled(host, way, steps(*window), ksampler("euler"), sigmas.tolist())
    assert acted(run) == acts


@pytest.mark.parametrize("way", ALL_WAYS)
@pytest.mark.parametrize(
    ("name", "acts"),
    [
        ("euler", [2, 3]),  # calls 0 to 5 are steps 0 to 5
        ("heun", [3, 4, 5, 6]),  # each corrector is at the next step: 0 1 | 1 2 | 2 3 | 3 4 | 4 5 | 5
        ("dpm_2", [4, 5, 6, 7]),  # each middle is in its own step: 0 0 | 1 1 | 2 2 | 3 3 | 4 4 | 5
    ],
)
def test_a_schedule_that_rises_in_between(host: Host, way: str, name: str, acts: list[int]):
    """Steps 2 (3 to 8) and 3 (8 to 4) of sigmas 14, 7, 3, 8, 4, 1, 0."""
    assert acted(sampled(host, way, steps(2, 4), ksampler(name), AGAIN)) == acts


@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
def test_a_sampler_that_goes_its_own_way_is_refused_before_it_begins(host: Host, way: str):
    host.forget()
    with pytest.raises(Exception, match=r"its sampler does not tell which step it is at.*use unit percent"):
        sampled(host, way, steps(2, 4), ksampler("dpm_adaptive"), AGAIN)
    assert host.unet_calls == 0
    percent = Control(start=0.0, end=0.5)
    assert acted(sampled(host, way, percent, ksampler("dpm_adaptive"), [14.0, 7.0, 3.0, 1.0, 0.0]))


# -- nudged -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ALL_WAYS)
@pytest.mark.parametrize("churn", [0.5, 2.0])
def test_euler_with_churn(host: Host, way: str, churn: float):
    """The sampler evaluates above each step's sigma, and is at that step all the same."""
    falling = [14.0, 7.0, 3.0, 1.5, 0.7, 0.0]
    run = sampled(host, way, steps(1, 3), ksampler("euler", {"s_churn": churn}), falling)
    assert [sigma for sigma, _ in evaluations(run)] == pytest.approx(
        [sigma * (1 + min(churn / 5, math.sqrt(2) - 1)) for sigma in falling[:-1]]
    )
    assert acted(run) == [1, 2]


# -- what it costs ----------------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts numbers that are read from a tensor: on a GPU each of them waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def dosed(start: float, end: float, **options: Any) -> Control:
    return Control(start=start, end=end, options=options)


CHAINS = {
    "all of sampling": ([dosed(0.0, 1.0), Control("pose")], 0),
    "window": ([dosed(0.1, 0.9)], 1),
    "three with windows, steps and schedules": (
        [
            dosed(0.1, 0.9, schedule=Schedule(CURVES["fade out"])),
            dosed(1, 4, unit="step"),
            dosed(0.0, 1.0, schedule=Schedule(CURVES["bell"], "percent")),
        ],
        1,
    ),
    "off": (
        [Control(strength=0.0), dosed(0.3, 0.5, schedule=Schedule(CURVES["constant"]), mask=torch.zeros(1, 8, 8))],
        0,
    ),
}


@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
@pytest.mark.parametrize("name", CHAINS)
def test_sigma_is_read_once_a_call_however_many_controls_ask(host: Host, way: str, name: str):
    """Beyond what sampling without control reads, and a handful when the run begins."""
    controls, allowed = CHAINS[name]

    def count(scene: Any, of_steps: int) -> int:
        with Reads() as reads:
            host.sample(scene, steps=of_steps)
        return reads.count

    scene = host.apply(way, host.scene(), "sd15", *controls)
    few, many = 3, 8
    a_call = (count(scene, many) - count(scene, few)) - (count(host.scene(), many) - count(host.scene(), few))
    assert a_call <= allowed * (many - few)


@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
def test_the_models_schedule_is_asked_once_a_run_for_what_is_constant(host: Host, way: str):
    """Two limits a window, and one bisection a sigma for all controls together; the host asks for nothing else."""
    asked: list[float] = []
    sampling = copy.deepcopy(host.model("sd15").get_model_object("model_sampling"))
    given = sampling.percent_to_sigma
    sampling.percent_to_sigma = lambda percent: asked.append(percent) or given(percent)
    scene = host.apply(way, host.scene(), "sd15", *CHAINS["three with windows, steps and schedules"][0])
    model = scene.model.clone()
    model.add_object_patch("model_sampling", sampling)
    host.sample_guided(model, "CFGGuider", positive=scene.positive, negative=scene.negative, cfg=3.0, steps=6)
    assert len(asked) == len([p for p in asked if p in (0.0, 1.0, 0.1, 0.9)]) + len([p for p in asked if p == 0.5]) * 24
    assert asked.count(0.1) <= 1
    assert asked.count(0.5) <= 6
