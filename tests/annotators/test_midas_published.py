"""MiDaS by transformers is the published preprocessor: the same random weights in both layouts, oblong pictures too."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from skimage.data import astronaut
from torch import Tensor
from transformers import DPTConfig, DPTForDepthEstimation

from zeroconv.annotators import depth
from zeroconv.annotators.networks import depth as seers
from zeroconv.annotators.normals import normal_midas

NAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^pretrained\.model\.", "dpt.embeddings."),
    (r"pos_embed$", "position_embeddings"),
    (r"patch_embed\.backbone\.stem\.conv", "backbone.bit.embedder.convolution"),
    (r"patch_embed\.backbone\.stem\.norm", "backbone.bit.embedder.norm"),
    (r"patch_embed\.backbone\.stages\.(\d)\.blocks", r"backbone.bit.encoder.stages.\1.layers"),
    (r"patch_embed\.proj", "projection"),
    (r"^dpt\.embeddings\.norm", "dpt.layernorm"),
    (r"^dpt\.embeddings\.blocks\.(\d+)", r"dpt.encoder.layer.\1"),
    (r"attn\.proj", "attention.output.dense"),
    (r"(encoder\.layer\.\d+)\.norm1", r"\1.layernorm_before"),
    (r"(encoder\.layer\.\d+)\.norm2", r"\1.layernorm_after"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
    (
        r"^pretrained\.act_postprocess(\d)\.0\.project",
        lambda m: f"neck.reassemble_stage.readout_projects.{int(m[1]) - 1}",
    ),
    (r"^pretrained\.act_postprocess(\d)\.3", lambda m: f"neck.reassemble_stage.layers.{int(m[1]) - 1}.projection"),
    (r"^pretrained\.act_postprocess(\d)\.4", lambda m: f"neck.reassemble_stage.layers.{int(m[1]) - 1}.resize"),
    (r"^scratch\.layer(\d)_rn", lambda m: f"neck.convs.{int(m[1]) - 1}"),
    (r"^scratch\.refinenet(\d)", lambda m: f"neck.fusion_stage.layers.{4 - int(m[1])}"),
    (r"resConfUnit(\d)\.conv(\d)", r"residual_layer\1.convolution\2"),
    (r"out_conv", "projection"),
    (r"^scratch\.output_conv", "head.head"),
)
"""From the keys of isl-org/MiDaS to those of transformers."""


def translated(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """MiDaS's weights under the names of transformers; the head that tells ImageNet's classes is left out."""
    made = {}
    for key, weight in weights.items():
        name = key
        for pattern, to in NAMES:
            name = re.sub(pattern, to, name)
        if ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), weight.chunk(3), strict=True):
                made[name.replace("attn.qkv", f"attention.attention.{part}")] = third
        elif not key.startswith("pretrained.model.head."):
            made[name] = weight
    return made


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """MiDaS's own network as controlnet-aux has it, and transformers' of the same weights."""
    from controlnet_aux.midas.midas.dpt_depth import DPTDepthModel

    torch.manual_seed(0)
    published: Any = DPTDepthModel(path=None, backbone="vitb_rn50_384", non_negative=True).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in published.named_parameters():
            if name.endswith("pos_embed"):
                weight.normal_(0, 0.5, generator=generator)
            elif weight.ndim > 1 and "backbone" not in name:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
        published.scratch.output_conv[4].bias.fill_(3)  # the last ReLU would cut most of the picture off
    config = DPTConfig(
        is_hybrid=True,
        neck_hidden_sizes=[256, 512, 768, 768],
        reassemble_factors=[1, 1, 1, 0.5],
        readout_type="project",
    )
    ours = DPTForDepthEstimation(config).eval()
    ours.load_state_dict(translated(published.state_dict()))
    return published.requires_grad_(False), ours.requires_grad_(False)


@pytest.mark.parametrize("size", [(384, 384), (128, 320), (256, 64)])
def test_raw_depth_is_the_published_network_s(pair: tuple[Any, Any], size: tuple[int, int]):
    published, ours = pair
    image = (astronaut()[: size[0], : size[1]] / 255).astype(np.float32)
    reference = published(torch.from_numpy(image).permute(2, 0, 1)[None] * 2 - 1)[0].numpy()
    assert np.ptp(reference) > 0.5 * reference.max() > 0
    np.testing.assert_allclose(seers.midas(ours, image), reference, rtol=0, atol=1e-4 * reference.max())


def test_hints_are_the_published_preprocessor_s(pair: tuple[Any, Any]):
    """Depth and normals, in the same colours; the published ones are cut to whole grey levels."""
    from controlnet_aux.midas import MidasDetector

    published, ours = pair
    picture = np.ascontiguousarray(astronaut()[:128, :320])
    image = (picture / 255).astype(np.float32)
    theirs: Any = MidasDetector(published)(
        picture, bg_th=0.2, a=0.5, depth_and_normal=True, detect_resolution=128, image_resolution=128
    )
    (hint,) = depth.stretched_hints([depth.depth_midas(ours, image)])
    for made, reference in zip((hint, normal_midas(ours, image, 0.2, 0.5)), theirs):
        assert reference.std() > 0.05 * 255 and made.shape == reference.shape
        assert -0.05 < (made * 255 - reference).min() and (made * 255 - reference).max() < 1.05
