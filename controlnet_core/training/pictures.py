"""Which pictures a training learns from, which it only watches, and what has become of them since it began."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..data.dataset import Dataset
from ..files.saving import SaveError
from ..files.writing import replacing
from .checkpoint import Checkpoint
from .options import TrainingOptions

NAME = "pictures.json"
"""In a run's folder: the name of each picture that it was last trained on, with the stamp of what it was made from."""


def split(dataset: Dataset, options: TrainingOptions, saved: Checkpoint | None) -> tuple[list[int], list[int]]:
    """(items to watch, items to learn from), as `Dataset.split`; a run that goes on from `saved` watches the same ones.

    Those of them that are gone, or have another size than most, are left out; with none left, others are chosen.
    """
    names = [] if saved is None else saved.facts.get("pictures", [])
    if saved is not None and saved.facts["options"]["held_out"] == options.held_out:
        place = {each.name: i for i, each in enumerate(dataset.places) if each.plain}
        found = [place[name] for name in names if name in place]
        if found:
            (size, _), *_ = Counter(map(dataset.bucket_of, found)).most_common()
            watched = [index for index in found if dataset.bucket_of(index) == size]
            return watched, [index for index in range(len(dataset)) if dataset.places[index].name not in names]
    return dataset.split(options.held_out, options.seed)


def names(dataset: Dataset, items: Sequence[int]) -> list[str]:
    """What the pictures of `items` are called."""
    return [dataset.places[index].name for index in items]


def changes(folder: Path, dataset: Dataset) -> str:
    """What has changed in the dataset since `note` was called: "3 pictures were added, 1 is gone"."""
    before, now = _known(folder), dataset.stamps
    if not before:
        return "it is not known how"
    added, gone = now.keys() - before.keys(), before.keys() - now.keys()
    touched = {name for name in now.keys() & before.keys() if now[name] != before[name]}
    counts = ((added, "added"), (gone, "taken away"), (touched, "changed"))
    said = ", ".join(f"{len(which)} {what}" for which, what in counts if which)
    return f"pictures: {said}" if said else "its prompts or options, not its pictures"


def note(folder: Path, dataset: Dataset) -> None:
    """Write down in the run's folder which pictures it is trained on; raises SaveError."""
    now = dataset.stamps
    if now == _known(folder):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / NAME) as temporary:
            temporary.write_text(json.dumps(now), encoding="utf-8", newline="\n")
    except OSError as error:
        raise SaveError(
            f"{NAME} cannot be written into {folder}: {error}: make room there, or choose a folder that can be "
            "written to"
        ) from error


def _known(folder: Path) -> dict[str, str]:
    """What `note` wrote; empty where nothing is, or nothing that can be read."""
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
