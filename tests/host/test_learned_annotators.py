"""Every learned annotator from download to hint: small random weights as the published files, a hub on the loopback.

A new annotator is tested as soon as it is in the list; a new network needs its small files in `MAKERS`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from skimage.data import astronaut

if TYPE_CHECKING:
    from hosting import Host

from zeroconv.annotators import ANNOTATORS, Annotator
from zeroconv.annotators.cache import HintCache
from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.networks import NETWORKS, File, Network, moge
from zeroconv.benchmarks import weights

from ..annotators import pretrained_tiny as tiny
from ..annotators import scripted_tiny, test_depth_anything_3
from ..annotators.loopback_hub import LoopbackHub, loopback_hub, set_offline
from ..annotators.test_moge import fill, settings

LEARNED = [annotator for annotator in ANNOTATORS if annotator.networks]
HINT = (1, 64, 85, 3)
"""What 96x128 pixels become at resolution 64."""
MASK = torch.zeros(1, 96, 128)
MASK[:, 30:50, 40:70] = 1.0
"""Of those pixels, for annotators that read a mask."""


# -- small files in the published layout -------------------------------------------------------------------------------


def anime(folder: Path) -> None:
    """netG.pth with its published keys and shapes, 218 MB of them: all are windows of one short row of numbers."""
    with torch.device("meta"):
        shapes = {key: weight.shape for key, weight in weights.anime_generator().state_dict().items()}
    numbers = torch.randn(80_000, generator=torch.Generator().manual_seed(0))

    def window(shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:
            return numbers.as_strided(shape, (1,))
        size = (2 / shape[1:].numel()) ** 0.5
        return (numbers * size).as_strided(shape, (41, 61, 4, 1))

    torch.save({f"module.{key}": window(shape) for key, shape in shapes.items()}, folder / "netG.pth")


def manga(folder: Path) -> None:
    """erika.pth with its published keys and shapes, 173 MB: windows of short rows of numbers that are spread alike."""
    numbers, rows = torch.randn(80_000, generator=torch.Generator().manual_seed(0)), {}

    def window(weight: torch.Tensor) -> torch.Tensor:
        if weight.numel() < 1000:
            return weight
        spread = float(f"{float(weight.std()):.1e}")
        return rows.setdefault(spread, numbers * spread).as_strided(weight.shape, (41, 61, 4, 1))

    torch.save({key: window(weight) for key, weight in weights.manga().items()}, folder / "erika.pth")


def moge_with_normals(folder: Path) -> None:
    said = settings(64, [0, 1], 60)
    network = moge.MoGe(said, 64, 2)
    fill(network)
    torch.save({"model_config": said, "model": network.state_dict()}, folder / "model.pt")


def oneformer_coco(folder: Path) -> None:
    """As `tiny.oneformer` has it, one class would win nearly everywhere: here the least likely one is the likeliest."""
    _, path = tiny.oneformer(folder, 133)
    state = torch.load(path, weights_only=True)
    key = "model.transformer_module.decoder.class_embed.weight"
    torch.save({**state, key: -state[key]}, path)


MAKERS: dict[str, Callable[[Path], object]] = {
    "hed": lambda folder: weights.write(folder, ["ControlNetHED.pth"]),
    "mlsd": lambda folder: weights.write(folder, ["mlsd_large_512_fp32.pth"]),
    "lineart_realistic": lambda folder: weights.write(folder, ["sk_model.pth"]),
    "lineart_coarse": lambda folder: weights.write(folder, ["sk_model2.pth"]),
    "lineart_anime": anime,
    "lineart_manga": manga,
    "teed": lambda folder: weights.write(folder, ["5_model.pth"]),
    "mteed": lambda folder: weights.write(folder, ["Anyline/MTEED.pth"]),
    "dpt_large": lambda folder: tiny.dpt(folder, hybrid=False),
    "dpt_hybrid": lambda folder: tiny.dpt(folder, hybrid=True),
    "depth_anything_v2_small": tiny.depth_anything,
    "depth_anything_3_small": test_depth_anything_3.write,
    "zoedepth": tiny.zoe,
    "moge2_small": moge_with_normals,
    "moge2_large": moge_with_normals,
    "marigold_normals": tiny.marigold,
    "oneformer_ade20k": lambda folder: tiny.oneformer(folder, 150),
    "oneformer_coco": oneformer_coco,
    "sam2_tiny": tiny.sam2,
    "lama": scripted_tiny.lama,
    "person_detector": tiny.person_detector,
    "pose_estimator": tiny.pose_estimator,
    "whole_pose_estimator": scripted_tiny.whole_pose,
}
"""By the name of a network, what writes its files, seeded and small, into an empty folder."""


@cache
def contents(network: Network) -> tuple[bytes, ...]:
    """The bytes of a network's files, in their order."""
    assert network.name in MAKERS, f"{network.name} is new: write what makes its small files into MAKERS"
    with TemporaryDirectory() as folder:
        MAKERS[network.name](Path(folder))
        for file in network.files:
            here = Path(folder) / file.name
            if not here.exists():  # transformers writes *.safetensors; some are published as torch's own files
                torch.save(load_file(here.with_name("model.safetensors")), here)
        return tuple((Path(folder) / file.name).read_bytes() for file in network.files)


# -- the host ----------------------------------------------------------------------------------------------------------


class Bench:
    """A host whose folder `annotators` is empty, with a hub that has the small files of all networks asked for."""

    def __init__(self, host: Host, hub: LoopbackHub, folder: Path, patch: pytest.MonkeyPatch):
        self.host, self.hub, self.folder = host, hub, folder
        self.adapter = sys.modules["zeroconv.nodes.host.annotators"]
        self.annotate = sys.modules["zeroconv.nodes.annotate"]
        self.built: list[str] = []
        self.patch = patch
        build = self.adapter._built

        def built(network: Network, paths: Sequence[Path]) -> torch.nn.Module:
            self.built.append(network.name)
            return build(network, paths)

        patch.setattr(self.adapter, "_built", built)
        self.forget()

    def forget(self) -> None:
        """As after a start of the host: no network is kept, no hint."""
        self.patch.setattr(self.adapter, "_patchers", {})
        self.forget_hints()

    def forget_hints(self) -> None:
        self.patch.setattr(self.annotate, "HINTS", HintCache(10**8))

    def publish(self, names: tuple[str, ...]) -> dict[File, bytes]:
        """Has the hub serve the files of these networks, and the table know them: their entries and contents."""
        networks, files = [], {}
        for name in names:
            (network,) = [entry for entry in NETWORKS if entry.name == name]
            made = dict(zip(map(served, network.files, contents(network)), contents(network), strict=True))
            networks.append(replace(network, files=tuple(made)))
            files |= made
        self.patch.setattr(self.adapter, "NETWORKS", tuple(networks))
        self.hub.files |= {f"{file.repository}/{file.name}": data for file, data in files.items()}
        return files

    def run(self, name: str, image: torch.Tensor, **parameters: Any) -> tuple[torch.Tensor, Any]:
        before = image.clone()
        (annotator,) = [annotator for annotator in LEARNED if annotator.name == name]
        given = {**parameters, **({"mask": MASK.clone()} if annotator.reads_mask else {})}
        hint, poses = self.host.call("Annotate", image=image, annotator=name, resolution=64, **given)
        assert torch.equal(image, before)
        assert hint.shape == HINT and hint.dtype == torch.float32
        assert hint.isfinite().all() and hint.min() >= 0 and hint.max() <= 1
        return hint, poses


def served(file: File, data: bytes) -> File:
    """The entry of a file that has other bytes than the published one; a checksum is known where it was known."""
    return replace(file, size=len(data), sha256=hashlib.sha256(data).hexdigest() if file.sha256 else None)


@pytest.fixture
def bench(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    import folder_paths
    from huggingface_hub import constants

    assert "Annotate" in host.ours
    monkeypatch.delenv("AUX_ANNOTATOR_CKPTS_PATH", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    places = {name: kept for name, kept in folder_paths.folder_names_and_paths.items() if name != "annotators"}
    places["custom_nodes"] = ([str(tmp_path / "custom_nodes")], set())
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", places)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    with loopback_hub() as hub:
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 20)
        yield Bench(host, hub, tmp_path / "models" / "annotators", monkeypatch)


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    """A head before a rocket, 96x128."""
    return torch.from_numpy(astronaut()[30:126, 190:318] / np.float32(255))[None]


@pytest.mark.parametrize("annotator", LEARNED, ids=[annotator.name for annotator in LEARNED])
def test_from_download_to_hint(annotator: Annotator, bench: Bench, picture: torch.Tensor):
    import comfy.model_management as management

    files = bench.publish(annotator.networks)
    paths = {file: bench.folder / file.repository / file.name for file in files}

    def put(wanted: Collection[File]) -> None:
        """Lets these files lie in the folder, and no others."""
        for file, path in paths.items():
            path.unlink(missing_ok=True)
            if file in wanted:
                path.write_bytes(files[file])

    hint, poses = bench.run(annotator.name, picture)
    # It shows something, and no plain colour.
    assert hint.std(dim=(1, 2)).max() > 0.05
    if annotator.gives_pose:
        (frame,) = poses
        assert (frame["canvas_height"], frame["canvas_width"]) == HINT[1:3]
        assert frame["people"] and len(frame["people"][0]["pose_keypoints_2d"]) == 18 * 3
    else:
        assert poses == []
    # The files came, each once, and nothing else.
    found = [path for path in bench.folder.rglob("*") if path.is_file()]
    assert {path: path.read_bytes() for path in found} == {paths[file]: data for file, data in files.items()}
    size = sum(map(len, files.values()))
    assert bench.hub.sent == size
    assert bench.built == list(annotator.networks)

    # Another picture: another hint, of the networks that are there.
    other, _ = bench.run(annotator.name, picture.flip(2))
    assert (other - hint).abs().mean() > 0.01
    assert bench.hub.sent == size
    assert bench.built == list(annotator.networks)

    # Kept networks need no files, and are as good after the host has moved them away.
    put([])
    management.unload_all_models()
    bench.forget_hints()
    again, told = bench.run(annotator.name, picture)
    assert torch.equal(again, hint) and told == poses
    assert bench.built == list(annotator.networks)

    # Without a hub, each file that is missing is named, and where to get it and to put it.
    bench.hub.close()
    set_offline(None, None)  # connections that are open would outlive the hub
    for missing in files:
        put([file for file in files if file != missing])
        bench.forget()
        with pytest.raises(AnnotatorError) as caught:
            bench.run(annotator.name, picture)
        said = str(caught.value)
        assert said == (
            f"{annotator.name}: no connection: get {missing.repository}/{missing.name} "
            f"({max(missing.size, 100_000) / 1e6:.1f} MB) from {bench.hub.url} and put it into {bench.folder}, "
            "in the folders of its name"
        )

    # With all of them put there, as the errors told, the hint is the same.
    put(files)
    bench.forget()
    by_hand, _ = bench.run(annotator.name, picture)
    assert torch.equal(by_hand, hint)


@pytest.mark.parametrize("name", ["human_pose", "dwpose"])
def test_nobody_found_is_said(name: str, bench: Bench, picture: torch.Tensor, caplog: pytest.LogCaptureFixture):
    (annotator,) = [annotator for annotator in LEARNED if annotator.name == name]
    bench.publish(annotator.networks)
    bench.run(name, picture)
    assert "nobody" not in caplog.text
    hint, (frame,) = bench.run(name, picture, **{f"{name}_detection_threshold": 1.0})
    assert not hint.any() and frame["people"] == []
    assert f"{name} found nobody in picture 1: the hint is black" in caplog.text
