"""How well the controls work, in numbers: where a fixed judge finds the figure and the solids in sampled pictures.

The judge (`segmenter`) sees the picture alone. What it finds is compared with the exact segments of the scene that the
hints came from; with hints of another scene, and without any, still with those of the scene whose prompt was used.
"""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .dataset import HELD_OUT, HINTS, render_arrays
from .models import SIZE
from .pipeline import GUIDANCE_SCALE, STEPS, LabModel, scene_noise
from .scene import describe, random_scene
from .segmenter import CLASSES, Segmenter
from .sheet import contact_sheet

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

FIGURE, SOLIDS = CLASSES.index("figure"), CLASSES.index("solid")

SETTINGS: dict[str, tuple[str, ...]] = {
    "none": (),
    "other": ("depth", "pose"),
    "canny": ("canny",),
    "depth": ("depth",),
    "pose": ("pose",),
    "depth+pose": ("depth", "pose"),
}
"""The hints of each setting; those of "other" are of another scene than the prompt and the segments."""


@dataclass(frozen=True)
class Scores:
    """Mean IoU over scenes for the figure and for all solids as one class, and the seconds that it took."""

    figure: float
    solids: float
    seconds: float

    @property
    def mean(self) -> float:
        """The mean of figure and solids."""
        return (self.figure + self.solids) / 2


@dataclass(frozen=True)
class Bound:
    """What a row of the table has to reach; `measure` is an attribute of Scores."""

    row: str
    measure: str
    sign: str
    value: float


BOUNDS = (
    Bound("renders", "figure", ">=", 0.95),
    Bound("renders", "solids", ">=", 0.95),
    Bound("depth", "mean", ">=", 0.90),
    Bound("pose", "figure", ">=", 0.86),
    Bound("depth+pose", "mean", ">=", 0.90),
    Bound("depth+pose", "figure", ">=", 0.92),
    Bound("none", "mean", "<=", 0.40),
    Bound("other", "mean", "<=", 0.40),
)
SIGNS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class HeldOut:
    """N scenes that nothing was trained on.

    images and each of hints are (N,3,H,W) in [0,1], segments (N,H,W) of 0 ground, 1 figure, 2 any solid.
    """

    seeds: list[int]
    prompts: list[str]
    images: Tensor
    hints: dict[str, Tensor]
    segments: Tensor


def held_out(count: int) -> HeldOut:
    """The first `count` scenes from seed HELD_OUT on."""
    seeds = [HELD_OUT + i for i in range(count)]
    rows = [render_arrays(seed, SIZE) for seed in seeds]

    def pictures(name: str) -> Tensor:
        return torch.from_numpy(np.stack([row[name] for row in rows])).permute(0, 3, 1, 2).float() / 255

    return HeldOut(
        seeds,
        [describe(random_scene(seed)) for seed in seeds],
        pictures("image"),
        {name: pictures(name) for name in HINTS},
        torch.from_numpy(np.stack([row["segments"] for row in rows])).long().clamp(max=SOLIDS),
    )


def iou(found: Tensor, exact: Tensor) -> Tensor:
    """Intersection over union of figure and solids, (B,2), for classes `found` and `exact` (B,H,W).

    NaN where the scene has none of it. Solid ids above 2 in either map count as solid.
    """

    def masks(classes: Tensor) -> Tensor:
        return torch.stack([classes == FIGURE, classes >= SOLIDS], dim=1).flatten(2)

    ours, theirs = masks(found), masks(exact)
    shared, either = (ours & theirs).sum(2), (ours | theirs).sum(2)
    return torch.where(theirs.any(2), shared / either.clamp(min=1), torch.nan)


@torch.no_grad()
def judge(segmenter: Segmenter, pictures: Tensor, exact: Tensor, batch: int = 16) -> Tensor:
    """IoU (N,2) of what `segmenter` finds in `pictures` (N,3,H,W) in [0,1] with the exact classes (N,H,W)."""
    place = next(segmenter.parameters()).device
    found = torch.cat([segmenter(chunk.to(place)).argmax(1).cpu() for chunk in pictures.split(batch)])
    return iou(found, exact)


@dataclass(frozen=True)
class Report:
    """Scores by row: the judge itself on `renders` and `reconstructions`, then the settings, with their pictures."""

    scenes: HeldOut
    rows: dict[str, Scores]
    pictures: dict[str, Tensor]

    def table(self) -> str:
        """The rows as text."""
        lines = [f"{'mean IoU':<17}{'figure':>8}{'solids':>8}{'mean':>8}{'seconds':>10}"]
        lines += [
            f"{name:<17}{row.figure:>8.3f}{row.solids:>8.3f}{row.mean:>8.3f}{row.seconds:>10.1f}"
            for name, row in self.rows.items()
        ]
        return "\n".join(lines)

    def sheet(self, rows: int = 8) -> Image:
        """A contact sheet of the first scenes: the render, the hints in use, and the picture of each setting."""
        used = {name for setting in self.pictures for name in SETTINGS[setting]}
        columns = {"render": self.scenes.images}
        columns |= {f"{name} hint": self.scenes.hints[name] for name in HINTS if name in used}
        columns |= {"other's hints" if name == "other" else name: found for name, found in self.pictures.items()}
        return contact_sheet({label: x[:rows].permute(0, 2, 3, 1).numpy() for label, x in columns.items()})


def evaluate(
    model: LabModel,
    segmenter: Segmenter,
    scenes: HeldOut,
    settings: Iterable[str] = SETTINGS,
    batch: int = 16,
    steps: int = STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
) -> Report:
    """Sample every scene in every setting, one prompt and one noise per scene, and let the judge compare."""
    rows: dict[str, Scores] = {}
    pictures: dict[str, Tensor] = {}

    def measure(name: str, make: Callable[[slice], Tensor]) -> Tensor:
        started = time.monotonic()
        chunks = [slice(start, start + batch) for start in range(0, len(scenes.seeds), batch)]
        made = torch.cat([make(chunk).cpu() for chunk in chunks])
        seconds = time.monotonic() - started
        figure, solids = judge(segmenter, made, scenes.segments, batch).nanmean(0).tolist()
        rows[name] = Scores(figure, solids, seconds)
        log.info("%s: figure %.3f, solids %.3f, %.1f s", name, figure, solids, seconds)
        return made

    measure("renders", lambda chunk: scenes.images[chunk])
    measure("reconstructions", lambda chunk: model.reconstruct(scenes.images[chunk]))
    for setting in settings:
        # The next scene's hints: the one that a prompt and its segments have nothing to do with.
        hints = {name: scenes.hints[name].roll(-1 if setting == "other" else 0, 0) for name in SETTINGS[setting]}

        def sample(chunk: slice, hints: Mapping[str, Tensor] = hints) -> Tensor:
            return model.sample(
                scenes.prompts[chunk],
                scene_noise(scenes.seeds[chunk]),
                {name: hint[chunk] for name, hint in hints.items()},
                steps,
                guidance_scale,
            )

        pictures[setting] = measure(setting, sample)
    return Report(scenes, rows, pictures)


def verdicts(rows: Mapping[str, Scores]) -> list[tuple[bool, str]]:
    """Whether each bound on a row that was measured is reached, and the line that says so."""
    results = []
    for bound in BOUNDS:
        if bound.row in rows:
            value = getattr(rows[bound.row], bound.measure)
            reached = SIGNS[bound.sign](value, bound.value)
            line = f"{bound.row}, {bound.measure}: {value:.3f} {bound.sign} {bound.value:.2f}"
            results.append((reached, f"{line}  {'reached' if reached else 'MISSED'}"))
    return results
