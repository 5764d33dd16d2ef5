"""Puts controls on conds: at once, or when sampling starts, through a wrapper on a clone of the model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import comfy.patcher_extension
import comfy.samplers

from . import run
from .control import Control, ControlError
from .run import KEY, NEGATIVE, WrappersMP

log = logging.getLogger(__name__)

Conds = dict[str, list[dict[str, Any]]]
"""The lists of conds of a guider by their name ("positive", "negative", ...)."""


def attach(conds: Conds, controls: Sequence[Control]) -> Conds:
    """New lists of new conds that carry `controls` after what they carry already; both halves share one object.

    Two conds are batched only when their control is the same object, so that every chain is built once.
    """
    if not controls:
        return conds
    conds = _copied_to_negative(conds)
    chains: dict[int | None, Any] = {}

    def chain(previous: Any) -> Any:
        key = None if previous is None else id(previous)
        if key not in chains:
            for control in controls:
                control = control.copy()
                control.set_previous_controlnet(previous)
                previous = control
            chains[key] = previous
        return chains[key]

    return {
        name: [
            {
                **cond,
                "control": chain(cond.get("control")),
                "control_apply_to_uncond": False,
                NEGATIVE: "negative" in name,
            }
            for cond in entries
        ]
        for name, entries in conds.items()
    }


def _copied_to_negative(conds: Conds) -> Conds:
    """Do what the host does for its deprecated apply node, before another control on the negative keeps it from it."""
    conds = {name: list(entries) for name, entries in conds.items()}
    copied = [cond for cond in conds.get("positive", []) if cond.get("control_apply_to_uncond")]
    for name, entries in conds.items():
        if name != "positive" and entries:
            comfy.samplers.apply_empty_x_to_equal_area(copied, entries, "control", lambda controls, i: controls[i])
    return conds


def attach_to_prompt(positive: list[Any], negative: list[Any], controls: Sequence[Control]) -> tuple[list, list]:
    """CONDITIONING `positive` and `negative` with `controls` on every entry; what came in stays as it was."""
    controls = [control.copy() for control in controls]
    for control in controls:
        control.on_both_prompts = True
    # The host's conds are dicts; the text embedding of an entry travels in them for the time being.
    plain = {
        name: [{**options, KEY: embedding} for embedding, options in entries]
        for name, entries in (("positive", positive), ("negative", negative))
    }
    attached = attach(plain, controls)
    return tuple(  # type: ignore[return-value]
        [[cond.pop(KEY), cond] for cond in attached[name]] for name in ("positive", "negative")
    )


def attach_to_model(model: Any, controls: Sequence[Control]) -> Any:
    """A clone of the host's MODEL that puts `controls` on the conds of every sampling; one that does not fit raises."""
    clone = model.clone()
    if not controls:
        return clone
    for control in controls:
        control.check_fits(model.model)
        if control.foreign_hooks():
            raise ControlError(
                f"{control.name} acts through hooks, which the host takes from prompts alone: use Apply ControlNet to "
                "Prompt"
            )

    sampled: list[tuple[int, ...]] = []

    def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider, call = executor.class_obj, run.bound(executor, args, kwargs)
        _warn_of_tiles(controls, tuple(8 * n for n in call.arguments["noise"].shape[-2:]), sampled)
        guider.conds = attach(guider.conds, controls)
        comfy.patcher_extension.add_wrapper_with_key(
            WrappersMP.CALC_COND_BATCH, KEY, run.calc_cond_batch, guider.model_options, is_model_options=True
        )
        return run.sample(executor, call)

    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
    return clone


def lost_in(graph: dict[str, Any], node_id: str | None) -> str:
    """Where a prompt (API format) hands the MODEL of node `node_id` to a merge that drops control; empty where nowhere.

    The host's merge nodes keep what hangs on `model1`; of `model2` they take weights alone.
    """
    links = [
        (str(value[0]), given, name, node.get("class_type", ""))
        for name, node in graph.items()
        for given, value in node.get("inputs", {}).items()
        if isinstance(value, list) and len(value) == 2
    ]
    reached = [node_id]
    for source in reached:  # it grows
        for _, given, name, kind in (link for link in links if link[0] == source):
            if given == "model2" and kind.startswith("ModelMerge"):
                return f"model2 of {kind} (node {name})"
            if given in ("model", "model1") and name not in reached:
                reached.append(name)
    return ""


def running_graph() -> dict[str, Any]:
    """The prompt that the host's queue works on, in API format; empty where there is no queue."""
    server: Any = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    running = server.prompt_queue.get_current_queue()[0] if hasattr(server, "prompt_queue") else []
    return running[0][2] if running else {}


def _warn_of_tiles(controls: Sequence[Control], size: tuple[int, ...], sampled: list[tuple[int, ...]]) -> None:
    """Say so in the log, once for a model, where it seems to sample the tiles of a picture: none of them is told."""
    for control in controls:
        height, width = control.cond_hint_original.shape[-2:]
        if sampled.count(size) == 1 and height >= 1.5 * size[0] and width >= 1.5 * size[1]:
            log.warning(
                "%s has a hint of %dx%d, and pictures of %dx%d are sampled one after the other: if these are tiles of "
                "a larger one, each of them gets the whole hint; use Apply ControlNet to Prompt for such upscalers",
                *(control.name, width, height, size[1], size[0]),
            )
            break
    sampled.append(size)
