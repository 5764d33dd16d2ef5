"""Holes filled by LaMa: written-out numbers with a plain filler, and a seeded program of its interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage.data import rocket
from torch import Tensor, nn

from zeroconv.annotators import pipeline
from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.inpaint import inpaint_lama
from zeroconv.annotators.networks import NETWORKS, scripted

from . import scripted_tiny
from .seeded import record


class Filler(nn.Module):
    """In place of LaMa: fills a hole with one number."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.tensor(number))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        self.seen.append((image, mask))
        return image * (1 - mask) + mask * self.number


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted_tiny.lama(tmp_path_factory.mktemp("lama"))


@pytest.fixture(scope="module")
def network(file: Path) -> nn.Module:
    return scripted.build(file)


def photograph(height: int = 96, width: int = 144) -> np.ndarray:
    return rocket()[100 : 100 + height, 200 : 200 + width].astype(np.float32) / 255


def square(height: int, width: int) -> np.ndarray:
    """A mask of the middle."""
    mask = np.zeros((height, width), np.float32)
    mask[height // 3 : 2 * height // 3, width // 3 : 2 * width // 3] = 1
    return mask


def test_the_hole_is_filled_and_the_rest_is_as_it_was():
    image, mask = photograph(), square(96, 144)
    before = image.copy()
    hint = inpaint_lama(Filler(0.75), image, mask, detail=0)
    assert hint.shape == (96, 144, 3) and hint.dtype == np.float32
    assert (hint[mask == 1] == 0.75).all()
    np.testing.assert_array_equal(hint[mask == 0], image[mask == 0])
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(mask, square(96, 144))


def test_greys_of_the_mask_mix_and_are_a_hole():
    image, mask, filler = np.full((8, 16, 3), 0.2, np.float32), np.zeros((8, 16), np.float32), Filler(1.0)
    mask[2, 3] = 0.25
    hint = inpaint_lama(filler, image, mask, detail=0)
    # A quarter of 1 and three quarters of 0.2.
    np.testing.assert_allclose(hint[2, 3], 0.4, atol=1e-6)
    assert filler.seen[0][1].sum() == 1 and filler.seen[0][1][0, 0, 2, 3] == 1


def test_it_looks_at_the_asked_size_and_a_small_hole_stays_one():
    image, mask, filler = photograph(200, 250), np.zeros((200, 250), np.float32), Filler(1.0)
    mask[101, 120] = 1
    hint = inpaint_lama(filler, image, mask, detail=100)
    ((seen, hole),) = filler.seen
    # 100x125, continued to multiples of 8.
    assert seen.shape == (1, 3, 104, 128) and hole.shape == (1, 1, 104, 128)
    assert hole[0, 0, :100, :125].sum() == 1 and hole[0, 0, 50, 60] == 1
    torch.testing.assert_close(seen[0, :, 100], seen[0, :, 98])
    changed = (hint != image).any(axis=2)
    assert changed.sum() == 1 and changed[101, 120]
    # Never enlarged.
    inpaint_lama(filler, image, mask, detail=2048)
    assert filler.seen[1][0].shape == (1, 3, 200, 256)


def test_without_a_hole_nothing_is_asked():
    filler = Filler(1.0)
    np.testing.assert_array_equal(inpaint_lama(filler, photograph(), np.zeros((96, 144), np.float32)), photograph())
    assert filler.seen == []


def test_a_seeded_program_fills_as_it_answers(network: nn.Module):
    """As Sanster/IOPaint asks it: RGB and mask in 0..1, sides of 8 n, and its answer where the mask is."""
    image, mask = photograph(), square(96, 144)
    hint, _ = pipeline.annotate(record("inpaint_lama"), image, networks=[network], mask=mask)
    with torch.inference_mode():
        pixels, hole = torch.from_numpy(image).permute(2, 0, 1)[None], torch.from_numpy(mask)[None, None]
        answer = network(pixels, hole)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(hint, answer, atol=1e-6)
    assert hint[mask == 1].std() > 0.05
    again, _ = pipeline.annotate(record("inpaint_lama"), image, networks=[network], mask=mask)
    np.testing.assert_array_equal(hint, again)
    other, _ = pipeline.annotate(record("inpaint_lama"), 1 - image, networks=[network], mask=mask)
    assert np.abs(other - hint)[mask == 1].mean() > 0.01


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 90, 3), (90, 1, 3), (64, 64, 1), (50, 60, 4)], ids=str)
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_any_picture_gives_a_hint(network: nn.Module, shape: tuple[int, ...], level: float):
    picture = np.random.default_rng(1).random(shape).astype(np.float32)
    mask = np.full(shape[:2], level, np.float32)
    hint, _ = pipeline.annotate(record("inpaint_lama"), picture, networks=[network], mask=mask)
    assert hint.shape == (*shape[:2], 3) and hint.dtype == np.float32
    assert 0 <= hint.min() and hint.max() <= 1


def test_numbers_that_are_none_are_told():
    with pytest.raises(AnnotatorError, match="numbers that are not finite"):
        inpaint_lama(Filler(float("nan")), photograph(), square(96, 144))


def test_without_a_mask_it_says_so(network: nn.Module):
    with pytest.raises(AnnotatorError, match="inpaint_lama: found no mask: connect one, white where to paint anew"):
        pipeline.annotate(record("inpaint_lama"), photograph(), networks=[network])


def test_the_file_is_a_program_and_refused_when_it_is_another(file: Path):
    (entry,) = [network for network in NETWORKS if network.name == "lama"]
    assert entry.files[0].program and entry.licence.startswith("Apache-2.0") and entry.commercial
    with pytest.raises(AnnotatorError, match=r"big-lama.pt is a program with checksum .* it is not run"):
        entry.load([file])


@pytest.mark.gpu
def test_holes_are_filled_on_cuda(file: Path, network: nn.Module):
    given: dict[str, Any] = {"image": photograph(), "mask": square(96, 144)}
    here, there = inpaint_lama(network, **given), inpaint_lama(scripted.build(file).to("cuda"), **given)
    np.testing.assert_allclose(here, there, atol=1e-3)
