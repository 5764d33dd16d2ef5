"""A training's TOML file: which model, which dataset, where to, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..data.config import (
    DATA,
    MODEL,
    OF_TRAINING,
    TOP,
    ConfigError,
    Making,
    line,
    load,
    loras_of,
    optional_path_of,
    path_of,
    section,
)
from ..data.config import read as read_data
from .options import MEANINGS, TrainingOptions
from .validation import ValidationPrompt

__all__ = ["OPTIONS", "SECTIONS", "ConfigError", "Run", "defaults", "read"]

OPTIONS = {field.name: field.default for field in fields(TrainingOptions)}
SECTIONS = {
    "": TOP,
    "model": (*MODEL, *OF_TRAINING),
    "data": tuple(DATA),
    "training": tuple(name for name in OPTIONS if name != "prediction"),
}
"""The keys of each section; those of "" stand at the top of the file."""

AUTO = "auto"
"""In place of a prediction: what the model's file says, as where nothing is said."""


@dataclass(frozen=True)
class Run:
    """A training as its file describes it: files and folders, and the options.

    Without `prediction_given` what the model predicts is not `options.prediction` but what its file says. `vae` shows
    samples in true colours, and `control` is what it begins with. `prompts` are sampled with the held-out pictures;
    `tokenizer` is for those that the dataset does not have. With `making` there is no cached dataset: `dataset` is the
    folder of pictures, which are read as that says. `trackers` are told of losses and samples.
    """

    base: Path
    dataset: Path
    output: Path
    options: TrainingOptions
    prediction_given: bool = True
    vae: Path | None = None
    control: Path | None = None
    loras: tuple[Path, ...] = ()
    tokenizer: Path | None = None
    prompts: tuple[ValidationPrompt, ...] = ()
    making: Making | None = None
    trackers: tuple[str, ...] = ()

    def predicting(self, prediction: str) -> Run:
        """This training of a model that predicts this."""
        return replace(self, options=replace(self.options, prediction=prediction))


def read(path: Path | None, overrides: Mapping[str, Any]) -> Run:
    """The training that the TOML file describes, with `overrides` in place of its own options and paths.

    Relative paths are relative to the file. Raises ConfigError, and OptionsError for a value that no option takes.
    """
    found = load(path, SECTIONS, overrides)
    making = None if found["data"].get("cached", True) is True else read_data(path, overrides)
    source = "dataset" if making is None else "folder"
    base, dataset, output = (
        path_of(path, found, where, key) for where, key in (("model", "base"), ("data", source), ("", "output"))
    )
    vae, control, tokenizer = (optional_path_of(path, found, "model", key) for key in ("vae", "control", "tokenizer"))
    prediction = {key: value for key, value in found["model"].items() if key == "prediction" and value != AUTO}
    options = TrainingOptions(**prediction, **found["training"])
    loras, prompts = loras_of(path, found), _prompts(path, found)
    return Run(
        base,
        dataset,
        output,
        options,
        bool(prediction),
        vae,
        control,
        loras,
        tokenizer,
        prompts,
        making,
        _trackers(path, found),
    )


def _trackers(path: Path | None, found: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    named = found[""].get("trackers", [])
    if not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ConfigError(f'{path}: trackers is {named!r}: expected a list of names such as ["wandb"]')
    return tuple(named)


def _prompts(path: Path | None, found: Mapping[str, Mapping[str, Any]]) -> tuple[ValidationPrompt, ...]:
    """The user's own prompts and hints: the sections [[validation]] of the file."""
    tables = found[""].get("validation", [])
    alike = {"hint": str, "prompt": str}
    for table in tables if isinstance(tables, list) else [None]:
        if not (isinstance(table, dict) and "hint" in table and all(type(x) is alike.get(k) for k, x in table.items())):
            raise ConfigError(
                f"{path}: validation is {tables!r}: expected sections [[validation]], each with a hint and a prompt"
            )
    return tuple(
        ValidationPrompt(table.get("prompt", ""), path_of(path, {"validation": table}, "validation", "hint"))
        for table in tables
    )


def defaults() -> str:
    """A TOML file with every option at its default, and what each means."""
    lines = [
        "# A training of ZeroConv: python -m controlnet_core.data THIS_FILE makes its dataset, and",
        "# python -m controlnet_core.training THIS_FILE trains on it.",
        "# Paths are relative to this file. What is left out has the value that stands here.",
        "",
        line("output", "run", "folder of the run: checkpoints, samples, logs and control.safetensors"),
        line("trackers", [], 'of accelerate, such as ["wandb"], told beside the files in it and TensorBoard'),
        *section("model", MODEL),
        line("prediction", AUTO, f"{MEANINGS['prediction']}; auto: as the model's own file says"),
        line("control", "", "control, or checkpoint of another run, to begin with; none: a fresh one"),
        *section("data", DATA),
        *section("training", {name: (OPTIONS[name], MEANINGS[name]) for name in SECTIONS["training"]}),
        "",
        "# Prompts and hints of your own, sampled as often as the held-out pictures: any number of such sections.",
        "# [[validation]]",
        line("# hint", "ball.png", "a picture that is a hint"),
        line("# prompt", "a red ball", "what is sampled from it"),
    ]
    return "\n".join(lines) + "\n"
