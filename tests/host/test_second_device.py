"""The whole pack on a device that is not the CPU: the CPU's own latents, and nothing uploaded twice.

What mixes tensors of two devices raises there, and so does what MPS and DirectML lack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import Control, Run, Scene, latent, moved, off_by, picture

from zeroconv.annotators.networks import NETWORKS

from ..second_device import transfers
from .neighbours.callers import MultiDiffusion, animatediff, in_tiles
from .neighbours.controls import KINDS, apply, ours
from .second_host import SecondHost, believed
from .small_training import RARER, WIDGETS, cached, losses
from .test_learned_annotators import LEARNED, Bench, bench  # noqa: F401 - fixtures
from .test_learned_annotators import picture as photograph  # noqa: F401 - fixtures

if TYPE_CHECKING:
    from hosting import Host

    from zeroconv.annotators import Annotator

    Case = Callable[[Host], Run]


@pytest.fixture(scope="module")
def second(host: Host, tmp_path_factory: pytest.TempPathFactory) -> SecondHost:
    import folder_paths

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(folder_paths.folder_names_and_paths, "controlnet", ([], set()))
        return SecondHost.beside(tmp_path_factory.mktemp("second"))


def same(host: Host, second: SecondHost, case: Case) -> Run:
    """The run of a case on the second device, where it gives what it gives on the CPU."""
    expected, found = case(host), second.run(case)
    assert second.moves, "it did not run there"
    assert off_by(found, expected) <= ROUNDING
    return found


ROUNDING = 1e-5
"""Weights that were moved lie at other addresses, and the CPU adds up in another order there."""
SAMPLER: dict[str, Any] = {"steps": 3}
HALF = torch.eye(2).repeat_interleave(64, 0).repeat_interleave(64, 1)[None]


def dosed(kind: str, way: str = "ApplyControl", sampler: dict[str, Any] | None = None, **options: Any) -> Case:
    """A sampling of the tiny SDXL model under one control; options that are functions are made by the host."""

    def case(host: Host) -> Run:
        given: dict[str, Any] = {"image": picture(1), **options}
        given = {name: value(host) if callable(value) else value for name, value in given.items()}
        scene = apply(host, way, host.scene("sdxl"), ours(host, kind), **given)
        return host.sample(scene, **{**SAMPLER, **(sampler or {})})

    return case


def schedule(**inputs: Any) -> Callable[[Host], Any]:
    return lambda host: host.call("ControlSchedule", **inputs)[0]


def soft(host: Host) -> Any:
    return host.call("ControlBlockWeights", preset="soft")[0]


DOSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cond_only": {"guidance": "cond_only"},
    "mask": {"mask": HALF, "guidance": "cond_only", "way": "ApplyControlToPrompt"},
    "cfg_resolution": {"guidance": "cfg_resolution", "block_weights": soft},
    "odd sizes": {"mask": HALF, "resize": "pad", "sampler": {"latent_image": latent(1, 15, 19)}},
    "schedule": {"schedule": schedule(curve="fade out"), "start": 0.1, "end": 0.9},
    "each picture": {
        "image": picture(1, 2),
        "mask": torch.cat([HALF, 1 - HALF]),
        "sampler": {"latent_image": latent(2)},
        "schedule": schedule(curve="constant", per_image="1, 0.4"),
        "guidance": "cond_only",
    },
    "steps": {"unit": "step", "start": 1, "end": 2, "resize": "stretch", "image": picture(1, 1, 96, 208)},
}
STEADY = ("plain", "cond_only", "mask", "cfg_resolution", "odd sizes")
"""Doses that are the same at every call, which need not ask when it is."""


@pytest.mark.parametrize("dose", DOSES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_dose_of_every_kind(host: Host, second: SecondHost, kind: str, dose: str):
    same(host, second, dosed(kind, **DOSES[dose]))
    uploads = [] if kind == "foreign" else second.later("upload")  # the host's own uploads what it is given each time
    assert not uploads if dose in STEADY else len(set(uploads)) == len(uploads)
    # What is not finite is looked for once more when the first sums are there, and then at the end.
    reads = [read for read in second.later("read") if "watch.py" not in read]
    assert len(second.later("read")) - len(reads) <= 1
    assert all("run.py" in read for read in reads) and len(reads) <= (0 if dose in STEADY else len(second.calls))


@pytest.mark.parametrize("family", ["sd15", "sd21"])
@pytest.mark.parametrize("way", ["ApplyControl", "StackControlsToPrompt"])
def test_the_other_families(host: Host, second: SecondHost, family: str, way: str):
    two = (Control(strength=0.7), Control("pose", hint=2, strength=0.8))
    same(host, second, lambda host: host.sample(host.apply(way, host.scene(family), family, *two), **SAMPLER))
    assert second.later("upload") == []


# -- several controls --------------------------------------------------------------------------------------------------


def stacked(*entries: tuple[str, dict[str, Any]], way: str = "ApplyControl") -> Case:
    """A stack of controls of these kinds with these options, each with a hint of its own."""

    def case(host: Host) -> Run:
        stack: dict[str, Any] = {}
        for i, (kind, options) in enumerate(entries):
            control = ours(host, kind)
            if "control_type" in options:
                wanted = {"control_net": control, "type": options["control_type"]}
                (control,) = host.call("SetUnionControlNetType", **wanted)
            inputs = {"control_net": control, "image": picture(i + 1), **options}
            inputs.pop("control_type", None)
            stack = {"stack": host.call("StackControls", **stack, **inputs)[0]}
        scene = host.scene("sdxl")
        if way == "ApplyControl":
            return host.sample(replace(scene, model=host.call(way, model=scene.model, **stack)[0]), **SAMPLER)
        return host.sample(
            Scene(scene.model, *host.call(way, positive=scene.positive, negative=scene.negative, **stack)), **SAMPLER
        )

    return case


STACKS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "all kinds": tuple((kind, {"strength": 0.5}) for kind in KINDS if kind != "foreign"),
    "halves": (("controlnet", {"guidance": "cond_only"}), ("lite", {}), ("adapter", {"guidance": "cfg_resolution"})),
    "fused": (("union", {"strength": 0.6}), ("union", {"control_type": "openpose", "strength": 0.9})),
    "fused in part": (("union", {}), ("union", {"control_type": "openpose", "unit": "step", "start": 1, "end": 2})),
    "not fused": (("union", {}), ("union", {"control_type": "openpose", "mask": HALF})),
}


@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
@pytest.mark.parametrize("name", STACKS)
def test_stacks(host: Host, second: SecondHost, name: str, way: str):
    same(host, second, stacked(*STACKS[name], way=way))
    if name != "fused in part":
        assert second.later("upload") == []


@pytest.mark.parametrize("kind", ["controlnet", "adapter"])
def test_with_native_controls_in_native_nodes(host: Host, second: SecondHost, kind: str):
    def case(host: Host) -> Run:
        first = apply(host, "ControlNetApplyAdvanced", host.scene("sdxl"), ours(host, kind), picture(1))
        native = host.load("sdxl_pose", native=True)
        return host.sample(apply(host, "ControlNetApplyAdvanced", first, native, picture(2)), **SAMPLER)

    same(host, second, case)


def test_shuffle_and_other_guiders(host: Host, second: SecondHost):
    def case(host: Host) -> Run:
        shuffle = host.load("sdxl_depth", control_type="shuffle")
        scene = apply(host, "ApplyControl", host.scene("sdxl"), shuffle, picture(1))
        more = {"positive": scene.positive, "negative": scene.negative, "cond2": host.scene("sdxl").negative}
        guided = {"cond1": more.pop("positive"), "cfg_conds": 3.0, "cfg_cond2_negative": 2.0, **more}
        return host.sample_guided(scene.model, "DualCFGGuider", steps=2, **guided)

    same(host, second, case)


# -- pieces ------------------------------------------------------------------------------------------------------------

FRAMES: dict[str, Any] = {"latent_image": latent(4), "steps": 3}
MASKS = torch.cat([HALF, 1 - HALF, HALF, torch.ones(1, 128, 128)])


@pytest.mark.parametrize("windows", ["context", "AnimateDiff"])
@pytest.mark.parametrize("kind", KINDS)
def test_windows_of_frames(host: Host, second: SecondHost, kind: str, windows: str):
    def case(host: Host) -> Run:
        options = {"mask": MASKS, "guidance": "cond_only"} if kind != "foreign" else {}
        scene = apply(host, "ApplyControl", host.scene("sdxl"), ours(host, kind), picture(1, 4), **options)
        model = host.windows(scene.model, 2, 1) if windows == "context" else animatediff(scene.model, 2, 1)
        return host.sample(replace(scene, model=model), **FRAMES)

    same(host, second, case)
    if kind != "foreign":
        assert second.later("upload") == []


@pytest.mark.parametrize("kind", KINDS)
def test_tiles(host: Host, second: SecondHost, kind: str):
    def case(host: Host) -> Run:
        options = {"mask": HALF} if kind != "foreign" else {}
        image = picture(1, 1, 256, 256)
        scene = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, kind), image, **options)
        return in_tiles(host, scene, MultiDiffusion())

    same(host, second, case)


@pytest.mark.parametrize("kind", ["controlnet", "adapter", "lllite"])
def test_a_prompt_for_an_area(host: Host, second: SecondHost, kind: str):
    def case(host: Host) -> Run:
        scene = apply(host, "ApplyControl", host.scene("sdxl"), ours(host, kind), picture(1), mask=HALF)
        area = {"width": 64, "height": 128, "x": 64, "y": 0, "strength": 1.0}
        limited = host.call("ConditioningSetArea", conditioning=scene.positive, **area)[0]
        return host.sample(replace(scene, positive=[*limited, *scene.positive]), **SAMPLER)

    same(host, second, case)
    assert second.later("upload") == []


# -- what looks on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["controlnet", "adapter", "lllite", "foreign"])
def test_a_recorded_run(host: Host, second: SecondHost, kind: str):
    reports = []

    def case(host: Host) -> Run:
        scene = apply(host, "ApplyControl", host.scene("sdxl"), ours(host, kind), picture(1), guidance="cond_only")
        model, record = host.call("RecordControl", model=scene.model)
        run = host.sample(replace(scene, model=model), **SAMPLER)
        reports.append(host.call("ControlReport", record=record, latent={"samples": run.latent}))
        return run

    same(host, second, case)
    texts = [[part for part in report if isinstance(part, str)] for report in reports]
    assert texts[0] == texts[1] and "acted at 3 of 3 sigmas" in texts[0][0]


@pytest.mark.parametrize("kind", KINDS)
def test_inspection(host: Host, second: SecondHost, kind: str):
    def case(host: Host) -> Any:
        run = host.sample(apply(host, "ApplyControl", host.scene("sdxl"), ours(host, kind), picture(1)), steps=1)
        (report,) = host.call("InspectControl", control_net=ours(host, kind), model=host.model("sdxl"))
        return replace(run, sigmas=report)

    assert case(host).sigmas == second.run(case).sigmas


# -- training and annotators -------------------------------------------------------------------------------------------


GENTLE: dict[str, Any] = {**RARER, "connections": "gaussian"}
"""With small steps, options of a training in which rounding stays rounding: AdamW makes a whole step of a gradient that
is 0 but for it. In steps of 1e-3, 1e-7 of the weights is 2e-3 of the fourth loss."""


@pytest.mark.parametrize(("kind", "more"), [("controlnet", {}), ("control_lora", {"ema": 0.9, "accumulation": 2})])
def test_the_training_node(host: Host, tmp_path: Path, kind: str, more: dict[str, Any]):
    """Dataset, text and VAE included: the losses of the CPU."""
    import folder_paths
    from tiny_models import tiny_model

    def losses_in(folder: Path) -> list[float]:
        widgets = {**WIDGETS, "kind": kind, "learning_rate": 2e-6}
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(folder_paths.folder_names_and_paths, "controlnet", ([str(folder)], {".safetensors"}))
            patch.setattr(folder_paths, "output_directory", str(folder))
            _, clip, vae = host.call("LoadLabModel")
            data = cached(folder / "data", clip, vae)
            given = {"model": tiny_model("sd15", channel_mult=[1, 1, 1, 1]), "clip": clip, "vae": vae, "dataset": data}
            host.call("TrainControlNet", **given, name="mine", options={**GENTLE, **more}, **widgets)
        return [float(line.split()[1]) for line in losses(folder / "zeroconv" / "training" / "mine")]

    expected = losses_in(tmp_path / "cpu")
    with believed(), transfers() as moves:
        found = losses_in(tmp_path / "second")
    assert len(moves) > 100
    assert found == pytest.approx(expected, rel=1e-4) and len(found) == 4


PROGRAMS = {network.name for network in NETWORKS if any(file.program for file in network.files)}
MOVED = [annotator for annotator in LEARNED if not PROGRAMS & set(annotator.networks)]
"""TorchScript holds tensors of torch's own and takes none of this device."""


@pytest.mark.parametrize("annotator", MOVED, ids=[annotator.name for annotator in MOVED])
def test_annotators(annotator: Annotator, bench: Bench, photograph: torch.Tensor):  # noqa: F811 - the fixtures
    """What learned annotators see with their networks there: the hint of the CPU, to a grey level."""
    bench.publish(annotator.networks)
    expected, poses = bench.run(annotator.name, photograph)
    bench.forget()
    with believed(), transfers() as moves:
        hint, found = bench.run(annotator.name, photograph)
        bench.forget()
    assert len(moves) > 10
    assert (hint - expected).abs().max() <= 1 / 255 + 1e-6
    assert [len(frame["people"]) for frame in found] == [len(frame["people"]) for frame in poses]


# -- a mistake of each kind --------------------------------------------------------------------------------------------


def test_it_would_see_a_mistake(host: Host, second: SecondHost, monkeypatch: pytest.MonkeyPatch):
    """A tensor left on the CPU raises, and one that is moved at every call is heard; without, control acts."""
    from zeroconv.nodes.host.networks import ControlNetControl

    right = ControlNetControl._moved
    monkeypatch.setattr(ControlNetControl, "_moved", lambda control, text, place: text)
    with pytest.raises(RuntimeError, match="tensors of two devices"):
        second.run(dosed("controlnet"))

    def forgetful(control: ControlNetControl, text: torch.Tensor, place: dict[str, Any]) -> torch.Tensor:
        control._texts.clear()
        return right(control, text, place)

    monkeypatch.setattr(ControlNetControl, "_moved", forgetful)
    second.run(dosed("controlnet"))
    assert len(second.later("upload")) == 2 * 2  # text and vector, at two of three steps
    monkeypatch.setattr(ControlNetControl, "_moved", right)
    run = same(host, second, dosed("controlnet"))
    assert second.later("upload") == []
    assert moved(run, host.sample(host.scene("sdxl"), **SAMPLER)) >= 0.01
