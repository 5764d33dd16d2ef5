"""The line drawing generators against controlnet-aux on seeded random weights; which way round hints are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.lineart import lineart, lineart_anime
from zeroconv.annotators.networks.lineart import AnimeGenerator, LineartGenerator
from zeroconv.benchmarks.weights import anime_generator, seeded

from .seeded import assert_agrees, hint_of, load, photograph, theirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


class Red(nn.Module):
    """In place of a generator: draws the red channel, and notes the sizes that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.sizes.append(tuple(image.shape))
        return image[:, :1]


def their_lineart() -> nn.Module:
    from controlnet_aux.lineart import Generator

    return Generator(3, 1, 3)


@pytest.mark.parametrize(
    ("ours", "peer", "size"), [(LineartGenerator, their_lineart, 64), (AnimeGenerator, anime_generator, 256)]
)
def test_drawings_agree_with_controlnet_aux(ours: type[nn.Module], peer: Callable[[], nn.Module], size: int):
    network, reference = ours().eval(), peer().eval()
    weights = seeded(reference)
    network.load_state_dict(weights)
    reference.load_state_dict(weights)
    image = torch.from_numpy(photograph(size, 2 * size)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        drawn, wanted = network(image), reference(image.clone())
    assert drawn.shape == (1, 1, size, 2 * size)
    assert wanted.std() > 0.05
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("size", [(512, 512), (256, 384)])
@pytest.mark.parametrize("name", ["lineart_realistic", "lineart_coarse"])
def test_hints_agree_with_controlnet_aux(name: str, size: tuple[int, int], folder: Path):
    from controlnet_aux import LineartDetector

    # Their detector has both networks at all times.
    both = load("lineart_realistic", folder) + load("lineart_coarse", folder)
    networks = both[:1] if name == "lineart_realistic" else both[1:]
    image = photograph(*size)
    reference = theirs(LineartDetector.from_pretrained(str(folder)), image, coarse=name == "lineart_coarse")
    # They cut off what is behind the point of 0..255; we do not.
    assert_agrees(hint_of(name, networks, image), reference, levels=1.0)


def test_coarse_is_another_network(folder: Path):
    image = photograph(128, 128)
    fine = hint_of("lineart_realistic", load("lineart_realistic", folder), image)
    coarse = hint_of("lineart_coarse", load("lineart_coarse", folder), image)
    assert np.abs(fine - coarse).mean() > 0.05


# 512x512 is taken as it is; 256x384 is stretched to 256x512 and back.
@pytest.mark.parametrize("size", [(512, 512), (256, 384)])
def test_anime_hints_agree_with_controlnet_aux(size: tuple[int, int], folder: Path):
    from controlnet_aux import LineartAnimeDetector

    networks, image = load("lineart_anime", folder), photograph(*size)
    reference = theirs(LineartAnimeDetector.from_pretrained(str(folder)), image)
    assert_agrees(hint_of("lineart_anime", networks, image), reference, levels=1.0)


@pytest.mark.parametrize("function", [lineart, lineart_anime])
def test_dark_lines_become_white(function: Callable[..., np.ndarray]):
    image = np.ones((256, 256, 3), np.float32)
    image[:, 100] = 0.0
    before = image.copy()
    hint = function(Red(), image)
    assert hint.shape == (256, 256, 3) and hint.dtype == np.float32
    np.testing.assert_allclose(hint, 1 - image, atol=1e-6)
    np.testing.assert_array_equal(image, before)


def test_anime_reads_multiples_of_256():
    network, image = Red(), photograph(64, 320)
    hint = lineart_anime(network, image)
    assert network.sizes == [(1, 3, 256, 512)]
    # Stretched and back again, red is still red, but for the cubic's ringing.
    assert np.abs(1 - hint[:, :, 0] - image[:, :, 0] / 255).mean() < 0.01


@pytest.mark.parametrize("name", ["lineart_realistic", "lineart_anime"])
def test_the_picture_decides_and_twice_is_the_same(name: str, folder: Path):
    networks, image = load(name, folder), photograph(128, 128)
    hint = hint_of(name, networks, image)
    np.testing.assert_array_equal(hint, hint_of(name, networks, image))
    assert np.abs(hint - hint_of(name, networks, 255 - image)).mean() > 0.05
    assert hint_of(name, networks, photograph(70, 33)).shape == (70, 33, 3)
    assert hint_of(name, networks, photograph(1, 1)).shape == (1, 1, 3)


def test_odd_sizes_are_refused():
    with pytest.raises(AnnotatorError, match=r"image is 33x70; .*multiples of 64"):
        lineart(Red(), photograph(70, 33))
    with pytest.raises(AnnotatorError, match=r"image has shape \(8, 8\); an annotator reads RGB"):
        lineart_anime(Red(), np.zeros((8, 8), np.float32))
