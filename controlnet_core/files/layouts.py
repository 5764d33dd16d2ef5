"""The names of tensors in the layouts in which ControlNets are published, brought to ldm's and back.

What only one kind of control has stands beside its network; which file has which layout, `kinds` tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..keys import State, Weights, numbered, renamed, some
from ..networks.unet import UNetConfig

# -- ldm --------------------------------------------------------------------------------------------------------------

CONTROL = "control_model."
"""Where a checkpoint of the whole training model keeps its ControlNet (lllyasviel/ControlNet, cldm/cldm.py)."""

OTHER_PARTS = ("model.", "model_ema.", "cond_stage_model.", "first_stage_model.", "conditioner.")
"""What else a checkpoint of the whole training model holds: the base UNet, text encoder and autoencoder."""

SCHEDULE = (
    "betas", "alphas_cumprod", "sqrt_", "log_one_minus_", "posterior_", "lvlb_weights", "logvar", "ddim_", "denoiser.",
    "edm_", "scale_factor", "global_step", "v_pred", "ztsnr",
)  # fmt: skip
"""How the tensors begin there that say how noise is added and what the model was trained for, with the marks that other
programs add (CompVis/stable-diffusion, ldm/models/diffusion/ddpm.py; Stability-AI/generative-models, sgm/modules/
diffusionmodules/denoiser.py)."""


def from_ldm(state: State) -> Weights:
    """The ControlNet of an ldm file, bare or inside a checkpoint of the whole training model.

    The checkpoint's other parts are left out; a key that is neither theirs nor the ControlNet's stays, to be named.
    """
    kept = {key: tensor for key, tensor in state.items() if not key.startswith(OTHER_PARTS + SCHEDULE)}
    return convolve_projections({key.removeprefix(CONTROL): tensor for key, tensor in kept.items()})


def from_difference(state: State) -> Weights:
    """The ControlNet of a difference file without its marker."""
    return from_ldm({key: tensor for key, tensor in state.items() if key != "difference"})


def convolve_projections(state: State) -> Weights:
    """SD1.x weights with the transformers' projections as 1x1 convolutions, also from files that have them 2-D.

    Only the published size is touched (320 channels, 768 numbers a text token, no pooled vector): there 2-D
    projections cannot mean SD2.x or SDXL, whose projections are linear.
    """
    weights = dict(state)
    stem = state.get("input_blocks.0.0.weight")
    context = state.get("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    sized = stem is not None and context is not None and (stem.shape[:1], context.shape[-1:]) == ((320,), (768,))
    if sized and "label_emb.0.0.weight" not in state:
        for key, tensor in state.items():
            if key.endswith((".1.proj_in.weight", ".1.proj_out.weight")) and tensor.ndim == 2:
                weights[key] = tensor[:, :, None, None]
    return weights


# -- diffusers --------------------------------------------------------------------------------------------------------

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""The parts of a ResBlock: diffusers' name -> ldm's. Transformers have the same names in both."""

FUSION = "transformer_layes."
"""The transformer of ControlNet Union, which its authors spell so; ours differs in one name."""


def from_diffusers(state: State) -> Weights:
    """The ldm weights of a diffusers ControlNetModel, ControlNetUnionModel or UNet2DConditionModel.

    Keys that diffusers' own models do not have stay as they are, to be named when the weights are loaded.
    """
    levels = numbered(state, "down_blocks.")
    names = _names(
        num_res_blocks=numbered(state, "down_blocks.0.resnets."),
        attention=[some(starts=f"down_blocks.{level}.attentions.")(state) for level in range(levels)],
        hint_blocks=numbered(state, "controlnet_cond_embedding.blocks."),
        fusion_layers=numbered(state, FUSION),
    )
    return convolve_projections(renamed(state, dict(names)))


def to_diffusers(state: State, config: UNetConfig) -> Weights:
    """The inverse: a ControlNet's or UNet's ldm weights as diffusers names them."""
    names = _names(
        num_res_blocks=config.num_res_blocks,
        attention=[depth > 0 for depth in config.transformer_depth],
        hint_blocks=(numbered(state, "input_hint_block.") - 3) // 2,  # layer, activation, layer, ...
        fusion_layers=numbered(state, FUSION),
    )
    return renamed(state, {ldm: diffusers for diffusers, ldm in names})


def _names(
    num_res_blocks: int, attention: Sequence[bool], hint_blocks: int, fusion_layers: int
) -> Iterator[tuple[str, str]]:
    """Every module of a ControlNet and of a UNet: (its name in diffusers, its name in ldm)."""
    stride = num_res_blocks + 1  # input_blocks on a level: the ResBlocks and a downsampling

    def resnet(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
        return ((f"{theirs}.{a}", f"{ours}.{b}") for a, b in RESNET.items())

    yield "conv_in", "input_blocks.0.0"
    for i in (1, 2):
        yield f"time_embedding.linear_{i}", f"time_embed.{2 * i - 2}"
        yield f"add_embedding.linear_{i}", f"label_emb.0.{2 * i - 2}"
    for level in range(len(attention)):
        for j in range(num_res_blocks):
            block = f"input_blocks.{1 + stride * level + j}"
            yield from resnet(f"down_blocks.{level}.resnets.{j}", f"{block}.0")
            yield f"down_blocks.{level}.attentions.{j}", f"{block}.1"
        yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{stride * (level + 1)}.0.op"

    yield from resnet("mid_block.resnets.0", "middle_block.0")
    yield "mid_block.attentions.0", "middle_block.1"
    yield from resnet("mid_block.resnets.1", "middle_block.2")

    for level, attends in enumerate(reversed(attention)):
        for j in range(stride):
            block = f"output_blocks.{stride * level + j}"
            yield from resnet(f"up_blocks.{level}.resnets.{j}", f"{block}.0")
            yield f"up_blocks.{level}.attentions.{j}", f"{block}.1"
        yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{stride * (level + 1) - 1}.{1 + attends}.conv"
    yield "conv_norm_out", "out.0"
    yield "conv_out", "out.2"

    yield "controlnet_cond_embedding.conv_in", "input_hint_block.0"
    for i in range(hint_blocks):
        yield f"controlnet_cond_embedding.blocks.{i}", f"input_hint_block.{2 * i + 2}"
    yield "controlnet_cond_embedding.conv_out", f"input_hint_block.{2 * hint_blocks + 2}"
    for i in range(stride * len(attention)):
        yield f"controlnet_down_blocks.{i}", f"zero_convs.{i}.0"
    yield "controlnet_mid_block", "middle_block_out.0"
    for i in range(fusion_layers):
        for part in ("weight", "bias"):
            yield f"{FUSION}{i}.attn.in_proj_{part}", f"{FUSION}{i}.attn.in_proj.{part}"
