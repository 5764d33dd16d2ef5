"""TEED against controlnet-aux on seeded random weights, layer by layer and as a hint, and AnyLine upon it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from zeroconv.annotators import pipeline
from zeroconv.annotators.hed import anyline, teed
from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.networks import NETWORKS
from zeroconv.annotators.networks.teed import TEED, Smish, build
from zeroconv.benchmarks.weights import seeded

from .seeded import assert_agrees, hint_of, load, photograph, record


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> list[nn.Module]:
    return load("teed", tmp_path_factory.mktemp("weights"))


def test_the_activation_in_numbers():
    # x tanh(log(1 + sigmoid(x))): at 0 nothing; log(1.5) = 0.4055 there, log(1.7311) = 0.5488 at 1.
    values = Smish()(torch.tensor([-1.0, 0.0, 1.0, 20.0]))
    expected = [-np.tanh(np.log(1.26894142)), 0.0, np.tanh(np.log(1.73105858)), 12.0]
    np.testing.assert_allclose(values, expected, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 128), (192, 64)])
def test_logits_agree_with_controlnet_aux(size: tuple[int, int]):
    from controlnet_aux.teed.ted import TED

    ours, reference = TEED(), TED()
    weights = seeded(reference)
    ours.load_state_dict(weights)
    reference.load_state_dict(weights)
    image = torch.from_numpy(photograph(*size)).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        maps, wanted = ours(image), reference(image)
    assert [tuple(logits.shape) for logits in maps] == [(1, 1, *size)] * 4
    for logits, other in zip(maps, wanted, strict=True):
        assert other.std() > 0.05 * other.abs().max()
        torch.testing.assert_close(logits, other, rtol=0, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("size", [(512, 512), (256, 384)])
@pytest.mark.parametrize("safe", [False, True])
def test_soft_edges_agree_with_controlnet_aux(
    size: tuple[int, int], safe: bool, networks: list[nn.Module], tmp_path: Path
):
    from controlnet_aux import TEEDdetector

    load("teed", tmp_path)
    image = photograph(*size)
    detector: Any = TEEDdetector.from_pretrained(str(tmp_path), "5_model.pth")
    reference = detector(image, min(size), safe_steps=2 if safe else 0, output_type="np").astype(np.float32)
    # They cut off what is behind the point of 0..255; we do not.
    assert_agrees(hint_of("teed", networks, image, safe=safe), reference, levels=1.0)


def test_several_pictures_at_once_are_each_by_itself(networks: list[nn.Module]):
    pictures = [photograph(128, 192) / np.float32(255), photograph(192, 256)[-128:, -192:] / np.float32(255)]
    both = [hint for hint, _ in pipeline.see(record("teed"), pictures, networks=networks, parameters={"safe": False})]
    for picture, hint in zip(pictures, both, strict=True):
        np.testing.assert_allclose(hint, hint_of("teed", networks, picture, safe=False), atol=1e-5)
    assert np.abs(both[0] - both[1]).mean() > 0.02


def test_any_size_gives_a_hint_and_twice_is_the_same(networks: list[nn.Module]):
    for size in ((1, 1), (1, 90), (70, 33), (128, 128)):
        image = photograph(*size)
        np.testing.assert_array_equal(hint_of("teed", networks, image), hint_of("teed", networks, image))
    moved = hint_of("teed", networks, image, safe=False) - hint_of("teed", networks, 255 - image, safe=False)
    assert np.abs(moved).mean() > 0.02
    with pytest.raises(AnnotatorError, match=r"image is 33x70; .*multiples of 64"):
        teed(networks[0], photograph(70, 33))


@pytest.mark.parametrize("change", ["lacks", "unknown", "shape"])
def test_other_weights_are_refused(change: str, tmp_path: Path):
    weights: dict[str, Any] = dict(TEED().state_dict())
    if change == "lacks":
        del weights["block_cat.DWconv2.bias"]
    else:
        weights["more" if change == "unknown" else "side_1.conv.weight"] = torch.zeros(1)
    torch.save(weights, tmp_path / "5_model.pth")
    said = {"lacks": "lacks block_cat.DWconv2.bias", "unknown": "unknown more", "shape": "mismatch for side_1.conv.w"}
    with pytest.raises(AnnotatorError, match=f"5_model.pth is not the weights of TEED: .*{said[change]}"):
        build(tmp_path / "5_model.pth")


def test_it_is_the_size_of_the_published_file_and_free_to_use():
    (network,) = [network for network in NETWORKS if network.name == "teed"]
    count = sum(value.numel() for value in TEED().state_dict().values())
    assert count == 58_910  # as the paper says
    assert 0 < network.files[0].size - 4 * count < 20_000
    assert network.licence.startswith("MIT") and network.commercial


# -- AnyLine -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(512, 512), (256, 384)])
def test_anyline_is_the_published_mixture_of_controlnet_auxs_parts(size: tuple[int, int], tmp_path: Path):
    """As TheMistoAI/ComfyUI-Anyline mixes them, in 0..1: controlnet-aux's own does so in bytes, which overflow."""
    from controlnet_aux import LineartStandardDetector, TEEDdetector
    from skimage.morphology import remove_small_objects

    networks, image, side = load("anyline", tmp_path), photograph(*size), min(size)
    detector: Any = TEEDdetector.from_pretrained(str(tmp_path / "Anyline"), "MTEED.pth")
    soft = detector(image, side, output_type="np") / 255
    fine: Any = LineartStandardDetector()(image, 2.0, 3, side, output_type="np")
    kept = fine * remove_small_objects(fine.astype(bool), max_size=35, connectivity=1) / 255
    assert (fine > 0).sum() > (kept > 0).sum() > 0.05 * fine.size  # some were too small
    reference = 255 * (1 - (1 - soft) * (1 - kept))
    # A level more or less of soft edges where theirs are cut off; no line of theirs is missing, and none too many.
    assert_agrees(hint_of("anyline", networks, image), reference.astype(np.float32), levels=2.0)


def test_small_lines_are_left_out_and_large_ones_stay(tmp_path: Path):
    """Two dark bars on light, of 5 and of 60 pixels."""
    (network,) = load("anyline", tmp_path)
    image = np.full((64, 128, 3), 200, np.uint8)
    image[30, 20:25] = image[30, 50:110] = 0
    blank = np.full((64, 128, 3), 200, np.uint8)
    for weight in network.parameters():  # logits of 0 everywhere, which is one level of soft edges
        weight.zero_()
    levels = {smallest: anyline(network, image, smallest)[30, :, 0] for smallest in (0, 12, 1000)}
    ground = anyline(network, blank)[30, 0, 0]
    assert (levels[0][20:25] > ground + 0.1).all() and (levels[0][50:110] > ground + 0.1).all()
    np.testing.assert_allclose(levels[12][15:30], ground)
    np.testing.assert_array_equal(levels[12][50:110], levels[0][50:110])
    np.testing.assert_allclose(levels[1000], ground)


def test_anyline_of_several_pictures_is_that_of_each(tmp_path: Path):
    networks = load("anyline", tmp_path)
    pictures = [photograph(128, 192), photograph(192, 256)[-128:, -192:]]
    both = [hint for hint, _ in pipeline.see(record("anyline"), pictures, networks=networks)]
    for picture, hint in zip(pictures, both, strict=True):
        assert np.mean(np.abs(hint - hint_of("anyline", networks, picture)) > 0.5 / 255) < 1e-3
    assert np.abs(both[0] - both[1]).mean() > 0.02


def test_mteed_has_teeds_size_and_is_free_to_use():
    (network,) = [network for network in NETWORKS if network.name == "mteed"]
    assert 0 < network.files[0].size - 4 * 58_910 < 20_000
    assert network.licence.startswith("MIT") and network.commercial
