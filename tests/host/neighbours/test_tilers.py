"""Tiled samplers: every tile is controlled by its own piece of the hint, of the mask and of the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import MOVES, Run, Scene, assert_same, latent, moved, off_by, picture

from .callers import Definition, MultiDiffusion, in_tiles, pack
from .controls import KINDS, NATIVE, WAYS, apply, native, ours

if TYPE_CHECKING:
    from hosting import Host

HINT = picture(1, 1, 256, 256)
MASK = torch.zeros(1, 256, 256)
MASK[:, 64:200, 32:160] = 1.0


def without(host: Host) -> Run:
    """Tiles without control."""
    return host.once("tiles without control", lambda: in_tiles(host, host.scene("sdxl"), MultiDiffusion()))


def whole(host: Host, way: str, kind: str, image: torch.Tensor = HINT, **options: Any) -> Scene:
    """A scene of 256 pixels under control."""
    return apply(host, way, host.scene("sdxl"), ours(host, kind), image, **options)


@pytest.mark.parametrize("kind", NATIVE)
def test_the_definition_is_what_the_hosts_own_control_does_in_tiles(host: Host, kind: str):
    """The premise of all below; a native T2I-Adapter keeps the first tile's features, and is no example."""
    scene = apply(host, "ControlNetApplyAdvanced", host.scene("sdxl"), native(host, kind), HINT)
    assert_same(in_tiles(host, scene, Definition()), in_tiles(host, scene, MultiDiffusion()), without(host))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_tile_follows_its_own_piece(host: Host, kind: str, way: str):
    scene = whole(host, way, kind)
    run, expected = in_tiles(host, scene, MultiDiffusion()), in_tiles(host, scene, Definition())
    assert off_by(run, expected) <= 1e-4
    assert moved(expected, without(host)) >= (0.01 if kind in ("lllite", "adapter") else MOVES)


@pytest.mark.parametrize("kind", NATIVE)
def test_native_and_ours_in_one_chain(host: Host, kind: str):
    scene = whole(host, "ApplyControlToPrompt", kind)
    chained = apply(host, "ControlNetApplyAdvanced", scene, native(host, "controlnet"), picture(2, 1, 256, 256))
    first = apply(host, "ControlNetApplyAdvanced", host.scene("sdxl"), native(host, kind), HINT)
    reference = apply(host, "ControlNetApplyAdvanced", first, native(host, "controlnet"), picture(2, 1, 256, 256))
    expected = in_tiles(host, reference, MultiDiffusion())
    assert_same(in_tiles(host, chained, MultiDiffusion()), expected, without(host))


DOSES: dict[str, dict[str, Any]] = {
    "two pictures, two hints": {"image": picture(3, 2, 256, 256)},
    "cond_only": {"guidance": "cond_only"},
    "a mask": {"mask": MASK},
    "a mask for each, cond_only": {"mask": torch.cat([MASK, 1 - MASK]), "guidance": "cond_only"},
    "a strength for each": {"per_image": "1, 0.25"},
}


@pytest.mark.parametrize("kind", ["controlnet", "foreign", "adapter", "lllite"])
@pytest.mark.parametrize("dose", DOSES)
def test_the_dose_of_two_pictures_is_cut_with_the_hint(host: Host, dose: str, kind: str):
    options = dict(DOSES[dose])
    if "per_image" in options:
        (options["schedule"],) = host.call("ControlSchedule", curve="constant", per_image=options.pop("per_image"))
    scene = whole(host, "ApplyControlToPrompt", kind, **options)
    two = {"latent_image": latent(2, 32, 32)}
    run, expected = in_tiles(host, scene, MultiDiffusion(), **two), in_tiles(host, scene, Definition(), **two)
    assert off_by(run, expected) <= 1e-4
    other = in_tiles(host, whole(host, "ApplyControlToPrompt", kind), Definition(), **two)
    assert off_by(other, expected) >= 1e-3, "the dose does nothing here"


def test_a_hint_of_another_shape_is_cropped_before_it_is_cut(host: Host):
    scene = whole(host, "ApplyControlToPrompt", "controlnet", picture(4, 1, 192, 320))
    run, expected = in_tiles(host, scene, MultiDiffusion()), in_tiles(host, scene, Definition())
    assert off_by(run, expected) <= 1e-4


@pytest.mark.parametrize("resize", ["stretch", "pad"])
def test_a_hint_that_is_not_to_be_cropped_is_refused(host: Host, resize: str):
    """Tilers crop it themselves, as the host's own rule is."""
    scene = whole(host, "ApplyControlToPrompt", "controlnet", picture(4, 1, 192, 320), resize=resize)
    with pytest.raises(Exception, match=f"a tiled sampler cuts the hint, .* resize crop alone, found {resize}"):
        in_tiles(host, scene, MultiDiffusion())


@pytest.mark.parametrize("size", [(16, 16, 8), (24, 40, 24), (32, 32, 64)])
def test_tiles_of_any_size(host: Host, size: tuple[int, int, int]):
    """One that is the whole picture as well, and a picture smaller than a tile."""
    height, width, tile = size
    given = {"latent_image": latent(1, height, width)}
    scene = whole(host, "ApplyControl", "controlnet", picture(1, 1, 8 * height, 8 * width))
    native_scene = apply(
        host, "ControlNetApplyAdvanced", host.scene("sdxl"), native(host, "controlnet"),
        picture(1, 1, 8 * height, 8 * width),
    )  # fmt: skip
    tiles = MultiDiffusion(min(tile, height, width), min(tile, height, width) // 2, 3)
    run = in_tiles(host, scene, replace(tiles), **given)
    assert off_by(run, in_tiles(host, native_scene, replace(tiles), **given)) <= 1e-4


def test_an_area_prompt_in_tiles(host: Host):
    """The host cuts the area first: its hint is made to fit the area, then cut into tiles, as the host's own is."""

    def area(scene: Scene) -> Scene:
        (positive,) = host.call(
            "ConditioningSetArea", conditioning=scene.positive, width=192, height=128, x=0, y=64, strength=1.0
        )
        return replace(scene, positive=scene.positive + positive)

    scene = area(whole(host, "ApplyControlToPrompt", "controlnet"))
    theirs = apply(host, "ControlNetApplyAdvanced", host.scene("sdxl"), native(host, "controlnet"), HINT)
    expected = in_tiles(host, area(theirs), MultiDiffusion())
    assert off_by(in_tiles(host, scene, MultiDiffusion()), expected) <= 1e-4


def test_a_sampling_without_tiles_afterwards_sees_the_whole_hint(host: Host):
    """What a tiler wrote is of its own run: the same prompts go on to a small picture of the tile's size."""
    scene = whole(host, "ApplyControlToPrompt", "controlnet")
    small = {"latent_image": latent(1, 16, 16), "steps": 2}
    before = host.sample(scene, **small)
    in_tiles(host, scene, MultiDiffusion())
    for control in {id(c): c for _, options in scene.positive for c in [options["control"]]}.values():
        control.__dict__.pop("get_control", None)
    assert off_by(host.sample(scene, **small), before) <= 1e-6


# -- the packs themselves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["MultiDiffusion", "Mixture of Diffusers", "SpotDiffusion"])
@pytest.mark.parametrize("kind", NATIVE)
def test_tiled_diffusion_itself(host: Host, kind: str, method: str, monkeypatch: pytest.MonkeyPatch):
    import comfy.gligen
    import comfy.samplers
    import comfy_extras.nodes_sag

    for place, name in (
        (comfy.samplers.KSampler, "sample"),
        (comfy.samplers.KSAMPLER, "sample"),
        (comfy.samplers, "get_area_and_mult"),
        (comfy.samplers, "pre_run_control"),
        (comfy_extras.nodes_sag, "create_blur_map"),
        (comfy.gligen.Gligen, "_set_position"),
    ):
        monkeypatch.setattr(place, name, getattr(place, name))  # it replaces them for good
    node = pack("ZEROCONV_TILED_DIFFUSION", monkeypatch).NODE_CLASS_MAPPINGS["TiledDiffusion"]

    def run(scene: Scene) -> Run:
        (model,) = node().apply(scene.model, method, 128, 128, 64, 4)
        return host.sample(replace(scene, model=model), latent_image=latent(1, 32, 32), steps=2)

    expected = run(apply(host, "ControlNetApplyAdvanced", host.scene("sdxl"), native(host, kind), HINT))
    plain = run(host.scene("sdxl"))
    for way in WAYS:
        assert_same(run(whole(host, way, kind)), expected, plain)
