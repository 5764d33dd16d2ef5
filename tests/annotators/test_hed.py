"""HED against controlnet-aux on seeded random weights, its levels and its scribbles in written-out numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zeroconv.annotators.hed import hed, scribble_hed
from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.networks.hed import HED
from zeroconv.benchmarks.weights import seeded

from .seeded import assert_agrees, hint_of, load, photograph, theirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


class Flat(nn.Module):
    """In place of HED: five maps of one logit."""

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(logit))

    def forward(self, image: Tensor) -> list[Tensor]:
        return [self.logit.expand(1, 1, image.shape[2] >> i, image.shape[3] >> i) for i in range(5)]


class Line(Flat):
    """Five maps with a white edge down columns 28 to 35."""

    def forward(self, image: Tensor) -> list[Tensor]:
        logits = torch.full((1, 1, image.shape[2], image.shape[3]), -20.0)
        logits[..., 28:36] = 20.0
        return [logits] * 5


def test_logits_agree_with_controlnet_aux():
    from controlnet_aux.hed import ControlNetHED_Apache2

    ours, reference = HED(), ControlNetHED_Apache2()
    weights = seeded(reference)
    ours.load_state_dict(weights)
    reference.load_state_dict(weights)
    image = torch.from_numpy(photograph(64, 128)).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        maps, wanted = ours(image), reference(image)
    assert [tuple(logits.shape) for logits in maps] == [(1, 1, 64 >> i, 128 >> i) for i in range(5)]
    for logits, other in zip(maps, wanted, strict=True):
        assert other.std() > 0.05 * other.abs().max()
        torch.testing.assert_close(logits, other, rtol=0, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("size", [(512, 512), (256, 384)])
@pytest.mark.parametrize("safe", [False, True])
def test_soft_edges_agree_with_controlnet_aux(size: tuple[int, int], safe: bool, folder: Path):
    from controlnet_aux import HEDdetector

    networks, image = load("hed", folder), photograph(*size)
    reference = theirs(HEDdetector.from_pretrained(str(folder)), image, safe=safe)
    # They cut off what is behind the point of 0..255; we do not.
    assert_agrees(hint_of("hed", networks, image, safe=safe), reference, levels=1.0)


@pytest.mark.parametrize("size", [(512, 512), (256, 384)])
@pytest.mark.parametrize("safe", [False, True])
def test_scribbles_agree_with_controlnet_aux(size: tuple[int, int], safe: bool, folder: Path):
    from controlnet_aux import HEDdetector

    networks, image = load("scribble_hed", folder), photograph(*size)
    reference = theirs(HEDdetector.from_pretrained(str(folder)), image, safe=safe, scribble=True)
    hint = hint_of("scribble_hed", networks, image, safe=safe)
    assert set(np.unique(hint)) == {0.0, 1.0}
    assert 0.05 < reference.mean() / 255 < 0.95
    # 1 pixel in 1000: a last bit of an edge decides there whether it is a ridge.
    assert np.mean(hint * 255 != reference) < 1e-3


@pytest.mark.parametrize(
    ("logit", "soft", "safe"),
    # sigmoid(-1) = 0.2689 is below a third, sigmoid(0) between a third and two thirds, sigmoid(1) = 0.7311 above.
    [(-1.0, 0.26894143, 0.0), (0.0, 0.5, 0.5), (1.0, 0.73105858, 1.0), (50.0, 1.0, 1.0)],
)
def test_levels(logit: float, soft: float, safe: float):
    image = np.zeros((64, 128, 3), np.float32)
    network = Flat(logit)
    np.testing.assert_allclose(hed(network, image, safe=False), np.full((64, 128, 3), soft), atol=1e-6)
    np.testing.assert_array_equal(hed(network, image), np.full((64, 128, 3), safe, np.float32))


def test_a_scribble_is_a_thick_stroke_along_the_edge():
    hint = scribble_hed(Line(0.0), np.zeros((64, 64, 3), np.float32))
    assert hint.shape == (64, 64, 3) and hint.dtype == np.float32
    (columns,) = np.nonzero(hint[32, :, 0])
    # The smoothed edge is above 127 in columns 28 to 35, and no pixel is below its upper and lower neighbour. Smoothed
    # by 3 pixels again, it is above 4/255 up to 6.5 pixels away: there the Gaussian's tail is 0.0157.
    np.testing.assert_array_equal(columns, np.arange(22, 42))
    assert (hint[:, 22:42] == 1).all()
    # The smoothed edge has 0.82 of 255 in its middle, 208.
    assert scribble_hed(Line(0.0), np.zeros((64, 64, 3), np.float32), threshold=220.0).max() == 0
    np.testing.assert_array_equal(scribble_hed(Line(0.0), np.zeros((64, 64, 3), np.float32), threshold=200.0)[0, 31], 1)


def test_the_picture_decides_and_twice_is_the_same(folder: Path):
    networks, image = load("hed", folder), photograph(128, 128)
    hint = hint_of("hed", networks, image, safe=False)
    np.testing.assert_array_equal(hint, hint_of("hed", networks, image, safe=False))
    assert np.abs(hint - hint_of("hed", networks, 255 - image, safe=False)).mean() > 0.05
    # Floats are the same picture as bytes.
    np.testing.assert_allclose(hint, hint_of("hed", networks, (image / 255).astype(np.float32), safe=False), atol=1e-5)


def test_small_and_odd_pictures_are_padded_and_cropped_by_the_pipeline(folder: Path):
    networks = load("hed", folder)
    assert hint_of("hed", networks, photograph(1, 1)).shape == (1, 1, 3)
    assert hint_of("hed", networks, photograph(70, 33)).shape == (70, 33, 3)
    with pytest.raises(AnnotatorError, match=r"image is 33x70; .*multiples of 64"):
        hed(networks[0], photograph(70, 33))
