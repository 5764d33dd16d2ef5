"""The residual report on the real host: its numbers are those of an independent count, and it changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import STEPS, Control, Run, Scene, latent, moved
from torch import Tensor

from zeroconv.controlnet_core.dosing.record import TOGETHER, Record, Row

if TYPE_CHECKING:
    from hosting import Host


def recorded(host: Host, scene: Scene) -> tuple[Scene, Record]:
    model, record = host.call("RecordControl", model=scene.model)
    return replace(scene, model=model), record


def ratios(record: Record, title: str) -> list[tuple[float | None, ...]]:
    (panel,) = [panel for panel in record.panels if panel.title == title]
    return [row.ratios for row in panel.rows]


def titles(record: Record) -> list[str]:
    return [panel.title for panel in record.panels]


def power(tensor: Tensor) -> float:
    return tensor.double().square().mean().item()


class Count:
    """An independent count by hooks on the modules themselves: what the UNet's blocks and the control's zero
    convolutions gave at each UNet call, and which rows were the prompt's."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Tensor]] = []
        self.rows: list[list[int]] = []
        self._now: dict[str, Tensor] = {}

    def keep(self, name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            self._now[name] = output.clone()  # the host adds to it in place

        return hook

    def end_of_call(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        output = executor(*args, **kwargs)
        self.calls.append(self._now)
        self._now = {}
        options = next(a for a in (*args, *kwargs.values()) if isinstance(a, dict) and "cond_or_uncond" in a)
        self.rows.append([i for i, number in enumerate(options["cond_or_uncond"]) if number == 0])
        return output


@contextmanager
def counted(scene: Scene, control: Any) -> Iterator[tuple[Scene, Count]]:
    """`scene` with hooks on its UNet and on the network of the CONTROL_NET `control`."""
    count, handles = Count(), []
    unet = scene.model.model.diffusion_model
    for i, block in enumerate(unet.input_blocks):
        handles.append(block[-1].register_forward_hook(count.keep(f"skip {i}")))
    handles.append(unet.middle_block[-1].register_forward_hook(count.keep("middle")))
    net = control.get_models()[-1].model
    net = getattr(net, "control", net)
    for i, zero_conv in enumerate(net.zero_convs):
        handles.append(zero_conv[0].register_forward_hook(count.keep(f"residual {i}")))
    handles.append(net.middle_block_out[0].register_forward_hook(count.keep("residual middle")))
    model = scene.model.clone()
    model.add_wrapper_with_key("apply_model", "count", count.end_of_call)
    try:
        yield replace(scene, model=model), count
    finally:
        for handle in handles:
            handle.remove()


def expected(call: dict[str, Tensor], rows: list[int] | None, strength: float, skips: int) -> list[float]:
    """RMS(residual) / RMS(what it joins) over `rows` of the UNet's batch; the residual has no other rows."""
    out = []
    for residual, joined in [*((f"residual {i}", f"skip {i}") for i in range(skips)), ("residual middle", "middle")]:
        target = call[joined] if rows is None else call[joined][rows]
        # What both halves of guidance have in common is computed once, for both.
        whole = call[residual].repeat(len(target) // len(call[residual]), 1, 1, 1)
        assert whole.shape == target.shape
        out.append((strength**2 * power(whole) / power(target)) ** 0.5)
    return out


# -- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["native", "ours", "foreign"])
@pytest.mark.parametrize(("family", "skips"), [("sd15", 12), ("sdxl", 9)])
def test_numbers_are_those_of_an_independent_count(host: Host, family: str, skips: int, way: str):
    """Of the host's own nodes, of ours, and of ours around a control of the host's loader."""
    control = Control(strength=0.7)
    loaded = host.load(f"{family}_depth", native=way != "ours")
    with counted(host.scene(family), loaded) as (scene, count):
        if way == "native":
            scene = host.native(scene, family, control)
        else:
            scene = host.apply("ApplyControl", scene, family, control, foreign=way == "foreign")
        scene, record = recorded(host, scene)
        run = host.sample(scene)
    titles_of = {"native": TOGETHER, "ours": getattr(loaded, "name", ""), "foreign": "the ControlNet of another loader"}
    (panel,) = record.panels
    assert panel.title == titles_of[way]
    assert [(row.step, row.sigma) for row in panel.rows] == list(enumerate(run.sigmas[:-1]))
    assert len(panel.rows) == len(count.calls) == STEPS
    for row, call in zip(panel.rows, count.calls, strict=True):
        wanted = expected(call, None, 0.7, skips)
        assert min(wanted) > 0.01
        assert row.ratios == pytest.approx(wanted, rel=1e-4)


def test_the_half_without_control_is_not_counted(host: Host):
    loaded = host.load("sd15_depth")
    with counted(host.scene(), loaded) as (scene, count):
        scene = host.apply("ApplyControl", scene, "sd15", Control(options={"guidance": "cond_only"}))
        scene, record = recorded(host, scene)
        host.sample(scene)
    for row, call, rows in zip(ratios(record, loaded.name), count.calls, count.rows, strict=True):
        assert call["skip 0"].shape[0] == 2 and len(rows) == 1
        assert row == pytest.approx(expected(call, rows, 1.0, 12), rel=1e-4)


def test_an_adapters_residuals_are_measured_where_they_join_the_encoder(host: Host):
    """The host's T2I-Adapter: blocks 2, 5, 8, 11, each against its own output before the adapter's is added."""
    from comfy.controlnet import T2IAdapter
    from comfy.t2i_adapter.adapter import Adapter
    from tiny_models import WIDTH, randomise

    channels = [WIDTH, WIDTH, 2 * WIDTH, 2 * WIDTH]
    network = Adapter(cin=192, channels=channels, nums_rb=2, ksize=1, sk=True, use_conv=False, xl=False)
    randomise(network, 7)
    adapter = T2IAdapter(network, 3, 8, "nearest-exact")
    control = Control()
    with counted(host.scene(), host.load("sd15_depth")) as (scene, count):
        positive, negative = host.call(
            "ControlNetApplyAdvanced",
            positive=scene.positive,
            negative=scene.negative,
            control_net=adapter,
            image=control.image,
            strength=0.5,
            start_percent=0.0,
            end_percent=1.0,
        )
        scene, record = recorded(host, replace(scene, positive=positive, negative=negative))
        host.sample(scene)
    with torch.inference_mode():
        features = [f for f in reversed(network(control.image.movedim(-1, 1))["input"]) if f is not None]
    assert titles(record) == [f"{TOGETHER}, added in the encoder"]
    for row, call in zip(record.panels[0].rows, count.calls, strict=True):
        wanted: list[Any] = [None] * 13
        for i, feature in zip((2, 5, 8, 11), features, strict=True):
            wanted[i] = pytest.approx(0.5 * (power(feature) / power(call[f"skip {i}"])) ** 0.5, rel=1e-4)
        assert list(row.ratios) == wanted


def test_strength_2_doubles_the_first_step(host: Host):
    """There the latent is the same noise; later ones have gone another way."""
    rows = []
    for strength in (1.0, 2.0):
        scene, record = recorded(host, host.apply("ApplyControl", host.scene(), "sd15", Control(strength=strength)))
        host.sample(scene)
        rows.append(record.panels[0].rows)
    assert [r / 2 for r in rows[1][0].ratios] == pytest.approx(rows[0][0].ratios, rel=1e-5)  # type: ignore[operator]
    assert [r / 2 for r in rows[1][-1].ratios] != pytest.approx(rows[0][-1].ratios, rel=1e-2)  # type: ignore[operator]


def test_nothing_outside_the_window(host: Host):
    control = Control(start=1, end=3, options={"unit": "step"})
    scene, record = recorded(host, host.apply("ApplyControl", host.scene(), "sd15", control))
    host.sample(scene, steps=5)
    acted = [[ratio is not None for ratio in row.ratios] for row in record.panels[0].rows]
    assert acted == [[False] * 13, [True] * 13, [True] * 13, [False] * 13, [False] * 13]


def test_block_weights_and_a_schedule_show(host: Host):
    """Middle only, at 1, 0.5 and 0 of strength 1: the first step like no schedule, the last one nothing."""
    (weights,) = host.call("ControlBlockWeights", preset="middle only")
    (schedule,) = host.call("ControlSchedule", curve="custom", keyframes="0: 1, 2: 0", unit="step")
    found = {}
    for name, options in {"plain": {}, "dosed": {"schedule": schedule, "block_weights": weights}}.items():
        scene, record = recorded(host, host.apply("ApplyControl", host.scene(), "sd15", Control(options=options)))
        host.sample(scene, steps=3)
        found[name] = [row.ratios for row in record.panels[0].rows]
    assert [[ratio is not None for ratio in row] for row in found["dosed"]] == [
        [False] * 12 + [True],
        [False] * 12 + [True],
        [False] * 13,
    ]
    assert found["dosed"][0][-1] == pytest.approx(found["plain"][0][-1], rel=1e-5)


def test_two_controls_have_a_panel_each_and_one_for_their_sum(host: Host):
    both = [Control("depth"), Control("pose", hint=2, strength=0.6)]
    scene, record = recorded(host, host.apply("StackControls", host.scene(), "sd15", *both))
    host.sample(scene)
    names = [host.load(f"sd15_{control.file}").name for control in both]
    assert titles(record) == [*names, TOGETHER]
    depth, pose, together = (ratios(record, title)[0] for title in titles(record))
    for a, b, c in zip(depth, pose, together, strict=True):
        assert a is not None and b is not None and c is not None
        assert abs(a - b) <= c <= a + b
        assert c not in (a, b)


def test_heun_has_a_row_for_each_sigma(host: Host):
    scene, record = recorded(host, host.apply("ApplyControl", host.scene(), "sd15", Control()))
    run = host.sample(scene, sampler_name="heun")
    assert run.count("unet") == 2 * STEPS - 1
    assert [row.sigma for row in record.panels[0].rows] == run.sigmas[:-1]


# -- it changes nothing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["native", "ApplyControl", "ApplyControlToPrompt"])
def test_latents_and_unet_calls_are_the_same(host: Host, way: str):
    control = Control(start=0.0, end=0.6)
    scene = (
        host.native(host.scene(), "sd15", control)
        if way == "native"
        else host.apply(way, host.scene(), "sd15", control)
    )
    plain, without = host.sample(scene, sampler_name="heun"), host.sample(host.scene(), sampler_name="heun")
    assert moved(plain, without) >= 0.05
    run = host.sample(recorded(host, scene)[0], sampler_name="heun")
    assert torch.equal(run.latent, plain.latent)
    assert run.events == plain.events


def test_it_may_come_before_apply_control(host: Host):
    scene, record = recorded(host, host.scene())
    run = host.sample(host.apply("ApplyControl", scene, "sd15", Control()))
    plain = host.sample(host.apply("ApplyControl", host.scene(), "sd15", Control()))
    assert torch.equal(run.latent, plain.latent)
    assert titles(record) == [host.load("sd15_depth").name]
    assert None not in record.panels[0].rows[0].ratios


def test_other_patches_stay_and_see_what_they_saw(host: Host):
    """A patch of another node that halves the skips: same latent with the record, whose numbers are the UNet's own."""

    def halve(h: Tensor, hsp: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        return h * 0.9, hsp * 0.5

    found = []
    for patched in (False, True):
        scene = host.apply("ApplyControl", host.scene(), "sd15", Control())
        if patched:
            model = scene.model.clone()
            model.set_model_output_block_patch(halve)
            scene = replace(scene, model=model)
        with_record, record = recorded(host, scene)
        assert torch.equal(host.sample(with_record).latent, host.sample(scene).latent)
        found.append(record.panels[0].rows[0].ratios)
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_the_model_that_goes_in_is_left_alone(host: Host):
    model = host.model("sd15")
    scene, record = recorded(host, host.scene())
    host.sample(scene)
    assert "diffusion_model" not in model.wrappers
    assert "zeroconv_record" not in model.model_options["transformer_options"]
    assert "patches" not in model.model_options["transformer_options"]
    before = record.panels
    host.sample(host.scene(), steps=2)
    assert record.panels == before


def test_each_sampling_starts_the_record_over(host: Host):
    scene, record = recorded(host, host.apply("ApplyControl", host.scene(), "sd15", Control()))
    for steps in (5, 2):
        run = host.sample(scene, steps=steps)
        assert [row.sigma for row in record.panels[0].rows] == run.sigmas[:-1]
    assert len(run.sigmas) == 3


# -- the nodes --------------------------------------------------------------------------------------------------------


def test_the_report(host: Host):
    control = Control(start=0.0, end=0.5)
    scene, record = recorded(host, host.apply("ApplyControl", host.scene(), "sd15", control))
    run: Run = host.sample(scene)
    report, picture = host.call("ControlReport", record=record, latent={"samples": run.latent})
    name, summary, head, *rows = report.splitlines()
    assert name == host.load("sd15_depth").name
    on = [row.ratios[0] is not None for row in record.panels[0].rows]
    assert 0 < sum(on) < STEPS
    assert summary.startswith(f"acted at {sum(on)} of {STEPS} sigmas;")
    assert head.split() == ["step", "sigma", *map(str, range(12)), "mid"]
    assert [row.split()[2] == "-" for row in rows] == [not acted for acted in on]
    first: Row = record.panels[0].rows[0]
    assert rows[0].split()[2:] == [f"{100 * ratio:.1f}" for ratio in first.ratios if ratio is not None]
    assert picture.shape[0] == 1 and picture.shape[3] == 3
    assert picture.min() >= 0 and picture.max() <= 1


def test_a_report_before_sampling_says_what_to_connect(host: Host):
    _, record = recorded(host, host.scene())
    with pytest.raises(Exception, match="connect the model of Record Control to the sampler"):
        host.call("ControlReport", record=record, latent=latent())


def test_a_report_without_control_says_so(host: Host):
    scene, record = recorded(host, host.scene())
    host.sample(scene)
    report, _ = host.call("ControlReport", record=record, latent=latent())
    assert "acted nowhere" in report


def test_two_records_on_one_model_are_refused(host: Host):
    scene, _ = recorded(host, host.scene())
    with pytest.raises(Exception, match="recorded already"):
        host.call("RecordControl", model=scene.model)


def test_a_model_without_the_sd_unet_is_refused(host: Host):
    config = type("Flux", (), {"unet_config": {"image_model": "flux"}})()
    with pytest.raises(Exception, match="the model is Flux"):
        host.call("RecordControl", model=SimpleNamespace(model=SimpleNamespace(model_config=config)))
