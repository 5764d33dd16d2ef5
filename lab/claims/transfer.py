"""Claim: a trained control works on fine-tuned base models as it is (paper, section 4)."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...controlnet_core.diffusion import add_noise, alphas_cumprod
from ...controlnet_core.files import saving
from ...controlnet_core.networks.controlnet import ControlNet
from ...controlnet_core.networks.unet import UNet
from ..dataset import load_shards, render_shards
from ..evaluate import held_out
from ..loop import fit
from ..models import SIZE, UNET, load_weights
from ..pipeline import LabModel
from ..sheet import contact_sheet
from ..vocabulary import tokenize
from . import runs
from .claim import Findings, Work, table
from .sampling import judged, sample, shown

log = logging.getLogger(__name__)

SCENES = 48
TUNED_ON, STEPS, BATCH = 4_000, 200, 16
TINT, GAMMA = (0.45, 0.6, 1.0), 1.5
"""How a night is made of a day: each value to the power of GAMMA, times the tint of its colour."""


def night(pictures: Tensor) -> Tensor:
    """Pictures (B,3,H,W) in [0,1] by night."""
    return pictures.clamp(0, 1) ** GAMMA * pictures.new_tensor(TINT)[:, None, None]


def day(pictures: Tensor) -> Tensor:
    """The inverse of `night`: the judge has seen days alone."""
    return (pictures / pictures.new_tensor(TINT)[:, None, None]).clamp(0, 1) ** (1 / GAMMA)


def measure(work: Work) -> Findings:
    """The shipped depth control, trained on the base, on the base fine-tuned to nights: as it is, and moved to it."""
    model, segmenter = LabModel.load((runs.HINT,)), runs.parts()[1]
    tuned = fine_tuned(work).to(model.place)
    scenes = held_out(SCENES)
    moved = ControlNet(UNET)
    own = model.controls[runs.HINT].state_dict()
    moved.load_state_dict(saving.transfer(own, model.unet.state_dict(), tuned.state_dict()))
    nightly = replace(model, unet=tuned)
    settings = {
        "base": (model, False),
        "base, depth": (model, True),
        "fine-tuned": (nightly, False),
        "fine-tuned, depth as it is": (nightly, True),
        "fine-tuned, depth moved": (replace(nightly, controls={runs.HINT: moved.to(model.place)}), True),
    }
    nights = night(scenes.images)
    reached = judged(segmenter, scenes, day(model.reconstruct(nights).cpu()))
    rows = [["renders by night, reconstructed", reached.figure, reached.solids, reached.mean, None]]
    columns = {"hint": scenes.hints[runs.HINT], "by day": scenes.images, "by night": nights}
    for name, (chosen, controlled) in settings.items():
        hints = {runs.HINT: scenes.hints[runs.HINT]} if controlled else {}
        found = sample(chosen, segmenter, scenes, scenes.prompts, hints)
        columns[name.replace("fine-tuned", "tuned")] = found.pictures
        by_night = chosen.unet is tuned
        score = judged(segmenter, scenes, day(found.pictures)) if by_night else found
        rows.append([name, score.figure, score.solids, score.mean, distance(found.pictures, nights)])
    sheet = contact_sheet({label: shown(pictures, 6) for label, pictures in columns.items()})
    head = ["base and control", "figure", "solids", "mean", "distance to the style"]
    return Findings(table(head, rows), {"transfer": sheet})


def distance(pictures: Tensor, style: Tensor) -> float:
    """How far the mean colours of pictures are from those of other pictures (N,3,H,W), scene by scene; 0..1."""
    return (pictures.mean((2, 3)) - style.mean((2, 3))).abs().mean().item()


def fine_tuned(work: Work) -> UNet:
    """The lab's UNet, all of it trained on scenes by night; kept in the work folder and trained where it is not."""
    model = runs.parts()[0]
    arrays = load_shards(render_shards(work.scenes, TUNED_ON, SIZE), ("image", "tokens"))
    images, tokens = (torch.from_numpy(arrays[name]) for name in ("image", "tokens"))
    alphas, empty = alphas_cumprod().to(model.place), torch.tensor(tokenize(""))
    unet = load_weights(UNet(UNET), "unet").to(model.place).requires_grad_(True)

    def loss_of_step(draw: torch.Generator) -> Tensor:
        chosen = torch.randint(len(images), (BATCH,), generator=draw)
        prompts = torch.where(torch.rand(BATCH, 1, generator=draw) < 0.1, empty, tokens[chosen].long())
        timesteps = torch.randint(1000, (BATCH,), generator=draw).to(model.place)
        pictures = night(images[chosen].to(model.place).permute(0, 3, 1, 2) / 255)
        with torch.autocast(model.place.type, torch.bfloat16):
            with torch.no_grad():
                context = model.text_encoder(prompts.to(model.place))
                clean = runs.encode(pictures)
            noise = torch.randn_like(clean)
            predicted = unet(add_noise(clean, noise, timesteps, alphas), timesteps, context)
        return F.mse_loss(predicted.float(), noise)

    fit(unet, loss_of_step, work.path("nights"), STEPS, lr=5e-4, ema_decay=0.98)
    return unet.eval().requires_grad_(False)
