"""Superpixels: patches of similar colour. They know nothing of what they show; semantic segments are in segments.py."""

from __future__ import annotations

import numpy as np

from . import Annotator, Parameter


def superpixels(
    image: np.ndarray,
    count: int = 200,
    compactness: float = 30.0,
    colours: str = "mean",
    seed: int = 0,
    merge: float = 8.0,
) -> np.ndarray:
    """About `count` patches of similar colour of an RGB picture (H,W,3), 0..1, in flat colours: (H,W,3) float32 0..1.

    scikit-image's SLIC in CIE Lab; a high `compactness` makes patches square, a low one lets them follow colour. In
    plain areas it has nothing to follow: neighbours whose means are less than `merge` apart, of 255, become one patch.
    `colours` are the mean of each patch, or drawn at random from `seed`.
    """
    from skimage import graph
    from skimage.segmentation import slic

    labels = slic(image, n_segments=count, compactness=compactness, start_label=0, channel_axis=2)
    if merge > 0 and labels.max() > 0:
        labels = graph.cut_threshold(labels, graph.rag_mean_color(np.asarray(image) * 255, labels), merge)
    total = int(labels.max()) + 1
    if colours == "palette":
        table = np.random.default_rng(seed).integers(0, 256, (total, 3)) / 255
    else:
        flat = labels.ravel()
        size = np.maximum(np.bincount(flat, minlength=total), 1)
        table = np.stack([np.bincount(flat, image[:, :, c].ravel(), total) / size for c in range(3)], axis=1)
    return table.astype(np.float32)[labels]


RECORDS = (
    Annotator(
        "superpixels",
        superpixels,
        (
            Parameter("count", "About how many patches.", 1, 10000, 1),
            Parameter("compactness", "Higher makes square patches, lower lets them follow colour.", 0.01, 100.0),
            Parameter("colours", "Each patch's own mean, or colours at random.", choices=("mean", "palette")),
            Parameter("seed", "Which random colours.", 0, 2147483647, 1),
            Parameter("merge", "Neighbours less than this apart, of 255, become one; 0 keeps them.", 0.0, 255.0, 0.5),
        ),
    ),
)
