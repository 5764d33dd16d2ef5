"""CONTROL_NET_STACK in the dialects of other packs, switched off, soft, by file name, and ours in theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from graphs import MOVES, Scene, assert_same, moved, off_by, picture

from .controls import WAYS, apply

if TYPE_CHECKING:
    from hosting import Host

HINT = picture(1)


def with_stack(host: Host, way: str, stack: Any, family: str = "sd15") -> Scene:
    """A scene whose controls are those of a stack alone."""
    scene = host.scene(family)
    if way == "ApplyControl":
        return replace(scene, model=host.call(way, model=scene.model, stack=stack)[0])
    positive, negative = host.call(way, positive=scene.positive, negative=scene.negative, stack=stack)
    return replace(scene, positive=positive, negative=negative)


def easy_use(host: Host, image: Any = HINT, soft: float = 1.0, strength: float = 1.0, family: str = "sd15") -> tuple:
    """An entry as Easy-Use's stacker makes it."""
    host.load(f"{family}_depth")
    return (f"{family}_depth.safetensors", strength, 0.0, 1.0, soft, image, True)


def comfyroll(stack: list | None, entry: tuple) -> list:
    """Comfyroll's stacker: a new list, entries that are called None left out."""
    return [one for one in stack or [] if one[0] != "None"] + [entry]


def efficiency(stack: list | None, entry: tuple) -> list:
    """Efficiency's stacker: the list that came in, longer."""
    stack = [] if stack is None else stack
    stack.extend([entry])
    return stack


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "stack", [[], (), None, [("None", HINT, 1.0, 0.0, 1.0)]], ids=["[]", "()", "None", "None in it"]
)
def test_a_stack_that_is_switched_off_passes_through(host: Host, stack: Any, way: str):
    without = host.once("without", lambda: host.sample(host.scene()))
    assert off_by(host.sample(with_stack(host, way, stack)), without) == 0


@pytest.mark.parametrize("stack", [[], None], ids=str)
def test_the_control_beside_a_stack_that_is_switched_off(host: Host, stack: Any):
    control = {"control_net": host.load("sd15_depth"), "image": HINT}
    alone = host.sample(replace(host.scene(), model=host.call("ApplyControl", model=host.model("sd15"), **control)[0]))
    (model,) = host.call("ApplyControl", model=host.model("sd15"), stack=stack, **control)
    assert off_by(host.sample(replace(host.scene(), model=model)), alone) == 0
    (made,) = host.call("StackControls", stack=stack, **control)
    assert len(made) == 1 and made is not stack


@pytest.mark.parametrize("way", WAYS)
def test_nothing_connected_at_all_is_still_refused(host: Host, way: str):
    scene = host.scene()
    given = (
        {"model": scene.model} if way == "ApplyControl" else {"positive": scene.positive, "negative": scene.negative}
    )
    with pytest.raises(Exception, match="nothing to apply: connect a control_net with its image, or a stack"):
        host.call(way, **given)


@pytest.mark.parametrize("way", WAYS)
def test_an_entry_without_an_image_is_refused_in_a_sentence(host: Host, way: str):
    for entry in (easy_use(host, image=None), (host.load("sd15_depth"), None, 1.0, 0.0, 1.0)):
        with pytest.raises(Exception, match="entry 0 of the control_net stack has no image: connect the hint"):
            with_stack(host, way, [entry])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("soft", [0.5, 0.825])
def test_easy_uses_soft_weight_is_a_falloff(host: Host, soft: float, family: str):
    """Skip i of n by soft^(n - i) and the middle by 1, as Advanced-ControlNet's scaled soft weights are."""
    (weights,) = host.call("ControlBlockWeights", preset="soft", falloff=soft)
    scene = host.scene(family)
    expected = host.sample(
        apply(host, "ApplyControl", scene, host.load(f"{family}_depth"), HINT, block_weights=weights)
    )
    run = host.sample(with_stack(host, "ApplyControl", [easy_use(host, soft=soft, family=family)], family))
    assert_same(run, expected, host.sample(scene))
    full = host.sample(with_stack(host, "ApplyControl", [easy_use(host, family=family)], family))
    assert moved(run, full) >= 0.01


def test_comfyroll_may_name_the_file(host: Host):
    host.load("sd15_depth")
    run = host.sample(with_stack(host, "ApplyControl", [("sd15_depth.safetensors", HINT, 0.7, 0.0, 0.8)]))
    expected = with_stack(host, "ApplyControl", [(host.load("sd15_depth"), HINT, 0.7, 0.0, 0.8)])
    assert off_by(run, host.sample(expected)) == 0


@pytest.mark.parametrize("stacker", [comfyroll, efficiency])
def test_other_stackers_go_on_with_ours(host: Host, stacker: Any):
    """Two entries, one of ours with a mask and one of theirs, in our node: as two of our nodes one after the other."""
    import torch

    mask = torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1
    given = {"control_net": host.load("sd15_depth"), "image": HINT}
    (first,) = host.call("StackControls", **given, mask=mask)
    kept = list(first)
    stack = stacker(first, (host.load("sd15_pose", native=True), picture(2), 0.5, 0.0, 1.0))
    run = host.sample(with_stack(host, "ApplyControl", stack))
    scene = apply(host, "ApplyControl", host.scene(), given["control_net"], HINT, mask=mask)
    scene = apply(host, "ApplyControl", scene, host.load("sd15_pose"), picture(2), strength=0.5)
    expected = host.sample(scene)
    assert off_by(run, expected) <= 1e-4
    assert moved(run, host.sample(host.scene())) >= MOVES
    assert stack[:1] == kept and [len(entry) for entry in stack] == [5, 5]


@pytest.mark.parametrize("node", ["StackControls", "ApplyControl"])
def test_a_stack_that_comes_in_stays_as_it_is(host: Host, node: str):
    """A cached list that grew at every run would apply its controls twice."""
    given = {"control_net": host.load("sd15_depth"), "image": HINT}
    for stack in ([easy_use(host)], [(host.load("sd15_pose"), picture(2), 1.0, 0.0, 1.0)], []):
        before = list(stack)
        inputs = given if node == "StackControls" else {"model": host.model("sd15"), **given}
        (made,) = host.call(node, stack=stack, **inputs)
        assert stack == before and made is not stack


def test_an_empty_stack_of_ours_in_other_packs(host: Host):
    """What they do with it is to go over it: a list, whatever was switched off before it."""
    (made,) = host.call("StackControls", control_net=host.load("sd15_depth"), image=HINT, strength=0.0)
    assert type(made) is list
    for entry in made:
        _control_net, _image, strength, start, end = entry
        assert (strength, start, end) == (0.0, 0.0, 1.0)
