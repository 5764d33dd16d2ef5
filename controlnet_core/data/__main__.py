"""Make a dataset from a terminal, without ComfyUI: python -m controlnet_core.data CONFIG.toml."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..errors import ZeroConvError
from ..files.lock import locked
from . import caching, config, encoders, sources
from .caching import Annotate
from .config import GIVEN, ConfigError, Making
from .dataset import Dataset
from .encoders import Encoders
from .pictures import PictureError

PERIOD = 5.0
"""Seconds between lines on the terminal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the dataset that the arguments describe; gives the exit code: 0, 1 after an error, 130 after Ctrl-C."""
    given = vars(_parser().parse_args(config.dashed(sys.argv[1:] if arguments is None else arguments)))
    if given.pop("defaults"):
        print("\n".join([*config.section("model", config.MODEL), *config.section("data", config.DATA)]).lstrip())
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        print(make(config.read(given.pop("config"), given)), flush=True)
    except ZeroConvError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("stopped: the same command goes on from there", file=sys.stderr, flush=True)
        return 130
    return 0


def make(making: Making) -> str:
    """The dataset as it is asked for, and what it holds, in lines; raises a ZeroConvError that says what is wrong."""
    options = making.options
    if not making.cached:
        raise ConfigError(
            "cached in [data] is false, so there is nothing to make: python -m controlnet_core.training reads the "
            "pictures themselves"
        )
    source = sources.read(making.folder)
    # Who cannot have the annotator need not wait for the encoders.
    annotate, ahead = (None, False) if options.hints == GIVEN else annotator(making)
    found = lab_encoders() if (making.base / "autoencoder.safetensors").is_file() else None
    found = found or encoders.read(making.base, making.tokenizer, making.vae, making.loras)
    started = said = time.monotonic()
    run = caching.make(
        making.dataset, source.items, found.pictures, found.prompt, annotate, options, making.prompts, ahead
    )
    with locked(making.dataset), closing(run):  # type: ignore[type-var]
        for progress in run:
            now = time.monotonic()
            if now - said > PERIOD:
                left = (now - started) * (progress.steps - progress.step) / max(1, progress.step)
                print(f"{progress.step} of {progress.steps} encoded, {left:.0f} s left", flush=True)
                said = now
    ended = replace(progress, skipped=(*source.skipped, *progress.skipped))
    layout = f"{making.folder}, read as {source.layout}"
    return caching.report(Dataset.open(making.dataset), layout, source.items, ended)


# -- the rooms beside the core: only here does it meet them ------------------------------------------------------------


def annotator(making: Making) -> tuple[Annotate, bool]:
    """What makes hints with an annotator's defaults, and whether many threads may: it has no networks.

    Raises ConfigError for a name that is none, or reads more.
    """
    room, images = beside("annotators"), beside("annotators.images")
    makers = {one.name: one for one in room.ANNOTATORS if not (one.reads_mask or one.reads_pose)}
    chosen = makers.get(making.options.hints)
    if chosen is None:
        raise ConfigError(f"annotator is {making.options.hints}: choose {GIVEN}, or one of {', '.join(makers)}")
    try:
        networks = [_network(name, making.annotator_weights) for name in chosen.networks]
    except images.AnnotatorError as error:
        raise ConfigError(str(error)) from error

    def annotate(picture: np.ndarray) -> np.ndarray:
        try:
            hint, _ = beside("annotators.pipeline").annotate(
                chosen, picture, making.options.hint_resolution, networks=networks
            )
        except images.AnnotatorError as error:
            raise PictureError(str(error)) from error
        return images.resized(hint, *picture.shape[:2])

    return annotate, not networks


def _network(name: str, folder: Path) -> Any:
    """An annotator's network, its files found or fetched."""
    (network,) = (one for one in beside("annotators.networks").NETWORKS if one.name == name)
    paths = beside("annotators.fetching").fetch(network, [folder], lambda *_: None)
    return network.load(paths).to("cuda" if torch.cuda.is_available() else "cpu")


def lab_encoders() -> Encoders:
    """The encoders of the embedded model, whose layouts are its own."""
    model = beside("lab.pipeline").LabModel.load(())
    return Encoders(model.encode_pictures, lambda prompt: (model.encode([prompt])[0], None))


def beside(name: str) -> Any:
    """A module of the pack that lies beside the core; ConfigError where the core stands alone."""
    try:
        return import_module(f"...{name}", __package__)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{name} cannot be had ({error}): run this in the folder of the whole pack") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m controlnet_core.data",
        allow_abbrev=False,
        description="Encode pictures, captions and hints for a training. What is there already is not encoded again: "
        "add pictures, and run it again.",
    )
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.toml", help="the file that describes the run")
    parser.add_argument("--defaults", action="store_true", help="print the sections that are read, and end")
    options = parser.add_argument_group("in place of what the file says")
    for name, (default, meaning) in {**config.MODEL, **config.DATA}.items():
        kind: dict[str, Any] = {"type": Path if name in config.PATHS else type(default), "metavar": str(default)}
        if isinstance(default, list):
            kind = {"type": Path, "nargs": "*", "metavar": "PATH"}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        options.add_argument(f"--{name.replace('_', '-')}", dest=name, default=argparse.SUPPRESS, help=meaning, **kind)
    return parser


if __name__ == "__main__":
    # Once more, as a part of the pack: the top-level package that Python started has nothing beside it.
    pack = ModuleType("zeroconv")
    pack.__path__ = [str(Path(__file__).absolute().parents[2])]
    sys.modules[pack.__name__] = pack
    sys.exit(import_module(f"{pack.__name__}.controlnet_core.data.__main__").main())
