"""MoGe-2: its transformer against transformers' DINOv2, the published settings, colours, and files that do not fit.

ZEROCONV_MOGE may name a checkout of microsoft/MoGe, whose own code is then run on the same weights.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from skimage.data import astronaut
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from zeroconv.annotators import ANNOTATORS, depth, pipeline
from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.networks import NETWORKS, dinov2, moge
from zeroconv.annotators.normals import normal_moge

ENDS = ("weight", "bias")


def stack(width: int, dim_in: list[int], dim_out: list[int | None] | None) -> dict[str, Any]:
    """The settings of a stack as Ruicheng/moge-2-vits-normal's model.pt carries them."""
    widths = [width, 256, 128, 64, 32] if width > 64 else [width, 32, 16, 16, 8]
    return {
        "dim_in": [dim_in[0], *(dim_in[1:] or widths[1:])],
        "dim_out": dim_out,
        "dim_res_blocks": widths,
        "num_res_blocks": [0, 1, 1, 1, 0],
        "res_block_in_norm": "none",
        "res_block_hidden_norm": "none",
        "resamplers": ["conv_transpose", "conv_transpose", "conv_transpose", "bilinear"],
    }


def settings(width: int, layers: list[int], patches: int) -> dict[str, Any]:
    """The model_config of the published file, of another width and number of patches."""
    heads = {f"{name}_head": stack(width, [width], [None] * 4 + [n]) for name, n in (("points", 3), ("normal", 3))}
    return {
        "encoder": {"backbone": "dinov2_vits14", "intermediate_layers": layers, "dim_out": width},
        "neck": stack(width, [width + 2, 2, 2, 2, 2], None),
        **heads,
        "mask_head": stack(width, [width], [None, None, None, None, 1]),
        "scale_head": {"dims": [width, width, width, 1]},
        "remap_output": "exp",
        "num_tokens_range": [patches // 3, patches],
    }


def fill(network: torch.nn.Module) -> None:
    """Seeded random weights that keep numbers at about the same size, and small what becomes an exponent."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in network.named_parameters():
            weight.normal_(0, 1.4 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.2, generator=generator)
            if key.startswith(("points_head.output_blocks.4.", "scale_head.4.")):
                weight.mul_(0.02)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small model.pt with seeded random weights."""
    said = settings(64, [0, 1], 60)
    network = moge.MoGe(said, 64, 2)
    fill(network)
    torch.save({"model_config": said, "model": network.state_dict()}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def photograph(height: int, width: int) -> np.ndarray:
    return (astronaut()[:height, :width] / 255).astype(np.float32)


def test_the_published_settings_make_a_network_of_the_published_size():
    with torch.device("meta"):
        network = moge.MoGe(settings(384, [5, 11], 3600), 384, 12)
    assert sum(weight.numel() for weight in network.parameters()) == 35_103_656
    (record,) = [network for network in NETWORKS if network.name == "moge2_small"]
    assert (record.build, record.commercial, record.files[0].name) == ("moge:build", True, "model.pt")


@pytest.mark.parametrize("patches", [(37, 37), (10, 23)])
def test_the_transformer_is_dinov2(patches: tuple[int, int]):
    """At its own size exactly; elsewhere DINOv2 fits its places a tenth of a patch wider than transformers does."""
    torch.manual_seed(0)
    theirs = Dinov2Model(
        Dinov2Config(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14)
    ).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(0, weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.5)
    weights = theirs.state_dict()
    ours = dinov2.DINOv2(128, 2)
    ours.load_state_dict(
        {
            "cls_token": weights["embeddings.cls_token"],
            "pos_embed": weights["embeddings.position_embeddings"],
            "mask_token": weights["embeddings.mask_token"],
            **{f"patch_embed.proj.{end}": weights[f"embeddings.patch_embeddings.projection.{end}"] for end in ENDS},
            **{f"norm.{end}": weights[f"layernorm.{end}"] for end in ENDS},
            **{key: weight for i in range(2) for key, weight in block(weights, i).items()},
        }
    )
    torch.manual_seed(1)
    pixels = torch.randn(1, 3, 14 * patches[0], 14 * patches[1])
    with torch.no_grad():
        if patches != (dinov2.PATCHES, dinov2.PATCHES):
            # Its places are given to theirs, so that the rest can be compared.
            theirs.embeddings.interpolate_pos_encoding = lambda *_: ours.places(*patches)  # pyright: ignore
        reference = theirs(pixels).last_hidden_state
        found = ours(pixels, [1])[0]
    assert reference.std() > 0.05 * reference.abs().max()
    torch.testing.assert_close(found, reference, rtol=0, atol=1e-4 * float(reference.abs().max()))


def block(weights: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """A block of transformers' DINOv2 under the keys of facebookresearch/dinov2."""
    old, new = f"encoder.layer.{i}.", f"blocks.{i}."
    made = {
        new + "ls1.gamma": weights[old + "layer_scale1.lambda1"],
        new + "ls2.gamma": weights[old + "layer_scale2.lambda1"],
    }
    for end in ENDS:
        parts = [weights[f"{old}attention.attention.{part}.{end}"] for part in ("query", "key", "value")]
        made[f"{new}attn.qkv.{end}"] = torch.cat(parts)
        made[f"{new}attn.proj.{end}"] = weights[f"{old}attention.output.dense.{end}"]
        made |= {
            f"{new}{name}.{end}": weights[f"{old}{name}.{end}"] for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
        }
    return made


def test_views_in_numbers():
    """Pixel centres on a half diagonal of 1: a picture twice as wide as high."""
    view = dinov2.view(2, 4, 2.0)
    half = 5**-0.5
    torch.testing.assert_close(view[0], torch.tensor([[-0.75, -0.25, 0.25, 0.75]] * 2) * 2 * half)
    torch.testing.assert_close(view[1], torch.tensor([[-0.5] * 4, [0.5] * 4]) * half)


@pytest.mark.parametrize(
    ("normal", "colour"),
    [((0, 0, -1), (0.5, 0.5, 1)), ((-1, 0, 0), (1, 0.5, 0.5)), ((0, -1, 0), (0.5, 1, 0.5)), ((1, 0, 0), (0, 0.5, 0.5))],
)
def test_left_is_red_up_is_green_front_is_blue(
    file: Path, normal: tuple[float, ...], colour: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
):
    network: Any = moge.build(file)
    answer = torch.tensor(normal, dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    known = torch.ones(1, 1, 64, 64)
    known[..., 32:] = 0  # nothing is known of the right half: it faces the viewer
    monkeypatch.setattr(network, "forward", lambda _: (answer, known))
    hint = normal_moge(network, np.zeros((64, 64, 3), np.float32))
    np.testing.assert_allclose(hint[:, :32], np.broadcast_to(colour, (64, 32, 3)), atol=1e-6)
    np.testing.assert_allclose(hint[:, 32:], np.broadcast_to((0.5, 0.5, 1), (64, 32, 3)), atol=1e-6)


NAMES = [record.name for record in ANNOTATORS if "moge2_small" in record.networks]


@pytest.mark.parametrize("name", NAMES)
def test_from_a_photograph_to_a_hint(name: str, file: Path):
    (record,) = [record for record in ANNOTATORS if record.name == name]
    network: Any = moge.build(file)
    assert not network.training and all(weight.dtype == torch.float32 for weight in network.parameters())
    picture = astronaut()[:300, :410]
    before = picture.copy()
    hint, _ = pipeline.annotate(record, picture, 96, networks=[network])
    assert hint.shape == (96, 131, 3) and hint.dtype == np.float32
    if name == "normal_moge":
        np.testing.assert_allclose(np.linalg.norm(hint * 2 - 1, axis=2), 1, atol=1e-3)
    else:
        assert hint.min() == 0 and hint.max() == 1
    np.testing.assert_array_equal(pipeline.annotate(record, picture, 96, networks=[network])[0], hint)
    np.testing.assert_array_equal(picture, before)
    other, _ = pipeline.annotate(record, picture[:, ::-1], 96, networks=[network])
    assert np.abs(other - hint).mean() > 0.02


def test_an_answer_that_is_none_is_told(file: Path):
    network: Any = moge.build(file)
    network.encoder.backbone.norm.bias.fill_(torch.nan)
    for function in (normal_moge, depth.depth_moge):
        with pytest.raises(AnnotatorError, match="the network answered with numbers that are not finite"):
            function(network, photograph(64, 64))


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said["model"].pop("encoder.backbone.norm.bias"),
        lambda said: said["model"].update(unknown=torch.zeros(1)),
        lambda said: said["model"].pop("scale_head.0.weight"),
        lambda said: said["model_config"].pop("normal_head"),
        lambda said: said["model_config"].update(remap_output="linear"),
        lambda said: said["model_config"]["neck"].update(resamplers="max_pool"),
        lambda said: said.pop("model"),
    ],
)
def test_other_files_are_named(file: Path, change: Callable[[dict[str, Any]], Any]):
    said = torch.load(file, weights_only=True)
    change(said)
    torch.save(said, file)
    with pytest.raises(AnnotatorError, match=r"model\.pt is no MoGe-2 with normals"):
        moge.build(file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(AnnotatorError, match=r"model\.pt is no MoGe-2 with normals"):
        moge.build(file)


# -- depth -------------------------------------------------------------------------------------------------------------


def seen_from(height: int, width: int, focal: float) -> tuple[np.ndarray, Tensor]:
    """A ball of radius 1 before a slanted wall: depths (H,W), and their points (3,H,W) in the camera's own frame.

    `focal` is in half diagonals of the picture.
    """
    half = np.hypot(height, width) / 2
    down, right = ((np.arange(side) + 0.5 - side / 2) / half / focal for side in (height, width))
    right, down = np.meshgrid(right, down)
    wall = 6 / (1 - 0.4 * right)
    # |depth * (right, down, 1) - (0, 0, 3)| = 1
    square, halved = right**2 + down**2 + 1, 3.0
    inside = halved**2 - 8 * square
    ball = (halved - np.sqrt(inside.clip(0))) / square
    depths = np.where(inside > 0, ball, wall).astype(np.float32)
    points = np.stack([depths * right, depths * down, depths]).astype(np.float32)
    return depths, torch.from_numpy(points)


@pytest.mark.parametrize("size", [(96, 128), (120, 80)])
@pytest.mark.parametrize("focal", [0.7, 1.8])
def test_depth_is_that_from_the_camera_in_metres(
    size: tuple[int, int], focal: float, file: Path, monkeypatch: pytest.MonkeyPatch
):
    """Points whose origin lies 1.5 of their units behind the camera, which are 2 and 3 metres."""
    network: Any = moge.build(file)
    expected, points = seen_from(*size, focal)
    moved = points - torch.tensor([0, 0, 1.5]).view(3, 1, 1)
    known = torch.ones(2, 1, *size)
    known[:, :, :, :5] = 0.4
    answer = (torch.stack([moved, moved]), known, torch.tensor([2.0, 3.0]))
    monkeypatch.setattr(network, "points", lambda _: answer)
    found = moge.depths(network, np.zeros((2, *size, 3), np.float32))
    assert found.shape == (2, *size) and found.dtype == np.float32 and np.isinf(found[:, :, :5]).all()
    for one, metres in zip(found, (2, 3), strict=True):
        np.testing.assert_allclose(one[:, 5:], metres * expected[:, 5:], rtol=2e-3)
    inverse = depth.depth_moge(network, np.zeros((2, *size, 3), np.float32))
    np.testing.assert_array_equal(inverse, 1 / found)
    assert not inverse[:, :, :5].any()


def test_of_an_unknown_world_the_hint_is_black(file: Path, monkeypatch: pytest.MonkeyPatch):
    network: Any = moge.build(file)
    answer = (torch.ones(1, 3, 32, 32), torch.zeros(1, 1, 32, 32), torch.ones(1))
    monkeypatch.setattr(network, "points", lambda _: answer)
    seen = depth.depth_moge(network, np.zeros((32, 32, 3), np.float32))
    for farthest in (0.0, 10.0):
        (hint,) = depth.moge_hints([seen], farthest=farthest)
        assert hint.shape == (32, 32, 3) and not hint.any()


def test_hints_in_numbers():
    metres = np.array([[0.5, 1, 2, 4, np.inf]], np.float32)
    (hint,) = depth.moge_hints([1 / metres], farthest=4.0)
    np.testing.assert_allclose(hint[0, :, 0], [0.875, 0.75, 0.5, 0, 0], atol=1e-6)
    # Of a hundred numbers 1 to 100 and one of 10000, the last one is no bound.
    (hint,) = depth.moge_hints([np.append(np.arange(1.0, 101), 10000)[None].astype(np.float32)])
    np.testing.assert_allclose(hint[0, [0, 50, 99, 100], 0], [0, 50 / 99, 1, 1], atol=1e-6)
    first, second = depth.moge_hints([np.array([[1.0, 2.0]]), np.array([[2.0, 5.0]])], "batch")
    middle = 1 / (float(np.percentile([1, 5], 99)) - 1)  # of each picture every second number, first or second
    np.testing.assert_allclose([first[0, :, 0], second[0, :, 0]], [[0, middle], [middle, 1]], atol=1e-6)


@pytest.mark.skipif("ZEROCONV_MOGE" not in os.environ, reason="ZEROCONV_MOGE names no checkout of microsoft/MoGe")
@pytest.mark.parametrize("size", [(96, 144), (150, 100)])
def test_all_answers_are_those_of_the_authors_code(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of the published size, with seeded random weights under the authors' own keys."""
    # Their pictures of cameras, which nothing of this compares.
    cameras = SimpleNamespace(intrinsics_from_focal_center=lambda *_: torch.eye(3)[None])
    monkeypatch.setitem(sys.modules, "utils3d", SimpleNamespace(pt=cameras))
    monkeypatch.syspath_prepend(os.environ["ZEROCONV_MOGE"])
    from moge.model.v2 import MoGeModel  # pyright: ignore[reportMissingImports]

    said = settings(384, [5, 11], 60)
    theirs = MoGeModel(**said).eval()
    fill(theirs)
    torch.save({"model_config": said, "model": theirs.state_dict()}, tmp_path / "model.pt")
    ours: Any = moge.build(tmp_path / "model.pt")
    image = photograph(*size)
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    reference = theirs.infer(pixels, use_fp16=False, force_projection=False)
    known = reference["mask"].numpy()
    assert 0.05 < known.mean() < 0.95
    found = moge.depths(ours, image)
    np.testing.assert_array_equal(np.isfinite(found), known)
    assert np.std(found[known]) > 0.05 * np.mean(found[known])
    np.testing.assert_allclose(found[known], reference["depth"].numpy()[known], rtol=1e-3)
    np.testing.assert_allclose(moge.normals(ours, image)[known], reference["normal"].numpy()[known], atol=1e-4)
