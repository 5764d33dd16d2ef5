"""Every layout is told by its keys and brought to ldm's; what is no ControlNet is called by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from zeroconv.controlnet_core.files.diagnosis import diagnose
from zeroconv.controlnet_core.files.kinds import KINDS, UnknownFormat, detect
from zeroconv.controlnet_core.files.layouts import from_diffusers, from_ldm, to_diffusers
from zeroconv.controlnet_core.networks.controlnet import ControlNet
from zeroconv.controlnet_core.networks.unet import SD15, SD21, SDXL, UNet, UNetConfig

State = dict[str, Tensor]

TINY = UNetConfig(model_channels=32, channel_mult=(1, 2, 2, 2), context_dim=16, num_heads=4)
LAYOUTS = {
    "SD1.5": SD15,
    "SD2.1": SD21,
    "SDXL": SDXL,
    "SDXL mid": replace(SDXL, transformer_depth=(0, 0, 1), transformer_depth_middle=1),
    "narrow": TINY,
    "SDXL small": replace(SDXL, transformer_depth=(0, 0, 0), transformer_depth_middle=0),
    "one ResBlock in the middle": replace(TINY, transformer_depth_middle=-1),
    "odd": replace(TINY, num_res_blocks=3, channel_mult=(1, 3), transformer_depth=(0, 2), use_linear=True),
}


def weights(config: UNetConfig, network: type = ControlNet) -> State:
    """Keys and shapes alone: on the meta device even SDXL costs nothing."""
    return dict(network(config, device="meta").state_dict())


def shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def diffusers_model(config: UNetConfig, network: type) -> torch.nn.Module:
    """What diffusers itself builds for this configuration, on the meta device."""
    import diffusers

    attention = [depth > 0 for depth in config.transformer_depth]
    blocks: dict = {"down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention]}
    if network is UNet:
        blocks["up_block_types"] = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)]
    if config.adm_in_channels is not None:
        blocks["addition_embed_type"] = "text_time"
        blocks["addition_time_embed_dim"] = 256
        blocks["projection_class_embeddings_input_dim"] = config.adm_in_channels
    if config.transformer_depth_middle == -1:
        blocks["mid_block_type"] = "UNetMidBlock2D"
    depths = [depth or 1 for depth in config.transformer_depth[:-1]]
    with torch.device("meta"):
        return getattr(diffusers, "ControlNetModel" if network is ControlNet else "UNet2DConditionModel")(
            block_out_channels=[config.model_channels * mult for mult in config.channel_mult],
            layers_per_block=config.num_res_blocks,
            # diffusers gives the middle block the depth of the deepest level
            transformer_layers_per_block=[*depths, config.transformer_depth_middle],
            cross_attention_dim=config.context_dim,
            attention_head_dim=8,
            use_linear_projection=config.use_linear,
            **blocks,
        )


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [ControlNet, UNet])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "odd"])
def test_every_key_of_diffusers_has_its_ldm_name_and_shape(layout: str, network: type):
    theirs = diffusers_model(LAYOUTS[layout], network).state_dict()
    ours = weights(LAYOUTS[layout], network)
    assert len(theirs) > 100
    assert shapes(from_diffusers(theirs)) == shapes(ours)
    assert shapes(to_diffusers(ours, LAYOUTS[layout])) == shapes(theirs)


@pytest.mark.parametrize("network", [ControlNet, UNet])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_to_diffusers_and_back_are_the_same(layout: str, network: type):
    state = weights(LAYOUTS[layout], network)
    there = to_diffusers(state, LAYOUTS[layout])
    back = from_diffusers(there)
    assert len(there) == len(state)
    ldm = ("input_", "middle_", "output_", "out.", "zero_", "time_embed.", "label_")
    assert not [key for key in there if key.startswith(ldm)]
    assert back.keys() == state.keys()
    assert all(back[key] is state[key] for key in state)


@pytest.mark.parametrize(
    ("diffusers", "ldm"),
    [
        ("conv_in.weight", "input_blocks.0.0.weight"),
        ("time_embedding.linear_2.bias", "time_embed.2.bias"),
        ("add_embedding.linear_1.weight", "label_emb.0.0.weight"),
        ("down_blocks.0.resnets.1.time_emb_proj.weight", "input_blocks.2.0.emb_layers.1.weight"),
        ("down_blocks.0.downsamplers.0.conv.weight", "input_blocks.3.0.op.weight"),
        ("down_blocks.1.resnets.0.conv_shortcut.bias", "input_blocks.4.0.skip_connection.bias"),
        ("down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj.weight",) * 2,
        ("mid_block.attentions.0.proj_in.weight", "middle_block.1.proj_in.weight"),
        ("mid_block.resnets.1.norm2.weight", "middle_block.2.out_layers.0.weight"),
        ("controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight"),
        ("controlnet_cond_embedding.blocks.5.bias", "input_hint_block.12.bias"),
        ("controlnet_cond_embedding.conv_out.weight", "input_hint_block.14.weight"),
        ("controlnet_down_blocks.8.weight", "zero_convs.8.0.weight"),
        ("controlnet_mid_block.bias", "middle_block_out.0.bias"),
    ],
)
def test_names_written_out(diffusers: str, ldm: str):
    state = to_diffusers(weights(SDXL), SDXL)
    if diffusers == ldm:
        ldm = "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight"
    (name,) = (key for key, tensor in from_diffusers(state).items() if tensor is state[diffusers])
    assert name == ldm


def test_keys_that_no_layout_has_stay_to_be_named():
    state = {
        **to_diffusers(weights(TINY), TINY),
        "mid_block.nonsense.weight": torch.ones(1),
        "down_blocks": torch.ones(1),
    }
    assert {"mid_block.nonsense.weight", "down_blocks"} == from_diffusers(state).keys() - weights(TINY).keys()


# -- detection and canonical weights ----------------------------------------------------------------------------------


def prefixed(state: State) -> State:
    return {f"control_model.{key}": tensor for key, tensor in state.items()}


def checkpoint(state: State) -> State:
    """As control_sd15_*.pth: the whole training model, its noise schedule and the base model included."""
    others = ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"]
    others += ["cond_stage_model.transformer.text_model.final_layer_norm.bias", "model_ema.decay", "logvar"]
    others += ["betas", "alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef2", "lvlb_weights"]
    others += ["log_one_minus_alphas_cumprod"]
    return {**{key: torch.ones(1) for key in others}, **prefixed(state)}


WRITTEN: dict[str, tuple[Callable[[State], State], str]] = {
    "bare": (dict, "ldm"),
    "prefixed": (prefixed, "ldm with prefix"),
    "checkpoint": (checkpoint, "ldm with prefix"),
    "diffusers": (lambda state: to_diffusers(state, TINY), "diffusers"),
    "difference": (lambda state: {**prefixed(state), "difference": torch.ones(1)}, "difference"),
    "bare difference": (lambda state: {**state, "difference": torch.ones(1)}, "difference"),
}


@pytest.mark.parametrize("layout", WRITTEN)
def test_each_layout_is_told_and_brought_to_ldm(layout: str):
    write, name = WRITTEN[layout]
    state = weights(TINY)
    written = write(state)
    before = dict(written)
    _, found = detect(written)
    assert found.name == name
    assert found.needs_base == ("difference" in layout)
    canonical = found.canonicalize(written)
    assert canonical.keys() == state.keys()
    assert all(canonical[key] is state[key] for key in state)
    assert list(written) == list(before)
    assert canonical is not written


def test_a_missing_first_key_does_not_hide_the_layout():
    state = weights(TINY)
    del state["zero_convs.0.0.weight"]
    assert detect(state)[1].name == "ldm"
    assert detect(prefixed(state))[1].name == "ldm with prefix"


def test_a_checkpoint_keeps_the_keys_that_nobody_knows():
    state = {**checkpoint(weights(TINY)), "control_model.extra": torch.ones(1), "something.else": torch.ones(1)}
    assert from_ldm(state).keys() - weights(TINY).keys() == {"extra", "something.else"}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", WRITTEN)
def test_the_dtype_stays(layout: str, dtype: torch.dtype):
    state = WRITTEN[layout][0]({key: torch.empty_like(t, dtype=dtype) for key, t in weights(TINY).items()})
    assert {tensor.dtype for tensor in detect(state)[1].canonicalize(state).values()} == {dtype}


@pytest.mark.parametrize("layout", ["bare", "checkpoint", "diffusers"])
def test_flat_projections_of_sd15_become_convolutions(layout: str):
    """Some conversions of SD1.5 controls have them as linear layers; the published size cannot be another family."""
    flat = {key: t[:, :, 0, 0] if "proj_" in key and t.ndim == 4 else t for key, t in weights(SD15).items()}
    assert flat["middle_block.1.proj_out.weight"].shape == (1280, 1280)
    written = to_diffusers(flat, SD15) if layout == "diffusers" else WRITTEN[layout][0](flat)
    assert shapes(detect(written)[1].canonicalize(written)) == shapes(weights(SD15))


FLAT = [SD21, SDXL, replace(SD15, model_channels=64, use_linear=True)]
FLAT.append(replace(SD15, use_linear=True, adm_in_channels=2816))


@pytest.mark.parametrize("config", FLAT)
def test_flat_projections_of_other_families_stay(config: UNetConfig):
    assert shapes(from_ldm(weights(config))) == shapes(weights(config))
    assert shapes(from_diffusers(to_diffusers(weights(config), config))) == shapes(weights(config))


# -- kinds of control -------------------------------------------------------------------------------------------------

Q = "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
TOLD: list[tuple[tuple[str, ...], str]] = [
    (("lora_controlnet", "zero_convs.0.0.weight", "input_blocks.1.0.in_layers.2.up"), "Control-LoRA"),
    ((f"{Q}.down.0.weight", f"{Q}.conditioning1.0.weight"), "ControlLLLite"),
    (
        ("controlnet_cond_embedding.conv_in.weight", "task_embedding", "control_add_embedding.linear_1.bias"),
        "Union, diffusers",
    ),
    (("zero_convs.0.0.weight", "task_embedding", "control_add_embedding.linear_1.bias"), "Union, ldm"),
    (("controlnet_cond_embedding.conv_in.weight",), "diffusers"),
    (("zero_convs.0.0.weight", "lite_blocks.1.0.weight"), "ControlNet-lite"),
    (("difference", "control_model.zero_convs.0.0.weight"), "difference"),
    (("control_model.zero_convs.0.0.weight", "model.diffusion_model.out.2.weight"), "ldm with prefix"),
    (("zero_convs.0.0.weight",), "ldm"),
    (("adapter.body.0.resnets.0.block1.weight", "adapter.conv_in.weight"), "T2I-Adapter, diffusers"),
    (("body.0.block1.weight", "conv_in.weight"), "T2I-Adapter"),
    (("body.0.in_conv.weight", "body.0.out_conv.weight"), "T2I-Adapter"),
    (("adapter.body.0.block1.weight", "adapter.conv_in.weight"), "T2I-Adapter"),
]


@pytest.mark.parametrize(("keys", "name"), TOLD)
def test_each_kind_is_told_by_its_keys(keys: tuple[str, ...], name: str):
    assert detect({key: torch.ones(1) for key in keys})[1].name == name


def test_each_format_has_a_case_here():
    assert {name for _, name in TOLD} == {form.name for kind in KINDS for form in kind.formats}


# -- what is no ControlNet of ours ------------------------------------------------------------------------------------

LORA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q."
FLUX = ("controlnet_blocks.0.weight", "controlnet_x_embedder.weight", "single_transformer_blocks.0.attn.to_q.weight")
STRANGERS: list[tuple[tuple[str, ...], str]] = [
    (
        ("controlnet_cond_embedding.weight", "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"),
        "a SparseCtrl",
    ),
    (("control_model.zero_convs.0.0.weight", "control_model.input_blocks.1.1.to_q.lora_layer.up.weight"), "a CtrLoRA"),
    (
        ("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.temporal_res_block.norm1.weight"),
        "a ControlNet for Stable Video Diffusion",
    ),
    (("controlnet_cond_embedding.conv_in.weight", "up_connections.0.ctrl_to_base.0.weight"), "a ControlNet-XS"),
    (("brushnet_down_blocks.0.weight", "conv_in_condition.weight"), "a BrushNet"),
    (("lllite_dit_blocks_0_self_attn_q_proj.down.0.weight",), "a ControlLLLite for a diffusion transformer"),
    (("after_proj_list.18.bias", "controlnet_blocks.0.weight"), "a HunyuanDiT ControlNet"),
    (("controlnet_blocks.0.weight", "transformer_blocks.0.img_mlp.net.0.proj.weight"), "a Qwen-Image ControlNet"),
    (("controlnet_blocks.0.weight", "pos_embed_input.proj.weight"), "an SD3 ControlNet"),
    (FLUX, "a Flux ControlNet"),
    (("controlnet_blocks.0.weight", "double_blocks.0.img_attn.norm.key_norm.scale"), "a Flux ControlNet"),
    (("controlnet_blocks.3.weight",), "a ControlNet of a diffusion transformer"),
    (("style_embedding", "ln_post.weight"), "a style T2I-Adapter"),
    (("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), "an IP-Adapter"),
    ((LORA + "lora_down.weight", LORA + "lora_up.weight", LORA + "alpha"), "a LoRA"),
    (("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",), "a LoRA"),
    (("lora_unet_mid_block_resnets_0_conv1.hada_w1_a",), "a LoRA"),
    (("lora_unet_mid_block_resnets_0_conv1.lokr_w2",), "a LoRA"),
    (("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight",), "a motion module"),
    (("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"), "a base model"),
    (("input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight"), "a UNet alone"),
    (("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "up_blocks.0.resnets.0.conv1.weight"), "a UNet alone"),
    (("double_blocks.0.img_attn.qkv.weight",), "a diffusion transformer"),
    (("first_stage_model.encoder.conv_in.weight",), "a VAE"),
    (("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"), "a VAE"),
    (("vision_model.encoder.layers.0.layer_norm1.weight",), "a CLIP vision encoder"),
    (("text_model.embeddings.token_embedding.weight",), "a text encoder"),
    (("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"), "a text encoder"),
    (("emb_params",), "a textual-inversion embedding"),
    (("model.1.sub.0.RDB1.conv1.0.weight",), "an upscaler"),
]


@pytest.mark.parametrize(("keys", "says"), STRANGERS)
def test_a_stranger_is_called_by_its_name(keys: tuple[str, ...], says: str):
    state = {key: torch.ones(1) for key in keys}
    with pytest.raises(UnknownFormat, match=f"^this is {says}\\b") as caught:
        detect(state)
    text = str(caught.value)
    assert "\n" not in text
    assert any(word in text for word in ("put it into", "load it with", "custom nodes")), (
        "it says where the file belongs"
    )


def test_the_unet_of_a_base_model_is_told_in_both_layouts():
    for state in (weights(TINY, UNet), to_diffusers(weights(TINY, UNet), TINY)):
        assert diagnose(state).startswith("this is a UNet alone")


def test_the_unknown_is_shown_by_its_first_keys():
    state = {f"layer{i}.weight": torch.ones(1) for i in range(7)}
    assert diagnose(state) == (
        "this is no ControlNet in the ldm or diffusers layout: expected a key like zero_convs.0.0.weight or "
        "controlnet_cond_embedding.conv_in.weight, found 7 tensors, the first of them layer0.weight, layer1.weight, "
        "layer2.weight: load a ControlNet for SD1.x, SD2.x or SDXL"
    )
    assert "found 0 tensors, the first of them none" in diagnose({})
