"""A file becomes a network strictly, or says what is wrong with it; records, licences and defaults of our networks."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from zeroconv.annotators.images import AnnotatorError, grey
from zeroconv.annotators.networks import NETWORKS, learned
from zeroconv.annotators.networks.hed import HED, build

from .seeded import hint_of, load, photograph, record

OURS = ("hed", "scribble_hed", "mlsd", "lineart_realistic", "lineart_coarse", "lineart_anime")


def small() -> nn.Module:
    return nn.Conv2d(3, 1, 1)


def write(path: Path, **tensors: torch.Tensor) -> Path:
    torch.save(tensors, path)
    return path


def test_half_precision_and_parallel_files_become_fp32_in_eval_mode(tmp_path: Path):
    weight = torch.arange(3.0).reshape(1, 3, 1, 1)
    path = write(tmp_path / "a.pth", **{"module.weight": weight.half(), "module.bias": torch.ones(1)})
    network = learned.build(small, path)
    assert {key: value.dtype for key, value in network.state_dict().items()} == {
        "weight": torch.float32,
        "bias": torch.float32,
    }
    torch.testing.assert_close(network.weight, weight, rtol=0, atol=0)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_safetensors_are_read_too(tmp_path: Path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(1, 3, 1, 1), "bias": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert learned.build(small, tmp_path / "a.safetensors")(torch.ones(1, 3, 1, 1)).item() == 3.0


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"weight": (1, 3, 1, 1)}, r"a.pth is not the weights of Conv2d: it lacks bias and has unknown none: put the"),
        (
            {"weight": (1, 3, 1, 1), "bias": (1,), "more.bias": (1,)},
            r"it lacks none and has unknown more.bias: put the published file in its place",
        ),
        ({"weight": (1, 4, 1, 1), "bias": (1,)}, r"a.pth is not the weights of Conv2d: .*size mismatch for weight"),
    ],
)
def test_other_weights_are_refused(tensors: dict[str, tuple[int, ...]], said: str, tmp_path: Path):
    path = write(tmp_path / "a.pth", **{key: torch.zeros(shape) for key, shape in tensors.items()})
    with pytest.raises(AnnotatorError, match=said):
        learned.build(small, path)


def test_long_lists_of_keys_are_cut(tmp_path: Path):
    path = write(tmp_path / "ControlNetHED.pth", weight=torch.zeros(1))
    # HED has its norm and, of 13 convolutions and 5 projections, a weight and a bias.
    with pytest.raises(AnnotatorError, match=r"weights of HED: it lacks norm, block1.* and 34 more and has unknown w"):
        build(path)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n", None]
)
def test_files_that_are_no_weights_are_named(name: str, content: bytes | None, tmp_path: Path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(AnnotatorError, match=rf"{name} cannot be read as weights \(.+delete it, so that it is fetched"):
        learned.build(small, tmp_path / name)


def test_a_part_of_a_download_is_named(tmp_path: Path):
    path = write(tmp_path / "a.pth", weight=torch.zeros(1, 3, 1, 1), bias=torch.zeros(1))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AnnotatorError, match="a.pth cannot be read as weights"):
        learned.build(small, path)


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    torch.save({"step": 3}, tmp_path / "a.pth")
    with pytest.raises(AnnotatorError, match="a.pth is no dictionary of tensors"):
        learned.build(small, tmp_path / "a.pth")


def test_pictures_become_tensors_on_the_networks_place():
    image = np.zeros((64, 128, 3), np.uint8)
    image[1, 2] = (255, 0, 51)
    pixels = learned.to_tensor(image, small().double())
    assert pixels.shape == (1, 3, 64, 128) and pixels.dtype == torch.float64
    np.testing.assert_allclose(pixels[0, :, 1, 2], [1, 0, 0.2], atol=1e-7)
    with pytest.raises(AnnotatorError, match=r"image is 100x64; .* sides that are multiples of 64: pad it with"):
        learned.to_tensor(image[:, :100], small())


def test_hints_are_grey():
    hint = grey(learned.to_maps(torch.tensor([[[[0.0, 0.25], [0.5, 1.0]]]], dtype=torch.float16), np.zeros((2, 2, 3))))
    assert hint.dtype == np.float32
    np.testing.assert_array_equal(hint, np.repeat([[[0.0], [0.25]], [[0.5], [1.0]]], 3, axis=2))


@pytest.mark.parametrize("name", OURS)
def test_defaults_in_the_list_are_the_functions_own(name: str):
    wanted = record(name)
    own = {
        parameter.name: parameter.default
        for parameter in inspect.signature(wanted.function).parameters.values()
        if parameter.default is not inspect.Parameter.empty
    }
    assert own == {parameter.name: parameter.default for parameter in wanted.parameters}
    assert all(parameter.tooltip for parameter in wanted.parameters)


@pytest.mark.parametrize("name", OURS)
def test_networks_of_ours_may_be_used_commercially_and_are_checked_by_sum(name: str):
    for wanted in record(name).networks:
        (network,) = [network for network in NETWORKS if network.name == wanted]
        assert network.commercial
        assert network.licence.startswith(("Apache-2.0", "MIT"))
        for file in network.files:
            assert file.size > 6e6
            assert file.sha256 is not None and len(bytes.fromhex(file.sha256)) == 32


def test_hed_is_the_size_of_the_published_file():
    # 14.7 million numbers in half precision, with a few thousand bytes around them.
    published = next(network.files[0].size for network in NETWORKS if network.name == "hed")
    assert 0 < published - 2 * sum(value.numel() for value in HED().state_dict().values()) < 20_000


# Of M-LSD the lines are a pixel wide: test_mlsd.py has it with maps that half precision can hold.
@pytest.mark.parametrize("name", [*(name for name in OURS if name != "mlsd"), "teed"])
@pytest.mark.parametrize(
    "place", [pytest.param({"dtype": torch.bfloat16}), pytest.param({"device": "cuda"}, marks=pytest.mark.gpu)], ids=str
)
def test_hints_are_made_where_the_network_is(name: str, place: dict[str, Any], tmp_path: Path):
    networks, image = load(name, tmp_path), photograph(128, 128)
    reference = hint_of(name, networks, image)
    moved = [network.to(**place) for network in networks]
    hint = hint_of(name, moved, image)
    # Random networks are far more sensitive than trained ones; another picture is 10 times as far away.
    apart = np.abs(hint - reference).mean()
    assert apart < 0.1 * np.abs(hint_of(name, moved, 255 - image) - reference).mean()
