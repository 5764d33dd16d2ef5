"""The TOML file of a training: how it is read, and what it says about the dataset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import ZeroConvError
from .writer import CachingOptions

GIVEN = "given"
"""In place of an annotator's name: hints are those of the folder."""

TOP = ("output", "trackers", "model", "data", "training", "validation")
"""The keys at the top of the file."""

MODEL: dict[str, tuple[Any, str]] = {
    "base": ("model.safetensors", "a checkpoint of SD1.x, SD2.x or SDXL, a folder as diffusers has it, or lab/weights"),
    "tokenizer": ("", "folder of CLIP's vocab.json and merges.txt, where the checkpoint has none beside it"),
    "loras": ([], "LoRAs as sd-scripts writes them, merged into the base and its text encoder"),
    "vae": ("", "a VAE in place of the base's own; samples have its colours (name the base itself for its own)"),
}

DATA: dict[str, tuple[Any, str]] = {
    "dataset": ("dataset", "folder of the cached dataset"),
    "folder": ("pictures", "folder of pictures, captions and hints that the dataset is made of"),
    "cached": (True, "false: no dataset is made; training encodes each picture and caption whenever it needs it"),
    "resolution": (CachingOptions.resolution, "pictures become about as large as a square of this side"),
    "annotator": (GIVEN, "given: the folder's own hints; else the annotator that makes a hint of every picture"),
    "annotator_resolution": (0, "short side of what the annotator looks at; 0: the size that is trained on"),
    "annotator_weights": ("annotators", "folder of the files that annotators with networks read, or fetch"),
    "mirror": (CachingOptions.mirror, "train on the mirror image of each picture as well"),
    "crops": (
        CachingOptions.crops,
        "parts of each picture: 1 is its centre; more are slightly enlarged, and hints follow",
    ),
    "caption_variants": (CachingOptions.caption_variants, "forms of each caption: 1 is itself; more shuffle its tags"),
    "tag_dropout": (CachingOptions.tag_dropout, "share of the tags that are left out of such a form"),
    "keep_tags": (CachingOptions.keep_tags, "tags that stay in front of it"),
    "batch_size": (CachingOptions.batch_size, "pictures that are encoded at once"),
}
"""Each key with its default and what it means; `base`, `dataset` and `folder` have to be given."""

RANGES = {
    "resolution": (64, 8192),
    "annotator_resolution": (0, 8192),
    "crops": (1, 64),
    "caption_variants": (1, 64),
    "tag_dropout": (0, 1),
    "keep_tags": (0, 1000),
    "batch_size": (1, 4096),
}

OF_TRAINING = ("prediction", "control")
"""Keys of [model] that the training reads alone."""

PATHS = ("output", "base", "tokenizer", "vae", "dataset", "folder", "annotator_weights")


class ConfigError(ZeroConvError):
    """A TOML file that describes no training and no dataset; the message begins with its name."""


@dataclass(frozen=True)
class Making:
    """A dataset as its file describes it: what it is made with, what of, and where to.

    Without `cached` it is not made: training reads `folder`. `prompts` are those that are sampled on the way.
    """

    base: Path
    tokenizer: Path | None
    vae: Path | None
    loras: tuple[Path, ...]
    folder: Path
    dataset: Path
    annotator_weights: Path
    options: CachingOptions
    cached: bool = True
    prompts: tuple[str, ...] = ()


def read(path: Path | None, overrides: Mapping[str, Any]) -> Making:
    """The dataset that the TOML file describes, with the values `overrides` in place of its own.

    The sections of the training are not looked at. Raises ConfigError.
    """
    # The training's own keys are for its own command to judge.
    found = load(path, {"": TOP, "model": (*MODEL, *OF_TRAINING), "data": tuple(DATA)}, overrides)
    given = ("dataset", "folder", "annotator_weights")
    said = {key: found["data"].get(key, default) for key, (default, _) in DATA.items() if key not in given}
    for key, value in said.items():
        if type(value) is int and isinstance(DATA[key][0], float):
            said[key] = value = float(value)
        if type(value) is not type(DATA[key][0]):
            raise ConfigError(f"{_file(path)}{place('data', key)} is {value!r}: expected one like {DATA[key][0]!r}")
    for key, (least, most) in RANGES.items():
        if not least <= said[key] <= most:
            raise ConfigError(f"{_file(path)}{place('data', key)} is {said[key]}: expected {least} to {most}")
    if not said["cached"] and said["annotator"] != GIVEN:
        raise ConfigError(
            f"{_file(path)}{place('data', 'cached')} is false, which goes with hints that lie beside the pictures "
            f"(annotator {GIVEN}), found annotator {said['annotator']}"
        )
    validation = found[""].get("validation", [])
    prompts = (
        [each.get("prompt") for each in validation if isinstance(each, dict)] if isinstance(validation, list) else []
    )
    return Making(
        base=path_of(path, found, "model", "base"),
        tokenizer=optional_path_of(path, found, "model", "tokenizer"),
        vae=optional_path_of(path, found, "model", "vae"),
        loras=loras_of(path, found),
        folder=path_of(path, found, "data", "folder"),
        dataset=path_of(path, found, "data", "dataset" if said["cached"] else "folder"),
        annotator_weights=path_of(path, found, "data", "annotator_weights", DATA["annotator_weights"][0]),
        options=CachingOptions(
            resolution=said["resolution"],
            mirror=said["mirror"],
            hints=said["annotator"],
            hint_resolution=0 if said["annotator"] == GIVEN else said["annotator_resolution"],
            **{key: said[key] for key in ("batch_size", "crops", "caption_variants", "tag_dropout", "keep_tags")},
        ),
        cached=said["cached"],
        prompts=tuple(prompt for prompt in prompts if isinstance(prompt, str)),
    )


def load(
    path: Path | None, sections: Mapping[str, tuple[str, ...]], overrides: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The values of each of `sections` in the TOML file, "" being the top of it, each key one that its section has.

    `overrides` take the place of what the file says, by key; without a file they are all there is. Raises ConfigError.
    """
    found = {} if path is None else _parsed(path)
    tables = {}
    for section, keys in sections.items():
        table = found.get(section, {}) if section else found
        if not isinstance(table, dict):
            raise ConfigError(f"{_file(path)}{section} is {table!r}: expected a section [{section}] with its keys")
        _check(path, sections, section, table)
        tables[section] = {**table, **{key: value for key, value in overrides.items() if key in keys}}
    return tables


def path_of(
    path: Path | None, found: Mapping[str, Mapping[str, Any]], section: str, key: str, default: str | None = None
) -> Path:
    """What `key` names: relative to the TOML file where that says it, to the working folder where a flag does (a Path).

    Raises ConfigError where it is missing and has no default, or is no path.
    """
    value = found[section].get(key, default)
    if isinstance(value, Path):
        return value.expanduser().absolute()
    if isinstance(value, str):
        return (Path.cwd() if path is None else path.absolute().parent) / Path(value).expanduser()
    if path is None:
        raise ConfigError(f"no file was given: --defaults prints one to begin with; without one --{key} must be given")
    said = "lacks" if value is None else "has no path as"
    raise ConfigError(f"{path} {said} {place(section, key)}: --defaults prints a whole file to begin with")


def optional_path_of(path: Path | None, found: Mapping[str, Mapping[str, Any]], section: str, key: str) -> Path | None:
    """`path_of`, None for a key that is left out or empty."""
    return path_of(path, found, section, key) if found[section].get(key) else None


def loras_of(path: Path | None, found: Mapping[str, Mapping[str, Any]]) -> tuple[Path, ...]:
    """The files that `loras` in [model] names; raises ConfigError where it is no list of paths."""
    named = found["model"].get("loras", [])
    if not isinstance(named, list):
        raise ConfigError(f"{_file(path)}{place('model', 'loras')} is {named!r}: expected a list of paths")
    return tuple(path_of(path, {"model": {"loras": each}}, "model", "loras") for each in named)


def place(section: str, key: str) -> str:
    """Where a key stands, in words."""
    return f"{key} in [{section}]" if section else f"{key} at the top, before the first section"


def line(key: str, value: Any, meaning: str) -> str:
    """A line of a TOML file, with what it means."""
    written = f'"{value}"' if isinstance(value, str) else str(value).lower()
    return f"{key} = {written}".ljust(34) + f"# {meaning}"


def section(name: str, keys: Mapping[str, tuple[Any, str]]) -> list[str]:
    """The lines of a section with every key at its default."""
    return ["", f"[{name}]", *(line(key, value, meaning) for key, (value, meaning) in keys.items())]


def dashed(arguments: Iterable[str]) -> list[str]:
    """The words of a command line with dashes in place of the underscores of their flags: both are the same flag."""
    parts = ((word.partition("=") if word.startswith("--") else ("", "", word)) for word in arguments)
    return [flag.replace("_", "-") + equals + value for flag, equals, value in parts]


def _parsed(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give the path of a TOML file in UTF-8") from error
    try:
        return _toml().loads(text)
    except ValueError as error:
        paths = ": write paths with / or in single quotes" if "\\" in text else ""
        raise ConfigError(f"{path} is no TOML file ({error}){paths}") from error


def _check(path: Path | None, sections: Mapping[str, tuple[str, ...]], section: str, keys: Iterable[str]) -> None:
    """Raise ConfigError for a key that the section does not have, saying which one is meant."""
    for key in keys:
        if key in sections[section]:
            continue
        elsewhere = [place(other, key) for other, known in sections.items() if key in known]
        near = elsewhere or [place(section, name) for name in get_close_matches(key, sections[section], 1)]
        meant = f"did you mean {near[0]}?" if near else f"it can be {', '.join(sections[section])}"
        raise ConfigError(f"{_file(path)}{place(section, key)} is not known: {meant}")


def _file(path: Path | None) -> str:
    return "" if path is None else f"{path}: "


def _toml() -> Any:
    """The module that reads TOML: Python's own from 3.11 on, else tomli where it is installed."""
    for name in ("tomllib", "tomli"):
        with suppress(ModuleNotFoundError):
            return import_module(name)
    raise ConfigError("Python before 3.11 reads no TOML by itself: run `pip install tomli`, or use a newer Python")
