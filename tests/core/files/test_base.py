"""A base is read from a checkpoint or a folder in diffusers' layout, and what it was trained for from its marks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from zeroconv.controlnet_core.diffusion import alphas_cumprod, zero_terminal_snr
from zeroconv.controlnet_core.files.base import read_base
from zeroconv.controlnet_core.files.loading import LoadError
from zeroconv.controlnet_core.networks.unet import UNet, UNetConfig

CONFIG = UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(1, 0), context_dim=8)


def checkpoint(path: Path, **marks: Tensor) -> Path:
    torch.manual_seed(0)
    weights = {f"model.diffusion_model.{key}": tensor for key, tensor in UNet(CONFIG).state_dict().items()}
    save_file({**weights, **marks}, path, metadata={"num_heads": "8"})
    return path


def folder(path: Path, **scheduler: Any) -> Path:
    """A UNet of CONFIG and a scheduler, as diffusers saves them."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    torch.manual_seed(0)
    layout: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 8,
    }
    unet = UNet2DConditionModel(**layout)
    unet.save_pretrained(path / "unet")
    usual = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    DDIMScheduler(**{**usual, **scheduler}).save_pretrained(path / "scheduler")
    return path


def test_zero_terminal_snr_is_diffusers_own():
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = (1 - rescale_zero_terminal_snr(betas)).cumprod(0)
    found = zero_terminal_snr(alphas_cumprod())
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-7)
    assert found[-1] == 0 and found[0] == pytest.approx(alphas_cumprod()[0].item(), rel=1e-6)
    torch.testing.assert_close(zero_terminal_snr(torch.tensor([0.81, 0.25, 0.01])), torch.tensor([0.81, 0.2025, 0.0]),
                               rtol=1e-4, atol=1e-7)  # fmt: skip


def test_the_marks_of_a_checkpoint_say_what_it_predicts(tmp_path: Path):
    plain = read_base(checkpoint(tmp_path / "plain.safetensors"))
    assert (plain.prediction, plain.why) == ("eps", "no key says otherwise")
    assert torch.equal(plain.alphas, alphas_cumprod())
    marked = read_base(checkpoint(tmp_path / "v.safetensors", v_pred=torch.zeros(1)))
    assert marked.prediction == "v" and "v_pred" in marked.why
    assert torch.equal(marked.alphas, alphas_cumprod())
    zero = read_base(checkpoint(tmp_path / "z.safetensors", v_pred=torch.zeros(1), ztsnr=torch.zeros(1)))
    assert zero.prediction == "v" and "ztsnr" in zero.why
    assert torch.equal(zero.alphas, zero_terminal_snr(alphas_cumprod()))
    with pytest.raises(LoadError, match=r"edm.safetensors is trained with EDM's noise: train on a model with SD's"):
        read_base(checkpoint(tmp_path / "edm.safetensors", edm_mean=torch.zeros(1)))


@torch.no_grad()
def test_a_folder_of_diffusers_is_a_base(tmp_path: Path):
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    found = read_base(folder(tmp_path))
    assert (found.prediction, found.why) == ("eps", "prediction_type of scheduler_config.json")
    torch.testing.assert_close(found.alphas, alphas_cumprod())
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 8)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    torch.testing.assert_close(found.unet(x, t, context), theirs(x, t, context).sample, rtol=1e-4, atol=1e-5)


def test_the_scheduler_of_a_folder_says_what_it_predicts(tmp_path: Path):
    found = read_base(folder(tmp_path, prediction_type="v_prediction", rescale_betas_zero_snr=True))
    assert found.prediction == "v" and found.why.endswith("zero terminal SNR")
    assert torch.equal(found.alphas, zero_terminal_snr(alphas_cumprod()))
    for wrong in ({"prediction_type": "sample"}, {"beta_schedule": "linear"}):
        with pytest.raises(LoadError, match="expected epsilon or v_prediction, and scaled_linear"):
            read_base(folder(tmp_path, **wrong))


def test_a_folder_without_a_unet_is_told(tmp_path: Path):
    with pytest.raises(LoadError, match=r"holds no UNet: expected unet/diffusion_pytorch_model.safetensors"):
        read_base(tmp_path)
    (tmp_path / "scheduler").mkdir()
    folder(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(LoadError, match=r"scheduler_config.json cannot be read .*: download the model again"):
        read_base(tmp_path)
