"""A training on disk: all of it in one safetensors file, written whole or not at all, and its control as a file."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import checksum, saving
from ..files.header import HeaderError, read_header
from ..files.loading import LoadError, load_control, read_weights
from ..files.saving import SaveError, write
from ..files.writing import sweep
from ..keys import State, Weights
from ..networks.controlnet import ControlNet
from ..networks.lite import ControlNetLite
from .options import PRECISIONS, STRUCTURE, OptionsError, TrainingOptions

log = logging.getLogger(__name__)

CHECKSUM = "checksum"
"""The name in a file's metadata of what tells whether the file is as it was written."""

FACTS: dict[str, type | tuple[type, ...]] = {
    "options": dict, "seconds": (int, float), "measured": list, "scaler": dict, "base": str, "data": str, "held": list,
    "groups": list,
    "pictures": list, "control": dict, "begun": str,
}  # fmt: skip
"""What kind of value each of a checkpoint's facts is.

`held` are the items that are watched and `pictures` their names; `control` is what the control's shapes do not tell of
it; `begun` says of which kind the control was that the training began with, "" for a fresh one.
"""

NAME = re.compile(r"step-(\d{8})\.safetensors")

ASIDE = ".not-finite"
"""Behind the name of a file of a step after which numbers were no longer finite."""


@dataclass(frozen=True)
class Checkpoint:
    """A training after `step` steps: everything that its further losses depend on, the base and the data excepted.

    `tensors` are named `model.`, `optimizer.<state>.` and `average.` with the parameter's name behind. `facts` is
    plain data: options, measurements, seconds, and what the base and the data are recognized by. Chance and data
    position need no room: both follow from the seed and the step (a training whose chance does not, adds it).
    """

    step: int
    tensors: Weights
    facts: dict[str, Any]

    def part(self, prefix: str) -> Weights:
        """The tensors under a prefix, without it."""
        return {key.removeprefix(prefix): tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint into `folder` and leave the newest `keep`; raises SaveError, and then none is lost."""
    path = folder / f"step-{checkpoint.step:08d}.safetensors"
    tensors = {name: tensor.detach().cpu() for name, tensor in checkpoint.tensors.items()}
    facts = json.dumps(checkpoint.facts)
    said = {"step": str(checkpoint.step), "facts": facts}
    # What the loader of controls asks for stands open: a checkpoint is a control's file, too (`kinds.unwrapped`).
    about = checkpoint.facts.get("control", {})
    write(path, tensors, {**about, **said, CHECKSUM: _checksum(tensors, said)})
    keep_newest(path, keep)
    return path


def keep_newest(path: Path, keep: int) -> None:
    """Delete the files of earlier steps beside `path`, all but the newest `keep`, itself among them.

    A file of a later step is there only where it could not be read, and is no reason to delete those that can.
    """
    for old in [each for each in files(path.parent) if each <= path][:-keep]:
        try:
            old.unlink(missing_ok=True)
        except OSError as error:  # on Windows, while somebody reads it
            log.warning("%s is no longer needed and cannot be deleted: %s", old, error)


def clean(folder: Path) -> None:
    """Remove what a process left in `folder`, of any file with a suffix, when it was killed while it wrote."""
    sweep(folder, "*.*")


def files(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, from old to new."""
    return sorted(path for path in folder.glob("step-*.safetensors") if NAME.fullmatch(path.name))


def load(path: Path) -> Checkpoint:
    """The checkpoint in a file; raises LoadError saying what is wrong with it.

    All of it is read, and is as it was written; older checkpoints have no checksum that says so.
    """
    tensors, metadata = read_weights(path)
    try:
        facts = json.loads(metadata["facts"])
        found = Checkpoint(int(metadata["step"]), tensors, facts)
        if not isinstance(facts, dict) or not all(
            isinstance(facts[name], FACTS[name]) for name in FACTS if name in facts
        ):
            raise ValueError("facts of another kind")
    except (KeyError, ValueError, RecursionError) as error:
        raise LoadError(
            f"{path.name}: this is no checkpoint of a training: choose a file step-*.safetensors"
        ) from error
    if CHECKSUM in metadata and metadata[CHECKSUM] != _checksum(tensors, metadata):
        raise LoadError(f"{path.name}: the file has changed since it was written, or was not written as it should be")
    return found


def _checksum(tensors: State, said: Mapping[str, str]) -> str:
    """The checksum of all that a checkpoint says, by its tensors and the texts beside them."""
    return checksum.of_tensors(tensors) + checksum.of_bytes(f"{said['step']} {said['facts']}".encode())


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read, None where there is none; raises LoadError where none of them can."""
    found = files(folder)
    for path in reversed(found):
        try:
            return load(path)
        except LoadError as error:
            log.warning("%s; the checkpoint before it is taken, if there is one", error)
    if found:
        raise LoadError(
            f"{folder}: none of its {len(found)} checkpoints can be read: delete them to begin again at step 0"
        )
    return None


def options_of(folder: Path) -> dict[str, Any] | None:
    """The options that the newest checkpoint was trained with, by its header alone; None where none can be read."""
    for path in reversed(files(folder)):
        try:
            return dict(json.loads(read_header(path)[1]["facts"])["options"])
        except (OSError, HeaderError, KeyError, TypeError, ValueError, RecursionError):
            continue
    return None


def kept(folder: Path) -> str:
    """What a training that ends here goes on from, in words."""
    for path in reversed(files(folder)):
        try:
            load(path)
        except LoadError:
            continue
        return f"{path.name} is kept, and training goes on from it."
    if files(folder):
        return "None of its checkpoints can be read."
    if any(folder.glob(f"*{ASIDE}")):
        return "There is no checkpoint before it: training begins anew."
    return "No checkpoint was written yet."


def fingerprint(base: State) -> str:
    """What a base is recognized by: a hash over the names, the shapes and a few numbers of each tensor."""
    found = hashlib.sha256()
    for key in sorted(base):
        few = base[key].flatten()[:16].to("cpu", torch.float32)
        found.update(f"{key}{tuple(base[key].shape)}".encode() + few.numpy().tobytes())
    return found.hexdigest()[:16]


def check(saved: Checkpoint, options: TrainingOptions, facts: dict[str, Any]) -> None:
    """Raise OptionsError unless a training that goes on from `saved` would be the same one; log what has changed.

    Another dataset is no reason to refuse: pictures are added, taken away and touched.
    """
    before, now = saved.facts["options"], options.as_dict()
    for name in STRUCTURE:
        if before[name] != now[name]:
            raise OptionsError(
                f"this run began with {name} {before[name]!r}, found {now[name]!r}: give the same again, or train in "
                "another folder"
            )
    same = [("base", "model")]
    if "data" in facts and saved.facts.get("data") == facts["data"]:
        same.append(("held", "choice of held-out pictures (held_out)"))
    for name, what in same:
        if name in facts and saved.facts.get(name, facts[name]) != facts[name]:
            raise OptionsError(
                f"this run began with another {what}: give the same one again, or train in another folder"
            )
    for name in before.keys() & now.keys():
        if before[name] != now[name]:
            log.info("%s was %s and is %s from step %d on", name, before[name], now[name], saved.step)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> Weights:
    """The optimizer's state as tensors `<state>.<parameter>`; a plain whole number becomes an int64 of no dimension."""
    return {
        f"{state}.{names[parameter]}": torch.as_tensor(value)
        for parameter, states in optimizer.state.items()
        for state, value in states.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Weights, names: Mapping[Tensor, str]) -> None:
    """The inverse of `optimizer_tensors`; of weights that another process steps nothing is taken."""
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {names[parameter]: i for i, parameter in enumerate(order)}
    state: dict[int, dict[str, Tensor | int]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if name not in numbers:
            continue
        plain = tensor.ndim == 0 and tensor.dtype == torch.int64
        parameter = order[numbers[name]]
        state.setdefault(numbers[name], {})[kind] = int(tensor) if plain else _laid_out(tensor, parameter)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _laid_out(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A copy that lies in memory as the parameter does where it has its shape: fused steps go through both at once.

    Tensors of a file may be mapped, and a mapped file cannot be deleted on Windows.
    """
    if tensor.shape != parameter.shape:
        return tensor.clone()
    return torch.empty_strided(tensor.shape, parameter.stride(), dtype=tensor.dtype).copy_(tensor)


# -- its control ------------------------------------------------------------------------------------------------------


def control_of(saved: Checkpoint) -> ControlNet | ControlNetLite:
    """The control in a checkpoint, a network of its own in fp32; raises LoadError where it is not all there."""
    found = load_control(saved.tensors, saved.facts.get("control"), name=f"the checkpoint of step {saved.step}")
    assert isinstance(found.control, (ControlNet, ControlNetLite))
    return found.control


def write_control(
    path: Path, control: ControlNet | ControlNetLite, weights: State, options: TrainingOptions, step: int, dtype: str
) -> None:
    """Write the file of a control with these `weights` in place of its own, as `dtype` (a name in PRECISIONS).

    As fp32 where a weight is beyond the range of `dtype`. Raises SaveError.
    """
    said = {"trained_steps": str(step), "prediction": options.prediction}
    try:
        made = saving.to_file(control, dtype=PRECISIONS[dtype], metadata=said, weights=weights)
    except SaveError as error:
        log.warning("%s is written in fp32: %s", path.name, error)
        made = saving.to_file(control, metadata=said, weights=weights)
    saving.write(path, *made)


def write_unet(path: Path, weights: State, dtype: str = "fp32") -> None:
    """Write the UNet with its trained decoder, its tensors named as in a checkpoint of the whole model."""
    named = {f"model.diffusion_model.{key}": tensor.to("cpu", PRECISIONS[dtype]) for key, tensor in weights.items()}
    saving.write(path, named)
