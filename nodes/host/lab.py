"""The embedded model as the host's own MODEL, CLIP and VAE objects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.ldm.models.autoencoder
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import torch

from ...lab.autoencoder import Autoencoder
from ...lab.models import UNET, load_weights, read_weights
from ...lab.text_encoder import CLIP_CONFIG, ROWS


class _Config(comfy.supported_models.SD15):
    # Heads of 64 channels; the host gives SD1.5 eight heads at every width.
    unet_extra_config = comfy.supported_models.SD20.unet_extra_config


def load_model() -> Any:
    """The UNet, a MODEL."""
    blocks, levels = UNET.num_res_blocks, len(UNET.channel_mult)
    config = _Config(
        {
            "image_size": 16,
            "in_channels": UNET.in_channels,
            "out_channels": UNET.out_channels,
            "model_channels": UNET.model_channels,
            "channel_mult": list(UNET.channel_mult),
            "num_res_blocks": [blocks] * levels,
            "transformer_depth": [d for d in UNET.transformer_depth for _ in range(blocks)],
            "transformer_depth_output": [d for d in UNET.transformer_depth for _ in range(blocks + 1)],
            "transformer_depth_middle": UNET.transformer_depth_middle,
            "context_dim": UNET.context_dim,
            "adm_in_channels": UNET.adm_in_channels,
            "use_linear_in_transformer": UNET.use_linear,
            "use_spatial_transformer": True,
            "use_temporal_attention": False,
            "use_temporal_resblock": False,
            "use_checkpoint": False,
            "legacy": False,
        }
    )
    management = comfy.model_management
    stored = management.unet_dtype(weight_dtype=torch.float16)
    config.set_inference_dtype(stored, management.unet_manual_cast(stored, management.get_torch_device()))
    weights = {f"model.diffusion_model.{key}": value for key, value in read_weights("unet").items()}
    model = config.get_model(weights, "model.diffusion_model.", device=management.unet_offload_device())
    model.load_model_weights(weights, "model.diffusion_model.")
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return kind(model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device())


def _text_model(device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> Any:
    return comfy.sd1_clip.SDClipModel(
        device=device,
        dtype=dtype,
        textmodel_json_config=dict(CLIP_CONFIG),
        return_projected_pooled=False,
        model_options=model_options or {},
    )


def load_clip() -> Any:
    """The text encoder behind the host's SD1 tokenizer, a CLIP; words that the lab does not know mean nothing."""
    target = SimpleNamespace(
        params={"clip_model": _text_model}, clip=comfy.sd1_clip.SD1ClipModel, tokenizer=comfy.sd1_clip.SD1Tokenizer
    )
    clip = comfy.sd.CLIP(target)
    weights = {key: value.float() for key, value in read_weights("text_encoder").items()}
    rows = weights.pop("text_model.embeddings.token_embedding.weight")
    table = torch.zeros(CLIP_CONFIG["vocab_size"], rows.shape[1])
    table[list(ROWS)] = rows
    weights["text_model.embeddings.token_embedding.weight"] = table
    weights["text_projection.weight"] = torch.eye(rows.shape[1])
    clip.load_sd(weights)
    return clip


def load_vae() -> Any:
    """The autoencoder, a VAE.

    The host builds a VAE around the networks that it knows; ours takes the place of the smallest of them on an object
    of its own.
    """
    ddconfig = {
        "double_z": True, "z_channels": 4, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1],
        "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    params = {"ddconfig": ddconfig, "embed_dim": 4}
    placeholder = comfy.ldm.models.autoencoder.AutoencoderKL(**params).state_dict()
    vae = comfy.sd.VAE(sd=placeholder, config={"params": params})
    vae.first_stage_model = load_weights(Autoencoder(), "autoencoder").to(vae.vae_dtype)  # type: ignore[assignment]
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model,
        load_device=vae.device,
        offload_device=comfy.model_management.vae_offload_device(),
    )
    return vae
