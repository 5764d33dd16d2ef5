"""Schedules and block weights on the real host: what the nodes give and show, and what they do to the latents."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import MOVES, WAYS, Control, Run, Scene, assert_same, latent, moved, off_by
from torch import Tensor

from zeroconv.controlnet_core.dosing.block_weights import BlockWeights
from zeroconv.controlnet_core.dosing.record import Panel, Row
from zeroconv.controlnet_core.dosing.schedule import CURVES, Keyframe, Schedule

if TYPE_CHECKING:
    from hosting import Host

STEPS = 5
LINE = (255, 180, 84)  # the colour of curves and bars


@pytest.fixture(autouse=True)
def _pictures_go_to(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))


def schedule(host: Host, keyframes: str, **inputs: Any) -> Schedule:
    (made,) = host.call("ControlSchedule", curve="custom", keyframes=keyframes, **inputs)
    return made


def weights(host: Host, **inputs: Any) -> BlockWeights:
    (made,) = host.call("ControlBlockWeights", **inputs)
    return made


def apply(host: Host, way: str = "ApplyControl", family: str = "sd15", **options: Any) -> Scene:
    """A control with these inputs; `start`, `end` and `strength` are the control's own."""
    own = {name: options.pop(name) for name in ("start", "end", "strength") if name in options}
    return host.apply(way, host.scene(family), family, Control(**own, options=options))


def pixels(picture: Tensor) -> Tensor:
    assert picture.ndim == 4 and picture.shape[0] == 1 and picture.shape[3] == 3
    assert picture.dtype == torch.float32 and 0 <= picture.min() and picture.max() <= 1
    return (picture[0] * 255).round().int()


def painted(picture: Tensor, colour: tuple[int, int, int] = LINE, within: int = 0) -> Tensor:
    """(H,W): which pixels have this colour."""
    return (pixels(picture) - torch.tensor(colour)).abs().amax(-1) <= within


# -- the nodes --------------------------------------------------------------------------------------------------------


def test_a_named_curve(host: Host):
    (made,) = host.call("ControlSchedule", curve="bell", unit="percent")
    assert made == Schedule(CURVES["bell"], "percent")


def test_keyframes_of_ones_own_and_strengths_for_each_picture(host: Host):
    made = schedule(host, "0: 1 ease\n3: 0.5", unit="step", per_image="1, 0.5\n0")
    assert made == Schedule((Keyframe(0, 1, "ease"), Keyframe(3, 0.5)), "step", (1.0, 0.5, 0.0))


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"curve": "custom", "keyframes": " "}, "the keyframes are empty"),
        ({"curve": "custom", "keyframes": "0: 1, nonsense"}, 'found "nonsense"'),
        ({"curve": "bell", "unit": "step"}, 'the curve "bell" runs from 0 to 1 and unit is step'),
        ({"per_image": "1, half"}, 'per_image takes numbers.*found "1, half"'),
        ({"per_image": "1, -1"}, "strength of a picture is a number from 0, found -1"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused(host: Host, inputs: dict, says: str):
    with pytest.raises(Exception, match=says):
        host.call("ControlSchedule", **inputs)


def test_block_weights(host: Host):
    assert weights(host) == BlockWeights("soft")
    assert weights(host, preset="soft", falloff=0.5, middle=2.0).weights(2) == (0.25, 0.5, 2.0)
    assert weights(host, preset="custom", skips="0 1, 2\n0.5", middle=3.0).weights(4) == (0, 1, 2, 0.5, 3)
    assert weights(host, preset="even", skips="not read").weights(2) == (1, 1, 1)


@pytest.mark.parametrize(
    ("skips", "says"),
    [("", "custom block weights are empty"), ("1, x", 'skips takes numbers.*found "1, x"'), ("11", "found 11")],
)
def test_block_weights_that_cannot_be_meant_are_refused(host: Host, skips: str, says: str):
    with pytest.raises(Exception, match=says):
        weights(host, preset="custom", skips=skips)


@pytest.mark.parametrize("way", WAYS)
def test_block_weights_of_another_family_are_refused(host: Host, way: str):
    """9 weights for SD1.x: said by our node, or when sampling starts."""
    nine = weights(host, preset="custom", skips="1, 1, 1, 1, 1, 1, 1, 1, 1")
    with pytest.raises(Exception, match="has 12 skip connections, found 9 block weights"):
        host.sample(apply(host, way, block_weights=nine))


# -- what the nodes show ----------------------------------------------------------------------------------------------


def shown(host: Host, node: str, *values: Any) -> Path:
    """The file of the picture that this node shows."""
    import folder_paths

    (saved,) = host.ours[node].execute(*values).ui.as_dict()["images"]
    return Path(folder_paths.get_temp_directory()) / saved["subfolder"] / saved["filename"]


def test_the_nodes_show_their_pictures(host: Host):
    from PIL import Image

    assert Image.open(shown(host, "ControlBlockWeights", "soft", 0.8, "", 1.0)).size == (512, 306)
    assert Image.open(shown(host, "ControlBlockWeights", "custom", 0.8, "1 1 1", 1.0)).size == (512, 156)


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_is_drawn_where_its_values_are(host: Host, name: str):
    (told,) = host.ours["ControlSchedule"].execute(name, "", "window", "").ui["curve"]
    schedule = Schedule(CURVES[name])
    assert all(value == schedule.at(position) for position, value in told["points"])
    places = [position for position, _ in told["points"]]
    assert places == sorted(set(places))
    assert (places[0], places[-1]) == (0, 1)
    assert max(b - a for a, b in pairwise(places)) < 0.006
    assert told["keyframes"] == [(each.position, each.value, each.interpolation) for each in schedule.keyframes]
    assert (told["right"], told["top"]) == (1, 1)


def test_a_curve_in_steps_has_room_behind_its_last_point(host: Host):
    (told,) = host.ours["ControlSchedule"].execute("custom", "0: 1 hold, 20: 2.5", "step", "1, 0.5").ui["curve"]
    assert (told["right"], told["top"], told["axis"], told["per_image"]) == (25, 3, "step", (1.0, 0.5))
    jump = [value for position, value in told["points"] if 19.99 < position <= 20]
    assert jump == [1, 2.5]


def test_bars_are_as_high_as_their_weights(host: Host):
    from zeroconv.nodes import pictures

    bars = painted(pictures.bars([("three", (1.0, 0.5, 0.0))]))
    high = bars.sum(0)
    left, middle, right = (int(high[x]) for x in (16 + 80, 256, 496 - 80))
    assert right == 0
    assert middle == pytest.approx(left / 2, abs=1)
    assert left == pytest.approx(88, abs=1)


def test_a_heat_map_has_a_cell_for_each_residual_of_each_step(host: Host):
    """The lightest colour for the most, grey for nothing, the same scale in every panel."""
    from zeroconv.nodes import pictures

    lightest, darkest, grey = (252, 230, 140), (20, 24, 60), (42, 45, 51)
    first = Panel("first", (Row(0, 8.0, (0.8, 0.0, None)), Row(1, 4.0, (0.0, 0.0, 0.0))))
    second = Panel("second", (Row(0, 8.0, (0.4, None, 0.8)), Row(1, 4.0, (None, None, None))))
    picture = pictures.heat_map([first, second])

    def cell(panel: int, row: int, column: int) -> tuple[int, ...]:
        top = 44 + panel * (44 + 2 * 20 + 22) + row * 20
        return tuple(pixels(picture)[top + 1, 104 + column * 40 + 1].tolist())

    assert [cell(0, 0, i) for i in range(3)] == [lightest, darkest, grey]
    assert [cell(0, 1, i) for i in range(3)] == [darkest] * 3
    assert [cell(1, 0, i) for i in range(3)] == [(186, 65, 102), grey, lightest]  # half way
    assert [cell(1, 1, i) for i in range(3)] == [grey] * 3


def test_a_heat_map_of_many_steps_stays_small(host: Host):
    from zeroconv.nodes import pictures

    rows = tuple(Row(k, 1.0, (0.1, float("nan"))) for k in range(200))
    assert pictures.heat_map([Panel("long", rows)]).shape[1] < 1000


# -- in the latents: schedules ----------------------------------------------------------------------------------------


def in_pieces(host: Host, strengths: list[float]) -> Run:
    """One native sampling for each step, under native control at that step's strength."""
    state, pieces = latent(), []
    for k, strength in enumerate(strengths):
        scene = host.native(host.scene(), "sd15", Control(strength=strength)) if strength else host.scene()
        piece = host.sample(
            scene,
            "KSamplerAdvanced",
            steps=len(strengths),
            latent_image=state,
            start_at_step=k,
            end_at_step=k + 1 if k + 1 < len(strengths) else 10000,
            add_noise="enable" if k == 0 else "disable",
            return_with_leftover_noise="enable",
        )
        state = {"samples": piece.latent}
        pieces.append(piece)
    return Run(pieces[-1].latent, [], [event for piece in pieces for event in piece.events])


@pytest.mark.parametrize(
    ("text", "inputs", "strengths"),
    [
        ("1: 2, 3: 0", {"unit": "step"}, [1.6, 1.6, 0.8, 0.0, 0.0]),
        ("0: 1 hold, 2: 0.5", {"unit": "step"}, [0.8, 0.8, 0.4, 0.4, 0.4]),
        ("0: 1, 1: 0", {"unit": "window"}, [0.8, 0.6, 0.4, 0.2, 0.0]),
        ("0: 0 ease, 1: 2", {"unit": "window"}, [0.0, 0.25, 0.8, 1.35, 1.6]),
    ],
)
@pytest.mark.parametrize("way", ["ApplyControl", "StackControlsToPrompt"])
def test_a_schedule_gives_the_latent_of_native_samplings_step_by_step(
    host: Host, way: str, text: str, inputs: dict, strengths: list[float]
):
    """At strength 0.8 over a window in steps; ease is 3u^2 - 2u^3 at u = 0, 1/4, 1/2, 3/4, 1."""
    made = schedule(host, text, **inputs)
    scene = apply(host, way, strength=0.8, start=0, end=-1, unit="step", schedule=made)
    run = host.sample(scene, steps=STEPS)
    without = host.once("five steps", lambda: host.sample(host.scene(), steps=STEPS))
    assert_same(run, in_pieces(host, strengths), without)
    assert run.count("control") == sum(strength > 0 for strength in strengths)


def test_the_window_of_the_apply_node_is_what_a_curve_runs_over(host: Host):
    """Steps 1 to 3 of 5 fading out: strengths 1, 0.5 and 0 there, and nothing outside."""
    (made,) = host.call("ControlSchedule", curve="fade out")
    run = host.sample(apply(host, start=1, end=4, unit="step", schedule=made), steps=STEPS)
    without = host.once("five steps", lambda: host.sample(host.scene(), steps=STEPS))
    assert_same(run, in_pieces(host, [0, 1, 0.5, 0, 0]), without)


def test_percent_is_that_of_the_hosts_own_window(host: Host):
    """Held to 40 percent and then nothing: the window 0 to 0.4 of the host's own node."""
    made = schedule(host, "0: 1 hold, 0.4: 0", unit="percent")
    run = host.sample(apply(host, schedule=made), steps=9)
    native = host.sample(host.native(host.scene(), "sd15", Control(end=0.4)), steps=9)
    assert_same(run, native, host.sample(host.scene(), steps=9))
    assert 0 < run.count("control") == native.count("control") < 9


def test_a_constant_schedule_is_a_strength(host: Host):
    run = host.sample(apply(host, strength=0.5, schedule=schedule(host, "0: 0.6")))
    native = host.sample(host.native(host.scene(), "sd15", Control(strength=0.3)))
    assert_same(run, native, host.sample(host.scene()))


def test_strengths_for_each_picture(host: Host):
    """Two pictures at 1 and 0: the first as under control, the second as without."""
    two: dict[str, Any] = {"latent_image": latent(2)}
    made = schedule(host, "0: 1", per_image="1, 0")
    run = host.sample(apply(host, schedule=made), **two)
    under, without = host.sample(apply(host), **two), host.sample(host.scene(), **two)
    assert moved(under, without) >= MOVES
    for picture, reference in enumerate((under, without)):
        pair = [replace(r, latent=r.latent[picture]) for r in (run, reference)]
        assert off_by(*pair) <= 1e-4
    half = host.sample(apply(host, schedule=schedule(host, "0: 1", per_image="0.5, 0.5")), **two)
    assert_same(half, host.sample(apply(host, strength=0.5), **two), without)


def test_strengths_for_fewer_frames_than_context_windows_run_over_are_refused(host: Host):
    scene = apply(host, schedule=schedule(host, "0: 1", per_image="1, 0.5, 0"))
    with pytest.raises(Exception, match="per_image has 3 strengths, the batch at least 4 pictures"):
        host.sample(replace(scene, model=host.windows(scene.model, 4, 2)), latent_image=latent(6), steps=5)


def test_strengths_for_another_number_of_pictures_are_refused(host: Host):
    made = schedule(host, "0: 1", per_image="1, 0.5, 0")
    with pytest.raises(Exception, match="per_image has 3 strengths, the batch 2 pictures"):
        host.sample(apply(host, schedule=made), latent_image=latent(2))


# -- in the latents: block weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_soft_is_the_hosts_own_falloff(host: Host, family: str):
    """The host can weigh output i by strength^(n - i) and the middle by strength^1; no node of its own asks for it."""
    from comfy.controlnet import StrengthType

    native = host.load(f"{family}_depth", native=True).copy()
    native.strength_type = StrengthType.LINEAR_UP
    scene, control = host.scene(family), Control(strength=0.825)
    positive, negative = host.call(
        "ControlNetApplyAdvanced",
        positive=scene.positive,
        negative=scene.negative,
        control_net=native,
        image=control.image,
        strength=control.strength,
        start_percent=0.0,
        end_percent=1.0,
    )
    reference = host.sample(replace(scene, positive=positive, negative=negative))
    soft = weights(host, preset="soft", middle=0.825)
    run = host.sample(apply(host, family=family, block_weights=soft))
    assert_same(run, reference, host.sample(scene))


def test_even_weights_are_a_strength(host: Host):
    half = weights(host, preset="custom", skips=", ".join(["0.5"] * 12), middle=0.5)
    run = host.sample(apply(host, block_weights=half))
    native = host.sample(host.native(host.scene(), "sd15", Control(strength=0.5)))
    assert_same(run, native, host.sample(host.scene()))


@pytest.mark.parametrize("way", WAYS)
def test_middle_only_by_every_way(host: Host, way: str):
    """Where only the middle block's zero convolution is not zero, all other residuals are nothing."""
    state = host.state("sd15_depth")
    for name in state:
        if name.startswith("zero_convs"):
            state[name].zero_()
    host.write("sd15_depthmiddle", state)
    reference = host.sample(host.native(host.scene(), "sd15", Control("depthmiddle")))
    run = host.sample(apply(host, way, block_weights=weights(host, preset="middle only")))
    assert_same(run, reference, host.sample(host.scene()))


def scaled_in_the_file(host: Host, name: str, factors: list[float]) -> Run:
    """Native control by a file whose zero convolution i, the middle's last, is multiplied by `factors[i]`."""
    state = host.state("sd15_depth")
    for key in state:
        for i, factor in enumerate(factors):
            if key.startswith(f"zero_convs.{i}." if i < 12 else "middle_block_out."):
                state[key] *= factor
    host.write(f"sd15_{name}", state)
    return host.sample(host.native(host.scene(), "sd15", Control(name)))


@pytest.mark.parametrize(
    ("inputs", "factors"),
    [
        (
            {"preset": "custom", "skips": "0.1, 0.9, 0.2, 0.8, 0.3, 1, 0, 1.2, 0.6, 0.4, 1.5, 0.7", "middle": 0.5},
            [0.1, 0.9, 0.2, 0.8, 0.3, 1, 0, 1.2, 0.6, 0.4, 1.5, 0.7, 0.5],
        ),
        ({"preset": "deep half"}, [0] * 6 + [1] * 7),
        ({"preset": "shallow half"}, [1] * 6 + [0] * 7),
        ({"preset": "soft", "falloff": 0.5}, [0.5 ** (12 - i) for i in range(13)]),
    ],
    ids=["custom", "deep half", "shallow half", "soft 0.5"],
)
def test_weights_are_those_of_a_file_with_scaled_zero_convolutions(host: Host, inputs: dict, factors: list[float]):
    reference = scaled_in_the_file(host, "depth" + inputs["preset"].replace(" ", ""), factors)
    assert_same(host.sample(apply(host, block_weights=weights(host, **inputs))), reference, host.sample(host.scene()))


def test_the_halves_add_up(host: Host):
    """The deep and the shallow half of one control, stacked, are all of it."""
    halves = [
        Control(options={"block_weights": weights(host, preset=preset)}) for preset in ("deep half", "shallow half")
    ]
    run = host.sample(host.apply("StackControls", host.scene(), "sd15", *halves))
    assert off_by(run, host.sample(apply(host))) <= 1e-4
    deep = host.sample(host.apply("StackControls", host.scene(), "sd15", halves[0]))
    assert moved(deep, run) >= MOVES


# -- nothing is changed -----------------------------------------------------------------------------------------------


def test_without_them_nothing_is_different(host: Host):
    (constant,) = host.call("ControlSchedule", curve="constant")
    run = host.sample(apply(host, schedule=constant, block_weights=weights(host, preset="even")))
    assert torch.equal(run.latent, host.sample(apply(host)).latent)


def test_one_schedule_serves_two_controls(host: Host):
    (made,) = host.call("ControlSchedule", curve="fade out")
    window = {"unit": "step", "schedule": made}
    controls = [Control(start=0, end=2, options=window), Control("pose", start=2, end=-1, options=window)]
    run = host.sample(host.apply("StackControls", host.scene(), "sd15", *controls), steps=STEPS)
    ran = [event.sigma for event in run.events if event.what == "control"]
    assert ran == [run.sigmas[0], run.sigmas[2], run.sigmas[3]]  # 1, 0; 1, 0.5, 0: at 0 a network does not run
