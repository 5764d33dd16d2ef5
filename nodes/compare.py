"""`CompareImages`: two pictures over each other, and a slider between them."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from .host import given


class CompareImages(io.ComfyNode):
    """Shows one picture over another; `web/compare.js` moves the line between them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CompareImages",
            display_name="Compare Images (ZeroConv)",
            category="ZeroConv/inspect",
            description="Two pictures over each other: move the mouse over them, and see one to its left and the other "
            "to its right.",
            inputs=[
                io.Image.Input("before", tooltip="What is seen to the left of the mouse: without control, say."),
                io.Image.Input("after", tooltip="What is seen to the right of it."),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, before: torch.Tensor, after: torch.Tensor) -> io.NodeOutput:
        shown = {}
        for name, image in (("before", before), ("after", after)):
            given.picture(image, name)
            shown[name] = ui.PreviewImage(image, cls=cls).as_dict()["images"]
        return io.NodeOutput(ui={"compare": [shown]})
