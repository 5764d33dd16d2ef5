"""The host's model comes out of a sampling as it went in, whatever happens, and the next prompt is right."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import STEPS, WAYS, Control, Run, Scene, assert_same, latent, prompt

if TYPE_CHECKING:
    from hosting import Host


class Broken(Exception):
    """What the tests raise in mid-sampling."""


def fail_at_step_two(call: int) -> None:
    if call == 2:
        raise Broken


def cancel_at_step_two(call: int) -> None:
    import comfy.model_management

    if call == 2:
        comfy.model_management.interrupt_current_processing(True)


def spoil(host: Host, scene: Scene, ending: str) -> None:
    """A sampling that ends well, in an exception or by Cancel; never past its second step in the last two."""
    import comfy.model_management

    if ending == "success":
        host.sample(scene)
    elif ending == "exception":
        with pytest.raises(Broken):
            host.sample(scene, before_unet=fail_at_step_two)
        assert host.unet_calls == 1
    else:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            host.sample(scene, before_unet=cancel_at_step_two)
        assert host.unet_calls == 2


ENDINGS = ["success", "exception", "cancel"]


def shape_of(value: Any) -> Any:
    """A picture of nested options that compares by identity of what they hold."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shape_of(item) for item in value]
    return id(value)


def snapshot(patcher: Any) -> dict[str, Any]:
    """All of a ModelPatcher and its model that a control could leave something in."""
    net = patcher.model.diffusion_model
    return {
        "weights": {name: (t.data_ptr(), t.clone()) for name, t in patcher.model.state_dict().items()},
        "options": {name: shape_of(part) for name, part in vars(patcher).items() if isinstance(part, dict | list)},
        "hooks": {
            name: [len(vars(module)[kind]) for kind in ("_forward_hooks", "_forward_pre_hooks")]
            for name, module in patcher.model.named_modules()
        },
        "forwards": {name: "forward" in vars(module) for name, module in patcher.model.named_modules()},
        "class": (type(net), type(patcher.model)),
    }


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["weights"].keys() == after["weights"].keys()
    for name, (place, values) in before["weights"].items():
        assert after["weights"][name][0] == place, name
        assert torch.equal(after["weights"][name][1], values), name
    for part in ("options", "hooks", "forwards", "class"):
        assert before[part] == after[part], part


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("way", ["native", *WAYS])
def test_the_hosts_model_is_unchanged_and_samples_the_same(host: Host, way: str, ending: str):
    plain = host.scene()
    without = host.once("integrity without", lambda: host.sample(plain))
    before = snapshot(plain.model)
    prompts = shape_of([plain.positive, plain.negative])
    graph = host.native if way == "native" else partial(host.apply, way)
    controlled = graph(plain, "sd15", Control())
    spoil(host, controlled, ending)
    assert_unchanged(before, snapshot(plain.model))
    assert shape_of([plain.positive, plain.negative]) == prompts
    assert torch.equal(host.sample(plain).latent, without.latent)


# What the next prompt changes: the host keeps the objects that nodes made, so all but "hint" sample the same object.
NEXT: dict[str, dict[str, Any]] = {
    "seed": {"seed": 77},
    "size": {"latent_image": latent(1, 24, 16)},
    "batch": {"latent_image": latent(2)},
    "steps": {"steps": 3, "sampler_name": "heun"},
    "cfg": {"cfg": 1.0},
}


@pytest.mark.parametrize("change", [*NEXT, "hint", "model"])
@pytest.mark.parametrize(
    ("way", "ending"),
    [("ApplyControl", "success"), ("ApplyControl", "cancel"), ("ApplyControlToPrompt", "exception")],
)
def test_the_next_prompt_with_control_is_right(host: Host, way: str, ending: str, change: str):
    control, start = Control(end=0.8), host.scene()
    scene = host.apply(way, start, "sd15", control)
    spoil(host, scene, ending)
    if change == "hint":
        control = replace(control, hint=9)
        scene = host.apply(way, start, "sd15", control)
    elif change == "model":
        start = Scene(host.another_model("sd15"), prompt(4), prompt(5))
        scene = host.apply(way, start, "sd15", control)
    sampler = NEXT.get(change, {})
    native = host.once(("next", change), lambda: host.sample(host.native(start, "sd15", control), **sampler))
    without = host.once(("next", change, "without"), lambda: host.sample(start, **sampler))
    assert_same(host.sample(scene, **sampler), native, without)


# -- the host's memory management ------------------------------------------------------------------------------------


def loaded_by(host: Host, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], float]:
    """The modules the host was asked to load for a sampling, and the working memory it was told of."""
    import comfy.model_management

    asked: list[tuple[list[Any], float]] = []
    load = comfy.model_management.load_models_gpu

    def spy(models: list[Any], *args: Any, **kwargs: Any) -> Any:
        asked.append(([patcher.model for patcher in models], kwargs.get("memory_required", 0)))
        return load(models, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "load_models_gpu", spy)
        host.sample(scene)
    return asked[0]


@pytest.mark.parametrize("way", WAYS)
def test_the_host_knows_our_weights_and_our_working_memory(host: Host, way: str, monkeypatch: pytest.MonkeyPatch):
    controls = (Control(), Control("pose"))
    models, memory = loaded_by(host, host.apply(way, host.scene(), "sd15", *controls), monkeypatch)
    _, alone = loaded_by(host, host.apply(way, host.scene(), "sd15", controls[0]), monkeypatch)
    _, nothing = loaded_by(host, host.scene(), monkeypatch)
    for control in controls:
        net = host.load(f"sd15_{control.file}").get_models()[-1].model
        assert sum(model is net for model in models) == 1
    assert nothing < alone <= memory


def test_a_control_says_how_much_it_needs(host: Host):
    """More than nothing, no more in half precision, and a chain no less than its members."""
    control = host.load("sd15_depth")
    need = control.inference_memory_requirements(torch.float32)
    assert need > 0
    assert control.inference_memory_requirements(torch.float16) <= need
    chained = host.load("sd15_pose").copy().set_previous_controlnet(control)
    assert chained.inference_memory_requirements(torch.float32) >= need


def test_copies_share_one_model_patcher(host: Host):
    control = host.load("sd15_depth")
    (patcher,) = control.get_models()
    again = control.copy().copy()
    assert again is not control
    assert again.get_models()[0] is patcher
    assert again.get_models()[0].model is patcher.model


@pytest.mark.parametrize("way", WAYS)
def test_cloning_the_model_copies_no_weights(host: Host, way: str):
    """LoRA and other nodes clone the MODEL after us: the same UNet and the same ControlNet run in the clone."""
    scene = host.apply(way, host.scene(), "sd15", Control())
    clone = scene.model.clone().clone()
    assert clone.model is host.model("sd15").model
    run = host.sample(replace(scene, model=clone))
    net = host.load("sd15_depth").get_models()[-1].model
    assert {event.module for event in run.events if event.what == "control"} == {id(net)}
    assert torch.equal(run.latent, host.sample(scene).latent)


@pytest.mark.parametrize("way", WAYS)
def test_the_controls_weights_are_unchanged(host: Host, way: str):
    net = host.load("sd15_depth").get_models()[-1].model
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    host.sample(host.apply(way, host.scene(), "sd15", Control(strength=0.6)))
    assert before.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_applying_twice_from_one_model_does_not_add_up(host: Host):
    """ApplyControl leaves its input alone: two branches of a graph do not see each other."""
    start = host.scene()
    host.apply("ApplyControl", start, "sd15", Control("pose"))
    one = host.apply("ApplyControl", start, "sd15", Control())
    native = host.sample(host.native(start, "sd15", Control()))
    assert_same(host.sample(one), native, host.sample(start))


# -- the hint is encoded once per sampling and size ------------------------------------------------------------------


def hints(run: Run) -> list[int]:
    return [batch for _, batch in run.calls("hint")]


@pytest.mark.parametrize("way", WAYS)
def test_the_hint_is_encoded_once_per_sampling(host: Host, way: str):
    scene = host.apply(way, host.scene(), "sd15", Control())
    run = host.sample(scene, steps=6)
    assert run.count("control") == 6
    assert hints(run) == [1]


def test_native_encodes_it_at_every_step(host: Host):
    """The premise of these tests: the recorder sees what the native node does."""
    assert host.sample(host.native(host.scene(), "sd15", Control()), steps=6).count("hint") == 6


@pytest.mark.parametrize("batch", [1, 2])
def test_the_hint_of_a_batch_is_encoded_once(host: Host, batch: int):
    control = Control(size=(batch, 128, 128))
    run = host.sample(host.apply("ApplyControl", host.scene(), "sd15", control), latent_image=latent(2))
    assert hints(run) == [batch]
    assert run.count("control") == STEPS


@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
def test_the_hint_is_encoded_once_for_each_size_of_area(host: Host, way: str):
    start = host.scene()
    (area,) = host.call("ConditioningSetArea", conditioning=prompt(3), width=80, height=128, x=0, y=0, strength=1.0)
    start = Scene(start.model, start.positive + area, start.negative)
    run = host.sample(host.apply(way, start, "sd15", Control()), steps=6)
    assert run.count("control") > 6
    assert len(hints(run)) == 2


def test_two_controls_encode_one_hint_each(host: Host):
    controls = (Control(), Control("pose", hint=2))
    run = host.sample(host.apply("StackControls", host.scene(), "sd15", *controls))
    assert hints(run) == [1, 1]


def test_another_hint_is_encoded_anew(host: Host):
    """The guided hint of one graph never serves another that shares its CONTROL_NET."""
    latents: list[torch.Tensor] = []
    for hint in (1, 9, 1):
        run = host.sample(host.apply("ApplyControl", host.scene(), "sd15", Control(hint=hint)))
        latents.append(run.latent)
    assert torch.equal(latents[0], latents[2])
    assert not torch.equal(latents[0], latents[1])
