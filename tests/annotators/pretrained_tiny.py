"""Tiny networks of `transformers` with seeded random weights, written as their published repositories hold them."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BeitConfig,
    BitConfig,
    CLIPTextConfig,
    CLIPTextModel,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    PreTrainedModel,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    Sam2VideoConfig,
    Sam2VideoModel,
    SwinConfig,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
    ZoeDepthConfig,
    ZoeDepthForDepthEstimation,
)

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def randomise(network: PreTrainedModel) -> PreTrainedModel:
    """The network with weights large enough for the picture to show in what it answers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.6 / weight[0].numel() ** 0.5, generator=generator)
            else:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return network


def save(network: PreTrainedModel, folder: Path) -> tuple[Path, Path]:
    """The paths of its config.json and model.safetensors."""
    network.save_pretrained(folder)
    return files(folder)


def files(folder: Path) -> tuple[Path, Path]:
    """The paths of config.json and model.safetensors."""
    return folder / "config.json", folder / "model.safetensors"


def dpt(folder: Path, hybrid: bool) -> tuple[Path, Path]:
    """Intel/dpt-large without its size; with `hybrid`, Intel/dpt-hybrid-midas, which begins with convolutions."""
    backbone = BitConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32],
        depths=[1, 1, 1],
        num_groups=4,
        layer_type="bottleneck",
        global_padding="SAME",
        embedding_dynamic_padding=True,
        out_features=STAGES[:3],
    )
    torch.manual_seed(0)
    network: Any = DPTForDepthEstimation(
        DPTConfig(
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=64,
            patch_size=16,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 16, 32, 32] if hybrid else [8, 16, 24, 32],
            fusion_hidden_size=16,
            is_hybrid=hybrid,
            backbone_config=backbone.to_dict() if hybrid else None,
            backbone_featmap_shape=[1, 32, 4, 4] if hybrid else None,
            neck_ignore_stages=[0, 1] if hybrid else [],
            reassemble_factors=[1, 1, 1, 0.5] if hybrid else [4, 2, 1, 0.5],
            readout_type="project",
        )
    )
    randomise(network)
    with torch.no_grad():
        network.head.head[4].bias.fill_(2000)  # MiDaS has no depth below 0: keep most of the picture above
    return save(network, folder)


def depth_anything(folder: Path) -> tuple[Path, Path]:
    """depth-anything/Depth-Anything-V2-Small-hf without its size."""
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=518,
        patch_size=14,
        out_features=STAGES,
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    network = DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone.to_dict(),
            patch_size=14,
            reassemble_hidden_size=16,
            neck_hidden_sizes=[4, 8, 8, 16],
            fusion_hidden_size=8,
            head_hidden_size=8,
        )
    )
    return save(randomise(network), folder)


def zoe(folder: Path) -> tuple[Path, Path]:
    """Intel/zoedepth-nyu-kitti without its size: two domains, indoor and outdoor."""
    torch.manual_seed(0)
    backbone = BeitConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=384,
        use_relative_position_bias=True,
        out_features=STAGES,
        reshape_hidden_states=False,
    )
    network = ZoeDepthForDepthEstimation(
        ZoeDepthConfig(
            backbone_config=backbone.to_dict(),
            neck_hidden_sizes=[4, 8, 8, 16],
            fusion_hidden_size=8,
            bottleneck_features=8,
            num_relative_features=8,
            bin_embedding_dim=8,
            patch_transformer_hidden_size=128,
            patch_transformer_intermediate_size=16,
            num_patch_transformer_layers=4,
            patch_transformer_num_attention_heads=4,
            bin_configurations=[
                {"name": "nyu", "n_bins": 8, "min_depth": 1e-3, "max_depth": 10.0},
                {"name": "kitti", "n_bins": 8, "min_depth": 1e-3, "max_depth": 80.0},
            ],
            num_attractors=[4, 2, 2, 1],
        )
    )
    return save(randomise(network), folder)


def oneformer(folder: Path, classes: int) -> tuple[Path, Path]:
    """shi-labs/oneformer_*_swin_large without its size, with pytorch_model.bin as it has it."""
    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4, image_size=64, out_features=STAGES
    )
    network = OneFormerForUniversalSegmentation(
        OneFormerConfig(
            backbone_config=backbone.to_dict(),
            num_labels=classes,
            num_queries=12,
            conv_dim=32,
            mask_dim=32,
            hidden_dim=32,
            num_attention_heads=2,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
            encoder_layers=2,
            decoder_layers=2,
            query_dec_layers=1,
            text_encoder_width=16,
            text_encoder_num_layers=1,
        )
    )
    randomise(network)
    with torch.no_grad():
        # So that queries differ, and each is sure of its class: else all pixels have one.
        network.model.transformer_module.queries_embedder.weight.mul_(20)
        network.model.transformer_module.decoder.class_embed.weight.mul_(10)
    config, weights = save(network, folder)
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    weights.unlink()
    return config, folder / "pytorch_model.bin"


def person_detector(folder: Path) -> tuple[Path, Path]:
    """PekingU/rtdetr_r50vd_coco_o365 without its size, which takes most things for people."""
    torch.manual_seed(0)
    labels = {0: "person", 1: "bicycle", 2: "car"}
    network: Any = RTDetrForObjectDetection(
        RTDetrConfig(
            backbone_config=RTDetrResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 8, 16, 16],
                depths=[1, 1, 1, 1],
                layer_type="basic",
                out_indices=[2, 3, 4],
            ),
            encoder_in_channels=[8, 16, 16],
            encoder_hidden_dim=16,
            encoder_ffn_dim=16,
            encoder_attention_heads=2,
            d_model=16,
            num_queries=12,
            decoder_in_channels=[16, 16, 16],
            decoder_ffn_dim=16,
            decoder_layers=2,
            decoder_attention_heads=2,
            num_denoising=4,
            id2label=labels,
            label2id={name: number for number, name in labels.items()},
        )
    )
    with torch.no_grad():
        _spread(network)
        network.model.decoder.class_embed[-1].bias[0] = 4.0
    return save(network, folder)


def pose_estimator(folder: Path) -> tuple[Path, Path]:
    """usyd-community/vitpose-base-simple without its size."""
    torch.manual_seed(0)
    network = VitPoseForPoseEstimation(
        VitPoseConfig(
            backbone_config=VitPoseBackboneConfig(
                image_size=[64, 48], hidden_size=32, num_hidden_layers=2, num_attention_heads=2, out_indices=[2]
            ),
            num_labels=17,
        )
    )
    with torch.no_grad():
        _spread(network)
    return save(network, folder)


def _spread(network: PreTrainedModel) -> None:
    """Fresh weights are so small, or zero, that every query is the same: these make answers that the picture moves."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)


def sam2(folder: Path) -> tuple[Path, Path]:
    """facebook/sam2.1-hiera-tiny without its size: published as the network for videos, whose memory pictures leave."""
    torch.manual_seed(0)
    side, width = 128, 16
    backbone = {
        "hidden_size": 8,
        "image_size": [side, side],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 2, 2],
        "window_size_per_stage": [4, 2, 4, 2],
        "global_attention_blocks": [3],
        "window_positional_embedding_background_size": [4, 4],
    }
    network: Any = Sam2VideoModel(
        Sam2VideoConfig(
            vision_config={
                "backbone_config": backbone,
                "backbone_channel_list": [64, 32, 16, 8],
                "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
                "fpn_hidden_size": width,
            },
            prompt_encoder_config={"hidden_size": width, "image_size": side, "mask_input_channels": 4},
            mask_decoder_config={
                "hidden_size": width,
                "mlp_dim": width,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": width,
            },
            memory_attention_hidden_size=width,
            memory_attention_num_layers=1,
            memory_attention_feed_forward_hidden_size=width,
            memory_encoder_hidden_size=width,
            memory_encoder_output_channels=4,
            memory_fuser_num_layers=1,
            memory_fuser_embed_dim=width,
            memory_fuser_intermediate_dim=width,
        )
    )
    randomise(network)
    with torch.no_grad():
        # So that masks have clear borders, and the network is sure of most of them.
        for part in network.mask_decoder.output_hypernetworks_mlps:
            part.proj_out.weight.mul_(200)
            part.proj_out.bias.mul_(200)
        network.mask_decoder.iou_prediction_head.proj_out.bias.add_(3)
        network.mask_decoder.conv_s0.bias.add_(3)
    return save(network, folder)


def marigold(folder: Path) -> list[Path]:
    """prs-eth/marigold-normals-v1-1 with few and narrow blocks, in the order in which it is built of its files."""
    diffusers: Any = import_module("diffusers")
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    unet = diffusers.UNet2DConditionModel(
        in_channels=8,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        use_linear_projection=True,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        latent_channels=4,
    )
    randomise(text).half().save_pretrained(folder / "text_encoder", variant="fp16")
    for part, name in ((unet, "unet"), (vae, "vae")):
        part.half().save_pretrained(folder / name, variant="fp16")
    diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
        set_alpha_to_one=False,
    ).save_pretrained(folder / "scheduler")
    said = {"prediction_type": "normals", "use_full_z_range": True, "default_denoising_steps": 2}
    said["default_processing_resolution"] = 64
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "MarigoldNormalsPipeline", **said}))
    names = ("text_encoder/model", "vae/diffusion_pytorch_model", "unet/diffusion_pytorch_model")
    parts = [(f"{name.split('/')[0]}/config.json", f"{name}.fp16.safetensors") for name in names]
    return [folder / path for path in ("model_index.json", "scheduler/scheduler_config.json", *sum(parts, ()))]
