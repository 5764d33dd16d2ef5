"""`ControlSchedule`, `ControlBlockWeights`: strength that changes over sampling, and from residual to residual."""

from __future__ import annotations

import math
import re
from typing import Any

from comfy_api.latest import io, ui

from ..controlnet_core.dosing.block_weights import LARGEST, PRESETS, SOFT, BlockWeights
from ..controlnet_core.dosing.schedule import CURVES, SCHEDULE_UNITS, Schedule, ScheduleError, parse
from ..controlnet_core.errors import ZeroConvError
from ..controlnet_core.limits import WRITTEN
from . import apply, pictures

CUSTOM = "custom"
FAMILIES = {12: "SD1.x, SD2.x: 12 skip connections and the middle", 9: "SDXL: 9 skip connections and the middle"}


class NumbersError(ZeroConvError):
    """A text that is no list of numbers."""


def _numbers(text: str, name: str) -> tuple[float, ...]:
    """The numbers in `text`, between commas, blanks or line ends; none in an empty text."""
    if len(text) > WRITTEN:
        raise NumbersError(f"{name} has {len(text)} characters, at most {WRITTEN} are read: leave numbers out")
    pieces = [piece for piece in re.split(r"[,\s]+", text) if piece]
    try:
        return tuple(float(piece) for piece in pieces)
    except ValueError:
        raise NumbersError(
            f'{name} takes numbers between commas, such as "1, 0.5, 0"; found "{text.strip()}"'
        ) from None


POINTS = 200
"""Equal parts of a drawn curve."""

AXES = {"window": "part of the control's window", "percent": "part of sampling", "step": "step"}


def made(curve: str, keyframes: str, unit: str, per_image: str) -> Schedule:
    """The schedule that the inputs of Control Schedule mean."""
    if curve != CUSTOM and unit == "step":
        raise ScheduleError(
            f'the curve "{curve}" runs from 0 to 1 and unit is step: set unit to window or percent, '
            "or curve to custom with keyframes in steps"
        )
    frames = parse(keyframes) if curve == CUSTOM else CURVES[curve]
    return Schedule(frames, unit, _numbers(per_image, "per_image"))  # type: ignore[arg-type]


def drawn(schedule: Schedule) -> dict[str, Any]:
    """What web/schedule.js draws of a schedule, for JSON.

    `points` are positions and values of the line from 0 to `right`, jumps upright; `top` is above all of them.
    """
    places = [keyframe.position for keyframe in schedule.keyframes]
    right = max(10, math.ceil(1.25 * places[-1])) if schedule.unit == "step" else 1  # room to drag the last step on
    around = [place for here in places for place in (math.nextafter(here, 0), here)]
    positions = sorted({*(right * i / POINTS for i in range(POINTS + 1)), *around})
    return {
        "keyframes": [(each.position, each.value, each.interpolation) for each in schedule.keyframes],
        "points": [(position, schedule.at(position)) for position in positions],
        "right": right,
        "top": max(1, *(math.ceil(keyframe.value) for keyframe in schedule.keyframes)),
        "axis": AXES[schedule.unit],
        "per_image": schedule.per_image,
    }


def asked(**inputs: str) -> dict[str, Any]:
    """What the page draws for the values of Control Schedule's widgets."""
    return drawn(made(**inputs))


class ControlSchedule(io.ComfyNode):
    """A strength that changes over sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlSchedule",
            display_name="Control Schedule (ZeroConv)",
            category="ZeroConv/strength",
            description="A strength that changes over sampling, by a named curve or by keyframes of your own. It "
            "multiplies the strength of the node it is connected to, within that node's start and end.",
            inputs=[
                io.Combo.Input(
                    "curve",
                    options=[CUSTOM, *CURVES],
                    default="fade out",
                    tooltip="A named curve runs over 0 to 1 of the window or of sampling; custom takes the keyframes.",
                ),
                io.String.Input(
                    "keyframes",
                    multiline=True,
                    default="",
                    placeholder="0: 1\n0.5: 0.3 ease\n1: 0",
                    tooltip='For curve custom only. One a line: position, strength, and how it goes on: "0: 1", '
                    '"0.5: 0.3 ease", "0.8: 0 hold". A named curve does not read this.',
                ),
                io.Combo.Input(
                    "unit",
                    options=list(SCHEDULE_UNITS),
                    default="window",
                    tooltip="Of the positions. window: 0 at start and 1 at end of the node that takes the schedule. "
                    "percent: 0 to 1 of all of sampling. step: the sampler's steps from 0, for custom only.",
                ),
                io.String.Input(
                    "per_image",
                    default="",
                    tooltip='One factor for each picture or frame of the batch, "1, 0.5, 0"; empty: all alike.',
                ),
            ],
            outputs=[apply.SCHEDULE.Output(display_name="schedule")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, curve: str, keyframes: str, unit: str, per_image: str) -> io.NodeOutput:
        schedule = made(curve, keyframes, unit, per_image)
        return io.NodeOutput(schedule, ui={"curve": [drawn(schedule)]})


class ControlBlockWeights(io.ComfyNode):
    """One weight for each residual of a control."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlBlockWeights",
            display_name="Control Block Weights (ZeroConv)",
            category="ZeroConv/strength",
            description="How much of a control joins each block of the model, from shallow (fine detail) to deep "
            "(layout) and the middle.",
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="soft",
                    tooltip="soft: weaker towards the shallow blocks, as in the authors' guess mode. deep half and "
                    "shallow half: that half of the blocks alone, the middle with the deep ones.",
                ),
                io.Float.Input(
                    "falloff",
                    default=SOFT,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    tooltip="For preset soft only: the factor from each block to the next shallower one.",
                ),
                io.String.Input(
                    "skips",
                    default="",
                    tooltip="For preset custom only: 12 numbers for SD1.x and SD2.x, 9 for SDXL, from shallow to deep.",
                ),
                io.Float.Input(
                    "middle",
                    default=1.0,
                    min=0.0,
                    max=LARGEST,
                    step=0.01,
                    tooltip="Multiplies the middle block's weight: 1 in every preset but shallow half, 0 there.",
                ),
            ],
            outputs=[apply.BLOCK_WEIGHTS.Output(display_name="block_weights")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, preset: str, falloff: float, skips: str, middle: float) -> io.NodeOutput:
        numbers = _numbers(skips, "skips") if preset == CUSTOM else ()
        made = BlockWeights(preset, falloff, numbers, middle)  # type: ignore[arg-type]
        sizes = [len(numbers)] if preset == CUSTOM else list(FAMILIES)
        panels = [(FAMILIES.get(n, f"{n} skip connections and the middle"), made.weights(n)) for n in sizes]
        return io.NodeOutput(made, ui=ui.PreviewImage(pictures.bars(panels), cls=cls))
