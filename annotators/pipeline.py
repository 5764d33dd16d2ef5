"""From any picture to a hint of the asked resolution, with any annotator: the one way that nodes and commands take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from . import Annotator
from .images import AnnotatorError, fit_mask, pad_to_multiple, resize_short_side, to_picture
from .keypoints import with_canvas

LONGEST = 16384
"""Pixels of a hint's longer side; image libraries break at twice that."""

Seen = tuple[np.ndarray, "dict[str, Any] | None"]
"""What an annotator's function gives of one picture, and the POSE_KEYPOINT frame of one that gives it."""


def annotate(
    annotator: Annotator,
    image: np.ndarray,
    resolution: int = 0,
    *,
    networks: Sequence[Any] | Callable[[], Sequence[Any]] = (),
    mask: np.ndarray | None = None,
    frame: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Seen:
    """The hint (h,w,3) float32 of one picture, and the POSE_KEYPOINT frame of an annotator that gives one (`see`)."""
    ((seen, found),) = see(
        annotator, [image], resolution, networks=networks, masks=[mask], frames=[frame], parameters=parameters
    )
    (hint,) = draw(annotator, [seen], parameters)
    return hint, found


def see(
    annotator: Annotator,
    images: Sequence[np.ndarray],
    resolution: int = 0,
    *,
    networks: Sequence[Any] | Callable[[], Sequence[Any]] = (),
    masks: Sequence[np.ndarray | None] | None = None,
    frames: Sequence[Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> list[Seen]:
    """What `draw` makes the hints of, for pictures of one size; of most annotators that is the hint already.

    An image is whatever `images.to_picture` reads; `resolution` is the short side of the hint in pixels, 0 the
    picture's own. `networks` are those that the annotator names, loaded, or what gives them: it is called when all else
    is in order. A mask (H,W) in 0..1 and a POSE_KEYPOINT frame for each picture are for annotators that read them. A
    parameter that is left out has its default. Pictures stay as they are. Raises AnnotatorError, which names the
    annotator.
    """
    missing = [package for package in annotator.packages if find_spec(package) is None]
    if missing:
        raise AnnotatorError(
            f"{annotator.name} needs {', '.join(missing)}, which this Python lacks: install it with "
            f"`python -m pip install {' '.join(missing)}`; all other annotators work without"
        )
    given = annotator.own(annotator.function, parameters or {})
    masks, frames = masks or [None] * len(images), frames or [None] * len(images)
    try:
        pictures, also = [], []
        for image, mask, frame in zip(images, masks, frames, strict=True):
            picture = to_picture(image)
            own = picture.shape[:2]
            _check_size(own, resolution)
            picture = resize_short_side(picture, resolution)
            pictures.append(picture)
            also.append(_read(annotator, own, picture.shape[:2], mask, frame))
        padded = [pad_to_multiple(picture, annotator.multiple) for picture in pictures]
        loaded = networks() if callable(networks) else networks
        if annotator.batched:
            made = annotator.function(*loaded, np.stack(padded), **given)
        else:
            made = [annotator.function(*loaded, one, **given, **rest) for one, rest in zip(padded, also)]
    except AnnotatorError as error:
        raise AnnotatorError(f"{annotator.name}: {error}") from error
    except ImportError as error:
        raise AnnotatorError(
            f"{annotator.name} needs {error.name or 'a library'}, which cannot be loaded ({error}): install it, or "
            "a newer one; annotators that do not need it work without"
        ) from error
    return [_cut(annotator, one, picture) for one, picture in zip(made, pictures)]


def draw(
    annotator: Annotator, seen: Iterable[np.ndarray], parameters: Mapping[str, Any] | None = None
) -> Iterator[np.ndarray]:
    """The hints (h,w,3) float32 of what an annotator saw of each picture of a batch, one after the other."""
    if annotator.draw is None:
        yield from seen
    else:
        yield from annotator.draw(seen, **annotator.own(annotator.draw, parameters or {}))


def covering(sides: tuple[int, ...], target: tuple[int, ...]) -> int:
    """The resolution at which a picture of these sides (height, width) just covers a `target` of such sides.

    What the control then sees is drawn at its own scale, neither enlarged nor shrunk (pixel perfect, as in Mikubill/
    sd-webui-controlnet).
    """
    short = min(sides)
    scales = [wanted / side for side, wanted in zip(sides, target)]
    resolution = max(1, math.floor(short * max(scales)))
    while any(round(side * resolution / short) < wanted for side, wanted in zip(sides, target)):
        resolution += 1
    return resolution


def _read(
    annotator: Annotator, own: tuple[int, ...], size: tuple[int, ...], mask: np.ndarray | None, frame: Any
) -> dict[str, Any]:
    """The mask and frame of a picture for an annotator that reads them; its `own` size came before that of the hint."""
    given: dict[str, Any] = {}
    if annotator.reads_mask:
        if mask is None:
            raise AnnotatorError("found no mask: connect one, white where to paint anew, or on what to mark")
        given["mask"] = fit_mask(mask, size[0], size[1])
    if annotator.reads_pose:
        if frame is None:
            raise AnnotatorError(
                "found no pose_keypoints: for a photograph choose human_pose; to draw joints, connect them here"
            )
        given["frame"] = with_canvas(frame, own[0], own[1])
    return given


def _cut(annotator: Annotator, made: Any, picture: np.ndarray) -> Seen:
    """What a function gave of a picture, without the margin, and not the picture's own memory."""
    (seen, found), (height, width) = made if annotator.gives_pose else (made, None), picture.shape[:2]
    if found is not None:
        found = {**found, "canvas_width": width, "canvas_height": height}
    seen = np.ascontiguousarray(seen[:height, :width], dtype=np.float32)
    return seen.copy() if np.may_share_memory(seen, picture) else seen, found


def _check_size(sides: tuple[int, ...], resolution: int) -> None:
    """Raise where the hint would be longer than any use of it."""
    scale = resolution / min(sides) if resolution else 1
    height, width = (round(side * scale) for side in sides)
    if max(height, width) > LONGEST:
        raise AnnotatorError(
            f"the hint would be {width}x{height} pixels, and a side has {LONGEST} at most: crop the picture, or "
            "choose a lower resolution"
        )
