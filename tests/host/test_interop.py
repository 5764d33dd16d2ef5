"""CONTROL_NET and CONTROL_NET_STACK go both ways: ours through the host's nodes, and the host's through ours."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import MOVES, STEPS, WAYS, Control, Run, Scene, assert_same, latent, off_by, picture

if TYPE_CHECKING:
    from hosting import Host

TWO = (Control(strength=0.7, end=0.8), Control("pose", hint=2, strength=0.8, start=0.2))
FAMILIES = ["sd15", "sd21", "sdxl"]


def reference(host: Host, family: str = "sd15") -> tuple[Run, Run]:
    """The native graph of two controls, and the graph without."""
    native = host.once(("interop", family), lambda: host.sample(host.native(host.scene(family), family, *TWO)))
    return native, host.once(("interop", family, "without"), lambda: host.sample(host.scene(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_our_control_net_in_the_hosts_apply_node(host: Host, family: str):
    run = host.sample(host.native(host.scene(family), family, *TWO, own=True))
    assert_same(run, *reference(host, family))


def test_our_control_net_in_the_hosts_deprecated_apply_node(host: Host):
    def graph(native: bool) -> Scene:
        start = host.scene()
        (positive,) = host.call(
            "ControlNetApply",
            conditioning=start.positive,
            control_net=host.load("sd15_depth", native=native),
            image=picture(1),
            strength=0.6,
        )
        return replace(start, positive=positive)

    assert_same(host.sample(graph(native=False)), host.sample(graph(native=True)), reference(host)[1])


def test_our_control_net_chained_with_a_native_one_in_native_nodes(host: Host):
    first, second = TWO
    scene = host.native(host.native(host.scene(), "sd15", first, own=True), "sd15", second)
    assert_same(host.sample(scene), *reference(host))
    scene = host.native(host.native(host.scene(), "sd15", first), "sd15", second, own=True)
    assert_same(host.sample(scene), *reference(host))


@pytest.mark.parametrize(
    ("family", "way"), [*(("sd15", way) for way in WAYS), ("sd21", "ApplyControl"), ("sdxl", "StackControlsToPrompt")]
)
def test_the_hosts_control_net_in_our_nodes(host: Host, family: str, way: str):
    run = host.sample(host.apply(way, host.scene(family), family, *TWO, foreign=True))
    assert_same(run, *reference(host, family))


def test_the_hosts_control_net_takes_our_window_in_steps(host: Host):
    """Wrapped, its residuals are dosed like our own."""
    control = Control(start=1, end=3, options={"unit": "step"})
    wrapped = host.sample(host.apply("ApplyControl", host.scene(), "sd15", control, foreign=True))
    own = host.sample(host.apply("ApplyControl", host.scene(), "sd15", control))
    assert_same(wrapped, own, reference(host)[1])
    assert wrapped.count("control") == 2


def test_the_hosts_control_net_is_not_changed_by_ours(host: Host):
    """The object from the host's loader is one that other nodes hold too."""
    control = host.load("sd15_depth", native=True)
    before = {name: id(value) for name, value in vars(control).items()}
    host.sample(host.apply("ApplyControl", host.scene(), "sd15", Control(strength=0.3), foreign=True))
    assert {name: id(value) for name, value in vars(control).items()} == before
    native = host.sample(host.native(host.scene(), "sd15", *TWO))
    assert torch.equal(native.latent, reference(host)[0].latent)


# -- CONTROL_NET_STACK -----------------------------------------------------------------------------------------------


def unpacked(host: Host, stack: list) -> Scene:
    """The stack as other packs apply it: five values each, into the host's own node."""
    scene = host.scene()
    positive, negative = scene.positive, scene.negative
    for control_net, image, strength, start_percent, end_percent in stack:
        positive, negative = host.call(
            "ControlNetApplyAdvanced",
            positive=positive,
            negative=negative,
            control_net=control_net,
            image=image,
            strength=strength,
            start_percent=start_percent,
            end_percent=end_percent,
        )
    return replace(scene, positive=positive, negative=negative)


def test_a_stack_is_a_plain_list_of_plain_five_tuples(host: Host):
    stack = host.stack("sd15", *TWO)
    assert type(stack) is list
    assert [type(entry) for entry in stack] == [tuple, tuple]
    assert [len(entry) for entry in stack] == [5, 5]
    for (control_net, image, *numbers), control in zip(stack, TWO, strict=True):
        assert callable(control_net.copy)
        assert torch.equal(image, control.image)
        assert numbers == [control.strength, control.start, control.end]


def test_the_incoming_stack_is_not_changed(host: Host):
    first = host.stack("sd15", TWO[0])
    entries = [id(part) for entry in first for part in entry]
    (second,) = host.call("StackControls", stack=first, **host.inputs(TWO[1], "sd15"))
    assert second is not first
    assert len(second) == 2
    assert second[0] == first[0] or [id(part) for part in second[0]] == entries
    host.call("ApplyControl", model=host.model("sd15"), stack=second)
    assert len(first) == 1
    assert [id(part) for entry in first for part in entry] == entries


def test_stacking_does_not_change_the_control_net(host: Host):
    """The loader's object is shared: what rides on the stack's copy is not on it."""
    control = host.load("sd15_depth")
    host.stack("sd15", Control(strength=0.1, options={"guidance": "cond_only", "mask": torch.zeros(1, 128, 128)}))
    scene = host.native(host.scene(), "sd15", *TWO, own=True)
    assert control is host.load("sd15_depth")
    assert_same(host.sample(scene), *reference(host))


def test_our_stack_unpacked_by_another_pack(host: Host):
    assert_same(host.sample(unpacked(host, host.stack("sd15", *TWO))), *reference(host))


@pytest.mark.parametrize(
    "options",
    [
        {"mask": torch.cat([torch.ones(1, 128, 64), torch.zeros(1, 128, 64)], dim=2)},
        {"guidance": "cond_only"},
        {"unit": "step", "start": 1, "end": 3},
    ],
    ids=["mask", "guidance", "steps"],
)
def test_what_foreign_tuples_have_no_room_for_rides_along(host: Host, options: dict[str, Any]):
    control = Control(options=options)
    ours = host.sample(host.apply("ApplyControl", host.scene(), "sd15", control))
    plain = host.sample(host.apply("ApplyControl", host.scene(), "sd15", Control()))
    assert off_by(ours, plain) > 0.01
    run = host.sample(unpacked(host, host.stack("sd15", control)))
    assert off_by(run, ours) <= 1e-5
    assert run.calls("control") == ours.calls("control")


@pytest.mark.parametrize("node", ["ApplyControl", "ApplyControlToPrompt"])
@pytest.mark.parametrize("native", [False, True], ids=["our nets", "the host's nets"])
def test_a_stack_of_another_pack_in_our_nodes(host: Host, native: bool, node: str):
    """Five-tuples as Comfyroll and Efficiency make them."""
    stack = [(host.load(f"sd15_{c.file}", native=native), c.image, c.strength, c.start, c.end) for c in TWO]
    assert_same(host.sample(with_stack(host, node, stack)), *reference(host))
    assert len(stack) == 2


def with_stack(host: Host, node: str, stack: list) -> Scene:
    scene = host.scene()
    if node == "ApplyControl":
        return replace(scene, model=host.call(node, model=scene.model, stack=stack)[0])
    positive, negative = host.call(node, positive=scene.positive, negative=scene.negative, stack=stack)
    return replace(scene, positive=positive, negative=negative)


@pytest.mark.parametrize("node", ["ApplyControl", "ApplyControlToPrompt"])
def test_easy_use_seven_tuples_are_accepted(host: Host, node: str):
    """(file name, strength, start, end, soft weights, image, True): the name is loaded from the controlnet folder."""
    for control in TWO:
        host.load(f"sd15_{control.file}")
    stack = [(f"sd15_{c.file}.safetensors", c.strength, c.start, c.end, 1.0, c.image, True) for c in TWO]
    run = host.sample(with_stack(host, node, stack))
    native, without = reference(host)
    assert off_by(run, native) <= 1e-4
    assert run.calls("unet") == native.calls("unet")
    assert off_by(native, without) > 0.01


def test_a_foreign_stack_goes_on_through_our_stack_node(host: Host):
    """Ours behind another pack's, our own format out."""
    first, second = TWO
    host.load("sd15_depth")
    foreign = [("sd15_depth.safetensors", first.strength, first.start, first.end, 1.0, first.image, True)]
    (stack,) = host.call("StackControls", stack=foreign, **host.inputs(second, "sd15"))
    assert [len(entry) for entry in stack] == [5, 5]
    assert len(foreign[0]) == 7
    run = host.sample(unpacked(host, stack))
    assert off_by(run, reference(host)[0]) <= 1e-4


@pytest.mark.parametrize("entry", [(1, 2, 3), "depth", None], ids=str)
def test_a_stack_of_something_else_is_refused(host: Host, entry: Any):
    with pytest.raises(Exception, match=r"(?i)stack"):
        host.call("ApplyControl", model=host.model("sd15"), stack=[entry])


def test_the_hosts_nodes_find_what_they_call_on_a_control_net(host: Host):
    """The attributes and methods that native nodes and other packs use."""
    control = host.load("sd15_depth")
    for method in (
        "copy",
        "set_cond_hint",
        "set_previous_controlnet",
        "set_extra_arg",
        "get_models",
        "get_control",
        "pre_run",
        "cleanup",
        "get_extra_hooks",
        "inference_memory_requirements",
    ):
        assert callable(getattr(control, method)), method
    for attribute in (
        "strength",
        "timestep_percent_range",
        "timestep_range",
        "previous_controlnet",
        "cond_hint_original",
        "extra_concat_orig",
        "global_average_pooling",
        "latent_format",
        "vae",
    ):
        assert hasattr(control, attribute), attribute
    assert control.get_extra_hooks() == []


def test_a_set_hint_returns_the_control_itself(host: Host):
    """As the native nodes chain the calls."""
    control = host.load("sd15_depth").copy()
    assert control.set_cond_hint(picture(1).movedim(-1, 1), 0.5, (0.1, 0.9)) is control
    assert control.strength == 0.5
    assert control.timestep_percent_range == (0.1, 0.9)
    assert host.load("sd15_depth").strength == 1.0


def test_a_run_has_as_many_control_passes_as_steps(host: Host):
    """cond and uncond go through the ControlNet together, as through the native one."""
    run = host.sample(host.apply("ApplyControl", host.scene(), "sd15", Control()))
    native = host.sample(host.native(host.scene(), "sd15", Control()))
    assert run.calls("control") == native.calls("control")
    assert run.count("control") == STEPS


# -- controls of other loaders, dosed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
def test_a_foreign_control_gets_the_hints_of_its_context_window(host: Host, way: str):
    """As our own does, which test_formulas.py compares with each frame's hint by itself."""
    hints = torch.cat([Control(hint=1).image.repeat(3, 1, 1, 1), Control(hint=2).image.repeat(3, 1, 1, 1)])
    frames: dict[str, Any] = {"latent_image": latent(6), "steps": 5}

    def run(foreign: bool) -> Run:
        scene = host.apply(way, host.scene(), "sd15", Control(options={"image": hints}), foreign=foreign)
        return host.sample(replace(scene, model=host.windows(scene.model, 4, 2)), **frames)

    assert off_by(run(foreign=True), run(foreign=False)) <= 1e-4


def seen_by_inner(host: Host, monkeypatch: pytest.MonkeyPatch, result: Any) -> list[tuple[int, Any]]:
    """What a control of the host's loader is told in a cond_only run: samples and `cond_or_uncond` of each call."""
    import comfy.controlnet

    seen = []
    whole = comfy.controlnet.ControlNet.get_control

    def get_control(self: Any, x: Any, t: Any, cond: Any, batched_number: int, options: dict) -> Any:
        seen.append((x.shape[0], options["cond_or_uncond"], batched_number, len(options["uuids"])))
        return result(whole(self, x, t, cond, batched_number, options))

    monkeypatch.setattr(comfy.controlnet.ControlNet, "get_control", get_control)
    control = Control(options={"guidance": "cond_only"})
    host.sample(host.apply("ApplyControl", host.scene(), "sd15", control, foreign=True))
    return seen


def test_a_foreign_control_is_told_of_the_conds_it_acts_on(host: Host, monkeypatch: pytest.MonkeyPatch):
    assert seen_by_inner(host, monkeypatch, lambda control: control) == [(1, [0], 1, 1)] * STEPS


def test_a_foreign_control_without_residuals_is_refused(host: Host, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        Exception, match="hands out no residuals here, so that they cannot be dosed: use the apply node"
    ):
        seen_by_inner(host, monkeypatch, lambda control: None)


def test_a_foreign_control_that_acts_through_hooks_needs_prompts(host: Host):
    import comfy.hooks
    from comfy.patcher_extension import WrappersMP

    ran = []

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        ran.append(1)
        return executor(*args, **kwargs)

    native = host.load("sd15_depth", native=True).copy()
    native.extra_hooks = comfy.hooks.HookGroup()
    native.extra_hooks.add(
        comfy.hooks.TransformerOptionsHook({"wrappers": {WrappersMP.CALC_COND_BATCH: {"x": [wrapper]}}})
    )
    scene, inputs = host.scene(), {"control_net": native, "image": picture(1)}
    with pytest.raises(Exception, match="acts through hooks, .* use Apply ControlNet to Prompt"):
        host.call("ApplyControl", model=scene.model, **inputs)
    positive, negative = host.call("ApplyControlToPrompt", positive=scene.positive, negative=scene.negative, **inputs)
    host.sample(replace(scene, positive=positive, negative=negative))
    assert len(ran) == STEPS


# -- every kind of control in the host's own nodes --------------------------------------------------------------------

KINDS = ("union", "lora", "adapter", "lllite", "lite")


def made(host: Host, kind: str) -> Any:
    """A CONTROL_NET of this kind for the tiny SDXL model."""
    from tiny_kinds import adapter_state, lite_state, lora_state, union_state

    from .test_lllite import file_for, published

    make = {
        "union": union_state,
        "lora": lambda: lora_state("sdxl"),
        "adapter": lambda: adapter_state("sdxl"),
        "lite": lambda: lite_state("sdxl"),
        "lllite": lambda: file_for(host.model("sdxl").model.diffusion_model, published),
    }[kind]
    control = host.load_made(f"sdxl_kind_{kind}", make)
    if kind == "union":
        (control,) = host.call("SetUnionControlNetType", control_net=control, type="depth")
    return control


def by_native_nodes(host: Host, *controls: tuple[Any, int]) -> Scene:
    scene = host.scene("sdxl")
    for control, hint in controls:
        positive, negative = host.call(
            "ControlNetApplyAdvanced",
            positive=scene.positive,
            negative=scene.negative,
            control_net=control,
            image=picture(hint),
            strength=0.7,
            start_percent=0.0,
            end_percent=0.8,
        )
        scene = replace(scene, positive=positive, negative=negative)
    return scene


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_the_hosts_apply_node_before_and_after_a_native_control(host: Host, kind: str):
    ours, native = made(host, kind), host.load("sdxl_depth", native=True)
    alone = host.sample(by_native_nodes(host, (ours, 1)))
    without = host.sample(host.scene("sdxl"))
    scene = host.scene("sdxl")
    (model,) = host.call("ApplyControl", model=scene.model, control_net=ours, image=picture(1), strength=0.7, end=0.8)
    assert_same(host.sample(replace(scene, model=model)), alone, without)
    both = host.sample(by_native_nodes(host, (ours, 1), (native, 2)))
    assert off_by(host.sample(by_native_nodes(host, (native, 2), (ours, 1))), both) <= 1e-4
    assert off_by(both, alone) >= 1e-3 and both.calls("unet") == without.calls("unet")


@pytest.mark.parametrize("kind", ["lora", "adapter", "lllite", "lite"])
def test_every_kind_takes_its_own_frames_hints_in_context_windows(host: Host, kind: str):
    """A Union is left out: its authors let the pictures of a batch see each other's hints."""
    control = made(host, kind)
    frames: dict[str, Any] = {"latent_image": latent(6), "steps": 5}

    def run(image: torch.Tensor) -> torch.Tensor:
        scene = host.scene("sdxl")
        (model,) = host.call("ApplyControl", model=scene.model, control_net=control, image=image)
        return host.sample(replace(scene, model=host.windows(model, 4, 2)), **frames).latent

    first, second = run(picture(1)), run(picture(2))
    mixed = run(torch.cat([picture(1).repeat(3, 1, 1, 1), picture(2).repeat(3, 1, 1, 1)]))
    largest = first.abs().max()
    assert (first - second).norm() >= MOVES * first.norm()
    assert (mixed[:3] - first[:3]).abs().max() <= 1e-4 * largest
    assert (mixed[3:] - second[3:]).abs().max() <= 1e-4 * largest
