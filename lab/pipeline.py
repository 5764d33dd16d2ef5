"""The embedded model without a host: prompts, noise and hints in, pictures out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..controlnet_core.diffusion import alphas_cumprod, guide, sample_ddim
from ..controlnet_core.dosing.piece import parts
from ..controlnet_core.dosing.strength import Guidance, Strength
from ..controlnet_core.errors import ZeroConvError
from ..controlnet_core.networks.controlnet import ControlNet
from ..controlnet_core.networks.lite import ControlNetLite
from ..controlnet_core.networks.residuals import Residuals
from ..controlnet_core.networks.unet import UNet
from .autoencoder import LATENT_SCALE, Autoencoder
from .dataset import HINTS
from .models import SIZE, UNET, control_name, device, load_weights
from .text_encoder import TextEncoder
from .vocabulary import tokenize

STEPS, GUIDANCE_SCALE = 20, 3.0
"""Sampling steps and guidance scale that the lab is judged with."""


class PipelineError(ZeroConvError):
    """Something to sample from that does not fit together."""


@dataclass(frozen=True)
class LabModel:
    """The embedded model's parts, all on one device; `controls` by the name of their hint."""

    autoencoder: Autoencoder
    text_encoder: TextEncoder
    unet: UNet
    controls: Mapping[str, ControlNet | ControlNetLite]

    @classmethod
    def load(cls, controls: Iterable[str] = HINTS, place: torch.device | None = None) -> LabModel:
        """The model of `lab/weights/` in fp32 with the named controls, on `place` (None: CUDA where there is one).

        Raises MissingWeights for a file that is not there.
        """
        place = place or device()
        return cls(
            load_weights(Autoencoder(), "autoencoder").to(place),
            load_weights(TextEncoder(), "text_encoder").to(place),
            load_weights(UNet(UNET), "unet").to(place),
            {name: load_weights(ControlNet(UNET), control_name(name)).to(place) for name in controls},
        )

    @property
    def place(self) -> torch.device:
        """The device that the model is on."""
        return next(self.unet.parameters()).device

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Context (B,77,64) of prompts. Raises UnknownWord for a word that the lab does not know."""
        return self.text_encoder(torch.tensor([tokenize(prompt) for prompt in prompts], device=self.place))

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Latents (B,4,H/8,W/8) as the UNet sees them of pictures (B,3,H,W) in [0,1]."""
        return self.autoencoder.encode(pictures.to(self.place) * 2 - 1) * LATENT_SCALE

    def reconstruct(self, pictures: Tensor) -> Tensor:
        """Pictures (B,3,H,W) in [0,1] through the autoencoder and back: the best that sampling can give."""
        return self.decode(self.encode_pictures(pictures))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B,3,8H,8W) in [0,1] of latents (B,4,H,W) as the UNet sees them."""
        return (self.autoencoder.decode(latents / LATENT_SCALE) * 0.5 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        noise: Tensor,
        hints: Mapping[str, Tensor] | None = None,
        steps: int = STEPS,
        guidance_scale: float = GUIDANCE_SCALE,
        strength: float = 1.0,
        guidance: Guidance = "both",
    ) -> Tensor:
        """Pictures (B,3,8H,8W) in [0,1] for B prompts by DDIM from `noise` (B,4,H,W).

        `hints` are (B,3,8H,8W) in [0,1] by the name of their control; several controls add (paper, section 3.4), each
        on the halves of guidance that `guidance` says (`strength.Strength`). A hint is encoded once; at strength 0 no
        control runs. Raises PipelineError for a control that is not loaded and for sizes that do not fit together.
        """
        noise = noise.to(self.place)
        hints = hints or {}
        self._check(prompts, noise, hints)
        guided = guidance_scale != 1
        context = self.encode([*prompts, *[""] * len(prompts)] if guided else prompts)
        halves = 2 if guided else 1  # the conditional one comes first
        piece = parts(len(noise) * halves, halves, (0,) if guidance != "both" else tuple(range(halves)))
        skips = len(self.unet.config.skip_channels)
        scales = Strength(strength, guidance=guidance).scales(strength, skips, noise.shape[2])
        guided_hints = {
            name: piece.of_frames(self.controls[name].encode_hint(hint.to(self.place)))
            for name, hint in hints.items()
            if strength != 0
        }

        def predict(x: Tensor, timesteps: Tensor) -> Tensor:
            x, timesteps = x.repeat(halves, 1, 1, 1), timesteps.repeat(halves)
            acted = [piece.take(tensor) for tensor in (x, timesteps, context)]
            residuals: Residuals | None = None
            for name, guided_hint in guided_hints.items():
                control = scales.apply(self.controls[name](*acted, guided_hint))
                control = control.mapped(lambda _, residual: piece.scatter(residual))
                residuals = control if residuals is None else residuals + control
            predicted = self.unet(x, timesteps, context, residuals=residuals)
            if not guided:
                return predicted
            cond, uncond = predicted.chunk(2)
            return guide(cond, uncond, guidance_scale)

        latents = sample_ddim(predict, noise, alphas_cumprod(), steps)
        return self.decode(latents)

    def _check(self, prompts: Sequence[str], noise: Tensor, hints: Mapping[str, Tensor]) -> None:
        batch, _, height, width = noise.shape
        if len(prompts) != batch:
            raise PipelineError(f"found {len(prompts)} prompts and noise for {batch} pictures: give each a prompt")
        for name, hint in hints.items():
            if name not in self.controls:
                loaded = ", ".join(self.controls) or "none"
                raise PipelineError(f"there is no control {name!r}; loaded: {loaded}: name one of them or load it too")
            expected = (batch, 3, 8 * height, 8 * width)
            if tuple(hint.shape) != expected:
                raise PipelineError(
                    f"{name} hint has shape {tuple(hint.shape)}; noise {tuple(noise.shape)} asks for {expected}: "
                    "resize the hint to 8 times the latent's size"
                )


def scene_noise(seeds: Iterable[int], size: int = SIZE) -> Tensor:
    """Unit noise (B,4,size/8,size/8), each picture's from its own seed, so that the batch does not matter."""
    return torch.stack(
        [torch.randn((4, size // 8, size // 8), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
