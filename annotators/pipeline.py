"""From any picture to a hint of the asked resolution, with any annotator: the one way that nodes and commands take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from . import Annotator
from .images import AnnotatorError, fit_mask, pad_to_multiple, resize_short_side, to_picture
from .keypoints import with_canvas

LONGEST = 16384
"""Pixels of a hint's longer side; image libraries break at twice that."""


def annotate(
    annotator: Annotator,
    image: np.ndarray,
    resolution: int = 0,
    *,
    networks: Sequence[Any] | Callable[[], Sequence[Any]] = (),
    mask: np.ndarray | None = None,
    frame: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> tuple[np.ndarray, dict[str, Any] | None]:
    """The hint (h,w,3) float32 of a picture, and the POSE_KEYPOINT frame of an annotator that gives one.

    `image` is whatever `images.to_picture` reads; `resolution` is the short side of the hint in pixels, 0 the picture's
    own. `networks` are those that the annotator names, loaded, or what gives them: it is called when all else is in
    order. `mask` (H,W) in 0..1 and the POSE_KEYPOINT `frame` are for annotators that read them. A parameter that is
    left out has its default. The picture stays as it is. Raises AnnotatorError, which names the annotator.
    """
    missing = [package for package in annotator.packages if find_spec(package) is None]
    if missing:
        raise AnnotatorError(
            f"{annotator.name} needs {', '.join(missing)}, which this Python lacks: install it with "
            f"`python -m pip install {' '.join(missing)}`; all other annotators work without"
        )
    given = {parameter.name: parameter.default for parameter in annotator.parameters} | dict(parameters or {})
    try:
        picture = to_picture(image)
        _check_size(picture.shape[:2], resolution)
        own = picture.shape[:2]
        picture = resize_short_side(picture, resolution)
        height, width = picture.shape[:2]
        picture = pad_to_multiple(picture, annotator.multiple)
        if annotator.reads_mask:
            if mask is None:
                raise AnnotatorError("found no mask: connect one, white where to paint anew")
            given["mask"] = fit_mask(mask, height, width)
        if annotator.reads_pose:
            if frame is None:
                raise AnnotatorError("found no pose_keypoints: connect a node that gives them")
            given["frame"] = with_canvas(frame, *own)
        made = annotator.function(*(networks() if callable(networks) else networks), picture, **given)
    except AnnotatorError as error:
        raise AnnotatorError(f"{annotator.name}: {error}") from error
    except ImportError as error:
        raise AnnotatorError(
            f"{annotator.name} needs {error.name or 'a library'}, which cannot be loaded ({error}): install it, or "
            "a newer one; annotators that do not need it work without"
        ) from error
    hint, found = made if annotator.gives_pose else (made, None)
    if found is not None:
        found = {**found, "canvas_width": width, "canvas_height": height}
    return np.ascontiguousarray(hint[:height, :width], dtype=np.float32), found


def _check_size(sides: tuple[int, ...], resolution: int) -> None:
    """Raise where the hint would be longer than any use of it."""
    scale = resolution / min(sides) if resolution else 1
    height, width = (round(side * scale) for side in sides)
    if max(height, width) > LONGEST:
        raise AnnotatorError(
            f"the hint would be {width}x{height} pixels, and a side has {LONGEST} at most: crop the picture, or "
            "choose a lower resolution"
        )
