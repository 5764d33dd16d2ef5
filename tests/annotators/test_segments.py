"""Segments: OneFormer with tiny random weights against transformers' own processor, and the published colours."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from skimage.data import astronaut
from torch import nn
from transformers import CLIPTokenizer, OneFormerImageProcessor

from zeroconv.annotators import ANNOTATORS, pipeline, segments
from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.networks import NETWORKS, oneformer
from zeroconv.annotators.palettes import ADE20K, COCO

from . import pretrained_tiny as tiny

KINDS: dict[str, tuple[Callable[..., nn.Module], Callable[..., np.ndarray], Any, tuple[int, int]]] = {
    "ade20k": (oneformer.build_ade20k, segments.segments_ade20k, ADE20K, segments.ADE20K_SIDES),
    "coco": (oneformer.build_coco, segments.segments_coco, COCO, segments.COCO_SIDES),
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny network of each kind, built of config.json and pytorch_model.bin."""
    folder = tmp_path_factory.mktemp("networks")
    return {kind: build(*tiny.oneformer(folder / kind, len(pal))) for kind, (build, _, pal, _) in KINDS.items()}


def photograph(height: int, width: int) -> np.ndarray:
    return cv2.resize(astronaut(), (width, height), interpolation=cv2.INTER_AREA)


def test_ade20k_has_the_published_colours():
    from controlnet_aux.util import ade_palette

    assert [list(colour) for colour in ADE20K] == ade_palette()
    assert (len(ADE20K), ADE20K[0], ADE20K[2], ADE20K[-1]) == (150, (120, 120, 120), (6, 230, 230), (92, 0, 255))
    # The dataset gives road (6) and skyscraper (48) one colour.
    assert len(set(ADE20K)) == 149 and ADE20K[6] == ADE20K[48] == (140, 140, 140)


def test_coco_has_things_before_stuff():
    assert len(COCO) == len(set(COCO)) == 133
    # person, toothbrush, banner, rug
    assert [COCO[i] for i in (0, 79, 80, 132)] == [(220, 20, 60), (191, 162, 208), (255, 255, 128), (250, 141, 255)]


def test_the_table_names_these_functions():
    table = {network.name: network for network in NETWORKS}
    for kind, (build, function, _, _) in KINDS.items():
        (record,) = [record for record in ANNOTATORS if record.name == f"segments_{kind}"]
        assert record.function is function and record.parameters == ()
        (name,) = record.networks
        assert table[name].build == f"oneformer:{build.__name__}"
        assert [file.name for file in table[name].files] == ["config.json", "pytorch_model.bin"]
        assert (table[name].licence, table[name].commercial) == ("MIT", True)


@pytest.mark.host
def test_the_task_is_what_clip_reads(comfy_path: Path):
    folder = comfy_path / "comfy" / "sd1_tokenizer"
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    assert tokenizer("the task is semantic")["input_ids"] == list(oneformer.TASK)


def by_transformers(network: Any, image: np.ndarray, sides: tuple[int, int], folder: Path) -> np.ndarray:
    """The class of each pixel as transformers' documentation makes it; its processor wants a list of classes."""
    classes = {str(i): {"name": str(i), "isthing": 0} for i in range(network.config.num_labels)}
    (folder / "classes.json").write_text(json.dumps(classes), encoding="utf-8")
    processor = OneFormerImageProcessor(
        size={"shortest_edge": sides[0], "longest_edge": sides[1]},
        repo_path=str(folder),
        class_info_file="classes.json",
        num_text=0,
    )
    pixels = processor.preprocess(image, return_tensors="pt")["pixel_values"]
    task = torch.zeros(1, 77)
    task[0, :7] = torch.tensor([49406, 518, 10549, 533, 29119, 1550, 49407])
    with torch.no_grad():
        found = network(pixels, task_inputs=task)
    return processor.post_process_semantic_segmentation(found, [image.shape[:2]])[0].numpy()


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("size", [(128, 192), (320, 256), (64, 512)])
def test_every_pixel_has_the_class_that_transformers_gives(
    networks: dict[str, Any], kind: str, size: tuple[int, int], tmp_path: Path
):
    _, function, palette, sides = KINDS[kind]
    image = photograph(*size)
    expected = by_transformers(networks[kind], image, sides, tmp_path)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(oneformer.labels(networks[kind], image, *sides), expected)
    hint = function(networks[kind], image.astype(np.float32) / 255)
    assert hint.shape == (*size, 3) and hint.dtype == np.float32
    np.testing.assert_array_equal(np.rint(hint * 255), np.array(palette)[expected])


def test_planted_answers_give_their_colours(networks: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """Three queries: person on the left half, banner on the right, and one of no class that covers everything."""
    classes = torch.full((1, 3, 134), -20.0)
    classes[0, [0, 1, 2], [0, 80, 133]] = 20
    masks = torch.full((1, 3, 4, 8), -20.0)
    masks[0, 0, :, :4] = masks[0, 1, :, 4:] = masks[0, 2] = 20
    said = type("Said", (), {"class_queries_logits": classes, "masks_queries_logits": masks})
    monkeypatch.setattr(networks["coco"], "forward", lambda **_: said)
    hint = segments.segments_coco(networks["coco"], np.zeros((32, 64, 3), np.float32))
    np.testing.assert_array_equal(np.rint(hint[:, :32] * 255), np.broadcast_to((220, 20, 60), (32, 32, 3)))
    np.testing.assert_array_equal(np.rint(hint[:, 32:] * 255), np.broadcast_to((255, 255, 128), (32, 32, 3)))


def test_scores_add_up_over_queries():
    """Two queries at 0.4 outdo one at 0.6 of a pixel; of equals the first class is taken."""
    classes = torch.full((1, 3, 4), -50.0)
    classes[0, [0, 1, 2], [2, 1, 1]] = 50
    masks = torch.logit(torch.tensor([0.6, 0.4, 0.4])).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert oneformer.best(classes, masks, 2, 2).tolist() == [[1, 1], [1, 1]]
    assert oneformer.best(classes[:, :2], torch.zeros(1, 2, 1, 1), 1, 2).tolist() == [[1, 1]]


def test_a_network_of_another_palette_is_refused(tmp_path: Path):
    paths = tiny.oneformer(tmp_path, 133)
    with pytest.raises(AnnotatorError, match=r"names 133 classes; this palette has 150"):
        oneformer.build_ade20k(*paths)


def test_half_precision_is_refused(tmp_path: Path):
    network: Any = oneformer.build_coco(*tiny.oneformer(tmp_path, 133)).half()
    with pytest.raises(AnnotatorError, match=r"OneFormer is in torch\.float16; it answers rightly in float32 alone"):
        segments.segments_coco(network, np.zeros((64, 64, 3), np.float32))


@pytest.mark.parametrize("kind", list(KINDS))
def test_from_a_photograph_to_a_hint(networks: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch):
    """With any size, twice the same, without a word to the net, and the picture stays as it is."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it spoke to a server"))
    (record,) = [record for record in ANNOTATORS if record.name == f"segments_{kind}"]
    picture = astronaut()[:300, :410]
    before = picture.copy()
    hint, _ = pipeline.annotate(record, picture, 96, networks=[networks[kind]])
    assert hint.shape == (96, 131, 3) and hint.dtype == np.float32
    colours = {tuple(colour) for colour in np.rint(hint * 255).astype(int).reshape(-1, 3).tolist()}
    assert len(colours) > 1 and colours <= set(KINDS[kind][2])
    np.testing.assert_array_equal(pipeline.annotate(record, picture, 96, networks=[networks[kind]])[0], hint)
    np.testing.assert_array_equal(picture, before)
