"""Guidance, masks and sizes in the latents: what our nodes give is native control with the formula written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from graphs import MOVES, STEPS, TOLERANCE, WAYS, Control, Run, Scene, assert_same, latent, moved, off_by, picture
from torch import Tensor

if TYPE_CHECKING:
    from hosting import Host

    Weight = Callable[[int, Tensor], Tensor | float]


def formula(host: Host, control: Control, weight: Weight, family: str = "sd15", positive_only: bool = False) -> Scene:
    """The host's own control with residual i, the middle's last, times `weight(i, residual)`."""
    import comfy.controlnet

    class Weighted(comfy.controlnet.ControlNet):
        def control_merge(self, control: dict, control_prev: Any, output_dtype: Any) -> dict:
            count = len(control["output"])
            weighed = {
                "output": [residual * weight(i, residual) for i, residual in enumerate(control["output"])],
                "middle": [residual * weight(count, residual) for residual in control["middle"]],
            }
            return super().control_merge(weighed, control_prev, output_dtype)

    native = host.load(f"{family}_{control.file}", native=True).copy()
    native.__class__ = Weighted
    native.set_cond_hint(control.image.movedim(-1, 1), control.strength, (control.start, control.end))
    scene = host.scene(family)
    positive, negative = (
        [
            [embedding, {**options, "control": native, "control_apply_to_uncond": False}]
            for embedding, options in entries
        ]
        for entries in (scene.positive, scene.negative)
    )
    return Scene(scene.model, positive, scene.negative if positive_only else negative)


def without(host: Host, family: str = "sd15", **sampler: Any) -> Run:
    return host.sample(host.scene(family), **sampler)


# -- guidance ----------------------------------------------------------------------------------------------------------

RESOLUTION = {  # the paper's 64/h at 512 pixels: h relative to the latent's own height
    "sd15": (1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8, 8),
    "sdxl": (1, 1, 1, 2, 2, 2, 4, 4, 4, 4),
}


@pytest.mark.parametrize("size", [(16, 16), (32, 16)])
@pytest.mark.parametrize("family", RESOLUTION)
def test_cfg_resolution_is_the_papers_weights_on_the_prompts_half(host: Host, family: str, size: tuple[int, int]):
    control = Control(strength=0.6, size=(1, 8 * size[0], 8 * size[1]))
    sampler: dict[str, Any] = {"latent_image": latent(1, *size)}
    weights = RESOLUTION[family]
    expected = host.sample(formula(host, control, lambda i, _: weights[i], family, positive_only=True), **sampler)
    for way in WAYS:
        scene = host.apply(
            way, host.scene(family), family, Control(strength=0.6, size=control.size, options={"guidance": GUIDED})
        )
        run = host.sample(scene, **sampler)
        assert moved(expected, without(host, family, **sampler)) >= MOVES
        assert off_by(run, expected) <= TOLERANCE
        assert {batch for _, batch in run.calls("control")} == {1}, "the half that gets no control is not computed"


GUIDED = "cfg_resolution"

GUESS = (0.09941, 0.12050, 0.14606, 0.17705, 0.21460, 0.26012, 0.31530, 0.38218, 0.46325, 0.56152, 0.68062, 0.825, 1.0)


@pytest.mark.parametrize("way", WAYS)
def test_cond_only_with_soft_weights_is_guess_mode(host: Host, way: str):
    """lllyasviel/ControlNet's guess mode: 0.825^(12 - i), and no control on the negative half."""
    (soft,) = host.call("ControlBlockWeights", preset="soft")
    options = {"guidance": "cond_only", "block_weights": soft}
    expected = host.sample(formula(host, Control(), lambda i, _: GUESS[i], positive_only=True))
    run = host.sample(host.apply(way, host.scene(), "sd15", Control(options=options)))
    assert moved(expected, without(host)) >= MOVES
    assert off_by(run, expected) <= TOLERANCE


# -- masks -------------------------------------------------------------------------------------------------------------


def ramp(height: int = 128, width: int = 128) -> Tensor:
    """A soft mask (1,H,W) that rises from left to right."""
    return torch.linspace(0, 1, width).expand(1, height, width)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_soft_mask_is_averaged_to_each_residuals_size(host: Host, way: str, family: str):
    def weight(_: int, residual: Tensor) -> Tensor:
        return F.interpolate(ramp()[:, None], size=residual.shape[2:], mode="area").to(residual)

    expected = host.sample(formula(host, Control(strength=0.8), weight, family))
    run = host.sample(host.apply(way, host.scene(family), family, Control(strength=0.8, options={"mask": ramp()})))
    assert_same(run, expected, without(host, family))


@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
def test_a_batch_of_masks_is_one_for_each_picture(host: Host, way: str):
    masks = torch.cat([ramp(), 1 - ramp(), torch.zeros(1, 128, 128)])
    sampler: dict[str, Any] = {"latent_image": latent(3)}

    def weight(_: int, residual: Tensor) -> Tensor:
        one = F.interpolate(masks[:, None], size=residual.shape[2:], mode="area")
        return one.repeat(len(residual) // 3, 1, 1, 1).to(residual)

    expected = host.sample(formula(host, Control(), weight), **sampler)
    run = host.sample(host.apply(way, host.scene(), "sd15", Control(options={"mask": masks})), **sampler)
    assert_same(run, expected, without(host, **sampler))
    plain = without(host, **sampler)
    assert torch.allclose(run.latent[2], plain.latent[2], atol=TOLERANCE * float(plain.latent.abs().max())), (
        "mask 3 is empty"
    )


# -- sizes -------------------------------------------------------------------------------------------------------------


def padded(image: Tensor) -> Tensor:
    """A hint of 96x208 in 128x128: 59 rows of it between black ones."""
    inner = F.interpolate(image.movedim(-1, 1), size=(59, 128), mode="nearest-exact")
    return F.pad(inner, (0, 0, 34, 35)).movedim(1, -1)


RESIZED: dict[str, Callable[[Tensor], Tensor]] = {
    "crop": lambda image: F.interpolate(
        image[:, :, 56:152].movedim(-1, 1), size=(128, 128), mode="nearest-exact"
    ).movedim(1, -1),
    "stretch": lambda image: F.interpolate(image.movedim(-1, 1), size=(128, 128), mode="nearest-exact").movedim(1, -1),
    "pad": padded,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", RESIZED)
def test_resize_is_the_hint_made_to_fit_beforehand(host: Host, way: str, how: str):
    wide = Control(size=(1, 96, 208))
    scene = host.scene()
    positive, negative = host.call(
        "ControlNetApplyAdvanced",
        positive=scene.positive,
        negative=scene.negative,
        control_net=host.load("sd15_depth", native=True),
        image=RESIZED[how](wide.image),
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    expected = host.sample(Scene(scene.model, positive, negative))
    run = host.sample(host.apply(way, scene, "sd15", Control(size=wide.size, options={"resize": how})))
    assert_same(run, expected, without(host))


def test_the_three_ways_to_resize_differ(host: Host):
    hints = [fit(Control(size=(1, 96, 208)).image) for fit in RESIZED.values()]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (hints[a] - hints[b]).abs().mean() > 0.02


@pytest.mark.parametrize("how", RESIZED)
@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
def test_a_hint_of_the_latents_size_is_never_resampled(host: Host, monkeypatch: pytest.MonkeyPatch, way: str, how: str):
    """Annotate with a resolution makes it; for an odd latent too."""
    (hint, _) = host.call("Annotate", image=picture(1, 1, 300, 390), annotator="canny", resolution=120)
    assert hint.shape == (1, 120, 156, 3)
    hint = hint[:, :, :152]
    scene = host.apply(way, host.scene(), "sd15", Control(options={"image": hint, "resize": how}))
    expected = host.sample(scene, latent_image=latent(1, 15, 19))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the hint was resampled")

    monkeypatch.setattr("comfy.utils.common_upscale", refuse)
    run = host.sample(scene, latent_image=latent(1, 15, 19))
    assert torch.equal(run.latent, expected.latent)
    monkeypatch.undo()
    assert moved(run, without(host, latent_image=latent(1, 15, 19))) >= MOVES


# -- frames ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_one_hint_is_for_all_frames(host: Host, way: str):
    sampler: dict[str, Any] = {"latent_image": latent(3)}
    one = host.sample(host.apply(way, host.scene(), "sd15", Control()), **sampler)
    three = Control(options={"image": Control().image.repeat(3, 1, 1, 1)})
    each = host.sample(host.apply(way, host.scene(), "sd15", three), **sampler)
    assert_same(one, each, without(host, **sampler))


# ComfyUI 0.3.75 compares the list of sigmas with one sigma for each frame: it takes one frame more than steps only.
FRAMES: dict[str, Any] = {"latent_image": latent(6), "steps": 5}


def windowed(host: Host, scene: Scene) -> Scene:
    """The same under the host's own context windows: 4 of 6 frames at a time, 2 of them shared."""
    return Scene(host.windows(scene.model, 4, 2), scene.positive, scene.negative)


@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
def test_context_windows_take_their_own_frames_hints(host: Host, way: str):
    """Frames with the first hint and frames with the second are controlled each by its own, in whatever window."""
    hints = torch.cat([Control(hint=1).image.repeat(3, 1, 1, 1), Control(hint=2).image.repeat(3, 1, 1, 1)])

    def run(image: Tensor) -> Tensor:
        scene = host.apply(way, host.scene(), "sd15", Control(options={"image": image}))
        return host.sample(windowed(host, scene), **FRAMES).latent

    mixed, first, second = run(hints), run(Control(hint=1).image), run(Control(hint=2).image)
    largest = first.abs().max()
    assert (first - second).norm() >= MOVES * first.norm()
    assert (mixed[:3] - first[:3]).abs().max() <= TOLERANCE * largest
    assert (mixed[3:] - second[3:]).abs().max() <= TOLERANCE * largest


def test_context_windows_take_their_own_frames_masks_and_strengths(host: Host):
    (schedule,) = host.call("ControlSchedule", curve="constant", per_image="1, 1, 1, 0, 0, 0")
    masks = torch.cat([torch.ones(3, 128, 128), torch.zeros(3, 128, 128)])
    plain = host.sample(windowed(host, host.scene()), **FRAMES).latent
    full = host.sample(windowed(host, host.apply("ApplyControl", host.scene(), "sd15", Control())), **FRAMES).latent
    assert (full - plain).norm() >= MOVES * plain.norm()
    for options in ({"mask": masks}, {"schedule": schedule}):
        scene = host.apply("ApplyControl", host.scene(), "sd15", Control(options=options))
        result = host.sample(windowed(host, scene), **FRAMES).latent
        assert (result[:3] - full[:3]).abs().max() <= TOLERANCE * full.abs().max()
        assert (result[3:] - plain[3:]).abs().max() <= TOLERANCE * plain.abs().max()


def test_the_hint_is_encoded_once_whatever_the_number_of_frames(host: Host):
    run = host.sample(
        host.apply("ApplyControl", host.scene(), "sd15", Control(size=(3, 128, 128))), latent_image=latent(3)
    )
    assert run.calls("hint") == [(run.sigmas[0], 3)] and run.count("control") == STEPS
