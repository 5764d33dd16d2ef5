"""Surface normals by diffusion, by Marigold: Ke et al., "Marigold: Affordable Adaptation of Diffusion-Based Image
Generators for Image Analysis" (prs-eth/Marigold); the network and its sampling are diffusers'."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ..images import AnnotatorError, to_picture
from . import learned, pretrained

NO_WORDS = (49406, 49407)
"""CLIP's tokens of an empty prompt: the first and the last."""
SETTINGS = ("prediction_type", "use_full_z_range", "default_denoising_steps", "default_processing_resolution")
OLDER_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Parts of the names of weights that a VAE of diffusers before 0.17 has."""


class Marigold(nn.Module):
    """The UNet that diffuses normals, the autoencoder of pictures and normals, and what no words are to the UNet."""

    no_words: Tensor

    def __init__(self, unet: nn.Module, vae: nn.Module, scheduler: Any, no_words: Tensor, settings: dict[str, Any]):
        super().__init__()
        self.unet, self.vae, self.scheduler, self.settings = unet, vae, scheduler, settings
        self.register_buffer("no_words", no_words)

    def forward(self, image: Tensor, seed: int) -> np.ndarray:
        """Normals (B,H,W,3) of length 1, x to the right, y up, z to the viewer, of pictures (B,3,H,W), 0..1.

        Each begins with the same noise.
        """
        diffusers: Any = import_module("diffusers")
        parts = {"unet": self.unet, "vae": self.vae, "scheduler": self.scheduler}
        pipeline = diffusers.MarigoldNormalsPipeline(**parts, text_encoder=None, tokenizer=None, **self.settings)
        pipeline.empty_text_embedding = self.no_words
        pipeline.set_progress_bar_config(disable=True)
        noise = [torch.Generator().manual_seed(seed) for _ in image]
        return pipeline(image, generator=noise).prediction


def build(
    index: Path,
    scheduler: Path,
    text_settings: Path,
    text: Path,
    vae_settings: Path,
    vae: Path,
    unet_settings: Path,
    unet: Path,
) -> nn.Module:
    """Marigold of the files of prs-eth/marigold-normals-v1-1: eval, fp32, CPU. Raises AnnotatorError for others."""
    from transformers import CLIPTextConfig, CLIPTextModel

    diffusers: Any = import_module("diffusers")
    said = _read(index)
    if said.get("prediction_type") != "normals":
        raise AnnotatorError(f"{index} describes no Marigold with normals: delete it, so that it is fetched again")
    encoder = pretrained.build(CLIPTextModel, CLIPTextConfig, text_settings, text)
    with torch.no_grad():
        no_words = encoder(torch.tensor([NO_WORDS])).last_hidden_state
    return Marigold(
        learned.build(lambda: diffusers.UNet2DConditionModel.from_config(_read(unet_settings)), unet),
        learned.build(lambda: diffusers.AutoencoderKL.from_config(_read(vae_settings)), vae, OLDER_NAMES),
        diffusers.DDIMScheduler.from_config(_read(scheduler)),
        no_words,
        {name: said[name] for name in SETTINGS if name in said},
    ).eval()


def normals(network: Marigold, image: np.ndarray, seed: int) -> np.ndarray:
    """Normals (B,H,W,3) float32 of length 1 of pictures (B,H,W,3), or of one: x to the right, y up, z to the viewer.

    Raises AnnotatorError for a picture too thin to be looked at, and for an answer that is not finite.
    """
    height, width = image.shape[-3:-1]
    looked_at = network.settings["default_processing_resolution"]
    if min(height, width) * looked_at < max(height, width):
        raise AnnotatorError(
            f"image is {width}x{height}, too thin for a network that looks at {looked_at} pixels: crop it"
        )
    pictures = np.stack([to_picture(one) for one in (image if image.ndim == 4 else [image])])
    found = network(rearrange(torch.from_numpy(pictures), "b h w c -> b c h w"), seed)
    if not np.isfinite(found).all():
        raise AnnotatorError("the network answered with numbers that are not finite: run it in fp32, or fetch it again")
    return found.astype(np.float32).reshape(image.shape)


def _read(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AnnotatorError(f"{path} cannot be read as settings: delete it, so that it is fetched again") from error
    if not isinstance(said, dict):
        raise AnnotatorError(f"{path} holds no settings: delete it, so that it is fetched again")
    return said
