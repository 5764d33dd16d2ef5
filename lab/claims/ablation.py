"""Claim: only zero convolutions and the full copy hold under all four kinds of prompt (paper, ablations, figure 8)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..evaluate import HeldOut, held_out
from ..pipeline import LabModel
from ..sheet import contact_sheet
from ..vocabulary import INSUFFICIENT_PROMPT
from . import runs
from .claim import Findings, Work, spread, table
from .curves import draw
from .sampling import Sampled, sample

if TYPE_CHECKING:
    from PIL.Image import Image

SCENES = 32
VARIANTS = ("zero", "gaussian", "lite")
SHOWN = 2


def measure(work: Work) -> Findings:
    """The three kinds of training under the four prompts, from every seed, against no control at all."""
    model, segmenter = runs.parts()
    scenes = held_out(SCENES)
    hint = {runs.HINT: scenes.hints[runs.HINT]}
    prompts = prompts_of(scenes)

    def under_all(chosen: LabModel, hints: dict[str, Tensor]) -> dict[str, Sampled]:
        return {name: sample(chosen, segmenter, scenes, own, hints) for name, own in prompts.items()}

    found = {"no control": [under_all(replace(model, controls={}), {})]}
    for name in VARIANTS:
        controls = [{runs.HINT: runs.control(work, name, seed)} for seed in runs.SEEDS]
        found[runs.RUNS[name].title] = [under_all(replace(model, controls=each), hint) for each in controls]
    rows = [
        [f"{title}: {part}", *(spread([getattr(each[prompt], part) for each in sampled]) for prompt in prompts)]
        for title, sampled in found.items()
        for part in ("figure", "solids", "mean")
    ]
    curves = {runs.RUNS[name].title: [runs.curve(work, name, seed) for seed in runs.SEEDS] for name in VARIANTS}
    marks = {runs.RUNS[name].title: [runs.converged(work, name, seed) for seed in runs.SEEDS] for name in VARIANTS}
    sheet = sheet_of(scenes, {title: sampled[0] for title, sampled in found.items() if title in curves})
    return Findings(table(["IoU", *prompts], rows), {"ablation": sheet, "ablation_curves": draw(curves, marks)})


def prompts_of(scenes: HeldOut) -> dict[str, list[str]]:
    """The paper's four settings; the conflicting prompt is that of the next scene."""
    count = len(scenes.prompts)
    return {
        "no prompt": [""] * count,
        "insufficient": [INSUFFICIENT_PROMPT] * count,
        "conflicting": [*scenes.prompts[1:], scenes.prompts[0]],
        "perfect": scenes.prompts,
    }


def sheet_of(scenes: HeldOut, found: Mapping[str, Mapping[str, Sampled]]) -> Image:
    """As figure 8 of the paper: a row for each variant, a column for each prompt; the first SHOWN scenes in turn."""
    columns: dict[str, list[np.ndarray]] = defaultdict(list)
    names = []
    for scene in range(SHOWN):
        for title, sampled in found.items():
            names.append(title)
            own = {"hint": scenes.hints[runs.HINT], "render": scenes.images}
            own |= {prompt: each.pictures for prompt, each in sampled.items()}
            for label, pictures in own.items():
                columns[label].append(pictures[scene].permute(1, 2, 0).numpy())
    return contact_sheet({label: np.stack(pictures) for label, pictures in columns.items()}, names)
