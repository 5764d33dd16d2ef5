"""A learned annotator of one parameter, which tells what of it was built and ran, and a plain one beside it."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from zeroconv.annotators import ANNOTATORS, PARAMETERS, Annotator, Parameter
from zeroconv.annotators.cache import HintCache
from zeroconv.annotators.networks import File, Network

if TYPE_CHECKING:
    from hosting import Host

WEIGHTS = {"scale": torch.tensor([0.5, 0.25, 0.125])}
SIZE = len(save(WEIGHTS))


class Tiny(torch.nn.Module):
    """A network of one parameter. As those of transformers, it has a `device` of its own, which nobody may set."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(3))

    @property
    def device(self) -> torch.device:
        return self.scale.device

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return picture * self.scale


class Fake:
    """What ran: paths that networks were built from, and pictures that were annotated, by their sizes."""

    def __init__(self) -> None:
        self.built: list[Path] = []
        self.ran: list[tuple[int, ...]] = []
        self.devices: list[torch.device] = []
        self.before: Any = None

    def build(self, path: Path) -> Tiny:
        self.built.append(path)
        network = Tiny()
        network.load_state_dict(load_file(path))
        return network.eval()

    def tiny(self, network: Tiny, picture: Any, gain: float = 1.0) -> Any:
        if self.before is not None:
            self.before(len(self.ran))
        self.ran.append(picture.shape)
        self.devices.append(network.device)
        return (network(torch.from_numpy(picture).to(network.device)) * gain).cpu().numpy()

    def plain(self, picture: Any) -> Any:
        self.ran.append(picture.shape)
        return picture


@pytest.fixture
def fake(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    """Three annotators of this test alone; `annotators` is an empty folder of the host, no other pack has weights."""
    import folder_paths
    from huggingface_hub import constants

    assert "Annotate" in host.ours
    fake = Fake()
    annotate, adapter = sys.modules["zeroconv.nodes.annotate"], sys.modules["zeroconv.nodes.host.annotators"]
    module = SimpleNamespace(build=fake.build)
    monkeypatch.setitem(sys.modules, "zeroconv.annotators.networks.fake", module)
    entries = (
        Annotator("tiny", fake.tiny, (Parameter("gain", "How bright."),), networks=("tiny",), multiple=64),
        Annotator("plain", fake.plain),
        Annotator("lacking", fake.tiny, networks=("tiny",), packages=("no_such_package",)),
    )
    monkeypatch.setattr(annotate, "ANNOTATORS", (*entries, *ANNOTATORS))
    listed = [(entry, parameter) for entry in entries for parameter in entry.parameters]
    monkeypatch.setattr(annotate, "PARAMETERS", (*listed, *PARAMETERS))
    monkeypatch.setattr(annotate, "HINTS", HintCache(10**8))
    file = File("someone/tiny", "tiny.safetensors", SIZE, hashlib.sha256(save(WEIGHTS)).hexdigest())
    monkeypatch.setattr(adapter, "NETWORKS", (Network("tiny", "fake:build", (file,), "MIT"),))
    monkeypatch.setattr(adapter, "_patchers", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.delenv("AUX_ANNOTATOR_CKPTS_PATH", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    others = {name: kept for name, kept in folder_paths.folder_names_and_paths.items() if name != "annotators"}
    others["custom_nodes"] = ([str(tmp_path / "custom_nodes")], set())
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", others)
    return fake


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The weights where the pack's users have them: models/annotators/<repository>/<name>."""
    return write(tmp_path / "models" / "annotators" / "someone" / "tiny" / "tiny.safetensors")


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(WEIGHTS, path)
    return path


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 64, 96, 3, generator=torch.Generator().manual_seed(seed))


def annotate(host: Host, image: torch.Tensor, annotator: str = "tiny", **inputs: Any) -> torch.Tensor:
    return host.call("Annotate", image=image, annotator=annotator, resolution=0, **inputs)[0]
