"""Superpixels: two colours give two patches, means are means, the palette follows its seed."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.data import astronaut
from skimage.segmentation import slic

from zeroconv.annotators.superpixels import superpixels

PHOTOGRAPH = astronaut()[::2, ::2].astype(np.float32) / 255


def halves() -> np.ndarray:
    """Orange left, blue right, (32,64,3)."""
    image = np.empty((32, 64, 3), np.float32)
    image[:, :32], image[:, 32:] = (1.0, 0.5, 0.1), (0.1, 0.2, 0.9)
    return image


def test_patches_of_their_mean_keep_two_flat_colours():
    image = halves()
    hint = superpixels(image, count=8)
    assert hint.shape == (32, 64, 3) and hint.dtype == np.float32
    np.testing.assert_allclose(hint, halves(), atol=1e-6)
    np.testing.assert_array_equal(image, halves())


def test_colours_from_the_palette_do_not_cross_the_border():
    hint = superpixels(halves(), count=8, colours="palette", merge=0)
    left, right = ({tuple(pixel) for pixel in half.reshape(-1, 3)} for half in (hint[:, :32], hint[:, 32:]))
    assert len(left) >= 2 and len(right) >= 2 and not left & right


def test_each_patch_has_the_mean_of_its_pixels():
    labels = slic(PHOTOGRAPH, n_segments=60, compactness=30.0, start_label=0)
    assert 30 < labels.max() < 120
    hint = superpixels(PHOTOGRAPH, 60, merge=0)
    for label in range(labels.max() + 1):
        patch = labels == label
        np.testing.assert_allclose(
            hint[patch], np.broadcast_to(PHOTOGRAPH[patch].mean(axis=0), (patch.sum(), 3)), atol=1e-5
        )
    np.testing.assert_allclose(hint.mean(axis=(0, 1)), PHOTOGRAPH.mean(axis=(0, 1), dtype=np.float64), atol=1e-3)


@pytest.mark.parametrize(("count", "least", "most"), [(20, 5, 40), (200, 100, 300), (1000, 500, 1300)])
def test_about_as_many_patches_as_asked(count: int, least: int, most: int):
    patches = np.unique(superpixels(PHOTOGRAPH, count, colours="palette", merge=0).reshape(-1, 3), axis=0)
    assert least <= len(patches) <= most


def test_compact_patches_follow_colour_less():
    errors = [np.abs(superpixels(PHOTOGRAPH, compactness=c, merge=0) - PHOTOGRAPH).mean() for c in (30.0, 100.0)]
    assert errors[0] < 0.9 * errors[1]


def test_the_seed_chooses_the_palette_and_not_the_patches():
    one, same, other = (superpixels(PHOTOGRAPH, colours="palette", seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any(axis=2).mean() > 0.99
    borders = [(np.diff(hint, axis=0) != 0).any(axis=2) for hint in (one, other)]
    np.testing.assert_array_equal(*borders)
    np.testing.assert_array_equal(superpixels(PHOTOGRAPH, seed=1), superpixels(PHOTOGRAPH, seed=2))
