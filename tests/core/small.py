"""Small random networks of the three published layouts, and tensors to run them on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zeroconv.controlnet_core.networks.controlnet import ControlNet
from zeroconv.controlnet_core.networks.residuals import Residuals
from zeroconv.controlnet_core.networks.unet import SD15, SD21, SDXL, UNet, UNetConfig

FULL = {"SD1.x": SD15, "SD2.x": SD21, "SDXL": SDXL}
SMALL = {
    "SD1.x": UNetConfig(model_channels=32, context_dim=24),
    "SD2.x": UNetConfig(model_channels=64, channel_mult=(1, 2, 2, 2), context_dim=24, num_heads=0, use_linear=True),
    "SDXL": UNetConfig(
        model_channels=64,
        channel_mult=(1, 2, 4),
        transformer_depth=(0, 1, 3),
        transformer_depth_middle=3,
        context_dim=40,
        num_heads=0,
        use_linear=True,
        adm_in_channels=60,
    ),
}
TINY = UNetConfig(model_channels=64, channel_mult=(1, 1, 2), transformer_depth=(1, 1, 0), context_dim=8, num_heads=4)
"""For what does not depend on the layout: three levels, 9 skip connections of 64 and 128 channels."""

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Inputs:
    """What the networks are called with: two pictures, at a late and at an early timestep."""

    x: Tensor
    timesteps: Tensor
    context: Tensor
    hint: Tensor
    y: Tensor | None

    def to(self, device: str | torch.device, dtype: torch.dtype) -> Inputs:
        """The same numbers elsewhere; timesteps stay whole numbers."""
        y = None if self.y is None else self.y.to(device, dtype)
        return Inputs(
            self.x.to(device, dtype),
            self.timesteps.to(device),
            self.context.to(device, dtype),
            self.hint.to(device, dtype),
            y,
        )

    def predict(self, unet: UNet, residuals: Residuals | None = None) -> Tensor:
        """The UNet's prediction."""
        return unet(self.x, self.timesteps, self.context, self.y, residuals)

    def control(self, control: ControlNet) -> Residuals:
        """The ControlNet's residuals."""
        return control(self.x, self.timesteps, self.context, control.encode_hint(self.hint), self.y)


def inputs(config: UNetConfig, height: int = 16, width: int = 16) -> Inputs:
    """Seeded inputs for a latent of `height` x `width`."""
    random = torch.Generator().manual_seed(7)
    return Inputs(
        x=torch.randn(2, config.in_channels, height, width, generator=random),
        timesteps=torch.tensor([871, 30]),
        context=torch.randn(2, 5, config.context_dim, generator=random),
        hint=torch.rand(2, 3, 8 * height, 8 * width, generator=random),
        y=None if config.adm_in_channels is None else torch.randn(2, config.adm_in_channels, generator=random),
    )


def seeded(build: type[Module], config: UNetConfig, **settings: object) -> Module:
    """A network with the same fresh weights in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return build(config, **settings)


def randomise_zeros(module: Module) -> Module:
    """`module` with every weight that starts at zero made random, as if it had been trained."""
    random = torch.Generator().manual_seed(11)
    for parameter in module.parameters():
        if not parameter.any():
            parameter.data = torch.randn(parameter.shape, generator=random).mul_(0.05).to(parameter)
    return module


def relative_change(before: Tensor, after: Tensor) -> float:
    """How far `after` has moved, as a fraction of `before`'s own length."""
    return ((after - before).float().norm() / before.float().norm()).item()


def assert_within(actual: Tensor, expected: Tensor, fraction: float) -> None:
    """No number of `actual` is further from `expected` than `fraction` of the largest one there."""
    assert actual.shape == expected.shape
    error = (actual.double().cpu() - expected.double().cpu()).abs().max()
    largest = expected.abs().max().double().cpu()
    assert largest > 0
    assert error <= fraction * largest, f"off by {error:.3g} where the largest value is {largest:.3g}"


def tensors(residuals: Residuals) -> list[Tensor]:
    """All residuals, none of which may be missing."""
    assert all(residual is not None for residual in residuals)
    return [residual for residual in residuals if residual is not None]


def small_vae() -> Any:
    """diffusers' AutoencoderKL of SD's four levels, 8 channels wide, whose latents are halved."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    blocks: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [8] * 4,
    }
    return AutoencoderKL(**blocks, norm_num_groups=4, scaling_factor=0.5)
