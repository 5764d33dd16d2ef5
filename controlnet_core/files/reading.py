"""A weights file becomes its tensors, by what is in it and never by its name; no code of it runs."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ZeroConvError
from ..keys import State, Weights
from ..limits import PICKLE, TENSORS, WRAPPINGS
from .header import HeaderError, read_header
from .shards import PartsError, parts


class LoadError(ZeroConvError):
    """Weights that cannot be read or loaded; the message begins with the file's name."""


STRANGE_FILES = (
    (b"GGUF", "a GGUF file, whose weights are quantized for other programs: load the control's safetensors file"),
    (b"\x89HDF", "an HDF5 file, as Keras writes it: load the control's safetensors file"),
    (b"\x93NUMPY", "a NumPy array: load the control's safetensors file"),
    (b"\x89PNG", "a picture: connect it as the hint, and load the control's weights"),
    (b"\xff\xd8\xff", "a picture: connect it as the hint, and load the control's weights"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (b"Rar!", "a RAR archive: unpack it"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
)
"""How files of other kinds begin, what they are and what to do."""


def read_weights(path: Path) -> tuple[Weights, dict[str, str]]:
    """The tensors of a weights file, mapped into memory where the file allows it, and its safetensors metadata.

    Safetensors, and what torch.save writes (loaded with `weights_only`); of a file that comes in parts, all of them.
    What stands around the tensors is taken off (`tensors_of`). Raises LoadError, which says what the file is instead
    or what is wrong with it.
    """
    try:
        found = [(_read_safetensors if safetensors else _read_torch)(part) for part, safetensors in forms(path)]
        return joined([(tensors_of(loaded), metadata) for loaded, metadata in found])
    except (HeaderError, PartsError, ContentError) as error:
        raise LoadError(f"{path.name}: {error}") from error


def forms(path: Path) -> list[tuple[Path, bool]]:
    """The files that hold the tensors of `path` (all parts of one that comes in parts), each with whether it is one of
    safetensors; else torch saved it.

    All that can be told of them before anything of their size is allocated holds. Raises LoadError.
    """
    try:
        return [(part, _is_safetensors(part)) for part in parts(path)]
    except (HeaderError, PartsError, ContentError) as error:
        raise LoadError(f"{path.name}: {error}") from error


class ContentError(ZeroConvError):
    """What a file holds instead of weights, as the end of a sentence that begins with the file's name."""


def joined(found: list[tuple[Weights, dict[str, str]]]) -> tuple[Weights, dict[str, str]]:
    """The tensors and metadata of all parts of a file; ContentError for a tensor that two of them hold."""
    weights, metadata = {}, {}
    for part, said in found:
        both = weights.keys() & part.keys()
        if both:
            raise ContentError(f"two parts of this file hold {min(both)}: download all parts again")
        weights |= part
        metadata |= said
    return weights, metadata


# -- one file ---------------------------------------------------------------------------------------------------------


def _is_safetensors(path: Path) -> bool:
    """Whether the file is one of safetensors; False where torch saved it; raises for all others and for damage."""
    with path.open("rb") as file:
        head = file.read(1024)
    if not head:
        raise ContentError("the file is empty, 0 bytes: download it again")
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ContentError("this is an HTML page, not weights: download the file itself, not its web page")
    if text.startswith(b"version https://git-lfs"):
        raise ContentError("this is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
    for beginning, what in STRANGE_FILES:
        if head.startswith(beginning):
            raise ContentError(f"this is {what}")
    if head[8:9] == b"{":
        read_header(path)
        return True
    if head.startswith(b"PK"):
        _check_archive(path)
    elif not head.startswith(b"\x80"):
        raise ContentError(
            f"this is neither a safetensors file nor one that torch saved; it begins with {head[:16]!r}: download it "
            "again"
        )
    return False


def _read_safetensors(path: Path) -> tuple[Weights, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()  # the open file itself is no iterable
            return {key: file.get_tensor(key) for key in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ContentError(f"this file is damaged, {_one_line(error)}: download it again") from error


def _check_archive(path: Path) -> None:
    """Raise unless the zip archive is one that torch wrote, in which nothing is larger than it is in the file."""
    try:
        if not zipfile.is_zipfile(path):
            raise ContentError("the file is truncated: the end of its zip archive is missing: download it again")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, UnicodeError) as error:
        raise ContentError(f"this file is damaged, {_one_line(error)}: download it again") from error
    descriptions = [entry for entry in entries if entry.filename.endswith("data.pkl")]
    if not descriptions:
        first = entries[0].filename if entries else "nothing"
        raise ContentError(f"this is a zip archive, of {first} and others, and torch did not write it: unpack it")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ContentError("this zip archive is compressed, which torch's never are: download the file again")
    if len(entries) > 2 * TENSORS or sum(entry.file_size for entry in descriptions) > PICKLE:
        raise ContentError(f"this file holds {len(entries)} things, expected at most {TENSORS} tensors: load another")


def _read_torch(path: Path) -> tuple[Any, dict[str, str]]:
    with path.open("rb") as file:
        archive = file.read(2) == b"PK"
    # Only a zip archive with a name can be mapped, and torch hands every *.safetensors to the safetensors library.
    mapped = archive and path.suffix != ".safetensors"
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the file holds
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped), {}
    except Exception as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is not None:
            raise ContentError(
                f"the file holds more than tensors, such as {code[1]}, which torch refuses to load because it could "
                "run code: convert it to safetensors"
            ) from error
        # What torch advises before that is how to read the file in spite of it.
        reason = _one_line(error).rpartition("WeightsUnpickler error: ")[2]
        raise ContentError(f"torch cannot read this file, {reason}: download it again") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# -- what stands around the tensors -----------------------------------------------------------------------------------

AROUND = ("state_dict", "model_state_dict", "module", "model", "controlnet", "adapter", "params_ema", "params")
"""What programs call the weights in a dictionary of a file, among other things that they keep there."""


def tensors_of(loaded: Any) -> Weights:
    """The tensors in what a file holds: {"state_dict": ...}, {"module": ...}, or among other things ({"epoch": 3}).

    Raises ContentError where there are none, and says what it is instead; and for shapes without numbers.
    """
    for _ in range(WRAPPINGS):
        if not isinstance(loaded, Mapping):
            break
        inside = {key: value for key, value in loaded.items() if isinstance(value, Mapping)}
        bare = any(isinstance(value, Tensor) for value in loaded.values())
        name = next((name for name in AROUND[: 1 if bare else None] if name in inside), None)
        if name is None and len(inside) == 1 and not bare and not _is_strange(loaded):
            (name,) = inside
        if name is None:
            break
        loaded = inside[name]
    if not isinstance(loaded, Mapping):
        raise ContentError(f"expected a dictionary of tensors, found a {type(loaded).__name__} without any")
    weights = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not weights:
        strange = _is_strange(loaded)
        raise ContentError(
            f"this is {strange}: load the control that lies beside it"
            if strange
            else f"expected a dictionary of tensors, found a {type(loaded).__name__} without any"
        )
    if len(weights) > TENSORS:
        raise ContentError(f"this file holds {len(weights)} tensors, expected at most {TENSORS}: load another")
    bare = [key for key, tensor in weights.items() if tensor.is_meta]
    if bare:
        raise ContentError(f"{bare[0]} has a shape and no numbers: save the control's whole weights again")
    return weights


def _is_strange(loaded: Mapping[Any, Any]) -> str:
    """What a dictionary without weights is, in words; empty where that is not known."""
    if "param_groups" in loaded or "optimizer_state_dict" in loaded:
        return "the state of an optimizer, kept to go on with a training"
    if "last_epoch" in loaded or "base_lrs" in loaded:
        return "the state of a learning rate schedule, kept to go on with a training"
    if "growth_tracker" in loaded or "_growth_tracker" in loaded:
        return "the state of a gradient scaler, kept to go on with a training"
    return ""


def check_plain(state: State) -> None:
    """Raise ContentError unless each tensor holds its own numbers, as many as its shape says."""
    for key, tensor in state.items():
        if tensor.is_quantized:
            raise ContentError(f"{key} is quantized ({tensor.dtype}): load the control's file in fp16, bf16 or fp32")
        if tensor.layout != torch.strided:
            raise ContentError(f"{key} is {tensor.layout}, expected plain numbers: save the control's weights again")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ContentError(
                f"{key} needs {tensor.nbytes} bytes, and there are {tensor.untyped_storage().nbytes()} of it: download "
                "the file again"
            )
