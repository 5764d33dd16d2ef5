"""`ApplyControl`, `ApplyControlToPrompt`, `StackControls`: which control acts, how strongly and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..controlnet_core.dosing.block_weights import BlockWeights
from ..controlnet_core.dosing.schedule import Schedule
from ..controlnet_core.dosing.strength import GUIDANCE, MOST_REUSED, Guidance, Strength
from ..controlnet_core.dosing.window import UNITS, Unit, Window
from . import seen
from .host import attach as host_attach
from .host import given
from .host import stack as host_stack
from .host.control import ControlError
from .host.resize import RESIZES, Resize

STACK = io.Custom("CONTROL_NET_STACK")
SCHEDULE = io.Custom("CONTROL_SCHEDULE")
BLOCK_WEIGHTS = io.Custom("CONTROL_BLOCK_WEIGHTS")

UNCONNECTED = object()
"""In the place of a stack that is not connected: one that is switched off may be `None`."""


def _control_inputs(required: bool) -> list[Any]:
    """The inputs that every node of this file has; where a stack may stand in, control and image may be left out."""
    return [
        io.ControlNet.Input("control_net", optional=not required, tooltip="The control; none with a stack alone."),
        io.Image.Input("image", optional=not required, tooltip="The hint, as an annotator makes it."),
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=10.0,
            step=0.01,
            tooltip="How much this control counts: 1 as it was trained, 0 not at all. A stack brings its own.",
        ),
        io.Float.Input("start", default=0.0, min=0.0, max=10000.0, step=0.001, tooltip="Control acts from here on."),
        io.Float.Input(
            "end",
            default=1.0,
            min=-1.0,
            max=10000.0,
            step=0.001,
            tooltip="And ends here; in steps, -1 means to the last one.",
        ),
        io.Combo.Input(
            "unit",
            options=list(UNITS),
            default="percent",
            tooltip="percent: start and end are parts of sampling, 0 to 1. step: they count the run's steps from 0, "
            "the end not included.",
        ),
        io.Combo.Input(
            "guidance",
            options=list(GUIDANCE),
            default="both",
            tooltip="Which half of guidance is controlled: both, the prompt's alone, or that with the paper's "
            "resolution weights 1, 2, 4, 8, which keep guidance alive without a prompt.",
        ),
        io.Combo.Input(
            "resize",
            options=list(RESIZES),
            default="crop",
            tooltip="How a hint of another shape is made to fit: its middle, all of it distorted, or all of it with "
            "black borders.",
        ),
        STACK.Input("stack", optional=True, tooltip="Controls that come before this one."),
        io.Mask.Input("mask", optional=True, tooltip="Where control acts: white fully, black not at all."),
        SCHEDULE.Input("schedule", optional=True, tooltip="How strength changes over the window."),
        BLOCK_WEIGHTS.Input(
            "block_weights", optional=True, tooltip="How strongly each block of the UNet is controlled."
        ),
    ]


REUSE_INPUT = io.Float.Input(
    "reuse",
    optional=True,
    default=0.0,
    min=0.0,
    max=MOST_REUSED,
    step=0.05,
    tooltip="Part of the steps at which this node's control is not computed but told from the steps before: 0.5 nearly "
    "halves what it costs. 0: computed at every step.",
)
VAE_INPUT = io.Vae.Input("vae", optional=True, tooltip="For controls of another loader that read latents.")


@dataclass(frozen=True)
class Inputs:
    """What every node of this file is given, by the names of `_control_inputs`; `image` (B,H,W,C), `mask` (B,H,W)."""

    strength: float
    start: float
    end: float
    unit: Unit
    guidance: Guidance
    resize: Resize
    control_net: Any = None
    image: Tensor | None = None
    stack: Any = UNCONNECTED
    mask: Tensor | None = None
    schedule: Schedule | None = None
    block_weights: BlockWeights | None = None
    reuse: float = 0.0

    def entries(self) -> list[host_stack.Entry]:
        """The entries that these inputs describe, those of the connected stack first."""
        entries = [] if self.stack is UNCONNECTED else host_stack.read(self.stack)
        if self.control_net is None:
            if self.image is not None:
                raise host_stack.StackError(
                    "an image is connected and no control_net: connect the control that follows it"
                )
            for name in ("mask", "schedule", "block_weights"):
                if getattr(self, name) is not None:
                    raise host_stack.StackError(
                        f"{name} is connected and no control_net: connect it to the Stack Controls whose control it "
                        "doses"
                    )
            if self.stack is UNCONNECTED:
                raise host_stack.StackError("nothing to apply: connect a control_net with its image, or a stack")
            return entries
        mask = given.mask(self.mask)
        window = Window(self.start, self.end, self.unit)
        strength = Strength(self.strength, window, self.guidance, mask, self.schedule, self.block_weights, self.reuse)
        return [*entries, host_stack.entry(self.control_net, self.image, strength, self.resize)]

    def shown(self, node: type[io.ComfyNode], entries: list[host_stack.Entry]) -> dict[str, Any]:
        """What `node` shows of a hint of its own; `entries` were made of these inputs."""
        return seen.stacked() if self.control_net is None else seen.shown(node, entries[-1])


class ApplyControl(io.ComfyNode):
    """Controls everything that this model samples."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ApplyControl",
            display_name="Apply ControlNet (ZeroConv)",
            category="ZeroConv/apply",
            description="Controls everything that the model samples, whatever the prompts. For upscalers that work in "
            "tiles use Apply ControlNet to Prompt: they cut the hints of prompts for each tile, not this one's.",
            inputs=[io.Model.Input("model"), *_control_inputs(required=False), VAE_INPUT, REUSE_INPUT],
            outputs=[io.Model.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """Runs again, to say so, when the model of some such node goes where control would be lost.

        The host tells this function neither its node nor the graph, and keeps what was made before the graph changed.
        """
        graph = host_attach.running_graph()
        own = (name for name, node in graph.items() if node.get("class_type") == "ApplyControl")
        return ", ".join(filter(None, (host_attach.lost_in(graph, name) for name in own)))

    @classmethod
    def execute(cls, model: Any, vae: Any = None, **inputs: Any) -> io.NodeOutput:
        lost = host_attach.lost_in(host_attach.running_graph(), cls.hidden.unique_id)
        if lost:
            raise ControlError(
                f"the controlled model goes into {lost}, which takes nothing but weights of it, and control would be "
                "lost: apply control behind the merge"
            )
        own = Inputs(**inputs)
        entries = own.entries()
        controls = host_stack.controls(entries, vae)
        return io.NodeOutput(host_attach.attach_to_model(model, controls), ui=own.shown(cls, entries))


class ApplyControlToPrompt(io.ComfyNode):
    """Controls these two prompts alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ApplyControlToPrompt",
            display_name="Apply ControlNet to Prompt (ZeroConv)",
            category="ZeroConv/apply",
            description="Controls these prompts alone: where prompts want different controls, and for tiled samplers.",
            inputs=[
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                *_control_inputs(required=False),
                VAE_INPUT,
                REUSE_INPUT,
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
        )

    @classmethod
    def execute(cls, positive: Any, negative: Any, vae: Any = None, **inputs: Any) -> io.NodeOutput:
        own = Inputs(**inputs)
        entries = own.entries()
        controls = host_stack.controls(entries, vae)
        return io.NodeOutput(*host_attach.attach_to_prompt(positive, negative, controls), ui=own.shown(cls, entries))


class StackControls(io.ComfyNode):
    """Adds a control to a stack, to be applied in one place."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StackControls",
            display_name="Stack Controls (ZeroConv)",
            category="ZeroConv/apply",
            description="Puts several controls on one stack, for one Apply ControlNet: depth and pose at once, say.",
            inputs=[*_control_inputs(required=True), REUSE_INPUT],
            outputs=[STACK.Output(display_name="stack")],
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        own = Inputs(**inputs)
        entries = own.entries()
        return io.NodeOutput(entries, ui=own.shown(cls, entries))
