"""A training's TOML file: which model, which dataset, where to, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import ZeroConvError
from .options import MEANINGS, TrainingOptions

OPTIONS = {field.name: field.default for field in fields(TrainingOptions)}
SECTIONS = {
    "": ("output", "model", "data", "training"),
    "model": ("base", "prediction", "control"),
    "data": ("dataset",),
    "training": tuple(name for name in OPTIONS if name != "prediction"),
}
"""The keys of each section; those of "" stand at the top of the file."""


class ConfigError(ZeroConvError):
    """A TOML file that describes no training; the message begins with its name."""


@dataclass(frozen=True)
class Run:
    """A training as its file describes it: files and folders, and the options; `control` is what it begins with."""

    base: Path
    dataset: Path
    output: Path
    options: TrainingOptions
    control: Path | None = None


def read(path: Path, overrides: Mapping[str, Any]) -> Run:
    """The training that the TOML file describes, with the options `overrides` in place of its own.

    Relative paths are relative to the file. Raises ConfigError, and OptionsError for a value that no option takes.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give the path of a TOML file in UTF-8") from error
    try:
        found = _toml().loads(text)
    except ValueError as error:
        paths = ": write paths with / or in single quotes" if "\\" in text else ""
        raise ConfigError(f"{path} is no TOML file ({error}){paths}") from error
    for section in SECTIONS:
        table = found.get(section, {}) if section else found
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {section} is {table!r}: expected a section [{section}] with its keys")
        _check(path, section, table)
    paths = {}
    for section, key in (("model", "base"), ("data", "dataset"), ("", "output")):
        value = (found.get(section, {}) if section else found).get(key)
        if not isinstance(value, str):
            said = "lacks" if value is None else "has no path as"
            raise ConfigError(f"{path} {said} {_place(section, key)}: --defaults prints a whole file to begin with")
        paths[key] = path.absolute().parent / Path(value).expanduser()
    prediction = {key: value for key, value in found["model"].items() if key == "prediction"}
    options = TrainingOptions(**{**prediction, **found.get("training", {}), **overrides})
    begin = found["model"].get("control", "")
    if not isinstance(begin, str):
        raise ConfigError(f"{path} has no path as {_place('model', 'control')}: give a control's file, or leave it out")
    control = path.absolute().parent / Path(begin).expanduser() if begin else None
    return Run(paths["base"], paths["dataset"], paths["output"], options, control)


def _check(path: Path, section: str, keys: Iterable[str]) -> None:
    """Raise ConfigError for a key that the section does not have, saying which one is meant."""
    for key in keys:
        if key in SECTIONS[section]:
            continue
        elsewhere = [_place(other, key) for other, known in SECTIONS.items() if key in known]
        near = elsewhere or [_place(section, name) for name in get_close_matches(key, SECTIONS[section], 1)]
        meant = f"did you mean {near[0]}?" if near else f"it can be {', '.join(SECTIONS[section])}"
        raise ConfigError(f"{path}: {_place(section, key)} is not known: {meant}")


def _place(section: str, key: str) -> str:
    return f"{key} in [{section}]" if section else f"{key} at the top, before the first section"


def _toml() -> Any:
    """The module that reads TOML: Python's own from 3.11 on, else tomli where it is installed."""
    for name in ("tomllib", "tomli"):
        with suppress(ModuleNotFoundError):
            return import_module(name)
    raise ConfigError("Python before 3.11 reads no TOML by itself: run `pip install tomli`, or use a newer Python")


def defaults() -> str:
    """A TOML file with every option at its default, and what each means."""
    lines = [
        "# A training of ZeroConv: python -m controlnet_core.training THIS_FILE",
        "# Paths are relative to this file. What is left out has the value that stands here.",
        "",
        _line("output", "run", "folder of the run: checkpoints, samples, logs and control.safetensors"),
        "",
        "[model]",
        _line("base", "model.safetensors", "checkpoint of an SD1.x, SD2.x or SDXL model, or its UNet alone"),
        _line("prediction", OPTIONS["prediction"], MEANINGS["prediction"]),
        _line("control", "", "control or checkpoint of another run to begin with; nothing begins with a fresh one"),
        "",
        "[data]",
        _line("dataset", "dataset", "folder of a cached dataset, made by the node Make Control Dataset"),
        "",
        "[training]",
        *(_line(name, OPTIONS[name], MEANINGS[name]) for name in SECTIONS["training"]),
    ]
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any, meaning: str) -> str:
    written = f'"{value}"' if isinstance(value, str) else str(value).lower()
    return f"{key} = {written}".ljust(34) + f"# {meaning}"
