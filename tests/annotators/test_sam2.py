"""Things by SAM 2: a small random network and planted masks against transformers' own processor, dots, and errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from skimage.data import coffee
from torch import Tensor, nn

from zeroconv.annotators import pipeline
from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.networks import NETWORKS
from zeroconv.annotators.networks.sam2 import build, everything, pointed
from zeroconv.annotators.segments import mask_sam2, segments_sam2

from . import pretrained_tiny as tiny
from .seeded import record

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "Sam2Model"):
    pytest.skip("this transformers has no SAM 2", allow_module_level=True)
from transformers.models.sam2.image_processing_sam2_fast import _rle_to_mask  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sam2")
    tiny.sam2(folder)
    return folder


@pytest.fixture(scope="module")
def network(folder: Path) -> Any:
    return build(*tiny.files(folder))


def photograph(height: int = 200, width: int = 300) -> np.ndarray:
    return coffee()[:height, :width].astype(np.float32) / 255


class Discs(nn.Module):
    """In place of SAM 2: around each point a disc, one of twice the radius, and the left half of the picture.

    Discs grow to the right, and the network is the surer the farther down a point is.
    """

    def __init__(self, side: int = 64) -> None:
        super().__init__()
        self.no_memory_embedding = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(prompt_encoder_config=SimpleNamespace(image_size=side))
        self.asked: list[tuple[Tensor, bool]] = []

    def get_image_embeddings(self, pixels: Tensor) -> list[Tensor]:
        assert pixels.shape == (1, 3, 64, 64)
        return [pixels]

    def forward(self, image_embeddings: Any, input_points: Tensor, input_labels: Tensor, multimask_output: bool) -> Any:
        assert input_labels.shape == input_points.shape[:3] and (input_labels == 1).all()
        self.asked.append((input_points, multimask_output))
        points = input_points[0, :, 0]
        cells = torch.arange(256.0) / 4
        away = torch.hypot(cells[None, None, :] - points[:, :1, None], cells[None, :, None] - points[:, 1:, None])
        radius = 3 + points[:, :1, None] / 8
        left = (32 - cells[None, None, :]).expand_as(away)
        masks = torch.stack([radius - away, 2 * radius - away, left], dim=1)[None] * 30
        sure = 0.5 + points[:, 1:] / 128 + torch.tensor([0.0, -0.004, -0.3])
        count = 3 if multimask_output else 1
        return SimpleNamespace(pred_masks=masks[:, :, :count], iou_scores=sure[None, :, :count])


def without_repetitions(boxes: list[list[float]], scores: list[float], most: float) -> list[int]:
    """Which boxes stay when none may share more than `most` with a surer one (torchvision's nms, not always built)."""

    def shared(one: list[float], other: list[float]) -> float:
        sides = [min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1)]
        both = max(0, sides[0]) * max(0, sides[1])
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
        return both / (sum(areas) - both)

    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(shared(boxes[i], boxes[j]) <= most for j in kept):
            kept.append(i)
    return kept


# -- against transformers' own processor -------------------------------------------------------------------------------


def test_the_small_network_answers_as_with_its_own_processor(network: Any):
    image = (photograph() * 255).astype(np.uint8)
    size = {"height": 128, "width": 128}
    processor = transformers.Sam2Processor(transformers.Sam2ImageProcessorFast(size=size), target_size=128)
    inputs = processor(images=image, input_points=[[[[70.5, 20.5]]]], input_labels=[[[1]]], return_tensors="pt")
    seen: list[Tensor] = []
    hook = network.vision_encoder.register_forward_pre_hook(
        lambda _, values, named: seen.append(values[0] if values else named["pixel_values"]), with_kwargs=True
    )
    with torch.inference_mode():
        theirs = network(**{key: inputs[key] for key in ("pixel_values", "input_points", "input_labels")})
        ours = pointed(network, image, np.array([[70.5, 20.5]]))
    hook.remove()
    # Theirs is rounded to bytes on the way, twice.
    torch.testing.assert_close(seen[1], seen[0], atol=1.01 / 255 / 0.224, rtol=0)
    (masks,) = processor.post_process_masks(theirs.pred_masks, [image.shape[:2]], binarize=False)
    expected = masks[0, theirs.iou_scores[0, 0].argmax()].numpy() > 0
    assert 0.02 < expected.mean() < 0.98
    assert (ours != expected).mean() < 0.01
    assert (pointed(network, 255 - image, np.array([[70.5, 20.5]])) != expected).mean() > 0.1


@pytest.mark.parametrize("size", [(128, 128), (100, 170)])
@pytest.mark.parametrize("confidence", [0.55, 0.8, 0.9])
def test_things_are_those_of_transformers_mask_generation(size: tuple[int, int], confidence: float):
    height, width = size
    discs = Discs()
    labels = everything(discs, photograph(height, width), 6, confidence)
    processor = transformers.Sam2ImageProcessorFast(size={"height": 64, "width": 64})
    ours = torch.cat([points for points, _ in discs.asked], dim=1)
    if height == width:
        # Of oblong pictures theirs scales both sides alike, as for the first SAM; SAM 2 sees them squeezed to a square.
        _, grid, *_ = processor.generate_crop_boxes(torch.zeros(3, height, width), 64, points_per_crop=6)
        torch.testing.assert_close(ours, grid.reshape(1, 36, 1, 2), atol=1e-4, rtol=0)
    answer = Discs()([], ours, torch.ones(1, 36, 1), True)
    whole = processor.post_process_masks(answer.pred_masks, [size], binarize=False)[0]
    masks, scores, boxes = processor.filter_masks(
        whole, answer.iou_scores[0], size, [0, 0, width, height], confidence, 0.95, 0, 1
    )
    found = [_rle_to_mask(masks[i]) for i in without_repetitions(boxes.tolist(), scores.tolist(), 0.7)]
    assert len(found) == labels.max() > 2
    expected = np.zeros(size, np.int64)
    for number, mask in enumerate(sorted(map(np.asarray, found), key=lambda mask: -mask.sum()), 1):
        expected[mask] = number
    assert (labels != expected).mean() < 0.002


# -- in numbers --------------------------------------------------------------------------------------------------------


def test_small_things_lie_on_large_ones_each_in_its_colour():
    image = photograph(128, 128)
    before = image.copy()
    hint = segments_sam2(Discs(), image, points=4, confidence=0.8)
    np.testing.assert_array_equal(image, before)
    assert hint.shape == (128, 128, 3) and hint.dtype == np.float32
    labels = everything(Discs(), image, 4, 0.8)
    colours = np.random.default_rng(0).integers(0, 256, (labels.max() + 1, 3)) / 255
    colours[0] = 0
    np.testing.assert_array_equal(hint, colours.astype(np.float32)[labels])
    assert not hint[0, 0].any()
    # Points lie at 8, 24, 40 and 56 of 64, and the network is surer than 0.8 from 40 down.
    assert labels[:39].max() == 0 and labels[80, 80] != labels[80, 80 - 18] > 0
    areas = np.bincount(labels.ravel())[1:]
    assert labels.max() >= 4 and areas.min() > 0
    other = segments_sam2(Discs(), image, points=4, confidence=0.8, seed=1)
    assert (other.any(axis=2) == hint.any(axis=2)).mean() > 0.99 and (other != hint).any()
    mean = segments_sam2(Discs(), image, points=4, confidence=0.8, colours="mean")
    np.testing.assert_allclose(mean[labels == 1], np.tile(image[labels == 1].mean(0), (areas[0], 1)), atol=1e-5)


def test_nothing_sure_enough_is_black():
    assert not segments_sam2(Discs(), photograph(64, 64), points=4, confidence=1.0).any()


def test_large_pictures_are_compared_reduced():
    image = np.zeros((1024, 2048, 3), np.float32)
    small, large = everything(Discs(), image[:512, :1024], 4, 0.8), everything(Discs(), image, 4, 0.8)
    assert large.shape == (1024, 2048) and large.max() == small.max()
    assert (large[1::2, 1::2] != small).mean() < 0.01


def test_a_dot_stands_for_its_innermost_pixel_and_dots_for_one_thing():
    image, mask = photograph(128, 128), np.zeros((128, 128), np.float32)
    mask[20:31, 100:111] = 1.0  # its middle is 25, 105
    discs = Discs()
    hint = mask_sam2(discs, image, mask)
    ((points, several),) = discs.asked
    np.testing.assert_allclose(points, [[[[105.5 / 2, 25.5 / 2]]]])
    assert several
    assert set(np.unique(hint)) == {0.0, 1.0} and hint.shape == (128, 128, 3) and hint.dtype == np.float32
    # The surest is the small disc, of radius 3 + 52.75 / 8 in units of 2 pixels.
    assert hint[25, 105, 0] == 1 and hint[25, 105 - 17, 0] == 1 and hint[25, 105 - 21, 0] == 0
    mask[60:, 0] = 0.3  # at the border, and pale
    discs = Discs()
    mask_sam2(discs, image, mask)
    ((points, several),) = discs.asked
    assert points.shape == (1, 1, 2, 2) and not several


@pytest.mark.parametrize("level", [0.0, 0.2])
def test_a_mask_without_a_dot_is_refused(level: float):
    mask = np.full((64, 64), level, np.float32)
    with pytest.raises(AnnotatorError, match="mask_sam2: the mask is black: paint a dot on what to mark"):
        pipeline.annotate(record("mask_sam2"), photograph(64, 64), networks=[Discs()], mask=mask)


def test_numbers_that_are_none_are_told(network: Any):
    broken = Discs()
    broken.forward = lambda **_: SimpleNamespace(  # type: ignore[method-assign]
        pred_masks=torch.full((1, 16, 3, 8, 8), torch.nan), iou_scores=torch.ones(1, 16, 3)
    )
    with pytest.raises(AnnotatorError, match="numbers that are not finite"):
        segments_sam2(broken, photograph(64, 64), points=4)


@pytest.mark.parametrize("name", ["segments_sam2", "mask_sam2"])
@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 90, 3), (90, 1, 3), (64, 64, 1), (50, 60, 4)], ids=str)
def test_any_picture_gives_a_hint(network: Any, name: str, shape: tuple[int, ...]):
    picture = np.random.default_rng(1).random(shape).astype(np.float32)
    given: dict[str, Any] = {"networks": [network], "mask": np.ones(shape[:2], np.float32)}
    hint, _ = pipeline.annotate(record(name), picture, parameters={"points": 4, "confidence": 0.0}, **given)
    again, _ = pipeline.annotate(record(name), picture, parameters={"points": 4, "confidence": 0.0}, **given)
    assert hint.shape == (*shape[:2], 3) and hint.dtype == np.float32
    assert 0 <= hint.min() and hint.max() <= 1
    np.testing.assert_array_equal(hint, again)


# -- files -------------------------------------------------------------------------------------------------------------


def test_the_published_network_for_videos_gives_the_one_for_pictures(folder: Path, network: Any):
    config, weights = tiny.files(folder)
    assert json.loads(config.read_text())["model_type"] == "sam2_video"
    assert isinstance(network, transformers.Sam2Model) and not network.training
    stored = load_file(weights)
    assert any(key.startswith("memory_") for key in stored)
    for key, value in network.state_dict().items():
        if key in stored:
            torch.testing.assert_close(value, stored[key], rtol=0, atol=0)
    frequencies = network.shared_image_embedding.positional_embedding
    torch.testing.assert_close(frequencies, network.prompt_encoder.shared_embedding.positional_embedding)


@pytest.mark.parametrize("lacks", ["mask_decoder.iou_token.weight", "shared_image_embedding.positional_embedding"])
def test_a_file_that_lacks_something_is_refused(lacks: str, folder: Path, tmp_path: Path):
    config, weights = tiny.files(folder)
    save_file({key: value for key, value in load_file(weights).items() if key != lacks}, tmp_path / "model.safetensors")
    with pytest.raises(AnnotatorError, match=f"lacks 1 weights of Sam2Model, {lacks} among them"):
        build(config, tmp_path / "model.safetensors")


def test_an_old_transformers_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.50.0"))
    with pytest.raises(AnnotatorError, match=r"transformers 4\.50\.0 has no Sam2: update it .*; 4\.56 and newer have"):
        build(*tiny.files(folder))


def test_the_list_knows_the_network():
    (entry,) = [network for network in NETWORKS if network.name == "sam2_tiny"]
    assert [file.name for file in entry.files] == ["config.json", "model.safetensors"]
    assert entry.licence == "Apache-2.0" and entry.commercial
    assert record("mask_sam2").reads_mask and record("segments_sam2").networks == ("sam2_tiny",)


@pytest.mark.gpu
def test_things_are_found_on_cuda(folder: Path, network: Any):
    here = pointed(network, photograph(), np.array([[70.5, 20.5]]))
    there = pointed(build(*tiny.files(folder)).to("cuda"), photograph(), np.array([[70.5, 20.5]]))
    assert (here != there).mean() < 0.01
