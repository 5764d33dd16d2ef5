"""Claim: several controls are composed by adding what they give, with no further weights (paper, section 3.4)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..evaluate import held_out
from ..hints import depth_hint
from ..models import SIZE
from ..pipeline import LabModel
from ..render import render
from ..scene import random_scene
from ..sheet import contact_sheet
from . import runs
from .claim import Findings, Work, table
from .sampling import sample, shown

SCENES = 48


def measure(_: Work) -> Findings:
    """The shipped depth and pose controls, alone and added; and where each hint knows what the other does not."""
    model, segmenter = LabModel.load(("depth", "pose")), runs.parts()[1]
    scenes = held_out(SCENES)
    depth, pose = scenes.hints["depth"], scenes.hints["pose"]
    alone = solids_alone(scenes.seeds)
    settings: dict[str, dict[str, Tensor]] = {
        "neither": {},
        "pose": {"pose": pose},
        "depth": {"depth": depth},
        "depth + pose": {"depth": depth, "pose": pose},
        "depth of the solids alone": {"depth": alone},
        "depth of the solids alone + pose": {"depth": alone, "pose": pose},
    }
    rows = []
    columns = {"render": scenes.images, "depth hint": depth, "pose hint": pose, "depth of solids": alone}
    for name, hints in settings.items():
        found = sample(model, segmenter, scenes, scenes.prompts, hints)
        rows.append([name, found.figure, found.solids, found.mean])
        columns[name.replace("depth of the solids alone", "solids")] = found.pictures
    sheet = contact_sheet({label: shown(pictures, 6) for label, pictures in columns.items()})
    return Findings(table(["hints", "figure", "solids", "mean"], rows), {"composition": sheet})


def solids_alone(seeds: list[int]) -> Tensor:
    """The depth hint (N,3,H,W) of each scene with its figure taken out of it."""
    scenes = [replace(random_scene(seed), figure=None) for seed in seeds]
    hints = np.stack([depth_hint(render(scene, SIZE)) for scene in scenes])
    return torch.from_numpy(hints).permute(0, 3, 1, 2)
