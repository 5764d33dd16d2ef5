"""The lines of manga: keys and size of the published file, the network written out, and the authors' own beside it.

ZEROCONV_MANGA_LINES may name a checkout of ljsabc/MangaLineExtraction_PyTorch, whose own network is then run.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zeroconv.annotators import pipeline
from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.lineart import lineart_manga
from zeroconv.annotators.networks import NETWORKS
from zeroconv.annotators.networks.manga import Block, MangaLines, build
from zeroconv.benchmarks import weights

from .seeded import hint_of, photograph, record


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return weights.manga()


@pytest.fixture(scope="module")
def network(state: dict[str, Tensor]) -> nn.Module:
    made = MangaLines()
    made.load_state_dict(state)
    return made.requires_grad_(False).eval()


def test_it_is_the_size_of_the_published_file_and_free_to_use(state: dict[str, Tensor]):
    (entry,) = [entry for entry in NETWORKS if entry.name == "lineart_manga"]
    assert len(state) == 707
    assert 0 < entry.files[0].size - 4 * sum(weight.numel() for weight in state.values()) < 300_000
    assert entry.licence.startswith("MIT") and entry.commercial


@pytest.mark.parametrize(("stride", "doubles"), [(1, False), (2, False), (1, True)])
def test_a_block_written_out(stride: int, doubles: bool):
    block = Block(3, 5, stride, doubles).eval()
    block.load_state_dict(weights.seeded(block))
    features = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))

    def convolved(values: Tensor, part: Any, stride: int) -> Tensor:
        norm, _, conv = part.model[:3]
        scale = norm.weight / (norm.running_var + 1e-3).sqrt()
        normed = (values - norm.running_mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        return F.conv2d(F.leaky_relu(normed, 0.2), conv.weight, conv.bias, stride=stride, padding=1)

    def doubled(values: Tensor) -> Tensor:
        return values.repeat_interleave(2, 2).repeat_interleave(2, 3) if doubles else values

    with torch.no_grad():
        branch = convolved(doubled(convolved(features, block.conv1, stride)), block.residual, 1)
        along: Any = block.shortcut.model[0]
        expected = branch + doubled(F.conv2d(features, along.weight, along.bias, stride=stride))
        torch.testing.assert_close(block(features), expected, rtol=0, atol=1e-5)


def test_the_hint_is_the_answer_inverted(network: nn.Module):
    image = photograph(128, 192)
    grey = torch.from_numpy(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[None, None].float()
    with torch.no_grad():
        answer = network(grey)[0, 0].numpy()
    assert answer.std() > 20 and 0.5 < ((answer > 0) & (answer < 255)).mean() < 1
    hint = hint_of("lineart_manga", [network], image)
    np.testing.assert_allclose(hint[:, :, 0], 1 - answer.clip(0, 255) / 255, atol=1e-5)


def test_any_size_gives_a_hint_and_several_are_each_by_itself(network: nn.Module):
    for size in ((1, 1), (70, 33)):
        image = photograph(*size)
        again = hint_of("lineart_manga", [network], image)
        np.testing.assert_array_equal(hint_of("lineart_manga", [network], image), again)
    with pytest.raises(AnnotatorError, match=r"image is 33x70; .*multiples of 64"):
        lineart_manga(network, image)
    pictures = [photograph(128, 64), photograph(256, 128)[128:, 64:]]
    both = [hint for hint, _ in pipeline.see(record("lineart_manga"), pictures, networks=[network])]
    for picture, hint in zip(pictures, both, strict=True):
        np.testing.assert_allclose(hint, hint_of("lineart_manga", [network], picture), atol=1e-4)
    assert np.abs(both[0] - both[1]).mean() > 0.02


def test_other_weights_are_refused(tmp_path: Path):
    torch.save({"module.block0.model.0.conv1.model.0.weight": torch.ones(1)}, tmp_path / "erika.pth")
    with pytest.raises(AnnotatorError, match="erika.pth is not the weights of MangaLines: it lacks block0"):
        build(tmp_path / "erika.pth")


@pytest.mark.skipif("ZEROCONV_MANGA_LINES" not in os.environ, reason="ZEROCONV_MANGA_LINES names no checkout")
def test_answers_are_those_of_the_authors_network(network: nn.Module, state: dict[str, Tensor]):
    file = Path(os.environ["ZEROCONV_MANGA_LINES"]) / "model_torch.py"
    spec = importlib.util.spec_from_file_location("manga_lines", file)
    assert spec and spec.loader
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    reference = theirs.res_skip().eval()
    reference.load_state_dict(state)
    grey = torch.from_numpy(photograph(128, 192).mean(2)).float()[None, None]
    with torch.no_grad():
        expected = reference(grey)
        torch.testing.assert_close(network(grey), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
