"""Controls as graphs beside the UNet, with a stand-in for CUDA: the same pictures to the bit, and every reason not to.

No GPU runs these: `standin.py` says what they prove.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import MOVES, Control, Run, Scene, latent, moved, picture
from standin import NotCapturable, StandIn, Tape
from torch import Tensor, nn

from .neighbours.callers import MultiDiffusion, animatediff, in_tiles
from .neighbours.controls import KINDS, apply, native, ours
from .test_integrity import ENDINGS, spoil
from .test_reuse import ask, begin, on_prompt

if TYPE_CHECKING:
    from hosting import Host

CAPTURED = ("controlnet", "union", "lora", "lite")
"""Kinds whose networks run at every step."""


@pytest.fixture
def standin(host: Host, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Graphs switched on, on the stand-in."""
    from zeroconv.nodes.host import graphs

    backend = StandIn()
    monkeypatch.setattr(graphs, "RUNNER", graphs.Runner(backend))
    monkeypatch.setenv("ZEROCONV_GRAPHS", "auto")
    return backend


def runner() -> Any:
    """The one in use."""
    from zeroconv.nodes.host import graphs

    return graphs.RUNNER


def both(sample: Callable[[], Run], monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Run]:
    """The run with graphs, and without."""
    with monkeypatch.context() as patch:
        patch.setenv("ZEROCONV_GRAPHS", "off")
        plain = sample()
    return sample(), plain


def assert_same_bits(host: Host, sample: Callable[[], Run], standin: StandIn, patch: pytest.MonkeyPatch) -> Run:
    """Graphs run in it, and change no bit."""
    before = standin.replays
    run, plain = both(sample, patch)
    assert torch.equal(run.latent, plain.latent)
    assert run.calls("unet") == plain.calls("unet")
    assert standin.replays > before
    assert all(mark.waits for mark in standin.marks)
    return run


# -- the stand-in -----------------------------------------------------------------------------------------------------


def test_a_replay_reads_its_static_inputs_and_what_was_there_at_the_capture(host: Host):
    from zeroconv.controlnet_core.networks.residuals import Residuals

    layer, factor = nn.Linear(2, 2), [1.0]

    def function(x: Tensor) -> Residuals:
        return Residuals((layer(x) * factor[0],), None)

    with torch.no_grad():
        tape = Tape(function, [torch.zeros(1, 2)])
        x = torch.ones(1, 2)
        first = function(x).skips[0]
        assert first is not None
        factor[0] = 3.0
        weight = layer.weight
        layer.weight = nn.Parameter(torch.zeros(2, 2))
        assert torch.equal(tape.replay([x]).skips[0], first)  # type: ignore[arg-type]
        weight.mul_(2.0)
        assert not torch.equal(tape.replay([x]).skips[0], first)  # type: ignore[arg-type]


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize(
    "function", [lambda x: x * x.sum().item(), lambda x: x + torch.tensor([1.0]), lambda x: x[x > 0].sum() + x]
)
def test_what_reads_the_device_or_brings_numbers_cannot_be_captured(
    host: Host,
    function: Callable[[Tensor], Tensor],
    inference: bool,
):
    from zeroconv.controlnet_core.networks.residuals import Residuals

    with torch.inference_mode(inference), pytest.raises(NotCapturable):
        Tape(lambda x: Residuals((function(x),), None), [torch.ones(2)])


# -- the same picture -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(host: Host, standin: StandIn, kind: str, way: str, monkeypatch: pytest.MonkeyPatch):
    scene = apply(host, way, host.scene("sdxl"), ours(host, kind), picture(1))
    if kind in CAPTURED:
        run = assert_same_bits(host, lambda: host.sample(scene), standin, monkeypatch)
        assert (len(standin.tapes), standin.replays) == (1, 3)
        assert moved(run, host.once("sdxl without", lambda: host.sample(host.scene("sdxl")))) >= MOVES
    else:
        run, plain = both(lambda: host.sample(scene), monkeypatch)
        assert torch.equal(run.latent, plain.latent)
        assert standin.entered == 0


@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_every_family(host: Host, standin: StandIn, family: str, monkeypatch: pytest.MonkeyPatch):
    scene = host.apply("ApplyControl", host.scene(family), family, Control())
    assert_same_bits(host, lambda: host.sample(scene), standin, monkeypatch)


DOSES: dict[str, Callable[[Host], dict[str, Any]]] = {
    "strength": lambda _: {"strength": 0.7},
    "window": lambda _: {"unit": "step", "start": 1, "end": 5},
    "fading": lambda host: {"schedule": host.call("ControlSchedule", curve="fade out")[0]},
    "mask": lambda _: {"mask": torch.rand(1, 128, 128, generator=torch.Generator().manual_seed(1)).round()},
    "cond_only": lambda _: {"guidance": "cond_only"},
    "cfg_resolution": lambda _: {"guidance": "cfg_resolution"},
    "weights": lambda host: {"block_weights": host.call("ControlBlockWeights", preset="deep half")[0]},
    "reuse": lambda _: {"reuse": 0.5},
}


@pytest.mark.parametrize("dose", DOSES)
@pytest.mark.parametrize("kind", ["controlnet", "union"])
def test_every_dose_without_another_capture(
    host: Host, standin: StandIn, kind: str, dose: str, monkeypatch: pytest.MonkeyPatch
):
    scene = apply(host, "ApplyControl", host.scene("sdxl"), ours(host, kind), picture(1), **DOSES[dose](host))
    assert_same_bits(host, lambda: host.sample(scene, steps=6), standin, monkeypatch)
    assert len(standin.tapes) == 1


def test_shuffle(host: Host, standin: StandIn, monkeypatch: pytest.MonkeyPatch):
    control = host.load("sd15_depth", control_type="shuffle")
    (model,) = host.call("ApplyControl", model=host.model("sd15"), control_net=control, image=picture(1))
    scene = replace(host.scene(), model=model)
    assert_same_bits(host, lambda: host.sample(scene), standin, monkeypatch)


@pytest.mark.parametrize(
    "inputs", [{"sampler_name": "heun"}, {"cfg": 1.0}, {"latent_image": latent(3, 24, 16)}], ids=str
)
def test_samplers_guidance_and_batches(
    host: Host, standin: StandIn, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    scene = host.apply("ApplyControl", host.scene(), "sd15", Control(size=(3, 128, 128)))
    assert_same_bits(host, lambda: host.sample(scene, **inputs), standin, monkeypatch)


@pytest.mark.parametrize("caller", ["core windows", "AnimateDiff"])
@pytest.mark.parametrize("kind", CAPTURED)
def test_windows(host: Host, standin: StandIn, kind: str, caller: str, monkeypatch: pytest.MonkeyPatch):
    scene = apply(host, "ApplyControl", host.scene("sdxl"), ours(host, kind), picture(1, 6))
    model = animatediff(scene.model) if caller == "AnimateDiff" else host.windows(scene.model, 4, 2)
    given: dict[str, Any] = {"latent_image": latent(6), "steps": 5}
    assert_same_bits(host, lambda: host.sample(replace(scene, model=model), **given), standin, monkeypatch)
    assert len(standin.tapes) == 1, "windows of one size share a graph"


@pytest.mark.parametrize("kind", CAPTURED)
def test_tiles(host: Host, standin: StandIn, kind: str, monkeypatch: pytest.MonkeyPatch):
    scene = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, kind), picture(1, 1, 256, 256))
    assert_same_bits(host, lambda: in_tiles(host, scene, MultiDiffusion()), standin, monkeypatch)


def chain(host: Host, *kinds: str) -> Scene:
    """These controls one after the other; "native" is the host's own."""
    scene = host.scene("sdxl")
    for i, kind in enumerate(kinds):
        if kind == "native":
            control, node = native(host, "controlnet"), "ControlNetApplyAdvanced"
        else:
            control, node = ours(host, kind), "ApplyControlToPrompt"
        scene = apply(host, node, scene, control, picture(i, 1))
    return scene


@pytest.mark.parametrize(
    "kinds",
    [
        ("controlnet", "controlnet"),  # one network, so one graph that is replayed twice before the UNet reads
        ("controlnet", "union", "lora"),
        ("native", "controlnet"),
        ("controlnet", "native"),  # the host's own reads what came before by index
        ("adapter", "controlnet", "foreign"),
        ("controlnet", "adapter"),
        ("lllite", "lite", "lllite"),
    ],
    ids="-".join,
)
def test_chains(host: Host, standin: StandIn, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    scene = chain(host, *kinds)
    assert_same_bits(host, lambda: host.sample(scene), standin, monkeypatch)


def test_fused_hints(host: Host, standin: StandIn, monkeypatch: pytest.MonkeyPatch):
    from .test_union import DEPTH, POSE, entry, sample

    (schedule,) = host.call("ControlSchedule", curve="fade out")
    entries = entry(host, DEPTH, 1), entry(host, POSE, 2, schedule=schedule)
    assert_same_bits(host, lambda: sample(host, *entries), standin, monkeypatch)


# -- who reads, waits -------------------------------------------------------------------------------------------------

READERS: dict[str, Callable[[dict[str, Any]], list[Any]]] = {
    "pop": lambda given: [given["output"].pop() for _ in range(len(given["output"]))],
    "index": lambda given: [given["output"][i] for i in range(len(given["output"]))],
    "last": lambda given: [given["output"][-1], given["middle"][0]],
    "slice": lambda given: given["output"][2:],
    "loop": lambda given: [one for one in given["output"]],  # noqa: C416  (it is the loop that is tried)
    "list": lambda given: list(given["output"]),
    "reversed": lambda given: list(reversed(given["output"])),
    "copy": lambda given: given["output"].copy(),
    "sum": lambda given: given["output"] + given["middle"],
    "sum of a plain list": lambda given: [*[], *given["middle"]],
    "extended": lambda given: _extended(given["output"]),
    "unpacked": lambda given: (lambda *all_of: list(all_of))(*given["output"]),
    "copied dictionary": lambda given: dict(given)["output"][:],
    "zip": lambda given: [a for a, _ in zip(given["output"], given["output"])],
}


def _extended(given: list[Any]) -> list[Any]:
    plain: list[Any] = []
    plain.extend(given)
    return plain


def given_at_a_step(host: Host, k: int = 0) -> dict[str, Any]:
    """What a control hands out at a step, unread."""
    control, kept = begin(host, on_prompt(host, "controlnet", picture(1))), {}
    get = control.get_control

    def keep(*args: Any) -> dict[str, list[Any]]:
        kept.update(get(*args))
        return {"input": [], "output": [], "middle": []}

    control.get_control = keep
    ask(host, control, k)
    return kept


@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_waits(host: Host, standin: StandIn, reader: str, monkeypatch: pytest.MonkeyPatch):
    found = READERS[reader](given_at_a_step(host))
    monkeypatch.setenv("ZEROCONV_GRAPHS", "off")
    expected = READERS[reader](given_at_a_step(host))
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert len(standin.marks) == 1


def test_nothing_waits_before_it_is_read(host: Host, standin: StandIn):
    """The host asks what there is, and how much, before it takes the first one."""
    given = given_at_a_step(host)
    assert "output" in given and len(given["output"]) == 9 and len(given["input"]) == 0
    assert standin.marks[0].waits == 0
    given["middle"].pop()
    assert standin.marks[0].waits == 1


@pytest.mark.parametrize("ending", ENDINGS)
def test_errors_and_cancel_between_launch_and_read(
    host: Host, standin: StandIn, ending: str, monkeypatch: pytest.MonkeyPatch
):
    scene = host.apply("ApplyControl", host.scene(), "sd15", Control(), Control(file="pose"))
    spoil(host, scene, ending)
    run, plain = both(lambda: host.sample(scene), monkeypatch)
    assert torch.equal(run.latent, plain.latent)
    assert standin.replays > 0


# -- given up ---------------------------------------------------------------------------------------------------------


def _forbid(standin: StandIn, monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    standin.why = "graphs are for NVIDIA's devices"


def _novram(standin: StandIn, monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    import comfy.model_management as management

    monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)


def _offloaded(standin: StandIn, monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    network = host.load("sd15_depth").network
    says = property(lambda _: True, lambda *_: None)  # whatever the host says when it loads a model
    monkeypatch.setattr(type(network), "model_lowvram", says, raising=False)


def _elsewhere(standin: StandIn, monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    """A layer that the host has left where it was, and casts when it is called."""
    (parameter,) = [p for name, p in host.load("sd15_depth").network.named_parameters() if name == "time_embed.0.bias"]
    monkeypatch.setattr(type(parameter), "device", _Device(parameter, torch.device("meta")))


class _Device:
    """A property that says another device for one tensor."""

    def __init__(self, one: Tensor, device: torch.device):
        self.one, self.device, self.usual = one, device, torch.Tensor.device

    def __get__(self, tensor: Any, _: Any) -> Any:
        if tensor is None:
            return self
        return self.device if tensor is self.one else self.usual.__get__(tensor)  # type: ignore[attr-defined]


def _patched(standin: StandIn, monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    layer = host.load("sd15_depth").network.input_blocks[0][0]
    monkeypatch.setattr(layer, "weight_function", [lambda weight: weight])


def _moving(standin: StandIn, monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    patcher = host.load("sd15_depth").patcher
    kind = type(patcher)
    monkeypatch.setattr(patcher, "__class__", type("DynamicModelPatcher", (kind,), {}))


def _short(standin: StandIn, monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    standin.room = 0


def _small(standin: StandIn, monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    standin.size = 2**20


def _unable(standin: StandIn, monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    """Another node's attention that reads the device."""
    from comfy.ldm.modules import attention

    usual = attention.optimized_attention

    def reading(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q.flatten()[0].item()
        return usual(q, *args, **kwargs)

    monkeypatch.setattr(attention, "optimized_attention", reading)


DOUBTS: dict[str, tuple[Callable[[StandIn, pytest.MonkeyPatch, Any], None], str]] = {
    "device": (_forbid, "graphs are for NVIDIA's devices"),
    "novram": (_novram, "the host keeps no weights on the device"),
    "offloaded": (_offloaded, "its weights are partly offloaded"),
    "elsewhere": (_elsewhere, "its weights are partly offloaded"),
    "patched": (_patched, "its weights are patched while it runs"),
    "moving": (_moving, "the host moves its weights while it runs"),
    "memory": (_short, "memory is short"),
    "share": (_small, "graphs would hold more than 10% of the device's memory"),
    "capture": (_unable, "it cannot be captured (operation not permitted when stream is capturing"),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_every_doubt_is_the_plain_path_with_the_same_picture(
    host: Host, standin: StandIn, doubt: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    scene = host.apply("ApplyControl", host.scene(), "sd15", Control())
    with monkeypatch.context() as patch:
        patch.setenv("ZEROCONV_GRAPHS", "off")
        expected = host.sample(scene)
    cause, why = DOUBTS[doubt]
    caplog.set_level(logging.INFO)
    with monkeypatch.context() as patch:
        cause(standin, patch, host)
        run = host.sample(scene)
    assert torch.equal(run.latent, expected.latent)
    assert standin.replays == 0
    said = [record.getMessage() for record in caplog.records if "runs without a graph" in record.getMessage()]
    assert len(said) == 1, "once, not at every step"
    assert said[0].startswith(f"sd15_depth.safetensors runs without a graph: {why}")
    assert runner().nbytes() == 0


def test_under_a_compiled_model(host: Host, standin: StandIn, monkeypatch: pytest.MonkeyPatch):
    from comfy.patcher_extension import WrappersMP

    scene = host.apply("ApplyControl", host.scene(), "sd15", Control())
    compiled = scene.model.clone()
    compiled.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "torch.compile", lambda executor, *a, **k: executor(*a, **k))
    run, plain = both(lambda: host.sample(replace(scene, model=compiled)), monkeypatch)
    assert torch.equal(run.latent, plain.latent)
    assert standin.entered == 0


def test_where_gradients_are_wanted(host: Host, standin: StandIn):
    control = begin(host, on_prompt(host, "controlnet", picture(1)))
    with torch.inference_mode():
        assert runner()._doubt(torch.device("cpu"), {}) is None
    assert runner()._doubt(torch.device("cpu"), {}) == "gradients are wanted"
    control.cleanup()


def test_a_recorded_run_is_plain(host: Host, standin: StandIn, monkeypatch: pytest.MonkeyPatch):
    scene = host.apply("ApplyControl", host.scene(), "sd15", Control())
    model, record = host.call("RecordControl", model=scene.model)
    runs = both(lambda: host.sample(replace(scene, model=model)), monkeypatch)
    assert torch.equal(runs[0].latent, runs[1].latent)
    assert standin.entered == 0
    assert record.panels


def test_it_is_off_unless_it_is_switched_on(host: Host, standin: StandIn, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ZEROCONV_GRAPHS")
    host.sample(host.apply("ApplyControl", host.scene(), "sd15", Control()))
    assert standin.entered == 0


def test_another_value_of_the_switch_is_refused(host: Host, standin: StandIn, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ZEROCONV_GRAPHS", "on")
    says = "ZEROCONV_GRAPHS is 'on'; it is off or auto: unset it or choose one of these"
    with pytest.raises(Exception, match=says):
        host.sample(host.apply("ApplyControl", host.scene(), "sd15", Control()))


def test_without_the_stand_in_a_cpu_is_plain(host: Host, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ZEROCONV_GRAPHS", "auto")
    assert runner().backend.refuses(torch.device("cpu")) == "graphs are for NVIDIA's devices"
    scene = host.apply("ApplyControl", host.scene(), "sd15", Control())
    run, plain = both(lambda: host.sample(scene), monkeypatch)
    assert torch.equal(run.latent, plain.latent)
    assert not runner().held


# -- weights that move ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def moved_aside(network: nn.Module) -> list[Tensor]:
    """Every weight at another place; what was there, spoilt. Gives the old ones, so that no place is used again."""
    old = []
    for parameter in network.parameters():
        value = parameter.data
        parameter.data = value.clone()
        value.fill_(torch.nan)
        old.append(value)
    return old


@torch.inference_mode()
def evicted(control: Any) -> None:
    """The host takes the network off the device, as for another model that needs the memory."""
    control.patcher.detach()


def test_weights_that_have_moved_are_captured_anew(host: Host, standin: StandIn, monkeypatch: pytest.MonkeyPatch):
    scene = host.apply("ApplyControl", host.scene(), "sd15", Control())
    first = assert_same_bits(host, lambda: host.sample(scene), standin, monkeypatch)
    spoilt = moved_aside(host.load("sd15_depth").network)
    second = assert_same_bits(host, lambda: host.sample(scene), standin, monkeypatch)
    assert torch.equal(first.latent, second.latent) and len(standin.tapes) == 2
    assert len(runner().held) == 1, "the old one is gone"
    del spoilt


def test_weights_that_move_in_a_run_are_captured_anew(host: Host, standin: StandIn):
    """The host frees memory for something else between two steps, and loads them again."""
    scene = host.apply("ApplyControl", host.scene(), "sd15", Control())
    expected = host.sample(scene)
    control = host.load("sd15_depth")
    spoilt: list[Tensor] = []

    def move(call: int) -> None:
        if call == 3:
            evicted(control)
            spoilt.extend(moved_aside(control.network))

    run = host.sample(scene, before_unet=move)
    assert torch.equal(run.latent, expected.latent)


def test_a_network_that_is_evicted_lets_its_graphs_go_at_once(host: Host, standin: StandIn):
    host.sample(host.apply("ApplyControl", host.scene(), "sd15", Control(), Control(file="pose")))
    assert len(runner().held) == 2 and runner().nbytes() > 0
    evicted(host.load("sd15_pose"))
    assert [held.network() for held in runner().held.values()] == [host.load("sd15_depth").network]
    evicted(host.load("sd15_depth"))
    assert runner().nbytes() == 0


def test_graphs_go_with_their_network(host: Host, standin: StandIn):
    host.write("sd15_going", host.state("sd15_depth"))
    (control,) = host.call("LoadControlNet", control_net_name="sd15_going.safetensors")
    (model,) = host.call("ApplyControl", model=host.model("sd15"), control_net=control, image=picture(1))
    host.sample(replace(host.scene(), model=model))
    host._kept.clear()
    assert len(runner().held) == 1
    network = weakref.ref(control.network)
    del control, model
    standin.tapes.clear()
    gc.collect()
    assert network() is None, "a graph keeps no network alive"
    assert not runner().held


def test_a_control_lora_keeps_none_of_a_run(host: Host, standin: StandIn, monkeypatch: pytest.MonkeyPatch):
    """It borrows another model's layers in the next one."""
    for family_model in (host.model("sdxl"), host.another_model("sdxl"), host.model("sdxl")):
        scene = replace(host.scene("sdxl"), model=family_model)
        scene = apply(host, "ApplyControl", scene, ours(host, "lora"), picture(1))
        assert_same_bits(host, lambda scene=scene: host.sample(scene), standin, monkeypatch)
        assert not runner().held


def test_the_share_of_memory_is_kept(host: Host, standin: StandIn, monkeypatch: pytest.MonkeyPatch):
    """A new run's graphs push out those of earlier ones, and are given up where the run's own fill the share."""
    scene = host.apply("ApplyControl", host.scene(), "sd15", Control())
    host.sample(scene)
    one = runner().nbytes()
    standin.size = 25 * one  # of which graphs get 2.5 times one
    for batch in (1, 2, 1, 2):
        assert_same_bits(host, lambda batch=batch: host.sample(scene, latent_image=latent(batch)), standin, monkeypatch)
        assert 0 < runner().nbytes() <= 2.5 * one
    stacked = host.apply("ApplyControl", scene, "sd15", Control(file="pose"), Control(file="zero"))
    assert_same_bits(host, lambda: host.sample(stacked), standin, monkeypatch)
    assert runner().nbytes() <= 2.5 * one


@pytest.mark.slow
def test_200_prompts_that_switch_everything_do_not_grow(host: Host, standin: StandIn):
    """Models, controls, kinds, sizes, batches and low memory in turns."""
    scenes = [
        apply(host, "ApplyControl", replace(host.scene("sdxl"), model=model), ours(host, kind), picture(1))
        for model in (host.model("sdxl"), host.another_model("sdxl"))
        for kind in CAPTURED
    ]
    sizes = [(1, 8, 8), (1, 16, 8), (2, 8, 8), (1, 8, 16), (3, 8, 8)]
    counts = []
    for i in range(200):
        standin.room = 0 if i % 7 == 6 else 8 * 2**30
        if i % 11 == 10:
            evicted(ours(host, CAPTURED[i % 4]))
        host.sample(scenes[i % len(scenes)], latent_image=latent(*sizes[i % len(sizes)]), steps=3)
        host._kept.clear()
        standin.tapes.clear()
        standin.marks.clear()
        if i % 40 == 39:
            gc.collect()
            counts.append(sum(isinstance(one, Tensor) for one in gc.get_objects()))
        assert len(runner().held) <= 32
    assert max(counts[2:]) <= 1.02 * max(counts[:2])
