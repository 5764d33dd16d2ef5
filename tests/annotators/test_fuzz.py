"""Every annotator without a network, on every kind of picture: a hint of the right size and range, or a clear error."""

from __future__ import annotations

import sys
from typing import Any

import cv2
import numpy as np
import pytest
from skimage.data import astronaut

from zeroconv.annotators import ANNOTATORS, Annotator, Parameter
from zeroconv.annotators.images import AnnotatorError, fit_mask
from zeroconv.annotators.pipeline import annotate

WEIGHTLESS = [annotator for annotator in ANNOTATORS if not annotator.networks]
EACH = pytest.mark.parametrize("annotator", WEIGHTLESS, ids=[annotator.name for annotator in WEIGHTLESS])
PHOTOGRAPH = cv2.resize(astronaut(), (40, 24), interpolation=cv2.INTER_AREA)
NOISE = np.random.default_rng(8)
PICTURES = {
    "1x1": NOISE.random((1, 1, 3)),
    "1xN": NOISE.random((1, 9, 3)),
    "Nx1": NOISE.random((9, 1, 3)),
    "2x2": NOISE.random((2, 2, 3)),
    "3x3": NOISE.random((3, 3, 3)),
    "bytes": PHOTOGRAPH,
    "black": np.zeros((24, 40, 3), np.float32),
    "white": np.ones((24, 40, 3), np.float32),
    "grey": PHOTOGRAPH[:, :, 0],
    "one channel": PHOTOGRAPH[:, :, :1],
    "RGBA": np.dstack([PHOTOGRAPH, np.arange(960, dtype=np.uint8).reshape(24, 40)]),
    "16 bit": PHOTOGRAPH.astype(np.uint16) * 257,
    "half": (PHOTOGRAPH / 255).astype(np.float16),
    "double": PHOTOGRAPH / 255,
    "out of range": NOISE.normal(0.5, 4, (24, 40, 3)).astype(np.float32),
    "not contiguous": PHOTOGRAPH[::-1, ::-2],
    "uneven": PHOTOGRAPH[:23, :37],
}
UNREADABLE = {
    "NaN": (np.full((8, 8, 3), np.nan, np.float32), "192 numbers that are not finite"),
    "infinite": (np.full((8, 8, 3), np.inf, np.float32), "192 numbers that are not finite"),
    "no rows": (np.zeros((0, 8, 3), np.float32), r"image has shape \(0, 8, 3\); .* at least one pixel"),
    "no columns": (np.zeros((8, 0, 3), np.uint8), r"image has shape \(8, 0, 3\); .* at least one pixel"),
    "two channels": (np.zeros((8, 8, 2), np.float32), r"image has shape \(8, 8, 2\); .* with 1, 3 or 4 channels"),
    "a batch": (np.zeros((1, 8, 8, 3), np.float32), r"image has shape \(1, 8, 8, 3\)"),
    "whole numbers": (np.zeros((8, 8, 3), np.int64), "image is int64; give float in 0..1, uint8 or uint16"),
    "truth values": (np.zeros((8, 8, 3), bool), "image is bool; give float in 0..1, uint8 or uint16"),
}


def given(annotator: Annotator, height: int, width: int) -> dict[str, Any]:
    """What the annotator reads beside the picture: a mask of its right half, two people."""

    def points(count: int) -> list[float]:
        return [
            number
            for i in range(count)
            for number in (width * (i + 1) / (count + 2), height * (i % 5 + 1) / 7, 0.5 if i % 4 == 3 else 1.0)
        ]

    whole = {
        "pose_keypoints_2d": points(18),
        "face_keypoints_2d": points(70),
        "hand_left_keypoints_2d": points(21),
        "hand_right_keypoints_2d": points(21),
    }
    only_body = {key: value if key == "pose_keypoints_2d" else None for key, value in whole.items()}
    frame = {"people": [whole, only_body], "canvas_width": width, "canvas_height": height}
    mask = np.zeros((height, width), np.float32)
    mask[:, width // 2 :] = 1
    return {"mask": mask if annotator.reads_mask else None, "frame": frame if annotator.reads_pose else None}


def readable(annotator: Annotator, picture: np.ndarray) -> np.ndarray:
    """The picture, without its colours for the one that reads depth maps and refuses others."""
    if annotator.name != "normal_from_depth" or picture.ndim == 2 or picture.shape[2] == 1:
        return picture
    grey = np.repeat(picture[:, :, :1], 3, axis=2)
    return np.concatenate([grey, picture[:, :, 3:]], axis=2)


def lowest(annotator: Annotator) -> float:
    """0, or less where the annotator marks pixels with a number that no picture has."""
    return min([0.0, *(p.minimum for p in annotator.parameters if p.name == "masked_value")])


def checked(annotator: Annotator, picture: np.ndarray, resolution: int = 0, **parameters: Any) -> np.ndarray:
    """The hint, run twice: the same both times, of the right type and range, and nothing given has changed."""
    picture = readable(annotator, picture)
    height, width = picture.shape[:2]
    also, before = given(annotator, height, width), picture.copy()
    hint, found = annotate(annotator, picture, resolution, parameters=parameters, **also)
    again, _ = annotate(annotator, picture, resolution, parameters=parameters, **also)
    scale = resolution / min(height, width) if resolution else 1
    assert hint.shape == (round(height * scale), round(width * scale), 3)
    assert hint.dtype == np.float32 and hint.flags.c_contiguous
    assert lowest(annotator) <= hint.min() and hint.max() <= 1
    assert (found is not None) == annotator.gives_pose
    if found is not None:
        assert (found["canvas_height"], found["canvas_width"]) == hint.shape[:2]
    np.testing.assert_array_equal(hint, again)
    np.testing.assert_array_equal(picture, before)
    for name, fresh in given(annotator, height, width).items():
        np.testing.assert_equal(also[name], fresh)
    return hint


def values(parameter: Parameter) -> list[Any]:
    """The ends of its range, or all its choices."""
    if isinstance(parameter.default, bool):
        return [False, True]
    if isinstance(parameter.default, str):
        return list(parameter.choices)
    return [type(parameter.default)(end) for end in (parameter.minimum, parameter.maximum)]


@EACH
@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("resolution", [0, 64])
def test_any_picture_gives_a_hint(annotator: Annotator, kind: str, resolution: int):
    checked(annotator, PICTURES[kind], resolution)


@EACH
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_picture_gives_an_error_that_names_the_annotator(annotator: Annotator, kind: str):
    picture, text = UNREADABLE[kind]
    with pytest.raises(AnnotatorError, match=f"^{annotator.name}: .*{text}"):
        annotate(annotator, picture, 64, **given(annotator, 8, 8))


@EACH
def test_the_ends_of_every_range_and_every_choice_work(annotator: Annotator):
    for parameter in annotator.parameters:
        assert isinstance(parameter.default, str) or parameter.minimum <= parameter.default <= parameter.maximum
        assert not isinstance(parameter.default, str) or parameter.default in parameter.choices
        for value in values(parameter):
            checked(annotator, PHOTOGRAPH, **{parameter.name: value})


@EACH
def test_every_parameter_changes_a_hint(annotator: Annotator):
    """At 96 pixels, of the photograph, a pale print of it or a faint ramp: what nothing reads would change none."""
    pictures = [cv2.resize(astronaut(), (96, 96), interpolation=cv2.INTER_AREA)]
    pictures.append(pictures[0] // 4 + 180)
    pictures.append(np.repeat(np.linspace(60, 90, 96, dtype=np.float32).astype(np.uint8)[None, :, None], 96, 0))
    reads = given(annotator, 96, 96)

    def hint(picture: np.ndarray, parameters: dict[str, Any]) -> bytes:
        picture = readable(annotator, picture)
        return annotate(annotator, picture, parameters=parameters, **reads)[0].tobytes()

    for parameter in annotator.parameters:
        # Colours at random and the like are read only beside a certain choice.
        others = [{}] + [{p.name: c} for p in annotator.parameters if p is not parameter for c in p.choices]
        hints = [
            {hint(picture, other | {parameter.name: value}) for value in (parameter.default, *values(parameter))}
            for picture in pictures
            for other in others
        ]
        assert max(map(len, hints)) > 1, parameter.name


@EACH
def test_pictures_in_bytes_and_in_floats_give_the_same_hint(annotator: Annotator):
    np.testing.assert_array_equal(checked(annotator, PHOTOGRAPH), checked(annotator, PHOTOGRAPH / np.float32(255)))


@pytest.mark.slow
@EACH
def test_8k(annotator: Annotator):
    """7680x4320, as it is: half a minute for superpixels, seconds for others on a quiet machine; 4 GB of memory."""
    picture = readable(annotator, np.ascontiguousarray(np.tile(astronaut(), (9, 15, 1))[:4320]))
    before = picture[::40, ::40].copy()
    hint, _ = annotate(annotator, picture, **given(annotator, 4320, 7680))
    assert hint.shape == (4320, 7680, 3)
    assert lowest(annotator) <= hint.min() and hint.max() <= 1
    assert hint.std() > 0.01
    np.testing.assert_array_equal(picture[::40, ::40], before)


@pytest.mark.parametrize("shape", [(12000, 3), (9000, 3), (16000, 2), (3, 12000)])
def test_long_thin_pictures_of_flat_colours_do_not_crash(shape: tuple[int, int]):
    (cartoon,) = (annotator for annotator in ANNOTATORS if annotator.name == "cartoon_lines")
    hint, _ = annotate(cartoon, np.full((*shape, 3), 0.4, np.float32))
    assert hint.shape == (*shape, 3) and not hint.any()


@pytest.mark.parametrize(("shape", "resolution", "size"), [((2, 3000), 512, "768000x512"), ((16385, 1), 0, "1x16385")])
def test_hints_longer_than_any_use_are_refused(shape: tuple[int, int], resolution: int, size: str):
    for annotator in ANNOTATORS:
        if not annotator.networks:
            with pytest.raises(AnnotatorError, match=f"^{annotator.name}: the hint would be {size} pixels, and a side"):
                annotate(annotator, np.zeros((*shape, 3)), resolution)


def test_a_library_that_cannot_be_loaded_stops_one_annotator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    (superpixels,) = (annotator for annotator in ANNOTATORS if annotator.name == "superpixels")
    with pytest.raises(AnnotatorError, match="^superpixels needs skimage.segmentation, which cannot be loaded"):
        annotate(superpixels, np.zeros((16, 16, 3)))
    (canny,) = (annotator for annotator in ANNOTATORS if annotator.name == "canny")
    assert annotate(canny, np.zeros((16, 16, 3)))[0].shape == (16, 16, 3)


def test_masks_are_averaged_clipped_and_refused_when_they_are_none():
    thin = np.zeros((64, 64), np.float32)
    thin[::8] = 1
    assert fit_mask(thin, 8, 8).tolist() == np.full((8, 8), 0.125).tolist()
    assert fit_mask(np.full((4, 4), 3.0), 8, 8).max() == 1
    with pytest.raises(AnnotatorError, match="the mask has numbers that are not finite"):
        fit_mask(np.full((4, 4), np.nan), 8, 8)
