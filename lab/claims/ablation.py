"""Claim: only zero convolutions and the full copy hold under all four kinds of prompt (paper, ablations, figure 8)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..evaluate import HeldOut, held_out
from ..sheet import contact_sheet
from ..vocabulary import INSUFFICIENT_PROMPT
from . import runs
from .claim import Findings, Work, table
from .curves import draw
from .sampling import Sampled, sample

if TYPE_CHECKING:
    from PIL.Image import Image

SCENES = 32
VARIANTS = ("zero", "gaussian", "lite")
SHOWN = 2


def measure(work: Work) -> Findings:
    """The three trainings under the four prompts, against no control at all."""
    model, segmenter = runs.parts()
    scenes = held_out(SCENES)
    rows, found = [], {}
    for name in ("no control", *VARIANTS):
        own = name in VARIANTS
        with_control = replace(model, controls={runs.HINT: runs.control(work, name)} if own else {})
        hints = {runs.HINT: scenes.hints[runs.HINT]} if own else {}
        for prompt, prompts in prompts_of(scenes).items():
            found[name, prompt] = sample(with_control, segmenter, scenes, prompts, hints)
        sampled = [found[name, prompt] for prompt in prompts_of(scenes)]
        title = runs.RUNS[name].title if own else name
        rows += [
            [f"{title}: {part}", *(getattr(each, part) for each in sampled)] for part in ("figure", "solids", "mean")
        ]
    curves = {runs.RUNS[name].title: runs.curve(work, name) for name in VARIANTS}
    marks = {runs.RUNS[name].title: runs.converged(work, name) for name in VARIANTS}
    sheet = sheet_of(scenes, found)
    return Findings(
        table(["IoU", *prompts_of(scenes)], rows), {"ablation": sheet, "ablation_curves": draw(curves, marks)}
    )


def prompts_of(scenes: HeldOut) -> dict[str, list[str]]:
    """The paper's four settings; the conflicting prompt is that of the next scene."""
    count = len(scenes.prompts)
    return {
        "no prompt": [""] * count,
        "insufficient": [INSUFFICIENT_PROMPT] * count,
        "conflicting": [*scenes.prompts[1:], scenes.prompts[0]],
        "perfect": scenes.prompts,
    }


def sheet_of(scenes: HeldOut, found: Mapping[tuple[str, str], Sampled]) -> Image:
    """As figure 8 of the paper: a row for each variant, a column for each prompt; the first SHOWN scenes in turn."""
    columns: dict[str, list[np.ndarray]] = defaultdict(list)
    names = []
    for scene in range(SHOWN):
        for variant in VARIANTS:
            names.append(runs.RUNS[variant].title)
            own = {"hint": scenes.hints[runs.HINT], "render": scenes.images}
            own |= {prompt: sampled.pictures for (name, prompt), sampled in found.items() if name == variant}
            for label, pictures in own.items():
                columns[label].append(pictures[scene].permute(1, 2, 0).numpy())
    return contact_sheet({label: np.stack(pictures) for label, pictures in columns.items()}, names)
