"""One small untrained network of each kind of control but a plain ControlNet, and the layouts it is published in."""

from __future__ import annotations

from typing import Any

from graphs import CONTEXT

from zeroconv.controlnet_core.control_lora import ControlLora
from zeroconv.controlnet_core.lllite import ControlLLLite, LLLite
from zeroconv.controlnet_core.t2i_adapter import AdapterConfig, T2IAdapter
from zeroconv.controlnet_core.unet import UNetConfig
from zeroconv.controlnet_core.union import UnionControlNet


def small(**settings: Any) -> UNetConfig:
    sizes = {"model_channels": 64, "channel_mult": (1, 1, 2), "transformer_depth": (0, 1, 2), "context_dim": CONTEXT}
    return UNetConfig(**sizes, transformer_depth_middle=2, use_linear=True, num_heads=0, **settings)


def adapter() -> T2IAdapter:
    return T2IAdapter(AdapterConfig(channels=(64, 64, 128, 128)))


OTHERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "ControlNet Union": (lambda: UnionControlNet(small(adm_in_channels=60), n_types=6), ("ldm", "diffusers")),
    "T2I-Adapter": (adapter, ("ldm", "diffusers")),
    "Control-LoRA": (lambda: ControlLora.fresh(small(adm_in_channels=60), rank=4), ("ldm",)),
    "ControlLLLite": (
        lambda: ControlLLLite(
            {"lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q": LLLite(64, 8, 8, 3, False)}
        ),
        ("ldm",),
    ),
}
