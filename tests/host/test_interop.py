"""CONTROL_NET and CONTROL_NET_STACK go both ways: ours through the host's nodes, and the host's through ours."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import STEPS, WAYS, Control, Run, Scene, assert_same, off_by, picture

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
