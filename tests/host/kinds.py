"""One small untrained network of each kind of control but a plain ControlNet, and the layouts it is published in."""

from __future__ import annotations

from typing import Any

from graphs import CONTEXT, POOLED

from zeroconv.controlnet_core.networks.control_lora import ControlLora
from zeroconv.controlnet_core.networks.lite import ControlNetLite
from zeroconv.controlnet_core.networks.lllite import ControlLLLite, LLLite
from zeroconv.controlnet_core.networks.t2i_adapter import AdapterConfig, T2IAdapter
from zeroconv.controlnet_core.networks.unet import UNetConfig
from zeroconv.controlnet_core.networks.union import UnionControlNet

SDXL = UNetConfig(
    model_channels=64,
    channel_mult=(1, 1, 2),
    transformer_depth=(0, 1, 2),
    transformer_depth_middle=2,
    context_dim=CONTEXT,
    num_heads=0,
    use_linear=True,
    adm_in_channels=POOLED + 6 * 256,
)
"""The tiny SDXL model's."""

OTHERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "ControlNet Union": (lambda: UnionControlNet(SDXL, n_types=6), ("ldm", "diffusers")),
    "T2I-Adapter": (lambda: T2IAdapter(AdapterConfig(channels=(64, 128, 256, 256))), ("ldm", "diffusers")),
    "Control-LoRA": (lambda: ControlLora.fresh(SDXL, rank=4), ("ldm",)),
    "ControlLLLite": (
        lambda: ControlLLLite(
            {"lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q": LLLite(64, 8, 8, 3, False)}
        ),
        ("ldm",),
    ),
    "ControlNet-lite": (lambda: ControlNetLite(SDXL), ("ldm",)),
}
