"""Whatever a call is about, the residuals are those of its samples one by one, cut from the whole by definition."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import CONTEXT, picture
from torch import Tensor

from .callers import Box, cut, repeated
from .controls import ours

if TYPE_CHECKING:
    from hosting import Host


@dataclass(frozen=True)
class Asked:
    """One call of `get_control`: latents (B,4,h,w), the number of each part of the batch, and what else is told."""

    x: Tensor
    numbers: tuple[int, ...] = (0,)
    sigmas: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    contexts: Tensor | None = None


@torch.inference_mode()
def residuals(host: Host, control: Any, asked: Asked, begin: bool = True) -> list[Tensor]:
    """What the control gives for this call of the tiny SDXL model, where the latents have sigma 5."""
    model = host.model("sdxl").model
    count = len(asked.x)
    t = torch.full((count,), 5.0)
    width = model.model_config.unet_config["adm_in_channels"]
    generator = torch.Generator().manual_seed(8)
    context = torch.randn(1, 7, CONTEXT, generator=generator)
    cond = {
        "c_crossattn": repeated(context, count) if asked.contexts is None else asked.contexts,
        "y": repeated(torch.randn(1, width, generator=generator), count),
    }
    options = {
        "cond_or_uncond": list(asked.numbers),
        "uuids": [None] * len(asked.numbers),
        "sigmas": t[: asked.sigmas or count // len(asked.numbers)],
        "sample_sigmas": torch.tensor([10.0, 5.0, 0.0]),
        **asked.options,
    }
    if begin:
        control.pre_run(model, model.model_sampling.percent_to_sigma)
    given = control.get_control(asked.x, t, cond, len(asked.numbers), options)
    return [] if given is None else [r for key in ("input", "output", "middle") for r in given[key] if r is not None]


@dataclass(frozen=True)
class Drawn:
    """One random call and the graph it is made in."""

    frames: int  # of the run
    window: tuple[int, ...] | None
    size: tuple[int, int]  # of the latent
    boxes: tuple[Box, ...] | None
    numbers: tuple[int, ...]
    hints: int
    masks: int
    per_image: bool
    cond_only: bool


def drawn(seed: int) -> Drawn:
    """A call about any frames and any tiles."""
    draw = random.Random(seed)
    frames = draw.choice((1, 2, 3, 5))
    window = tuple(draw.randrange(frames) for _ in range(draw.randint(1, frames))) if draw.random() < 0.5 else None
    size = (4 * draw.randint(3, 6), 4 * draw.randint(3, 6))
    boxes = None
    if draw.random() < 0.6:
        height, width = (4 * draw.randint(1, n // 4) for n in size)
        corners = [
            (draw.randint(0, size[0] - height), draw.randint(0, size[1] - width)) for _ in range(draw.randint(1, 3))
        ]
        boxes = tuple((y, x, height, width) for y, x in corners)
    numbers = draw.choice(((0,), (1, 0), (0, 1), (1,)))
    masks = draw.choice((0, 1, frames))
    return Drawn(
        frames, window, size, boxes, numbers, draw.choice((1, frames)), masks, draw.random() < 0.3, draw.random() < 0.4
    )


PROPERTY_KINDS = ("lite", "controlnet", "foreign", "adapter", "lora")


@pytest.mark.parametrize("kind", PROPERTY_KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_any_call_is_its_samples_one_by_one(host: Host, kind: str, seed: int):
    case = drawn(1000 * len(kind) + seed)
    height, width = (8 * n for n in case.size)
    hints = picture(seed, case.hints, 256, 256)[:, :height, :width]
    masks = picture(seed + 50, max(1, case.masks), 256, 256)[:, :height, :width, 0] if case.masks else None
    strengths = [0.25 + 0.5 * i for i in range(case.frames)] if case.per_image else None

    control = applied(host, kind, hints, masks, strengths, case.cond_only)
    frames = case.window or tuple(range(case.frames))
    boxes = case.boxes or ((0, 0, *case.size),)
    generator = torch.Generator().manual_seed(seed)
    rows = [(box, number, frame) for box in boxes for number in case.numbers for frame in frames]
    x = torch.randn(len(rows), 4, *boxes[0][2:], generator=generator)
    contexts = torch.randn(len(rows), 7, CONTEXT, generator=generator)

    begin(host, control)
    if case.window:
        control.sub_idxs, control.full_latent_length, control.context_length = list(frames), case.frames, len(frames)
    if case.boxes:  # as a tiled sampler writes it: for each tile the slices of all samples
        whole = control.cond_hint_original
        each = [whole[frame % len(whole)][None] for _ in case.numbers for frame in frames]
        control.cond_hint = torch.cat([cut(torch.cat(each), box, 8) for box in case.boxes])
    found = residuals(host, control, Asked(x, case.numbers, len(frames), {}, contexts), begin=False)

    for i, (box, number, frame) in enumerate(rows):
        if case.cond_only and number == 1:
            assert all(not residual[i].any() for residual in found)
            continue
        one = applied(
            host,
            kind,
            cut(hints[frame % len(hints)][None].movedim(-1, 1), box, 8).movedim(1, -1),
            None if masks is None else cut(masks[frame % len(masks)][None, None], box, 8)[0],
            None if strengths is None else [strengths[frame]],
            False,
        )
        expected = residuals(host, one, Asked(x[i : i + 1], (0,), 1, {}, contexts[i : i + 1]))
        if not expected:  # a mask of nothing but black
            assert all(not residual[i].any() for residual in found)
        for residual, single in zip(found, expected):
            largest = max(1e-3, float(single.abs().max()))
            assert (residual[i % len(residual)] - single[0]).abs().max() <= 1e-4 * largest, (case, i)


def applied(
    host: Host, kind: str, hints: Tensor, masks: Tensor | None, strengths: list[float] | None, cond_only: bool
) -> Any:
    """The control object that ApplyControlToPrompt puts on a prompt for these hints and doses."""
    options: dict[str, Any] = {"guidance": "cond_only"} if cond_only else {}
    if masks is not None:
        options["mask"] = masks
    if strengths is not None:
        per_image = ", ".join(map(str, strengths))
        (options["schedule"],) = host.call("ControlSchedule", curve="constant", per_image=per_image)
    scene = host.scene("sdxl")
    prompts = {"positive": scene.positive, "negative": scene.negative}
    positive, _ = host.call(
        "ApplyControlToPrompt", **prompts, control_net=ours(host, kind), image=hints.contiguous(), **options
    )
    return positive[0][1]["control"]


def begin(host: Host, control: Any) -> None:
    """Begin a run on the tiny SDXL model."""
    model = host.model("sdxl").model
    control.pre_run(model, model.model_sampling.percent_to_sigma)


def test_the_cases_differ():
    """Some of everything is drawn."""
    cases = [drawn(1000 * len(kind) + seed) for kind in PROPERTY_KINDS for seed in range(12)]
    for kind in (
        lambda case: case.window and case.boxes,
        lambda case: case.window and not case.boxes,
        lambda case: case.boxes and len(case.boxes) > 1 and len(case.numbers) > 1,
        lambda case: case.masks > 1 and case.boxes,
        lambda case: case.cond_only and len(case.numbers) > 1,
    ):
        assert any(kind(case) for case in cases)
