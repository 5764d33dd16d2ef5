"""`InspectControl`: what a control is, and which models it fits."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .host.report import report


class InspectControl(io.ComfyNode):
    """Says what a control is: family, format, size, and what it fits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InspectControl",
            display_name="Inspect Control (ZeroConv)",
            category="ZeroConv/inspect",
            description="Says what a control is: family, format, size, and whether it fits a model.",
            inputs=[
                io.ControlNet.Input("control_net"),
                io.Model.Input("model", optional=True, tooltip="Is this control made for it?"),
            ],
            outputs=[io.String.Output(display_name="report")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, control_net: Any, model: Any = None) -> io.NodeOutput:
        text = report(control_net, model)
        return io.NodeOutput(text, ui=ui.PreviewText(text))
