"""Nodes that sample a piece of the picture as a picture: UltimateSDUpscale, TiledKSampler, Impact's detailers."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import MOVES, Scene, latent, picture
from torch import Tensor

from .callers import Box, chain, cropped, cut, grid, pack, slice_written
from .controls import KINDS, NATIVE, apply, native, ours

if TYPE_CHECKING:
    from hosting import Host

HINT = picture(1, 1, 256, 256)
BOXES = grid(32, 32, 16, 0)
MASK = torch.zeros(1, 256, 256)
MASK[:, 64:200, 32:160] = 1.0


def upscaled(host: Host, scene: Scene, at_once: int = 1) -> Tensor:
    """The four tiles of a picture, one batch of them after the other, as UltimateSDUpscale samples them."""
    parts = []
    for start in range(0, len(BOXES), at_once):
        boxes = BOXES[start : start + at_once]
        tile = replace(scene, positive=cropped(scene.positive, boxes), negative=cropped(scene.negative, boxes))
        parts.append(host.sample(tile, latent_image=latent(len(boxes)), steps=2).latent)
    return torch.cat(parts)


def by_definition(host: Host, kind: str, image: Tensor = HINT, mask: Tensor | None = None) -> Tensor:
    """Each tile a graph of its own, with its hint and mask cropped by hand."""
    parts = []
    for y, x, height, width in BOXES:
        rows, columns = slice(8 * y, 8 * (y + height)), slice(8 * x, 8 * (x + width))
        options = {} if mask is None else {"mask": mask[:, rows, columns]}
        piece = image[:, rows, columns]
        scene = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, kind), piece, **options)
        parts.append(host.sample(scene, latent_image=latent(1), steps=2).latent)
    return torch.cat(parts)


def off(result: Tensor, expected: Tensor) -> float:
    """The largest difference in parts of the largest value."""
    return float((result - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_ultimate_sd_upscale(host: Host, kind: str):
    scene = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, kind), HINT)
    expected = by_definition(host, kind)
    assert off(upscaled(host, scene), expected) <= 1e-4
    assert off(by_definition(host, kind, 1 - HINT), expected) >= 0.01


@pytest.mark.parametrize("at_once", [1, 2, 4])
@pytest.mark.parametrize("kind", NATIVE)
def test_ultimate_sd_upscale_as_native(host: Host, kind: str, at_once: int):
    """A batch of tiles comes with a hint for each."""
    scene = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, kind), HINT)
    theirs = apply(host, "ControlNetApplyAdvanced", host.scene("sdxl"), native(host, kind), HINT)
    assert off(upscaled(host, scene, at_once), upscaled(host, theirs, at_once)) <= 1e-4


@pytest.mark.parametrize("kind", NATIVE)
def test_ultimate_sd_upscales_own_cropping(host: Host, kind: str, monkeypatch: pytest.MonkeyPatch):
    """Its function on our prompts and on native ones, tiles with padding that are enlarged to the model's size."""
    crop = pack("ZEROCONV_ULTIMATE_SD_UPSCALE", monkeypatch, "usdu_utils.py").crop_cond

    def run(scene: Scene) -> Tensor:
        parts = []
        for region in ((0, 0, 112, 96), (96, 80, 256, 256)):
            given = (region, (256, 256), (256, 256), (128, 128))
            tile = replace(scene, positive=crop(scene.positive, *given), negative=crop(scene.negative, *given))
            parts.append(host.sample(tile, latent_image=latent(1), steps=2).latent)
        return torch.cat(parts)

    expected = run(apply(host, "ControlNetApplyAdvanced", host.scene("sdxl"), native(host, kind), HINT))
    assert off(run(host.scene("sdxl")), expected) >= MOVES
    scene = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, kind), HINT)
    assert off(run(scene), expected) <= 1e-4
    masked = apply(
        host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, kind), HINT, mask=torch.ones(1, 256, 256)
    )
    assert off(run(masked), expected) <= 1e-4


@pytest.mark.parametrize("kind", ["controlnet", "foreign", "adapter", "lllite"])
def test_a_mask_is_cropped_with_the_hint(host: Host, kind: str):
    scene = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, kind), HINT, mask=MASK)
    expected = by_definition(host, kind, mask=MASK)
    assert off(by_definition(host, kind), expected) >= 1e-3, "the mask does nothing here"
    assert off(upscaled(host, scene), expected) <= 1e-4


def test_a_control_on_the_model_says_that_it_cannot_know_its_tile(host: Host, caplog: pytest.LogCaptureFixture):
    """The hint is of the whole picture, the run of a tile: nothing tells the two from a hint that is merely larger."""

    def told() -> list[str]:
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return [message for message in messages if "Apply ControlNet to Prompt" in message]

    def tiles(scene: Scene) -> None:
        for _ in BOXES:
            host.sample(scene, latent_image=latent(1), steps=1)

    scene = apply(host, "ApplyControl", host.scene("sdxl"), ours(host, "controlnet"), HINT)
    with caplog.at_level(logging.WARNING):
        tiles(scene)
        assert len(told()) == 1, "said once, not at every tile"
        scene = apply(host, "ApplyControl", host.scene("sdxl"), ours(host, "controlnet"), picture(1))
        tiles(scene)
        scene = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, "controlnet"), HINT)
        tiles(scene)
        assert not told()


@pytest.mark.parametrize("node", ["ApplyControl", "ApplyControlToPrompt"])
def test_the_node_says_it_too(host: Host, node: str):
    description = host.ours[node].GET_SCHEMA().description
    assert "tile" in description and ("Apply ControlNet to Prompt" in description) == (node == "ApplyControl")


# -- TiledKSampler ----------------------------------------------------------------------------------------------------


def tiled(host: Host, scene: Scene) -> Tensor:
    """Every tile sampled by itself, its slice written just before."""

    def tile(box: Box) -> Tensor:
        slice_written(scene.positive + scene.negative, box)
        return host.sample(scene, latent_image=latent(1), steps=2).latent

    return torch.cat([tile(box) for box in BOXES])


@pytest.mark.parametrize("kind", KINDS)
def test_tiled_ksampler(host: Host, kind: str):
    scene = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, kind), HINT)
    assert off(tiled(host, scene), by_definition(host, kind)) <= 1e-4


def test_tiled_ksampler_as_native(host: Host):
    """A native ControlNet has had no `device` for long, and the pack fails without."""
    control = native(host, "controlnet").copy()
    theirs = apply(host, "ControlNetApplyAdvanced", host.scene("sdxl"), control, HINT)
    with pytest.raises(AttributeError, match="device"):
        tiled(host, theirs)
    for entry in theirs.positive + theirs.negative:
        entry[1]["control"].device = torch.device("cpu")
    assert off(tiled(host, theirs), by_definition(host, "controlnet")) <= 1e-4


def test_tiled_ksampler_itself(host: Host, monkeypatch: pytest.MonkeyPatch):
    node = pack("ZEROCONV_TILED_KSAMPLER", monkeypatch).NODE_CLASS_MAPPINGS["BNK_TiledKSampler"]
    hint = picture(1, 1, 512, 512)

    def run(scene: Scene) -> Tensor:
        inputs = (5, 256, 256, "simple", 2, 3.0, "euler", "normal")
        with torch.inference_mode():
            (made,) = node().sample(scene.model, *inputs, scene.positive, scene.negative, latent(1, 64, 64), 1.0)
        return made["samples"]

    theirs = apply(host, "ControlNetApplyAdvanced", host.scene("sdxl"), native(host, "controlnet").copy(), hint)
    for entry in theirs.positive + theirs.negative:
        entry[1]["control"].device = torch.device("cpu")
    expected, plain = run(theirs), run(host.scene("sdxl"))
    assert off(plain, expected) >= MOVES
    scene = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, "controlnet"), hint)
    assert off(run(scene), expected) <= 1e-4


# -- Impact's detailers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_detailer_applies_the_cropped_hint_itself(host: Host, kind: str):
    """By the host's own node, old or new, on a copy of our CONTROL_NET: what comes before it on the prompt stays."""
    control, box = ours(host, kind), BOXES[1]
    piece = cut(HINT.movedim(-1, 1), box, 8).movedim(1, -1)
    expected = host.sample(
        apply(host, "ApplyControlToPrompt", host.scene("sdxl"), control, piece), latent_image=latent(1), steps=2
    )
    scene = apply(host, "ControlNetApplyAdvanced", host.scene("sdxl"), control, piece)
    assert off(host.sample(scene, latent_image=latent(1), steps=2).latent, expected.latent) <= 1e-4
    made: Any = next(chain(scene.positive[0][1]["control"]))
    assert made is not control
    assert control.cond_hint_original is None
