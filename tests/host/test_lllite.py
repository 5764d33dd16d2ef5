"""ControlLLLite on the host: the latents of a UNet whose layers shift their own input, and nothing left behind.

The authors' own node for ComfyUI is on no package registry: ZEROCONV_LLLITE_NODE names a checkout of
kohya-ss/ControlNet-LLLite-ComfyUI, to be run beside ours.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import (
    MOVES,
    STEPS,
    TOLERANCE,
    WAYS,
    Control,
    Run,
    Scene,
    assert_same,
    latent,
    moved,
    off_by,
    picture,
    prompt,
)
from test_integrity import ENDINGS, assert_unchanged, shape_of, snapshot, spoil
from torch import Tensor, nn

from ..core.networks.test_lllite import delta_by_hand, everything, file_for, layer_state, published

if TYPE_CHECKING:
    from hosting import Host

Scale = Callable[[Tensor], Tensor]
"""What is done to a delta (B,C,h,w)."""

FEW = ("ApplyControl", "StackControlsToPrompt")  # one for each of the host's levels, one of them with a stack

LINES = Control("lines")
OTHER = Control("other", hint=2)


class Shifted(nn.Module):
    """A layer that adds to its input what the formula says, while `reference.on`."""

    def __init__(self, layer: nn.Module, name: str, reference: Reference):
        super().__init__()
        self.layer, self.name, self.reference = layer, name, reference

    def forward(self, x: Tensor) -> Tensor:
        given = self.reference
        if not given.on:
            return self.layer(x)
        given.move_to(x)
        delta = delta_by_hand(given.state, self.name, x, given.hint)
        if x.ndim == 4:
            return self.layer(x + given.scale(delta))
        # The latents are twice as high as wide, or square.
        width = round((x.shape[1] / given.aspect) ** 0.5)
        square = delta.transpose(1, 2).unflatten(2, (-1, width))
        return self.layer(x + given.scale(square).flatten(2).transpose(1, 2))


class Reference:
    """The tiny SDXL model with the layers of a file replaced."""

    def __init__(self, state: dict[str, Tensor], hint: Tensor, scale: Scale = lambda delta: delta, model: Any = None):
        from tiny_models import tiny_model

        self.state, self.hint, self.scale, self.on = state, hint.movedim(-1, 1), scale, True
        self.aspect = hint.shape[1] / hint.shape[2]
        self.model = model or tiny_model("sdxl")
        net = self.model.model.diffusion_model
        names = {key.partition(".")[0] for key in state}
        for path, layer in list(net.named_modules()):
            name = "lllite_unet_" + path.replace(".", "_")
            if name in names:
                parent, _, child = path.rpartition(".")
                setattr(net.get_submodule(parent), child, Shifted(layer, name, self))

    def move_to(self, x: Tensor) -> None:
        """Compute on the device and in the dtype of x, which the host chooses."""
        if self.hint.device != x.device or self.hint.dtype != x.dtype:
            self.hint = self.hint.to(x)
            self.state = {key: tensor.to(x) for key, tensor in self.state.items()}

    @property
    def scene(self) -> Scene:
        return Scene(self.model, prompt(1), prompt(2))


@pytest.fixture(scope="module")
def states(host: Host) -> dict[str, dict[str, Tensor]]:
    """The tensors of three files; the host has them under these names."""
    unet = host.model("sdxl").model.diffusion_model
    lines = file_for(unet, published)
    made = {"lines": lines, "other": {key: -tensor for key, tensor in lines.items()}, "all": file_for(unet, everything)}
    for name, state in made.items():
        host.write(f"sdxl_{name}", state)
        (control,) = host.call("LoadControlNet", control_net_name=f"sdxl_{name}.safetensors")
        host._controls[(f"sdxl_{name}", False)] = control  # where host.load looks
    return made


def without(host: Host, **sampler: Any) -> Run:
    key = ("lllite without", shape_of(sampler) if "latent_image" in sampler else str(sampler))
    return host.once(str(key), lambda: host.sample(host.scene("sdxl"), **sampler))


def reference(host: Host, states: dict[str, dict[str, Tensor]], control: Control = LINES, **sampler: Any) -> Run:
    return host.sample(Reference(states[control.file], control.image).scene, **sampler)


# -- the same latents -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["lines", "all"])
@pytest.mark.parametrize("way", ["native", *WAYS])
def test_same_latent_as_the_formula(host: Host, states: dict[str, dict[str, Tensor]], way: str, file: str):
    control = Control(file)
    expected = host.once(("lllite", file), lambda: reference(host, states, control))
    dark = host.once(
        ("lllite dark", file), lambda: host.sample(Reference(states[file], torch.zeros_like(control.image)).scene)
    )
    assert moved(expected, dark) >= MOVES
    scene = host.scene("sdxl")
    ours = host.native(scene, "sdxl", control, own=True) if way == "native" else host.apply(way, scene, "sdxl", control)
    assert_same(host.sample(ours), expected, without(host))


SAMPLINGS: dict[str, tuple[Control, dict[str, Any]]] = {
    "batch 2": (LINES, {"latent_image": latent(2)}),
    "batch 2, hint batch 2": (Control("lines", size=(2, 128, 128)), {"latent_image": latent(2)}),
    "cfg 1": (LINES, {"cfg": 1.0}),
    "heun": (LINES, {"sampler_name": "heun"}),
    "twice as high": (Control("lines", size=(1, 256, 128)), {"latent_image": latent(1, 32, 16)}),
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_other_samplings(host: Host, states: dict[str, dict[str, Tensor]], sampling: str):
    control, sampler = SAMPLINGS[sampling]
    plain = host.sample(host.scene("sdxl"), **sampler)
    ours = host.sample(host.apply("ApplyControl", host.scene("sdxl"), "sdxl", control), **sampler)
    # Of two hints the formula takes one for each sample of both halves.
    assert_same(ours, reference(host, states, control, **sampler), plain)


@pytest.mark.parametrize("size", [(13, 9), (18, 22)])
def test_latents_that_the_formula_has_no_size_for(
    host: Host, states: dict[str, dict[str, Tensor]], size: tuple[int, int]
):
    """Not multiples of 32 pixels: the hint moves the latent there too."""
    runs = []
    for control in (LINES, replace(LINES, hint=5)):
        scene = host.apply("ApplyControl", host.scene("sdxl"), "sdxl", control)
        runs.append(host.sample(scene, latent_image=latent(1, *size)))
    plain = host.sample(host.scene("sdxl"), latent_image=latent(1, *size))
    assert runs[0].calls("unet") == plain.calls("unet")
    assert moved(runs[0], plain) >= MOVES
    assert moved(runs[0], runs[1]) >= MOVES


@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
def test_a_prompt_on_an_area(host: Host, states: dict[str, dict[str, Tensor]], way: str):
    """An area is sampled by itself: the whole hint is embedded at its size, and the rest is not computed anew."""
    start = host.scene("sdxl")
    (area,) = host.call("ConditioningSetArea", conditioning=prompt(3), width=64, height=128, x=0, y=0, strength=1.0)
    limited = Scene(start.model, area, start.negative)
    run = host.sample(host.apply(way, limited, "sdxl", LINES), cfg=1.0)
    plain = host.sample(limited, cfg=1.0)
    assert moved(run, plain) >= MOVES
    assert torch.equal(run.latent[..., 8:], plain.latent[..., 8:])
    assert run.calls("unet") == plain.calls("unet")


def test_no_more_unet_calls(host: Host, states: dict[str, dict[str, Tensor]]):
    """Both halves of guidance run together, as without control."""
    run = host.sample(host.apply("ApplyControl", host.scene("sdxl"), "sdxl", LINES))
    assert run.calls("unet") == without(host).calls("unet")
    assert [batch for _, batch in run.calls("unet")] == [2] * STEPS


@pytest.mark.parametrize("guidance", ["both", "cond_only"])
def test_a_record_has_the_shift_of_each_blocks_layers(host: Host, states: dict[str, dict[str, Tensor]], guidance: str):
    """Relative to what the layers are given; the first step doubles with the strength, and the latent is the same."""
    from zeroconv.controlnet_core.dosing.record import Row

    def recorded(strength: float) -> tuple[Run, Row]:
        control = Control("lines", strength=strength, options={"guidance": guidance})
        scene = host.apply("ApplyControl", host.scene("sdxl"), "sdxl", control)
        model, record = host.call("RecordControl", model=scene.model)
        run = host.sample(Scene(model, scene.positive, scene.negative))
        (panel,) = record.panels
        assert panel.title == "sdxl_lines.safetensors" and len(panel.rows) == STEPS
        return run, panel.rows[0]

    (run, row), (_, twice) = recorded(0.01), recorded(0.02)
    has_layers = [any(f"blocks_{i}_1_" in name for name in states["lines"]) for i in range(9)]
    assert [ratio is not None for ratio in row.ratios] == [*has_layers, True]
    first = has_layers.index(True)
    assert row.ratios[first] is not None and twice.ratios[first] == pytest.approx(2 * row.ratios[first], rel=0.02)
    plain = Control("lines", strength=0.01, options={"guidance": guidance})
    scene = host.apply("ApplyControl", host.scene("sdxl"), "sdxl", plain)
    assert torch.equal(run.latent, host.sample(scene).latent)


# -- dosing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", FEW)
def test_what_cannot_act_leaves_the_latent_bit_equal(host: Host, states: dict[str, dict[str, Tensor]], way: str):
    for control in (
        replace(LINES, strength=0.0),
        replace(LINES, options={"mask": torch.zeros(1, 128, 128)}),
        replace(LINES, start=9, end=-1, options={"unit": "step"}),
    ):
        assert torch.equal(
            host.sample(host.apply(way, host.scene("sdxl"), "sdxl", control)).latent, without(host).latent
        )


@pytest.mark.parametrize("strength", [0.4, 1.7])
def test_strength_multiplies_each_delta(host: Host, states: dict[str, dict[str, Tensor]], strength: float):
    run = host.sample(host.apply("ApplyControl", host.scene("sdxl"), "sdxl", replace(LINES, strength=strength)))
    expected = host.sample(Reference(states["lines"], LINES.image, lambda delta: strength * delta).scene)
    assert moved(expected, reference(host, states)) >= MOVES
    assert_same(run, expected, without(host))


@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
def test_a_window_of_steps(host: Host, states: dict[str, dict[str, Tensor]], way: str):
    """Steps 1 and 2 of four."""
    every = Control("all")
    switched = Reference(states["all"], every.image)

    def before_unet(call: int) -> None:
        switched.on = 1 <= call - 1 < 3

    expected = host.sample(switched.scene, before_unet=before_unet)
    assert moved(expected, reference(host, states, every)) >= MOVES
    control = replace(every, start=1, end=3, options={"unit": "step"})
    assert_same(host.sample(host.apply(way, host.scene("sdxl"), "sdxl", control)), expected, without(host))


def test_a_mask_and_resolution_weights(host: Host, states: dict[str, dict[str, Tensor]]):
    """The left half, and 16/h: 2 on the middle level, 4 on the lowest; at guidance 1 the prompt's half alone runs."""
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1
    weights = []

    def scale(delta: Tensor) -> Tensor:
        left = torch.zeros_like(delta)
        left[..., : delta.shape[3] // 2] = 16 / delta.shape[2]
        weights.append(16 / delta.shape[2])
        return delta * left

    expected = host.sample(Reference(states["lines"], LINES.image, scale).scene, cfg=1.0)
    assert set(weights) == {2.0, 4.0}
    assert moved(expected, host.sample(Reference(states["lines"], LINES.image).scene, cfg=1.0)) >= MOVES
    control = replace(LINES, options={"mask": mask, "guidance": "cfg_resolution"})
    run = host.sample(host.apply("ApplyControl", host.scene("sdxl"), "sdxl", control), cfg=1.0)
    assert_same(run, expected, without(host, cfg=1.0))


@pytest.mark.parametrize("file", ["lines", "all"])
@pytest.mark.parametrize("way", FEW)
def test_cond_only_leaves_the_other_half_alone(host: Host, states: dict[str, dict[str, Tensor]], way: str, file: str):
    """Both halves in one UNet call, and only the prompt's is controlled: as if each had run by itself."""
    control = Control(file)
    both = host.apply("ApplyControlToPrompt", host.scene("sdxl"), "sdxl", control)
    one_sided = host.sample(Scene(both.model, both.positive, host.scene("sdxl").negative))
    assert moved(one_sided, without(host)) >= MOVES
    assert moved(one_sided, host.sample(both)) >= MOVES
    limited = replace(control, options={"guidance": "cond_only"})
    run = host.sample(host.apply(way, host.scene("sdxl"), "sdxl", limited))
    assert off_by(run, one_sided) <= TOLERANCE
    assert run.calls("unet") == without(host).calls("unet")


# -- with others ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["native", *FEW])
def test_two_act_one_after_the_other(host: Host, states: dict[str, dict[str, Tensor]], way: str):
    """The second sees what the first has done to the layer's input: the outer of two nested layers is the first."""
    second = Reference(states["other"], OTHER.image)
    expected = host.sample(Reference(states["lines"], LINES.image, model=second.model).scene)
    scene, graph = host.scene("sdxl"), (LINES, OTHER)
    ours = host.native(scene, "sdxl", *graph, own=True) if way == "native" else host.apply(way, scene, "sdxl", *graph)
    assert moved(expected, reference(host, states)) >= MOVES
    assert moved(expected, reference(host, states, OTHER)) >= MOVES
    assert_same(host.sample(ours), expected, without(host))


@pytest.mark.parametrize("order", ["LLLite first", "ControlNet first", "native ControlNet first"])
@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
def test_with_a_controlnet(host: Host, states: dict[str, dict[str, Tensor]], way: str, order: str):
    """Both act: the host's own ControlNet on the reference."""
    depth = Control("depth", hint=3)
    shifted = Reference(states["lines"], LINES.image)
    expected = host.once("lllite and depth", lambda: host.sample(host.native(shifted.scene, "sdxl", depth)))
    assert moved(expected, reference(host, states)) >= MOVES
    assert moved(expected, host.sample(host.native(host.scene("sdxl"), "sdxl", depth))) >= MOVES
    scene = host.scene("sdxl")
    if order == "native ControlNet first":
        scene = host.apply(way, host.native(scene, "sdxl", depth), "sdxl", LINES)
    else:
        scene = host.apply(way, scene, "sdxl", *((LINES, depth) if order == "LLLite first" else (depth, LINES)))
    assert_same(host.sample(scene), expected, without(host))


def test_the_models_own_attention_patch_stays(host: Host, states: dict[str, dict[str, Tensor]]):
    """A patch that another node put on the model acts before ours, and is still alone there afterwards."""

    def double(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        return 2 * q, k, v

    def patched(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_attn1_patch(double)
        return clone

    base = replace(host.scene("sdxl"), model=patched(host.model("sdxl")))
    shifted = Reference(states["lines"], LINES.image)
    expected = host.sample(replace(base, model=patched(shifted.model)))
    run = host.sample(host.apply("ApplyControl", base, "sdxl", LINES))
    assert moved(expected, reference(host, states)) >= MOVES
    assert_same(run, expected, host.sample(base))
    assert base.model.model_options["transformer_options"]["patches"] == {"attn1_patch": [double]}


def test_asked_twice_for_one_call_it_acts_once(host: Host, states: dict[str, dict[str, Tensor]]):
    """Samplers that work in tiles ask each control again with the same options, before they call the UNet."""
    scene = host.apply("ApplyControlToPrompt", host.scene("sdxl"), "sdxl", Control("all"))
    control = scene.positive[0][1]["control"]

    def ask_again(apply_model: Any, given: dict[str, Any]) -> Tensor:
        x, t, c = given["input"], given["timestep"], given["c"]
        control.get_control(torch.zeros_like(x), t, c, len(given["cond_or_uncond"]), c["transformer_options"])
        control.get_control(x, t, c, len(given["cond_or_uncond"]), c["transformer_options"])
        return apply_model(x, t, **c)

    expected = host.sample(scene)
    model = scene.model.clone()
    model.set_model_unet_function_wrapper(ask_again)
    assert torch.equal(host.sample(replace(scene, model=model)).latent, expected.latent)
    assert moved(expected, without(host)) >= MOVES


# -- nothing left behind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("way", ["native", *FEW])
def test_the_model_is_unchanged_and_samples_the_same(
    host: Host, states: dict[str, dict[str, Tensor]], way: str, ending: str
):
    plain = host.scene("sdxl")
    expected = without(host)
    before = snapshot(plain.model)
    control = Control("all")
    if way == "native":
        scene = host.native(plain, "sdxl", control, own=True)
    else:
        scene = host.apply(way, plain, "sdxl", control)
    spoil(host, scene, ending)
    assert_unchanged(before, snapshot(plain.model))
    assert torch.equal(host.sample(plain).latent, expected.latent)


def test_an_exception_inside_a_layer_leaves_no_hook(host: Host, states: dict[str, dict[str, Tensor]]):
    plain = host.scene("sdxl")
    before = snapshot(plain.model)

    class Broken(Exception):
        pass

    def breaks(*_: Any) -> None:
        raise Broken

    handle = plain.model.model.diffusion_model.middle_block[0].register_forward_hook(breaks)
    with pytest.raises(Broken):
        host.sample(host.apply("ApplyControl", plain, "sdxl", Control("all")))
    handle.remove()
    assert_unchanged(before, snapshot(plain.model))


def test_the_hint_is_embedded_once_per_sampling(host: Host, states: dict[str, dict[str, Tensor]]):
    control = host.load("sdxl_lines")
    (patcher,) = control.get_models()
    assert control.copy().copy().get_models()[0] is patcher
    seen: list[int] = []
    handles = [
        net.conditioning1.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
        for _, net in patcher.model.networks()
    ]
    host.sample(host.apply("ApplyControl", host.scene("sdxl"), "sdxl", LINES))
    for handle in handles:
        handle.remove()
    assert seen == [1] * len(patcher.model)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_model_of_another_family(host: Host, states: dict[str, dict[str, Tensor]]):
    from zeroconv.nodes.host.control import ControlError

    expected = r"sdxl_lines.safetensors: this ControlLLLite is made for SDXL, the model is SD1.x: use it with an SDXL"
    with pytest.raises(ControlError, match=expected):
        host.call("ApplyControl", model=host.model("sd15"), control_net=host.load("sdxl_lines"), image=picture(1))


@pytest.mark.parametrize("way", FEW)
def test_a_model_without_one_of_the_layers(host: Host, states: dict[str, dict[str, Tensor]], way: str):
    """Said before anything is sampled."""
    from zeroconv.nodes.host.control import ControlError

    missing = "input_blocks_4_1_transformer_blocks_9_attn1_to_q"
    more = layer_state(f"lllite_unet_{missing}", 64, (), 2, 8, 12, torch.Generator().manual_seed(1))
    host.write("sdxl_more", states["lines"] | more)
    (host._controls[("sdxl_more", False)],) = host.call("LoadControlNet", control_net_name="sdxl_more.safetensors")
    host.forget()
    with pytest.raises(
        ControlError, match=f"sdxl_more.safetensors: the model lacks 1 of the .*, the first {missing}, a"
    ):
        host.sample(host.apply(way, host.scene("sdxl"), "sdxl", Control("more")))
    assert host.unet_calls == 0


def test_a_model_that_skips_a_block(host: Host, states: dict[str, dict[str, Tensor]]):
    from tiny_models import tiny_model

    from zeroconv.nodes.host.control import ControlError

    model = tiny_model("sdxl")
    model.model.diffusion_model.input_blocks[7][1].forward = lambda x, *_: x
    expected = r"8 of its \d+ layers were not reached in this call of the model, the first input_blocks_7_1_transf"
    with pytest.raises(ControlError, match=expected):
        host.sample(host.apply("ApplyControl", replace(host.scene("sdxl"), model=model), "sdxl", LINES))


def test_a_node_that_merges_tokens(host: Host, states: dict[str, dict[str, Tensor]]):
    from zeroconv.controlnet_core.networks.lllite import LLLiteError

    model = host.model("sdxl").clone()
    model.set_model_attn1_patch(lambda q, k, v, _: (q[:, ::2], k, v))
    expected = "lllite_unet_input_blocks_4_1_.*_attn1_to_q expects 64x64, its layer is given 32x64: .*merge or tile"
    with pytest.raises(LLLiteError, match=expected):
        host.sample(host.apply("ApplyControl", replace(host.scene("sdxl"), model=model), "sdxl", LINES))


# -- the authors' own node --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authors() -> Any:
    """The node file of the checkout that ZEROCONV_LLLITE_NODE names."""
    checkout = os.environ.get("ZEROCONV_LLLITE_NODE")
    if not checkout:
        pytest.skip("no checkout of kohya-ss/ControlNet-LLLite-ComfyUI: ZEROCONV_LLLITE_NODE names one")
    spec = importlib.util.spec_from_file_location("lllite_node", Path(checkout) / "node_control_net_lllite.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wide_scene() -> Scene:
    """A tiny SDXL model whose text is wider than its pictures: the node tells self-attention by equal widths."""
    import comfy.model_management
    import comfy.model_patcher
    import tiny_models

    width = 96
    config = tiny_models._CLASSES["sdxl"]({**tiny_models.unet_config("sdxl"), "context_dim": width})
    config.set_inference_dtype(comfy.model_management.unet_dtype(), None)
    model = config.get_model({}, "", device=torch.device("cpu"))
    tiny_models.randomise(model.diffusion_model, 17)
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(model, comfy.model_management.get_torch_device(), cpu)
    (text, options), (other, more) = prompt(1)[0], prompt(2)[0]
    return Scene(patcher, [[text.repeat(1, 1, 2)[..., :width], options]], [[other.repeat(1, 1, 2)[..., :width], more]])


@pytest.mark.parametrize("control", [LINES, replace(LINES, strength=0.6), (LINES, OTHER)], ids=["one", "0.6", "two"])
def test_same_latent_as_the_authors_node(
    host: Host, states: dict[str, dict[str, Tensor]], authors: Any, control: Control | tuple[Control, ...]
):
    scene, model = wide_scene(), None
    controls = control if isinstance(control, tuple) else (control,)
    for each in controls:
        path = str(host.folder / f"sdxl_{each.file}.safetensors")
        patch = authors.load_control_net_lllite_patch(path, each.image, each.strength, 0, 0, 0)
        model = (model or scene.model).clone()
        model.set_model_attn1_patch(patch)
        model.set_model_attn2_patch(patch)
    expected = host.sample(replace(scene, model=model))
    assert_same(host.sample(host.apply("ApplyControl", scene, "sdxl", *controls)), expected, host.sample(scene))
