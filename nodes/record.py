"""`RecordControl` and `ControlReport`: which residuals acted at which step, and how strongly."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..controlnet_core.dosing.record import Record, table
from . import pictures
from .host import record as host_record

RecordSocket = io.Custom("CONTROL_RECORD")


class RecordControl(io.ComfyNode):
    """Keeps account of what controls do in a sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RecordControl",
            display_name="Record Control (ZeroConv)",
            category="ZeroConv/inspect",
            description="Keeps account of what the controls add at every step of sampling, and changes nothing. "
            "Control Report shows the record.",
            inputs=[io.Model.Input("model", tooltip="With or without controls: before or after Apply ControlNet.")],
            outputs=[io.Model.Output(display_name="model"), RecordSocket.Output(display_name="record")],
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        return io.NodeOutput(*host_record.recorded(model))


class ControlReport(io.ComfyNode):
    """Shows what controls did in a sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlReport",
            display_name="Control Report (ZeroConv)",
            category="ZeroConv/inspect",
            description="What each control did at each step, and how strongly: what it added to each block of the "
            "model, in percent of what was there, as a heat map; the table is an output.",
            inputs=[
                RecordSocket.Input("record"),
                io.Latent.Input("latent", tooltip="The sampler's output; only so that the report comes after it."),
            ],
            outputs=[io.String.Output(display_name="report"), io.Image.Output(display_name="heat_map")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, record: Record, latent: Any) -> io.NodeOutput:
        picture = pictures.heat_map(record.panels)
        # The picture alone is shown: it has every number of the table.
        return io.NodeOutput(table(record), picture, ui=ui.PreviewImage(picture, cls=cls))
