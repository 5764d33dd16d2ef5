"""What weights are that no ControlNet format claims, and where they belong."""

from __future__ import annotations

from dataclasses import dataclass

from ..keys import Condition, State, has, some


@dataclass(frozen=True)
class Stranger:
    """A file that is none of ours: the question to the keys that tells it, what it is and where it belongs."""

    matches: Condition
    says: str


HOSTS_OWN = "load it with ComfyUI's own Load ControlNet Model and Apply ControlNet nodes"
OWN_NODES = "it works only with the custom nodes that were made for it"

STRANGE_CONTROLS = (
    Stranger(
        some(contains="motion_modules.") & (some(starts="controlnet_") | some(starts="input_hint_block.")),
        f"a SparseCtrl, a control for AnimateDiff: {OWN_NODES}",
    ),
    Stranger(some(contains=".lora_layer."), f"a CtrLoRA: {OWN_NODES}"),
    Stranger(some(contains="temporal_res_block."), f"a ControlNet for Stable Video Diffusion: {OWN_NODES}"),
    Stranger(some(contains="ctrl_to_base"), f"a ControlNet-XS: {OWN_NODES}"),
    Stranger(some(starts="brushnet_"), f"a BrushNet: {OWN_NODES}"),
    Stranger(
        some(starts="lllite_") & ~some(starts="lllite_unet_"),
        f"a ControlLLLite for a diffusion transformer: {OWN_NODES}",
    ),
)
"""Controls of Stable Diffusion whose keys contain a ControlNet's, or could be taken for one."""

OTHER_CONTROLS = Condition(lambda state: any(stranger.matches(state) for stranger in STRANGE_CONTROLS))
"""Does something in these keys go beyond a plain ControlNet?"""

TRANSFORMER = some(starts="controlnet_blocks.")

STRANGERS = (
    Stranger(has("after_proj_list.18.bias"), f"a HunyuanDiT ControlNet: {HOSTS_OWN}"),
    Stranger(TRANSFORMER & some(contains=".img_mlp."), f"a Qwen-Image ControlNet: {HOSTS_OWN}"),
    Stranger(TRANSFORMER & some(contains="pos_embed"), f"an SD3 ControlNet: {HOSTS_OWN}"),
    Stranger(
        TRANSFORMER & (some(starts="single_transformer_blocks.") | some(starts="double_blocks.")),
        f"a Flux ControlNet: {HOSTS_OWN}",
    ),
    Stranger(TRANSFORMER, f"a ControlNet of a diffusion transformer (Flux, SD3, Qwen): {HOSTS_OWN}"),
    Stranger(some(starts="style_embedding"), "a style T2I-Adapter: put it into style_models, for Load Style Model"),
    Stranger(some(starts="ip_adapter.") | some(starts="image_proj."), f"an IP-Adapter: {OWN_NODES}"),
    Stranger(
        some(contains="lora_down.") | some(contains="lora_A.") | some(contains="hada_w1") | some(contains="lokr_w"),
        "a LoRA: put it into the loras folder and load it with Load LoRA",
    ),
    Stranger(some(contains="motion_modules."), f"a motion module of AnimateDiff: {OWN_NODES}"),
    Stranger(
        some(starts="model.diffusion_model."),
        "a base model's checkpoint with no ControlNet in it: put it into the checkpoints folder, for Load Checkpoint",
    ),
    Stranger(
        some(contains="output_blocks.") | (has("down_blocks.0.resnets.0.conv1.weight") & some(starts="up_blocks.")),
        "a UNet alone, a base model with no ControlNet: put it into diffusion_models, for Load Diffusion Model",
    ),
    Stranger(
        some(contains="double_blocks.") | some(contains="joint_blocks.") | some(contains="transformer_blocks.0.attn."),
        "a diffusion transformer, a base model (Flux, SD3): put it into diffusion_models, for Load Diffusion Model",
    ),
    Stranger(
        some(ends="decoder.conv_in.weight") | some(ends="encoder.conv_in.weight"),
        "a VAE: put it into the vae folder, for Load VAE",
    ),
    Stranger(
        some(contains="vision_model.") | some(starts="visual."),
        "a CLIP vision encoder: put it into clip_vision, for Load CLIP Vision",
    ),
    Stranger(
        some(ends="token_embedding.weight") | some(contains=".SelfAttention.q.") | has("model.embed_tokens.weight"),
        "a text encoder: put it into text_encoders, for Load CLIP",
    ),
    Stranger(
        has("emb_params") | has("clip_g") | has("clip_l"), "a textual-inversion embedding: put it into embeddings"
    ),
    Stranger(
        some(ends=".RDB1.conv1.0.weight") | some(ends="body.0.rdb1.conv1.weight"),
        "an upscaler: put it into upscale_models, for Load Upscale Model",
    ),
)
"""Everything else that people put into a folder of ControlNets, the narrower first."""


def diagnose(state: State) -> str:
    """What these weights are and where they belong, in one line; unknown ones are shown by their first keys."""
    for stranger in STRANGE_CONTROLS + STRANGERS:
        if stranger.matches(state):
            return f"this is {stranger.says}"
    shown = ", ".join(list(state)[:3]) or "none"
    return (
        "this is no ControlNet in the ldm or diffusers layout: expected a key like zero_convs.0.0.weight or "
        f"controlnet_cond_embedding.conv_in.weight, found {len(state)} tensors, the first of them {shown}: load a "
        "ControlNet for SD1.x, SD2.x or SDXL"
    )
