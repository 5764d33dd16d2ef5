"""Depth: tiny random networks against transformers' own processors, ranges in numbers, files that do not fit."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from skimage.data import astronaut
from torch import Tensor, nn
from transformers import DPTImageProcessor, ZoeDepthImageProcessor

from zeroconv.annotators import ANNOTATORS, depth, pipeline
from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.networks import NETWORKS
from zeroconv.annotators.networks import depth as seers
from zeroconv.annotators.normals import normal_midas, normals_of_depth

from . import pretrained_tiny as tiny

HALF, IMAGENET = ([0.5] * 3, [0.5] * 3), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
MADE: dict[str, tuple[Callable[[Path], tuple[Path, Path]], Callable[..., nn.Module], Callable[..., np.ndarray]]] = {
    "dpt_large": (lambda folder: tiny.dpt(folder, hybrid=False), seers.build_dpt, depth.depth_midas),
    "dpt_hybrid": (lambda folder: tiny.dpt(folder, hybrid=True), seers.build_dpt, depth.depth_midas),
    "depth_anything_v2_small": (tiny.depth_anything, seers.build_depth_anything, depth.depth_anything),
    "zoedepth": (tiny.zoe, seers.build_zoe, depth.depth_zoe),
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny network for each of the table's, built of files by the function that the table names."""
    folder = tmp_path_factory.mktemp("networks")
    return {name: build(*make(folder / name)) for name, (make, build, _) in MADE.items()}


def photograph(height: int, width: int) -> np.ndarray:
    """An astronaut, squeezed: (height,width,3) float32 in steps of 1/255, as a picture of 8 bits has them."""
    return (cv2.resize(astronaut(), (width, height), interpolation=cv2.INTER_AREA) / 255).astype(np.float32)


def drawn(seen: np.ndarray, draw: Callable[..., Any] = depth.stretched_hints) -> np.ndarray:
    """The hint of what was seen of one picture."""
    (hint,) = draw([seen])
    return hint


def seen_by(network: nn.Module, run: Callable[[], Any]) -> list[tuple[int, ...]]:
    """The shapes of the pictures that a network sees while `run` runs."""
    shapes = []
    hooks = [
        module.register_forward_pre_hook(lambda _module, args: shapes.append(tuple(args[0].shape)))
        for module in network.modules()
        if isinstance(module, nn.Conv2d) and module.in_channels == 3
    ]
    run()
    for hook in hooks:
        hook.remove()
    assert hooks
    return shapes


def by_transformers(network: Any, image: np.ndarray, processor: Any, flip: bool = False) -> np.ndarray:
    """Raw depth (H,W) as transformers' documentation makes it, of a picture of 8 bits."""
    pixels = processor(np.rint(image * 255).astype(np.uint8), return_tensors="pt")["pixel_values"]
    sizes = [image.shape[:2]]
    with torch.no_grad():
        found = network(pixels)
        more = {"source_sizes": sizes, "outputs_flipped": network(pixels.flip(3))} if flip else {"target_sizes": sizes}
        return processor.post_process_depth_estimation(found, **more)[0]["predicted_depth"].numpy()


def assert_within(ours: np.ndarray, reference: np.ndarray) -> None:
    """Within 1e-4 of the largest number; before, that the picture moves it by 5 %."""
    assert np.ptp(reference) > 0.05 * np.abs(reference).max()
    assert ours.shape == reference.shape and ours.dtype == np.float32
    assert np.abs(ours - reference).max() <= 1e-4 * np.abs(reference).max()


def test_the_table_names_these_functions():
    table = {network.name: network for network in NETWORKS}
    for name, (_, build, function) in MADE.items():
        assert table[name].build == f"depth:{build.__name__}"
        assert [Path(file.name).suffix for file in table[name].files] in ([".json", ".safetensors"], [".json", ".bin"])
        assert table[name].commercial
        asked = [record for record in ANNOTATORS if record.networks == (name,)]
        assert function in [record.function for record in asked]
    (normal,) = [record for record in ANNOTATORS if record.name == "normal_midas"]
    assert normal.function is normal_midas
    assert {p.name: p.default for p in normal.parameters} == {"background": 0.1, "strength": 6.28, "front": "red"}


@pytest.mark.parametrize("name", ["dpt_large", "dpt_hybrid"])
def test_midas_is_transformers_at_the_size_that_it_knows(networks: dict[str, Any], name: str):
    image = photograph(64, 64)
    processor = DPTImageProcessor(size={"height": 64, "width": 64}, image_mean=HALF[0], image_std=HALF[1])
    reference = by_transformers(networks[name], image, processor)
    assert_within(seers.midas(networks[name], image), reference)
    expected = (reference - reference.min()) / np.ptp(reference)
    assert_within(drawn(depth.depth_midas(networks[name], image)), np.repeat(expected[:, :, None], 3, axis=2))


@pytest.mark.parametrize("name", ["dpt_large", "dpt_hybrid"])
def test_midas_looks_at_the_picture_as_it_is(networks: dict[str, Any], name: str):
    """Sides that are multiples of 64 stay, beyond a million pixels they shrink; the depth has the picture's size."""
    network = networks[name]
    for size, looked in (((64, 128), (64, 128)), ((192, 64), (192, 64)), ((1024, 2048), (736, 1440))):
        assert {shape[2:] for shape in seen_by(network, lambda size=size: seers.midas(network, photograph(*size)))} == {
            looked
        }
        assert seers.midas(network, photograph(*size)).shape == size


@pytest.mark.parametrize("name", ["dpt_large", "dpt_hybrid"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("end", [0, -1])
def test_midas_keeps_places(networks: dict[str, Any], name: str, axis: int, end: int):
    """What changes at one end of an oblong picture changes the depth there: rows are not taken for columns.

    Without attention's answers, which random weights mix over the whole picture.
    """
    network = deepcopy(networks[name])
    for weights, weight in network.named_parameters():
        if "attention.output" in weights:
            weight.zero_()
    image = np.concatenate([photograph(64, 64)] * 8, axis=axis)
    parts = np.split(image.copy(), 8, axis=axis)
    parts[end] = 1 - parts[end]
    moved = seers.midas(network, np.concatenate(parts, axis=axis)) - seers.midas(network, image)
    by_part = [float(np.abs(part).mean()) for part in np.split(moved, 8, axis=axis)][:: 1 if end == 0 else -1]
    assert by_part[0] > 1.5 * max(by_part[3:])  # the hybrid's group norms spread some of it


def test_depth_anything_is_transformers(networks: dict[str, Any]):
    network, image = networks["depth_anything_v2_small"], photograph(518, 518)
    size = {"height": 518, "width": 518}
    processor = DPTImageProcessor(size=size, image_mean=IMAGENET[0], image_std=IMAGENET[1])
    reference = by_transformers(network, image, processor)
    expected = (reference - reference.min()) / np.ptp(reference)
    assert_within(drawn(depth.depth_anything(network, image)), np.repeat(expected[:, :, None], 3, axis=2))


def test_depth_anything_looks_with_a_short_side_of_518(networks: dict[str, Any]):
    network = networks["depth_anything_v2_small"]
    for size, looked in (((256, 384), (518, 784)), ((128, 64), (1036, 518)), ((64, 1024), (252, 4102))):
        shapes = seen_by(network, lambda size=size: depth.depth_anything(network, photograph(*size)))
        assert [shape[2:] for shape in shapes] == [looked]


@pytest.mark.parametrize("size", [(64, 128), (320, 192), (480, 640)])
def test_zoe_is_transformers(networks: dict[str, Any], size: tuple[int, int]):
    image, processor = photograph(*size), ZoeDepthImageProcessor()
    reference = by_transformers(networks["zoedepth"], image, processor, flip=True)
    assert_within(seers.zoe(networks["zoedepth"], image), reference)
    near, far = np.percentile(reference, [2, 85])
    expected = np.clip(1 - (reference - near) / (far - near), 0, 1)
    assert_within(
        drawn(depth.depth_zoe(networks["zoedepth"], image), depth.metric_hints),
        np.repeat(expected[:, :, None], 3, axis=2),
    )


def test_zoe_of_a_thin_picture_keeps_to_its_bounds(networks: dict[str, Any]):
    network = networks["zoedepth"]
    shapes = seen_by(network, lambda: depth.depth_zoe(network, photograph(64, 4096)))
    assert [shape[2:] for shape in shapes] == [(32, 512)] * 2  # and its mirror image


def test_zoe_hint_in_numbers(monkeypatch: pytest.MonkeyPatch):
    metres = np.arange(101, dtype=np.float32).reshape(1, 101)
    monkeypatch.setattr(seers, "zoe", lambda *_: metres)
    seen = depth.depth_zoe(None, np.zeros((1, 101, 3)))  # pyright: ignore[reportArgumentType]
    hint = drawn(seen, depth.metric_hints)
    assert hint.shape == (1, 101, 3) and hint.dtype == np.float32
    np.testing.assert_allclose(hint[0, [0, 2, 23, 85, 100], 0], [1, 1, 1 - 21 / 83, 0, 0], atol=1e-6)
    monkeypatch.setattr(seers, "zoe", lambda *_: np.full((2, 3), 4.0, np.float32))
    seen = depth.depth_zoe(None, np.zeros((2, 3, 3)))  # pyright: ignore[reportArgumentType]
    assert not drawn(seen, depth.metric_hints).any()


def test_stretched_in_numbers():
    np.testing.assert_array_equal(drawn(np.array([[1.0, 3.0], [2.0, 5.0]]))[:, :, 0], [[0, 0.5], [0.25, 1]])
    assert not drawn(np.full((2, 3), 7.0)).any()


@pytest.mark.parametrize(("front", "first"), [("red", 2), ("blue", 0)])
def test_normals_are_sobel_slopes_of_the_raw_depth(networks: dict[str, Any], front: str, first: int):
    network, image = networks["dpt_hybrid"], photograph(64, 128)
    raw = seers.midas(network, image)
    near = (raw - raw.min()) / np.ptp(raw) >= 0.3
    assert 0.1 < near.mean() < 0.99
    slope = cv2.Sobel(raw, cv2.CV_32F, 1, 0, ksize=3) * near
    down = cv2.Sobel(raw, cv2.CV_32F, 0, 1, ksize=3) * near
    expected = slope / np.sqrt(slope**2 + down**2 + 1)
    normals = normal_midas(network, image, 0.3, 1.0, front)
    assert normals.shape == (64, 128, 3)
    assert_within(normals[:, :, first], (expected + 1) / 2)
    assert_within(normal_midas(network, image), normals_of_depth(raw, 0.1, 6.28, "red"))


@pytest.mark.parametrize("name", [r.name for r in ANNOTATORS if r.networks[:1] in [(name,) for name in MADE]])
def test_from_a_photograph_to_a_hint(networks: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch):
    """With any size, twice the same, without a word to the net, and the picture stays as it is."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it spoke to a server"))
    (record,) = [record for record in ANNOTATORS if record.name == name]
    loaded = [networks[wanted] for wanted in record.networks]
    picture = astronaut()[:300, :410]
    before = picture.copy()
    hint, frame = pipeline.annotate(record, picture, 96, networks=loaded)
    assert hint.shape == (96, 131, 3) and hint.dtype == np.float32 and frame is None
    assert hint.min() >= 0 and hint.max() <= 1
    np.testing.assert_array_equal(pipeline.annotate(record, picture, 96, networks=loaded)[0], hint)
    np.testing.assert_array_equal(picture, before)
    other, _ = pipeline.annotate(record, picture[:, ::-1], 96, networks=loaded)
    assert np.abs(other - hint).mean() > 0.02


@pytest.mark.parametrize("name", list(MADE))
def test_half_precision_networks_give_their_hint_in_full(networks: dict[str, Any], name: str, tmp_path: Path):
    make, build, function = MADE[name]
    hint = function(build(*make(tmp_path)).to(torch.bfloat16), photograph(64, 128))
    assert hint.dtype == np.float32
    assert np.corrcoef(hint.ravel(), function(networks[name], photograph(64, 128)).ravel())[0, 1] > 0.9


@pytest.mark.parametrize("name", list(MADE))
def test_an_answer_that_is_none_is_told(networks: dict[str, Any], name: str):
    network = deepcopy(networks[name])
    next(
        weight
        for end, weight in network.named_parameters()
        if end.endswith("patch_embeddings.projection.bias") or end == "dpt.embeddings.projection.bias"
    ).fill_(torch.nan)
    with pytest.raises(AnnotatorError, match="the network answered with numbers that are not finite"):
        MADE[name][2](network, photograph(64, 64))


def changed(paths: tuple[Path, Path], change: Callable[[dict[str, Tensor]], Any]) -> tuple[Path, Path]:
    weights = load_file(paths[1])
    change(weights)
    save_file(weights, paths[1])
    return paths


def test_weights_that_nothing_reads_may_be_missing(networks: dict[str, Any], tmp_path: Path):
    """The published file of dpt-large has 458 tensors, where transformers makes 462: the first layer fuses nothing."""
    unused = "neck.fusion_stage.layers.0.residual_layer1."

    def drop(weights: dict[str, Tensor]) -> None:
        found = [key for key in weights if key.startswith(unused)]
        assert len(found) == 4
        for key in found:
            del weights[key]

    network: Any = seers.build_dpt(*changed(tiny.dpt(tmp_path, hybrid=False), drop))
    assert not network.training
    assert all(weight.dtype == torch.float32 and not weight.requires_grad for weight in network.parameters())
    image = photograph(64, 128)
    np.testing.assert_array_equal(seers.midas(network, image), seers.midas(networks["dpt_large"], image))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("head.head.0.weight"), r"lacks 1 weights of DPTForDepthEstimation, head\.head\.0\.weight"),
        (lambda w: w.update({"head.head.0.weight": torch.zeros(3, 3)}), r"does not fit .*config\.json.*head\.head\.0"),
        (lambda w: [w.pop(key) for key in list(w)[1:]], r"lacks \d\d+ weights of DPTForDepthEstimation"),
    ],
)
def test_files_of_another_network_are_named(change: Callable[[dict[str, Tensor]], Any], said: str, tmp_path: Path):
    with pytest.raises(AnnotatorError, match=said):
        seers.build_dpt(*changed(tiny.dpt(tmp_path, hybrid=False), change))


def test_broken_files_are_named(tmp_path: Path):
    config, weights = tiny.dpt(tmp_path, hybrid=False)
    with pytest.raises(AnnotatorError, match=r"describes a network of type dpt; expected zoedepth"):
        seers.build_zoe(config, weights)
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AnnotatorError, match="model.safetensors"):
        seers.build_dpt(config, weights)
    for text in ("<html>", json.dumps([1])):
        config.write_text(text, encoding="utf-8")
        with pytest.raises(AnnotatorError, match=r"config\.json cannot be read as a config\.json"):
            seers.build_dpt(config, weights)
