"""Annotate on the real host: hints that are kept, videos in little memory, and what a batch of pictures may be."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from zeroconv.annotators import ANNOTATORS
from zeroconv.annotators.cache import HintCache
from zeroconv.annotators.images import AnnotatorError

from .fake_annotators import WEIGHTS, Fake, Tiny, annotate, fake, pictures, weights

if TYPE_CHECKING:
    from hosting import Host

__all__ = ["fake", "weights"]  # fixtures: pytest finds them here


def test_hints_are_kept_by_picture_and_own_parameters(host: Host, fake: Fake, weights: Path):
    image = pictures(3)
    first = annotate(host, image)
    assert len(fake.ran) == 3
    assert torch.equal(annotate(host, image, canny_low=7.0), first)  # another annotator's parameter
    assert len(fake.ran) == 3
    changed = image.clone()
    changed[1] = pictures(1, 5)[0]
    hints = annotate(host, changed)  # one frame of many
    assert len(fake.ran) == 4
    assert torch.equal(hints[[0, 2]], first[[0, 2]])
    torch.testing.assert_close(hints[1], changed[1] * WEIGHTS["scale"])
    torch.testing.assert_close(annotate(host, image, tiny_gain=0.5), image * WEIGHTS["scale"] * 0.5)
    assert len(fake.ran) == 7
    masked = annotate(host, image, mask=torch.zeros(1, 64, 96))  # laid on afterwards
    assert masked.abs().max() == 0
    assert torch.equal(annotate(host, image), first)
    assert len(fake.ran) == 7


def test_changing_a_later_parameter_of_a_long_video_runs_no_annotator_again(
    host: Host, fake: Fake, weights: Path, monkeypatch: pytest.MonkeyPatch
):
    annotate_node = sys.modules["zeroconv.nodes.annotate"]
    (record,) = (entry for entry in ANNOTATORS if entry.name == "depth_small")
    depths = torch.linspace(1, 2, 64 * 96).reshape(64, 96).numpy()

    def see(network: Tiny, pictures: Any) -> Any:
        fake.ran.append(pictures.shape)
        return [depths * (1 + picture.mean()) for picture in pictures]

    listed = replace(record, function=see, networks=("tiny",))
    monkeypatch.setattr(annotate_node, "ANNOTATORS", (listed,))
    monkeypatch.setattr(annotate_node, "AT_ONCE", 5 * 64 * 96)
    image = torch.linspace(0.1, 0.9, 12).reshape(12, 1, 1, 1).expand(12, 64, 96, 3)
    each = annotate(host, image, "depth_small")
    assert fake.ran == [(5, 64, 96, 3), (5, 64, 96, 3), (2, 64, 96, 3)]
    together = annotate(host, image, "depth_small", depth_small_range="batch")
    masked = annotate(host, image, "depth_small", depth_small_range="batch", mask=torch.ones(1, 64, 96))
    assert len(fake.ran) == 3
    assert (each.amin((1, 2, 3)) == 0).all() and (each.amax((1, 2, 3)) == 1).all()
    assert together.amin() == 0 and together.amax() == 1 and together[0].amax() < 0.5
    assert torch.equal(masked, together)
    changed = image.clone()
    changed[7] = 0.3
    annotate(host, changed, "depth_small")
    assert fake.ran[3:] == [(1, 64, 96, 3)]


def growth_during(run: Callable[[], object]) -> int:
    """Bytes by which this process was larger at most while something ran."""
    import psutil

    process, over = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    most = [before]

    def watch() -> None:
        while not over.wait(0.005):
            most[0] = max(most[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        over.set()
        watcher.join()
    return most[0] - before


def test_a_video_takes_little_more_than_itself_and_its_hints(host: Host, fake: Fake):
    """24 frames of 1024x576: beside their 170 MB and as much of hints, the node takes half of that sum at most."""
    image = torch.rand(24, 36, 64, 3).repeat(1, 16, 16, 1)
    annotate(host, image[:2], "canny")
    hints = []
    grown = growth_during(lambda: hints.append(annotate(host, image, "canny")))
    size = image.numel() * 4
    assert hints[0].shape == image.shape
    assert grown < size + 0.5 * 2 * size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["canny", "depth_moge"])
def test_beside_a_long_video_and_its_hints_there_is_little_and_depth_does_not_flicker(
    name: str, host: Host, fake: Fake, monkeypatch: pytest.MonkeyPatch
):
    """120 frames of 1024x576, a wall and something that comes nearer: 850 MB, and as much of hints.

    What the node takes beside those is within 1.5 times the bytes of both if they had 8 bits: 640 MB. Inverse depth is
    the red channel here; no network is part of the sum.
    """
    (record,) = [record for record in ANNOTATORS if record.name == name]

    def see(pictures: Any) -> Any:
        fake.ran.append(pictures.shape)
        return pictures[..., 0]

    annotate_node = sys.modules["zeroconv.nodes.annotate"]
    monkeypatch.setattr(annotate_node, "HINTS", HintCache(512 << 20))
    if record.networks:
        monkeypatch.setattr(annotate_node, "ANNOTATORS", (replace(record, function=see, networks=()),))
    image = torch.full((120, 576, 1024, 3), 0.1)
    image += torch.linspace(0, 0.1, 1024)[:, None]
    for i in range(120):
        image[i, 200:400, 300 + i : 600 + i] = 0.25 + 0.006 * i
    annotate(host, image[:2], name)
    hints: list[torch.Tensor] = []
    grown = growth_during(lambda: hints.append(annotate(host, image, name, depth_moge_range="batch")))
    beside, bound = grown - image.numel() * 4, 1.5 * 2 * image.numel()

    def flicker(hints: torch.Tensor) -> float:
        """Grey levels by which the wall changes at most."""
        return float((hints[:, :150, :, 0].amax(0) - hints[:, :150, :, 0].amin(0)).max() * 255)

    moved = flicker(hints[0])
    print(f"{name}: {beside / 1e6:.0f} of {bound / 1e6:.0f} MB beside input and hints; the wall moves by {moved:.2f}")
    assert beside < bound
    assert moved == 0
    if record.networks:
        assert hints[0][-1, 300, 500, 0] > hints[0][0, 300, 500, 0] + 0.5
        count = len(fake.ran)
        assert flicker(annotate(host, image, name)) > 50
        assert len(fake.ran) == count  # another range: nothing is looked at again


def test_a_hint_that_another_node_wrote_into_is_not_given_again(host: Host, fake: Fake, weights: Path):
    first = annotate(host, pictures(1))
    expected = first.clone()
    with torch.inference_mode():
        first.zero_()
    assert torch.equal(annotate(host, pictures(1)), expected)


def test_networks_stay_where_they_are_when_no_hint_is_to_be_made(host: Host, fake: Fake, weights: Path):
    import comfy.model_management as management

    annotate(host, pictures(1))
    management.unload_all_models()
    annotate(host, pictures(1))
    assert not any(isinstance(getattr(m.model.model, "network", None), Tiny) for m in management.current_loaded_models)


def test_cancel_stops_between_two_pictures(host: Host, fake: Fake, weights: Path):
    import comfy.model_management as management

    def cancel(ran: int) -> None:
        if ran == 1:
            management.interrupt_current_processing(True)

    fake.before = cancel
    with pytest.raises(management.InterruptProcessingException):
        annotate(host, pictures(4))
    assert len(fake.ran) == 2
    fake.before = None
    annotate(host, pictures(4))
    assert len(fake.ran) == 4  # the two that were made are kept


@pytest.mark.parametrize("annotator", ["tiny", "plain"])
def test_an_empty_batch_is_an_error(host: Host, fake: Fake, annotator: str):
    with pytest.raises(
        AnnotatorError, match=r"image is an empty batch of shape \(0, 64, 96, 3\): connect at least one"
    ):
        annotate(host, torch.zeros(0, 64, 96, 3), annotator)
    assert fake.ran == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pictures_in_half_precision_are_read(host: Host, fake: Fake, dtype: torch.dtype):
    image = pictures(1).to(dtype)
    hint = annotate(host, image, "plain")
    assert hint.dtype == torch.float32
    assert torch.equal(hint, image.float())
