"""Seeded random weights as published files, and our annotators and controlnet-aux's run on one photograph with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from skimage.data import astronaut
from torch import nn

from zeroconv.annotators import ANNOTATORS, Annotator, pipeline
from zeroconv.annotators.networks import NETWORKS
from zeroconv.benchmarks import weights


def photograph(height: int, width: int) -> np.ndarray:
    """The upper left part of a portrait with a rocket, (height,width,3) uint8, at most 512x512."""
    return np.ascontiguousarray(astronaut()[:height, :width])


def record(name: str) -> Annotator:
    (found,) = [annotator for annotator in ANNOTATORS if annotator.name == name]
    return found


def load(name: str, folder: Path) -> list[nn.Module]:
    """The networks of an annotator, from files in a folder that are written there unless they exist."""
    loaded = []
    for wanted in record(name).networks:
        (network,) = [network for network in NETWORKS if network.name == wanted]
        weights.write(folder, [file.name for file in network.files if not (folder / file.name).exists()])
        loaded.append(network.load([folder / file.name for file in network.files]))
    return loaded


def hint_of(name: str, networks: list[nn.Module], image: np.ndarray, **parameters: Any) -> np.ndarray:
    """What a user gets of a picture at its own size."""
    before = image.copy()
    hint, _ = pipeline.annotate(record(name), image, networks=networks, parameters=parameters)
    np.testing.assert_array_equal(image, before)
    assert hint.shape == image.shape and hint.dtype == np.float32
    assert hint.min() >= 0 and hint.max() <= 1
    return hint


def theirs(detector: Any, image: np.ndarray, **parameters: Any) -> np.ndarray:
    """What controlnet-aux makes of a picture at its own size, 0..255; its sides are multiples of 64."""
    side = min(image.shape[:2])
    made = detector(image, detect_resolution=side, image_resolution=side, output_type="np", **parameters)
    assert made.shape == image.shape
    return made.astype(np.float32)


def assert_agrees(hint: np.ndarray, reference: np.ndarray, levels: float) -> None:
    """No pixel is more than `levels` of 255 apart; before, that the picture moves the reference by 5 % at all."""
    assert reference.std() > 0.05 * 255
    assert np.abs(hint * 255 - reference).max() <= levels
