"""`ApplyControl`, `ApplyControlToPrompt`, `StackControls`: which control acts, how strongly and when."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..controlnet_core.dosing.strength import GUIDANCE, UNITS
from .host import attach as host_attach
from .host import stack as host_stack
from .host.control import Options
from .host.resize import RESIZES

Stack = io.Custom("CONTROL_NET_STACK")
Schedule = io.Custom("CONTROL_SCHEDULE")
BlockWeights = io.Custom("CONTROL_BLOCK_WEIGHTS")


def _dose(required: bool) -> list[Any]:
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
            tooltip="Multiplies every residual of this node's control; a stack brings its own.",
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
    ]


def _extras() -> list[Any]:
    return [
        Stack.Input("stack", optional=True, tooltip="Controls that come before this one."),
        io.Mask.Input("mask", optional=True, tooltip="Where control acts: white fully, black not at all."),
        Schedule.Input("schedule", optional=True, tooltip="How strength changes over the window."),
        BlockWeights.Input(
            "block_weights", optional=True, tooltip="How strongly each block of the UNet is controlled."
        ),
    ]


VAE_INPUT = io.Vae.Input("vae", optional=True, tooltip="For controls of another loader that read latents.")


def _entries(
    control_net: Any,
    image: Any,
    strength: float,
    start: float,
    end: float,
    unit: str,
    guidance: str,
    resize: str,
    stack: Any,
    mask: Any,
    schedule: Any,
    block_weights: Any,
) -> list[host_stack.Entry]:
    """The entries that a node's inputs describe, those of the connected stack first."""
    entries = host_stack.read(stack)
    if control_net is None:
        if image is not None:
            raise host_stack.StackError("an image is connected and no control_net: connect the control that follows it")
        for name, dose in {"mask": mask, "schedule": schedule, "block_weights": block_weights}.items():
            if dose is not None:
                raise host_stack.StackError(
                    f"{name} is connected and no control_net: connect it to the Stack Controls whose control it doses"
                )
        if not entries:
            raise host_stack.StackError("nothing to apply: connect a control_net with its image, or a stack")
        return entries
    rows = None if mask is None else mask.reshape(-1, 1, *mask.shape[-2:])
    options = Options(unit, guidance, resize, rows, schedule, block_weights)  # type: ignore[arg-type]
    return [*entries, host_stack.entry(control_net, image, strength, start, end, options)]


class ApplyControl(io.ComfyNode):
    """Controls everything that this model samples."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ApplyControl",
            display_name="Apply Control (ZeroConv)",
            category="ZeroConv",
            description="Controls everything that the model samples, whatever the prompts.",
            inputs=[io.Model.Input("model"), *_dose(required=False), *_extras(), VAE_INPUT],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        strength: float,
        start: float,
        end: float,
        unit: str,
        guidance: str,
        resize: str,
        control_net: Any = None,
        image: Any = None,
        stack: Any = None,
        mask: Any = None,
        schedule: Any = None,
        block_weights: Any = None,
        vae: Any = None,
    ) -> io.NodeOutput:
        dose = (strength, start, end, unit, guidance, resize)
        entries = _entries(control_net, image, *dose, stack, mask, schedule, block_weights)
        return io.NodeOutput(host_attach.attach_to_model(model, host_stack.controls(entries, vae)))


class ApplyControlToPrompt(io.ComfyNode):
    """Controls these two prompts alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ApplyControlToPrompt",
            display_name="Apply Control to Prompt (ZeroConv)",
            category="ZeroConv",
            description="Controls these prompts alone: where prompts want different controls, and for tiled samplers.",
            inputs=[
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                *_dose(required=False),
                *_extras(),
                VAE_INPUT,
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
        )

    @classmethod
    def execute(
        cls,
        positive: Any,
        negative: Any,
        strength: float,
        start: float,
        end: float,
        unit: str,
        guidance: str,
        resize: str,
        control_net: Any = None,
        image: Any = None,
        stack: Any = None,
        mask: Any = None,
        schedule: Any = None,
        block_weights: Any = None,
        vae: Any = None,
    ) -> io.NodeOutput:
        dose = (strength, start, end, unit, guidance, resize)
        entries = _entries(control_net, image, *dose, stack, mask, schedule, block_weights)
        return io.NodeOutput(*host_attach.attach_to_prompt(positive, negative, host_stack.controls(entries, vae)))


class StackControls(io.ComfyNode):
    """Adds a control to a stack, to be applied in one place."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StackControls",
            display_name="Stack Controls (ZeroConv)",
            category="ZeroConv",
            description="Adds a control to a stack; their residuals add, as the paper composes several hints.",
            inputs=[*_dose(required=True), *_extras()],
            outputs=[Stack.Output(display_name="stack")],
        )

    @classmethod
    def execute(
        cls,
        strength: float,
        start: float,
        end: float,
        unit: str,
        guidance: str,
        resize: str,
        control_net: Any = None,
        image: Any = None,
        stack: Any = None,
        mask: Any = None,
        schedule: Any = None,
        block_weights: Any = None,
    ) -> io.NodeOutput:
        dose = (strength, start, end, unit, guidance, resize)
        return io.NodeOutput(_entries(control_net, image, *dose, stack, mask, schedule, block_weights))
