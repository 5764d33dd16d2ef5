"""`LoadControlNet`: a file becomes a control."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..controlnet_core.networks.union import TYPES
from .host import files

DTYPES = {
    "default": None,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class LoadControlNet(io.ComfyNode):
    """Loads a control file of any layout for SD1.x, SD2.x and SDXL; what it is comes from its keys, not its name."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadControlNet",
            display_name="Load ControlNet (ZeroConv)",
            category="ZeroConv/apply",
            description="Loads a control for SD1.x, SD2.x or SDXL: ControlNet, Union, Control-LoRA, T2I-Adapter or "
            "ControlLLLite, whatever the layout.",
            inputs=[
                io.Combo.Input("control_net_name", options=files.names(), tooltip="A file of the controlnet folders."),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(DTYPES),
                    default="default",
                    tooltip="How the weights are kept in memory; default is what the host chooses for this file.",
                ),
                io.Combo.Input(
                    "control_type",
                    options=["auto", "shuffle", *TYPES],
                    default="auto",
                    tooltip="What the hint is: one of the types of a ControlNet Union, or shuffle, whose weights look "
                    "like any other's; auto for all others, and for files whose name ends with shuffle.",
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="The base model, for files that hold differences from it."
                ),
            ],
            outputs=[io.ControlNet.Output(display_name="control_net")],
        )

    @classmethod
    def fingerprint_inputs(cls, control_net_name: str, **_: Any) -> str:
        """Loads again when the file changes."""
        stat = files.path_of(control_net_name).stat()
        return f"{stat.st_mtime_ns}:{stat.st_size}"

    @classmethod
    def execute(
        cls, control_net_name: str, weight_dtype: str = "default", control_type: str = "auto", model: Any = None
    ) -> io.NodeOutput:
        return io.NodeOutput(files.load(control_net_name, DTYPES[weight_dtype], model, control_type))
