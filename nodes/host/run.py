"""One sampling of the host as the controls in it see it: when a call of the UNet is, and what its conds are.

Two wrappers tell them. They ride on a clone of the model, or as a hook on a control, for prompts have no model of
theirs; either way the host calls them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import comfy.hooks
import comfy.patcher_extension
from torch import Tensor

from ...controlnet_core.dosing.clock import Clock, Moment, churned

WrappersMP = comfy.patcher_extension.WrappersMP
KEY = "zeroconv"

RUN = "zeroconv_run"
"""Key in `transformer_options`: the `Run` that a call of the UNet belongs to."""

HALVES = "zeroconv_halves"
"""Key in `transformer_options`: for each number in `cond_or_uncond`, whether that list of conds is a negative one."""

LATENT = "zeroconv_latent"
"""Key in `transformer_options`: the shape of the latents that a call is about, which the host gives to all its conds;
those that are limited to an area get a part of them."""

NEGATIVE = "zeroconv_negative"
"""Key in a cond: whether it belongs to a negative list of its guider."""

OWN_STEPS = ("dpm_fast_function", "dpm_adaptive_function")
"""The host's samplers that go their own way from the first sigma to the last, whatever is between."""


class Run:
    """The clock of one sampling, which is read once a call of the UNet however many controls ask."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self._sigma: Tensor | None = None
        self._moment: Moment | None = None

    def moment(self, sigma: Tensor) -> Moment:
        """When the call is whose sigmas, one for each sample, are `sigma`."""
        if self._moment is None or self._sigma is not sigma:
            self._sigma, self._moment = sigma, self.clock.at(sigma.flatten()[0].item())
        return self._moment


def moment(options: dict[str, Any], sigma: Tensor, percent_to_sigma: Callable[[float], float]) -> Moment:
    """When a call of the UNet with these `transformer_options` is; `sigma` is what its control is given.

    Where no wrapper has told of the run, a clock is made of what the options tell.
    """
    if RUN not in options:
        sigmas = options.get("sample_sigmas")
        options[RUN] = Run(Clock(percent_to_sigma, None if sigmas is None else sigmas.tolist()))
    return options[RUN].moment(options.get("sigmas", sigma))


def sample(executor: Any, call: inspect.BoundArguments) -> Any:
    """Go on with a wrapped OUTER_SAMPLE as a run that its controls are told of, and that they let go in any case.

    Raises ClockError, before anything is sampled, where a control counts steps that cannot be told.
    """
    guider = executor.class_obj
    begin(call.arguments, guider)
    try:
        return executor(*call.args, **call.kwargs)
    finally:  # the host ends controls too, but not after an exception or Cancel
        for control in controls(guider.conds):
            if hasattr(control, "expect"):
                control.let_go()


def begin(arguments: dict[str, Any], guider: Any) -> None:
    """Begin the run of an OUTER_SAMPLE, whose `arguments` by name come back with a callback that tells the clock.

    A run that another wrapper has begun goes on.
    """
    options = guider.model_options["transformer_options"]
    if RUN not in options:
        sigmas, sampler = arguments["sigmas"].tolist(), arguments["sampler"]
        given = getattr(sampler, "extra_options", {})
        churn = (given.get("s_churn", 0.0), given.get("s_tmin", 0.0), given.get("s_tmax", float("inf")))
        model = guider.model_patcher.get_model_object("model_sampling")
        clock = Clock(model.percent_to_sigma, sigmas, churned(sigmas, *churn) if churn[0] > 0 else None)
        if getattr(getattr(sampler, "sampler_function", None), "__name__", "") not in OWN_STEPS:
            clock.begun(0)
            arguments["callback"] = _counting(clock, arguments.get("callback"))
        options[RUN] = Run(clock)
    handler, whole = guider.model_options.get("context_handler"), len(arguments["noise"])
    frames = whole
    if getattr(handler, "dim", None) == 0:
        frames = min(whole, handler.context_length)
    for control in controls(guider.conds):
        if hasattr(control, "expect"):
            control.expect(guider.model_patcher.model, frames, *arguments["noise"].shape[-2:], whole)
            if control.counts_steps:
                options[RUN].clock.check_steps()


def _counting(clock: Clock, callback: Any) -> Any:
    """The host's callback, which samplers call once the beginning of a step is evaluated, telling the clock as well."""

    def counted(step: int, *rest: Any) -> None:
        clock.begun(step + 1)
        if callback is not None:
            callback(step, *rest)

    return counted


def controls(conds: dict[str, list[dict[str, Any]]]) -> Iterator[Any]:
    """Every control on a guider's conds, those before it in its chain as well."""
    for entries in conds.values():
        for cond in entries:
            control = cond.get("control")
            while control is not None:
                yield control
                control = control.previous_controlnet


def bound(executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """The arguments of a wrapped call by their names: their order differs between versions of the host."""
    return inspect.signature(executor.original).bind(*args, **kwargs)


# -- wrappers ---------------------------------------------------------------------------------------------------------


def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """A wrapper of OUTER_SAMPLE that begins the run."""
    return sample(executor, bound(executor, args, kwargs))


def calc_cond_batch(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """A wrapper of CALC_COND_BATCH that tells what its call is about, and which of its lists are negative ones.

    Guiders order the lists differently: marks on the conds say it; without any, that is not told.
    """
    _, conds, x, _, model_options = args
    options = {**model_options["transformer_options"], LATENT: tuple(x.shape)}
    if any(NEGATIVE in cond for entries in conds if entries for cond in entries):
        options[HALVES] = {i: any(cond.get(NEGATIVE) for cond in entries) for i, entries in enumerate(conds) if entries}
    return executor(*args[:4], {**model_options, "transformer_options": options}, **kwargs)


@cache
def hook() -> Any:
    """Both wrappers as a hook that rides on a control, for everything that is sampled with it."""
    wrappers = {WrappersMP.OUTER_SAMPLE: {KEY: [outer_sample]}, WrappersMP.CALC_COND_BATCH: {KEY: [calc_cond_batch]}}
    hooks = comfy.hooks.HookGroup()
    hooks.add(comfy.hooks.TransformerOptionsHook({"wrappers": wrappers}))
    return hooks
