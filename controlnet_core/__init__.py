"""ControlNet (Zhang, Rao, Agrawala; ICCV 2023; arXiv:2302.05543) in torch alone, for any ldm-layout SD UNet.

The names below are what a program needs that controls, samples or trains with it; all else is in the rooms that they
come from. From the folder of this pack, with a UNet small enough to try:

    >>> import torch
    >>> from controlnet_core import Clock, ControlNet, Strength, UNet, UNetConfig, Window, copy_encoder
    >>> _ = torch.manual_seed(0), torch.set_grad_enabled(False)
    >>> config = UNetConfig(model_channels=32, context_dim=8)
    >>> unet, control = UNet(config), ControlNet(config)
    >>> copy_encoder(control, unet.state_dict())

A new ControlNet is a copy of the UNet's encoder between convolutions that are zero: it changes nothing.

    >>> latent, timestep, text = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 77, 8)
    >>> guided_hint = control.encode_hint(torch.rand(1, 3, 128, 128))  # once a picture, not once a step
    >>> plain = unet(latent, timestep, text)
    >>> residuals = control(latent, timestep, text, guided_hint)
    >>> len(residuals.skips), tuple(residuals.middle.shape)
    (12, (1, 128, 2, 2))
    >>> torch.equal(unet(latent, timestep, text, residuals=residuals), plain)
    True

Training moves these convolutions off zero; here chance does. A Strength says how much of the residuals is added and
when: of three steps of sampling, half of them in the first two.

    >>> for convolution in control.connections():
    ...     _ = convolution.weight.normal_(std=0.05)
    >>> residuals = control(latent, timestep, text, control.encode_hint(torch.rand(1, 3, 128, 128)))
    >>> strength = Strength(0.5, Window(0, 2, unit="step"))
    >>> clock = Clock(lambda percent: 14.6 * (1 - percent), sigmas=[14.6, 7.0, 3.0, 0.0])
    >>> values = [strength.at(clock.at(sigma)) for sigma in (14.6, 7.0, 3.0)]
    >>> values
    [0.5, 0.5, 0.0]
    >>> dosed = [strength.scales(value, len(residuals.skips), 16).apply(residuals) for value in values]
    >>> [torch.equal(unet(latent, timestep, text, residuals=each), plain) for each in dosed]
    [False, False, True]

Real weights: `load_unet(*read_weights(path))` and `load_control(*read_weights(path)).control`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.dataset import Dataset
    from .diffusion import alphas_cumprod, guide, sample_ddim
    from .dosing.block_weights import BlockWeights
    from .dosing.clock import Clock
    from .dosing.schedule import Schedule
    from .dosing.strength import Strength
    from .dosing.window import Window
    from .files.loading import load_control, load_unet, read_weights
    from .networks.controlnet import ControlNet, copy_encoder
    from .networks.residuals import Residuals
    from .networks.unet import UNet, UNetConfig
    from .training.loop import train
    from .training.options import TrainingOptions

__all__ = [
    "BlockWeights",
    "Clock",
    "ControlNet",
    "Dataset",
    "Residuals",
    "Schedule",
    "Strength",
    "TrainingOptions",
    "UNet",
    "UNetConfig",
    "Window",
    "alphas_cumprod",
    "copy_encoder",
    "guide",
    "load_control",
    "load_unet",
    "read_weights",
    "sample_ddim",
    "train",
]

_NAMES = {
    "data.dataset": ("Dataset",),
    "diffusion": ("alphas_cumprod", "guide", "sample_ddim"),
    "dosing.block_weights": ("BlockWeights",),
    "dosing.clock": ("Clock",),
    "dosing.schedule": ("Schedule",),
    "dosing.strength": ("Strength",),
    "dosing.window": ("Window",),
    "files.loading": ("load_control", "load_unet", "read_weights"),
    "networks.controlnet": ("ControlNet", "copy_encoder"),
    "networks.residuals": ("Residuals",),
    "networks.unet": ("UNet", "UNetConfig"),
    "training.loop": ("train",),
    "training.options": ("TrainingOptions",),
}
"""Where each of these is: a host that only lists its nodes shall not wait for the training, nor for what it loads."""


def __getattr__(name: str) -> Any:
    for file, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f".{file}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
