"""What a network sees of a picture whose sides do not fit it: its reflection, or the picture alone. Never a frame."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from skimage.data import coffee, rocket
from torch import Tensor, nn

from zeroconv.annotators import ANNOTATORS, Annotator, pipeline
from zeroconv.annotators.images import pad_to_multiple

from .seeded import record

LEARNED = [annotator for annotator in ANNOTATORS if annotator.networks]
CONVOLUTIONAL = (
    "hed",
    "mlsd",
    "scribble_hed",
    "lineart_realistic",
    "lineart_coarse",
    "lineart_manga",
    "teed",
    "anyline",
)


def seen_by(annotator: Annotator, picture: np.ndarray, resolution: int) -> np.ndarray:
    """What the annotator's function is given, and that the hint has the size that was asked for."""
    seen = []

    def function(*given: Any, **_: Any) -> Any:
        seen.append(given[-1][0] if annotator.batched else given[-1])
        return (given[-1], {"people": []}) if annotator.gives_pose else given[-1]

    # As it is listed, but for what it does.
    fake = replace(annotator, function=function, draw=None, parameters=())
    mask = np.ones(picture.shape[:2], np.float32)
    hint, _ = pipeline.annotate(fake, picture, resolution, networks=[None], mask=mask)
    assert min(hint.shape[:2]) == resolution
    assert seen[0].shape[0] >= hint.shape[0] and seen[0].shape[1] >= hint.shape[1]
    return seen[0]


@pytest.mark.parametrize("annotator", LEARNED, ids=[annotator.name for annotator in LEARNED])
def test_networks_that_want_multiples_of_64_see_a_reflection_and_others_the_picture(annotator: Annotator):
    """512x768 of a cup of coffee, from 400x600; a rocket of 500x749."""
    seen = seen_by(annotator, rocket(), 500)
    if annotator.name not in CONVOLUTIONAL:
        assert annotator.multiple == 1 and seen.shape == (500, 749, 3)
        return
    assert seen.shape == (512, 768, 3)
    for i in range(1, 12):
        np.testing.assert_array_equal(seen[499 + i, :749], seen[499 - i, :749])
    for i in range(1, 19):
        np.testing.assert_array_equal(seen[:, 748 + i], seen[:, 748 - i])
    assert seen_by(annotator, coffee(), 512).shape == (512, 768, 3)


class Slopes(nn.Module):
    """In place of HED: five maps of where brightness changes from left to right, summed over 64 rows.

    As deep maps of the real one do, it takes rows that repeat for one long edge.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, image: Tensor) -> list[Tensor]:
        grey = image.mean(1, keepdim=True) / 255
        slope = nn.functional.avg_pool2d(grey[..., 2:] - grey[..., :-2], (65, 1), 1, (32, 0), count_include_pad=False)
        return [nn.functional.pad(60 * self.gain * slope.abs() - 4, (1, 1))] * 5


def test_no_bar_where_the_picture_ends():
    """Coffee at 400x600: with its last row repeated, the bottom is 3.5 times as bright as the rows above it."""
    hint, _ = pipeline.annotate(record("hed"), coffee(), networks=[Slopes()], parameters={"safe": False})
    bottom, above = hint[-8:, 16:-16].mean(), hint[-72:-40, 16:-16].mean()
    assert hint.std() > 0.05
    assert bottom < 2 * above, (bottom, above)


def test_a_picture_smaller_than_its_margin_is_reflected_again():
    small = np.arange(6.0).reshape(2, 3, 1).repeat(3, axis=2)
    assert pad_to_multiple(small, 4)[:, :, 0].tolist() == [[0, 1, 2, 1], [3, 4, 5, 4], [0, 1, 2, 1], [3, 4, 5, 4]]
    assert (pad_to_multiple(small[:1, :1], 64) == 0).all() and pad_to_multiple(small[:1, :1], 64).shape == (64, 64, 3)
