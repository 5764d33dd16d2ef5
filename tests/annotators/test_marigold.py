"""Marigold's normals: diffusers' own pipeline on the same small files, colours, noise, and files that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from skimage.data import astronaut
from transformers import CLIPTextModel

from zeroconv.annotators import pipeline
from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.networks import NETWORKS, marigold
from zeroconv.annotators.normals import normal_marigold

from . import pretrained_tiny as tiny
from .seeded import hint_of, record


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tiny.marigold(tmp_path_factory.mktemp("marigold"))


@pytest.fixture(scope="module")
def network(files: list[Path]) -> Any:
    return marigold.build(*files)


def photograph(height: int, width: int) -> np.ndarray:
    return (astronaut()[:height, :width] / 255).astype(np.float32)


def test_the_list_names_these_files_and_a_licence(files: list[Path]):
    (entry,) = [entry for entry in NETWORKS if entry.name == "marigold_normals"]
    folder = files[0].parent
    assert [file.name for file in entry.files] == [str(path.relative_to(folder)) for path in files]
    assert entry.build == "marigold:build" and entry.licence.startswith("OpenRAIL++-M") and entry.commercial
    assert record("normal_marigold").packages == ("diffusers",)


@pytest.mark.parametrize("size", [(64, 64), (96, 130)])
def test_normals_are_those_of_diffusers(size: tuple[int, int], files: list[Path], network: Any):
    diffusers: Any = import_module("diffusers")
    folder = files[0].parent
    as_fp32: dict[str, Any] = {"variant": "fp16", "torch_dtype": torch.float32}
    parts: dict[str, Any] = {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", **as_fp32),
        "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae", **as_fp32),
        "scheduler": diffusers.DDIMScheduler.from_pretrained(folder / "scheduler"),
        "text_encoder": None,
        "tokenizer": None,
    }
    theirs = diffusers.MarigoldNormalsPipeline(**parts, prediction_type="normals")
    words: Any = CLIPTextModel.from_pretrained(folder / "text_encoder", variant="fp16", torch_dtype=torch.float32)
    with torch.no_grad():
        theirs.empty_text_embedding = words(torch.tensor([[49406, 49407]]))[0]
    image = photograph(*size)
    given: dict[str, Any] = {"num_inference_steps": 2, "processing_resolution": 64}
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    reference = theirs(pixels, generator=torch.Generator().manual_seed(7), **given).prediction[0]
    assert reference.std(axis=(0, 1)).max() > 0.05
    np.testing.assert_allclose(marigold.normals(network, image, 7), reference, atol=1e-4)
    hint = hint_of("normal_marigold", [network], image, seed=7)
    np.testing.assert_allclose(hint, (1 + reference * (-1, 1, 1)) / 2, atol=1e-4)


@pytest.mark.parametrize(
    ("normal", "colour"),
    [((0, 0, 1), (0.5, 0.5, 1)), ((-1, 0, 0), (1, 0.5, 0.5)), ((0, 1, 0), (0.5, 1, 0.5)), ((1, 0, 0), (0, 0.5, 0.5))],
)
def test_left_is_red_up_is_green_front_is_blue(
    network: Any, normal: tuple[float, ...], colour: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
):
    answer = np.broadcast_to(np.array(normal), (1, 32, 48, 3))
    monkeypatch.setattr(network, "forward", lambda *_: answer)
    hint = normal_marigold(network, np.zeros((32, 48, 3), np.float32))
    np.testing.assert_allclose(hint, np.broadcast_to(colour, (32, 48, 3)), atol=1e-6)
    monkeypatch.setattr(network, "forward", lambda *_: answer * np.nan)
    with pytest.raises(AnnotatorError, match="the network answered with numbers that are not finite"):
        normal_marigold(network, np.zeros((32, 48, 3), np.float32))


def test_several_pictures_are_each_by_itself_and_the_seed_counts(network: Any):
    pictures = [photograph(96, 128), photograph(224, 288)[-96:, -128:]]
    both = [hint for hint, _ in pipeline.see(record("normal_marigold"), pictures, networks=[network])]
    for picture, hint in zip(pictures, both, strict=True):
        np.testing.assert_allclose(hint, hint_of("normal_marigold", [network], picture), atol=1e-5)
    assert np.abs(both[0] - both[1]).mean() > 0.01
    other = hint_of("normal_marigold", [network], pictures[0], seed=1)
    assert np.abs(other - both[0]).mean() > 0.01
    with pytest.raises(AnnotatorError, match="image is 200x1, too thin"):
        normal_marigold(network, photograph(1, 200))


def test_a_vae_with_older_names_is_the_same(files: list[Path], network: Any, tmp_path: Path):
    paths = list(files)
    older = {today: name for name, today in marigold.OLDER_NAMES.items()}
    weights = load_file(paths[5])
    for today, name in older.items():
        weights = {key.replace(today, name): weight for key, weight in weights.items()}
    assert any(".proj_attn." in key for key in weights)
    paths[5] = tmp_path / "vae.safetensors"
    save_file(weights, paths[5])
    image = photograph(64, 64)
    expected = marigold.normals(network, image, 0)
    np.testing.assert_array_equal(marigold.normals(marigold.build(*paths), image, 0), expected)  # pyright: ignore


def without(files: list[Path], index: int, path: Path) -> None:
    weights = load_file(files[index])
    del weights[next(iter(weights))]
    save_file(weights, path)


def without_normals(files: list[Path], index: int, path: Path) -> None:
    path.write_text(json.dumps({**json.loads(files[index].read_text()), "prediction_type": "depth"}))


@pytest.mark.parametrize(
    ("index", "change", "said"),
    [
        (0, without_normals, "describes no Marigold with normals"),
        (1, lambda _files, _index, path: path.write_text("<html>"), "cannot be read as settings"),
        (3, without, "lacks 1 weights of CLIPTextModel"),
        (5, without, "is not the weights of AutoencoderKL: it lacks"),
        (7, without, "is not the weights of UNet2DConditionModel: it lacks"),
    ],
)
def test_other_files_are_named(index: int, change: Callable[..., None], said: str, files: list[Path], tmp_path: Path):
    changed = tmp_path / files[index].name
    change(files, index, changed)
    with pytest.raises(AnnotatorError, match=said):
        marigold.build(*files[:index], changed, *files[index + 1 :])
