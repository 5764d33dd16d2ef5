"""Depth Anything 3: its transformer against DINOv2, its angles in numbers, and files that do not fit.

ZEROCONV_DEPTH_ANYTHING_3 may name a checkout of ByteDance-Seed/Depth-Anything-3, whose own parts are then run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from skimage.data import astronaut
from torch import Tensor, nn

from zeroconv.annotators import depth, pipeline
from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.networks import NETWORKS, dinov2
from zeroconv.annotators.networks import depth_anything_3 as da3

from .seeded import hint_of, record

TINY = (64, (8, 8, 16, 16), 16)
MORE = {"model.cam_dec.fc_t.weight": (3, 8), "model.head.scratch.refinenet1_aux.out_conv.weight": (8, 8, 1, 1)}
"""Of the published file's parts that depth does without."""


def fill(network: nn.Module) -> None:
    """Seeded random weights that keep numbers at about the same size, and small what becomes an exponent."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in network.named_parameters():
            weight.normal_(0, 1.4 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.2, generator=generator)
            if "norm" in key and key.endswith("weight"):
                weight.add_(1)
            if "output_conv2.2." in key:
                weight.mul_(0.1)


def write(folder: Path) -> Path:
    """A small model.safetensors with seeded random weights under the published keys."""
    network = da3.DepthAnything3(*TINY)
    fill(network)
    weights = {f"model.{key}": weight.contiguous() for key, weight in network.state_dict().items()}
    save_file({**weights, **{key: torch.zeros(shape) for key, shape in MORE.items()}}, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return da3.build(write(tmp_path_factory.mktemp("da3")))


def photograph(height: int, width: int) -> np.ndarray:
    return (astronaut()[:height, :width] / 255).astype(np.float32)


def test_it_is_in_the_list_with_its_licence():
    with torch.device("meta"):
        small = da3.DepthAnything3(*da3.SMALL)
    (entry,) = [entry for entry in NETWORKS if entry.name == "depth_anything_3_small"]
    assert entry.build == "depth_anything_3:build" and entry.licence == "Apache-2.0" and entry.commercial
    assert sum(weight.numel() for weight in small.parameters()) == 24_991_714
    assert 4 * 24_991_714 < entry.files[0].size < 2 * 4 * 24_991_714  # there are cameras and rays in it, too


def test_before_its_angles_begin_the_transformer_is_dinov2(monkeypatch: pytest.MonkeyPatch):
    """test_moge.py has it that ours is transformers' own."""
    monkeypatch.setattr(da3, "LATER", 99)
    ours, plain = da3.Backbone(64), dinov2.DINOv2(64, da3.DEPTH)
    fill(ours)
    weights = {key: weight for key, weight in ours.state_dict().items() if key != "camera_token"}
    plain.load_state_dict({**weights, "mask_token": torch.zeros(1, 64)})
    plain.norm.eps = ours.norm.eps
    pixels = torch.randn(2, 3, 56, 84, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = plain(pixels, da3.LAYERS)
        for tokens, reference in zip(ours(pixels), expected, strict=True):
            torch.testing.assert_close(tokens[:, :, 64:], reference[:, 1:], rtol=0, atol=1e-4)


def test_turned_features_meet_by_how_far_apart_they_are():
    own, common = da3._angles(3, 5, torch.zeros(1))  # pyright: ignore[reportPrivateUsage]
    assert own.shape == common.shape == (16, 64)
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(1, 64, generator=generator).expand(16, -1) for _ in range(2))
    met = dinov2.turned(one, own) @ dinov2.turned(other, own).T

    def at(row: int, column: int) -> int:
        return 1 + 5 * row + column

    torch.testing.assert_close(met[at(0, 0), at(1, 2)], met[at(1, 1), at(2, 3)])
    assert abs(met[at(0, 0), at(1, 2)] - met[at(0, 0), at(2, 1)]) > 0.1
    assert not own[0].any() and not common[0].any()
    torch.testing.assert_close(common[1:], own[1:2].expand(15, -1))
    # Row 2, column 3: the slowest of 16 turns by 100 ** (-15 / 16) of the fastest.
    speed = 100 ** (-15 / 16)
    np.testing.assert_allclose(
        own[at(1, 2), [0, 15, 16, 31, 32, 47]], [2, 2 * speed, 2, 2 * speed, 3, 3 * speed], rtol=1e-5
    )


def test_places_of_maps_in_numbers():
    maps = da3._placed(torch.zeros(1, 8, 2, 4), 2.0)[0]  # pyright: ignore[reportPrivateUsage]
    across, down = dinov2.view(2, 4, 2.0)
    for first, at in ((0, across), (4, down)):
        for i, wave in enumerate((at.sin(), (at / 10).sin(), at.cos(), (at / 10).cos())):
            torch.testing.assert_close(maps[first + i], 0.1 * wave)


def test_it_looks_with_a_long_side_of_504(network: Any):
    shapes = []
    hook = network.backbone["pretrained"].patch_embed.register_forward_pre_hook(
        lambda _, given: shapes.append(given[0].shape)
    )
    for size in ((256, 384), (128, 64), (1, 90)):
        assert depth.depth_anything_3(network, photograph(*size)).shape == size
    hook.remove()
    assert [tuple(shape[2:]) for shape in shapes] == [(336, 504), (504, 252), (14, 504)]


def test_hints_of_several_pictures_are_those_of_each(network: Any):
    pictures = [photograph(96, 128), photograph(224, 288)[-96:, -128:]]
    seen = [one for one, _ in pipeline.see(record("depth_anything_3"), pictures, networks=[network])]
    for picture, one in zip(pictures, seen, strict=True):
        ((alone, _),) = pipeline.see(record("depth_anything_3"), [picture], networks=[network])
        np.testing.assert_allclose(one, alone, rtol=1e-3)
        (hint,) = depth.inverse_hints([one])
        np.testing.assert_allclose(hint_of("depth_anything_3", [network], picture), hint, atol=1e-3)
        assert hint.min() == 0 and hint.max() == 1
    assert np.abs(seen[0] - seen[1]).mean() > 0.02 * seen[0].mean()


def test_an_answer_that_is_none_is_told(network: Any):
    bias: Tensor = network.head.scratch.output_conv2[2].bias
    before = bias.clone()
    bias.fill_(torch.nan)
    with pytest.raises(AnnotatorError, match="the network answered with numbers that are not finite"):
        depth.depth_anything_3(network, photograph(64, 64))
    bias.copy_(before)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("model.backbone.pretrained.norm.bias", "it lacks backbone.pretrained.norm.bias"),
        ("model.head.projects.2.weight", "mismatch|it lacks head.projects.2.weight"),
    ],
)
def test_other_files_are_named(key: str, said: str, tmp_path: Path):
    path = write(tmp_path)
    weights = load_file(path)
    save_file({name: weight for name, weight in weights.items() if name != key}, path)
    with pytest.raises(AnnotatorError, match=f"model.safetensors is not the weights of DepthAnything3: .*({said})"):
        da3.build(path)
    save_file({**weights, "model.more": torch.zeros(1)}, path)
    with pytest.raises(AnnotatorError, match="has unknown more"):
        da3.build(path)


@pytest.mark.skipif("ZEROCONV_DEPTH_ANYTHING_3" not in os.environ, reason="ZEROCONV_DEPTH_ANYTHING_3 names no checkout")
@pytest.mark.parametrize("size", [(8, 12), (11, 6)])
def test_depth_is_that_of_the_authors_parts(size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the published size, with seeded random weights under the authors' keys; without what cameras need."""
    root = Path(os.environ["ZEROCONV_DEPTH_ANYTHING_3"]) / "src" / "depth_anything_3"
    for name in ("", ".model", ".model.utils", ".utils"):
        module = ModuleType(f"depth_anything_3{name}")
        module.__path__ = [str(root.joinpath(*name.split(".")))]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    addict: Any = ModuleType("addict")
    addict.Dict = dict
    monkeypatch.setitem(sys.modules, "addict", addict)
    from depth_anything_3.model.dinov2.dinov2 import DinoV2  # pyright: ignore[reportMissingImports]
    from depth_anything_3.model.dualdpt import DualDPT  # pyright: ignore[reportMissingImports]

    backbone = DinoV2("vits", list(da3.LAYERS), alt_start=4, qknorm_start=4, rope_start=4, cat_token=True).eval()
    head = DualDPT(768, output_dim=2, features=64, out_channels=(48, 96, 192, 384)).eval()
    weights = {}
    for part, name in ((backbone, "backbone"), (head, "head")):
        fill(part)
        weights |= {f"model.{name}.{key}": weight.clone() for key, weight in part.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    ours = da3.build(tmp_path / "model.safetensors")
    pixels = torch.randn(2, 3, 14 * size[0], 14 * size[1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        reference = head(backbone(pixels[:, None])[0], *pixels.shape[2:], patch_start_idx=0)["depth"][:, 0]
        assert reference.std() > 0.05 * reference.mean()
        torch.testing.assert_close(ours(pixels) * reference, torch.ones_like(reference), rtol=0, atol=1e-3)
