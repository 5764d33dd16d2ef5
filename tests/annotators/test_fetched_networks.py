"""From the hub to a hint: networks that came later, each fetched from a loopback hub, and missing without one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zeroconv.annotators import pipeline
from zeroconv.annotators.fetching import fetch, place
from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.networks import NETWORKS, Network
from zeroconv.benchmarks import weights

from .loopback_hub import LoopbackHub, loopback_hub, set_offline
from .seeded import photograph, record


def seeded_file(name: str) -> Callable[[Path], list[Path]]:
    """Writes one of the benchmark's seeded files."""

    def write(folder: Path) -> list[Path]:
        weights.write(folder, [name])
        return [folder / name]

    return write


WRITERS: dict[str, Callable[[Path], list[Path]]] = {"teed": seeded_file("5_model.pth")}
"""What writes each network's files into a folder, in their order."""
USERS = {"teed": "teed"}
"""An annotator of each network."""
EACH = pytest.mark.parametrize("name", WRITERS)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with loopback_hub() as served:
        yield served


def published(name: str, hub: LoopbackHub, folder: Path) -> Network:
    """The network's entry in the table, for random files of its kind that the hub serves in place of the real ones."""
    (network,) = [network for network in NETWORKS if network.name == name]
    folder.mkdir()
    contents = [path.read_bytes() for path in WRITERS[name](folder)]
    hub.files = {f"{file.repository}/{file.name}": data for file, data in zip(network.files, contents, strict=True)}
    files = tuple(
        replace(file, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        for file, data in zip(network.files, contents, strict=True)
    )
    return replace(network, files=files)


@EACH
def test_fetched_and_built_it_makes_a_hint(name: str, hub: LoopbackHub, tmp_path: Path):
    network = published(name, hub, tmp_path / "published")
    paths = fetch(network, [tmp_path / "models"], lambda done, total: None)
    assert paths == [place(file, tmp_path / "models") for file in network.files]
    user = record(USERS[name])
    assert name in user.networks
    loaded: dict[str, Any] = {name: network.load(paths)}
    for other in user.networks:
        if other != name:
            raise AssertionError(f"{other} has no file here")
    picture = photograph(96, 128)
    hint, _ = pipeline.annotate(user, picture, networks=[loaded[one] for one in user.networks])
    assert hint.shape == picture.shape and hint.dtype == np.float32
    assert 0 <= hint.min() and hint.max() <= 1


@EACH
def test_offline_the_error_names_the_file_and_its_place(
    name: str, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (network,) = [network for network in NETWORKS if network.name == name]
    set_offline(monkeypatch, True)
    with pytest.raises(AnnotatorError) as caught:
        fetch(network, [tmp_path], lambda done, total: None)
    first = network.files[0]
    assert str(caught.value).startswith(f"{name} needs {first.name} of {first.repository} (about ")
    assert "HF_HUB_OFFLINE is set" in str(caught.value) and str(place(first, tmp_path)) in str(caught.value)
    assert hub.sent == 0
