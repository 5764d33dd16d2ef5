"""M-LSD against controlnet-aux on seeded random weights, and its maps to lines in written-out numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.mlsd import mlsd
from zeroconv.annotators.networks.mlsd import MLSD, segments
from zeroconv.benchmarks import weights

from .seeded import hint_of, load, photograph, theirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def maps_with(*lines: tuple[int, int, float, tuple[float, float, float, float]]) -> Tensor:
    """Maps (1,9,32,32) with lines: x and y of the middle in cells, the score's logit, the moves to both ends."""
    maps = torch.zeros(1, 9, 32, 32)
    maps[:, 0] = -20.0
    for x, y, logit, moves in lines:
        maps[0, 0, y, x] = logit
        maps[0, 1:5, y, x] = torch.tensor(moves)
    return maps


class Fixed(nn.Module):
    """In place of M-LSD: always the same maps; keeps what it was given."""

    def __init__(self, maps: Tensor) -> None:
        super().__init__()
        self.maps = nn.Parameter(maps)
        self.given = torch.empty(0)

    def forward(self, image: Tensor) -> Tensor:
        self.given = image
        return self.maps


def test_maps_agree_with_controlnet_aux():
    from controlnet_aux.mlsd.models.mbv2_mlsd_large import MobileV2_MLSD_Large

    ours, reference = MLSD().eval(), MobileV2_MLSD_Large().eval()
    random = weights.seeded(reference)
    ours.load_state_dict(random)
    reference.load_state_dict(random)
    image = torch.from_numpy(photograph(64, 128)).permute(2, 0, 1)[None].float() / 127.5 - 1
    planes = torch.cat([image, torch.full((1, 1, 64, 128), 1 / 127.5 - 1)], 1)
    with torch.inference_mode():
        maps, wanted = ours(planes), reference(planes)
    assert maps.shape == (1, 9, 32, 64)
    assert wanted.std() > 0.05 * wanted.abs().max()
    torch.testing.assert_close(maps, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("size", [(512, 512), (256, 384)])
@pytest.mark.parametrize(("score", "dist"), [(0.1, 0.1), (0.5, 15.0)])
def test_lines_agree_with_controlnet_aux(size: tuple[int, int], score: float, dist: float, folder: Path):
    from controlnet_aux import MLSDdetector

    networks, image = load("mlsd", folder), photograph(*size)
    reference = theirs(MLSDdetector.from_pretrained(str(folder)), image, thr_v=score, thr_d=dist)
    hint = hint_of("mlsd", networks, image, score_threshold=score, dist_threshold=dist)
    assert reference.mean() / 255 > 0.005
    assert set(np.unique(hint)) == {0.0, 1.0}
    # 1 pixel in 1000: a last bit of an end decides there which pixel it is.
    assert np.mean(hint * 255 != reference) < 1e-3


def test_maps_become_lines_in_pixels():
    found = segments(maps_with((10, 5, 0.0, (-4.0, 0.0, 4.5, 0.0)), (20, 20, 3.0, (0.0, -8.0, 0.0, 8.0))), 0.1, 0.1)
    # Best first; twice the cell plus the moves.
    np.testing.assert_array_equal(found, [[40, 24, 40, 56], [12, 10, 29, 10]])


@pytest.mark.parametrize(
    ("score", "dist", "count"),
    # The scores are sigmoid(0) = 0.5 and sigmoid(3) = 0.953, the lengths 8.5 and 16 cells.
    [(0.1, 0.1, 2), (0.6, 0.1, 1), (0.1, 10.0, 1), (0.96, 0.1, 0), (0.1, 16.5, 0)],
)
def test_thresholds_decide(score: float, dist: float, count: int):
    maps = maps_with((10, 5, 0.0, (-4.0, 0.0, 4.5, 0.0)), (20, 20, 3.0, (0.0, -8.0, 0.0, 8.0)))
    assert segments(maps, score, dist).shape == (count, 4)


def test_only_the_best_of_neighbours_and_at_most_200_lines():
    near = maps_with((10, 5, 1.0, (-4.0, 0.0, 4.0, 0.0)), (11, 5, 2.0, (-4.0, 0.0, 4.0, 0.0)))
    np.testing.assert_array_equal(segments(near, 0.1, 0.1), [[14, 10, 30, 10]])
    many = maps_with(*((x, y, 1.0, (-1.0, 0.0, 1.0, 0.0)) for x in range(0, 32, 2) for y in range(0, 32, 2)))
    assert segments(many, 0.1, 0.1).shape == (200, 4)


def test_lines_are_drawn_white_one_pixel_wide():
    network = Fixed(maps_with((10, 5, 5.0, (-4.0, 0.0, 4.5, 0.0))))
    image = photograph(64, 64)
    before = image.copy()
    hint = mlsd(network, image)
    expected = np.zeros((64, 64, 3), np.float32)
    expected[10, 12:30] = 1.0
    np.testing.assert_array_equal(hint, expected)
    np.testing.assert_array_equal(image, before)
    # RGB and ones, both counted from 0 to 255 and brought to -1..1.
    assert network.given.shape == (1, 4, 64, 64)
    np.testing.assert_allclose(network.given[0, :3, 3, 5], image[3, 5] / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(network.given[0, 3], np.full((64, 64), 1 / 127.5 - 1), atol=1e-6)


@pytest.mark.parametrize(
    "place", [pytest.param({"dtype": torch.float16}), pytest.param({"device": "cuda"}, marks=pytest.mark.gpu)], ids=str
)
def test_lines_are_found_where_the_network_is(place: dict[str, Any]):
    network = Fixed(maps_with((10, 5, 5.0, (-4.0, 0.0, 4.5, 0.0)))).to(**place)
    hint = mlsd(network, photograph(64, 64))
    assert network.given.dtype == network.maps.dtype and network.given.device == network.maps.device
    assert hint.sum() == 3 * 18 and (hint[10, 12:30] == 1).all()


def test_a_picture_without_lines_is_black():
    assert mlsd(Fixed(maps_with()), photograph(64, 64)).max() == 0


def test_twice_is_the_same_at_every_size(folder: Path):
    networks = load("mlsd", folder)
    for size in ((70, 33), (1, 1), (128, 128)):
        image = photograph(*size)
        np.testing.assert_array_equal(hint_of("mlsd", networks, image), hint_of("mlsd", networks, image))
    assert (hint_of("mlsd", networks, image) != hint_of("mlsd", networks, 255 - image)).mean() > 0.005
    with pytest.raises(AnnotatorError, match=r"image is 33x70; .*multiples of 64"):
        mlsd(networks[0], photograph(70, 33))
