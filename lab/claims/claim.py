"""What a claim of the paper is here: the trainings it looks at, a measurement, and the table and pictures it leaves."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...controlnet_core.files.writing import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST = 300_000
"""Bytes of a picture that is kept in the repository."""


@dataclass(frozen=True)
class Work:
    """The folder that everything is made in; rendered scenes are shared with `lab train`."""

    folder: Path

    @property
    def scenes(self) -> Path:
        """Rendered scenes."""
        return self.folder / "scenes"

    def path(self, *names: str) -> Path:
        """A place among what is made for the claims."""
        return self.folder.joinpath("claims", *names)


@dataclass(frozen=True)
class Findings:
    """What was measured for a claim: a table in Markdown, and pictures by name."""

    table: str
    pictures: Mapping[str, Image] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A claim: its `name` on the command line, what the paper `says`, the trainings it needs, and how it is measured.

    `trainings` are names in `runs.RUNS`; `measure` is called once all of them are finished, from every seed.
    """

    name: str
    says: str
    trainings: tuple[str, ...]
    measure: Callable[[Work], Findings]


def table(head: Sequence[str], rows: Sequence[Sequence[str | float | None]], digits: int = 2) -> str:
    """A Markdown table; numbers get `digits` digits, `None` a dash."""

    def cell(value: str | float | None) -> str:
        if value is None:
            return "-"
        return value if isinstance(value, str) else f"{value:.{digits}f}"

    lines = [list(head), ["---"] + ["---:"] * (len(head) - 1), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean of what the seeds gave, and the least and the greatest of several: "0.78 (0.76 to 0.80)"."""
    low, mean, high = (f"{value:.{digits}f}" for value in (min(values), sum(values) / len(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


# -- findings on disk -------------------------------------------------------------------------------------------------


def keep(work: Work, claim: Claim, findings: Findings) -> None:
    """Write the findings of a claim; the table last, so that what is read is whole."""
    folder = work.path("findings")
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in findings.pictures.items():
        save(picture, folder / f"{name}.jpg")
    whole = {"table": findings.table, "pictures": sorted(findings.pictures), "threads": torch.get_num_threads()}
    with replacing(folder / f"{claim.name}.json") as temporary:
        temporary.write_text(json.dumps(whole, indent=1), encoding="utf-8")


def kept(work: Work, claim: Claim) -> tuple[str, list[Path]] | None:
    """The table and the pictures of a claim that was measured, else None."""
    path = work.path("findings", f"{claim.name}.json")
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["table"], [path.parent / f"{name}.jpg" for name in found["pictures"]]


def save(picture: Image, path: Path) -> None:
    """Write a picture as JPEG of at most LARGEST bytes."""
    for quality in (92, 85, 75, 60, 45):
        picture.convert("RGB").save(path, quality=quality)
        if path.stat().st_size <= LARGEST:
            return


def publish(readme: Path, findings: Mapping[str, tuple[str, Sequence[Path]]]) -> None:
    """Put the tables of claims into a README, and their pictures into `claims/` beside it."""
    text = published(readme.read_text(encoding="utf-8"), {name: content for name, (content, _) in findings.items()})
    readme.write_text(text, encoding="utf-8", newline="\n")
    for _, pictures in findings.values():
        for path in pictures:
            shutil.copyfile(path, readme.parent / "claims" / path.name)


def published(text: str, tables: Mapping[str, str]) -> str:
    """`text` with each table in its place: between the lines `<!-- claim NAME -->` and `<!-- end -->`.

    Raises ValueError for a claim that has no place there.
    """
    for name, content in tables.items():
        place = re.compile(rf"(<!-- claim {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = place.subn(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
        if count != 1:
            raise ValueError(f"the text has {count} places for the claim {name}: expected one <!-- claim {name} -->")
    return text
