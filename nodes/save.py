"""`SaveControlNet` and `NewControlNet`: a control becomes a file, a model becomes the beginning of a control."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui

from ..controlnet_core.networks.controlnet import HINT_ENCODERS
from .host import save

DTYPES = {"as loaded": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class SaveControlNet(io.ComfyNode):
    """Writes a control into the controlnet folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveControlNet",
            display_name="Save ControlNet (ZeroConv)",
            category="ZeroConv/training",
            description="Writes a control into the controlnet folder: as it is, without the checkpoint that it came "
            "in, in another layout or type, moved to another base model, or as its difference from one.",
            inputs=[
                io.ControlNet.Input("control_net"),
                io.String.Input(
                    "filename",
                    default="zeroconv/my_control",
                    tooltip="Below the first controlnet folder; / makes subfolders. A file that is there is kept: the "
                    "new one gets _2, _3, ... at its end.",
                ),
                io.Combo.Input(
                    "layout",
                    options=["ldm", "diffusers"],
                    default="ldm",
                    tooltip="How the tensors are called; ldm is what most programs read, and what its authors use.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="as loaded",
                    tooltip="fp16 and bf16 take half the room of fp32. As loaded is exact; a difference is fp32 then.",
                ),
                io.Combo.Input(
                    "content",
                    options=["control", "difference", "transfer"],
                    default="control",
                    tooltip="control: as it is. difference: what it adds to base. transfer: moved from base to target.",
                ),
                io.Model.Input("base", optional=True, tooltip="For difference and transfer: what it was made for."),
                io.Model.Input("target", optional=True, tooltip="For transfer: the model that it shall control."),
            ],
            outputs=[io.String.Output(display_name="control_net_name")],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        control_net: Any,
        filename: str,
        layout: str,
        dtype: str,
        content: str,
        base: Any = None,
        target: Any = None,
    ) -> io.NodeOutput:
        saved = save.save(control_net, filename, layout, DTYPES[dtype], content, base, target)
        return io.NodeOutput(saved.name, ui=ui.PreviewText(str(saved)))


class NewControlNet(io.ComfyNode):
    """A ControlNet as training begins."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NewControlNet",
            display_name="New ControlNet (ZeroConv)",
            category="ZeroConv/training",
            description="A ControlNet as training begins: a copy of the model's encoder, LoRAs included, between zero "
            "convolutions. It changes nothing until it has been trained.",
            inputs=[
                io.Model.Input("model", tooltip="SD1.x, SD2.x or SDXL."),
                io.Int.Input("hint_channels", default=3, min=1, max=8, tooltip="3 for pictures."),
                io.Combo.Input(
                    "hint_encoder",
                    options=list(HINT_ENCODERS),
                    default="released",
                    tooltip="released: as in published weights. paper: as the paper's text describes it.",
                ),
            ],
            outputs=[io.ControlNet.Output(display_name="control_net")],
        )

    @classmethod
    def execute(cls, model: Any, hint_channels: int, hint_encoder: str) -> io.NodeOutput:
        return io.NodeOutput(save.new_control(model, hint_channels, hint_encoder))
