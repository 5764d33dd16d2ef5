"""Our nodes give the latents that the host's ControlNetApplyAdvanced gives, in as many UNet calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import (
    CONTEXT,
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
    picture,
    prompt,
)

if TYPE_CHECKING:
    from hosting import Host

    Prompts = Callable[[Host, Scene], Scene]

DEPTH = Control()
TWO = (Control(strength=0.7), Control("pose", hint=2, strength=0.8))


def area_prompts(host: Host, scene: Scene) -> Scene:
    """A second positive prompt on the left half and a bit."""
    (limited,) = host.call("ConditioningSetArea", conditioning=prompt(3), width=80, height=128, x=0, y=0, strength=1.0)
    return _with(host, scene, limited)


def masked_prompts(host: Host, scene: Scene) -> Scene:
    """A second positive prompt under a mask, in the host's default way (the mask only weighs the result)."""
    mask = torch.zeros(1, 128, 128)
    mask[:, :, 48:] = 0.8
    (limited,) = host.call("ConditioningSetMask", conditioning=prompt(3), mask=mask)
    return _with(host, scene, limited)


def mask_bounds_prompts(host: Host, scene: Scene) -> Scene:
    """A second positive prompt under a mask that also limits the area."""
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:96, 48:] = 1.0
    (limited,) = host.call("ConditioningSetMask", conditioning=prompt(3), mask=mask, set_cond_area="mask bounds")
    return _with(host, scene, limited)


def two_prompts(host: Host, scene: Scene) -> Scene:
    """A second positive prompt, in force for the first half of sampling only."""
    (limited,) = host.call("ConditioningSetTimestepRange", conditioning=prompt(3), start=0.0, end=0.5)
    return _with(host, scene, limited)


def _with(host: Host, scene: Scene, second: list) -> Scene:
    (both,) = host.call("ConditioningCombine", conditioning_1=scene.positive, conditioning_2=second)
    return Scene(scene.model, both, scene.negative)


@dataclass(frozen=True)
class Case:
    """One graph: family, controls, prompts, and what the KSampler gets."""

    name: str
    controls: tuple[Control, ...] = (DEPTH,)
    family: str = "sd15"
    prompts: Prompts | None = None
    sampler: dict[str, Any] = field(default_factory=dict)

    def scene(self, host: Host) -> Scene:
        scene = host.scene(self.family)
        return self.prompts(host, scene) if self.prompts else scene

    @property
    def stacked(self) -> bool:
        """Whether to run this graph with stacks too: time does not allow it for all."""
        return len(self.controls) > 1 or self.name in ("window", "wide hint", "batch 2, hint batch 2")

    def without(self, host: Host) -> Run:
        return host.once((self.name, "without"), lambda: host.sample(self.scene(host), **self.sampler))

    def native(self, host: Host) -> Run:
        return host.once(
            (self.name, "native"),
            lambda: host.sample(host.native(self.scene(host), self.family, *self.controls), **self.sampler),
        )


CASES = [
    Case("plain"),
    Case("strength 0.6", (Control(strength=0.6),)),
    Case("window", (Control(start=0.2, end=0.7),)),
    Case("two", TWO),
    Case("two windows", (Control(end=0.5), Control("pose", hint=2, start=0.3))),
    Case("the same file twice", (Control(strength=0.5), Control(hint=2, strength=0.6))),
    Case("area", prompts=area_prompts),
    Case("two on an area", TWO, prompts=area_prompts),
    Case("mask", prompts=masked_prompts),
    Case("mask bounds", prompts=mask_bounds_prompts),
    Case("timed prompt", prompts=two_prompts),
    Case("batch 2", sampler={"latent_image": latent(2)}),
    Case("batch 2, hint batch 2", (Control(size=(2, 128, 128)),), sampler={"latent_image": latent(2)}),
    Case("batch 3, hint batch 2", (Control(size=(2, 128, 128)),), sampler={"latent_image": latent(3)}),
    Case("cfg 1", sampler={"cfg": 1.0}),
    Case("wide hint", (Control(size=(1, 96, 208)),)),
    Case("odd hint", (Control(size=(1, 144, 112)),), sampler={"latent_image": latent(1, 24, 16)}),
    Case("fp16 file", (Control("depth_fp16"),)),
    Case("denoise 0.5", sampler={"denoise": 0.5, "latent_image": {"samples": torch.full((1, 4, 16, 16), 0.3)}}),
    *(
        Case(name, (Control(strength=0.8, end=0.8),), sampler={"sampler_name": name})
        for name in ("heun", "dpmpp_2m", "dpmpp_2m_sde", "euler_ancestral", "uni_pc")
    ),
    *(Case(f"{family}, two", TWO, family) for family in ("sd21", "sdxl")),
    *(Case(f"{family} on an area", (DEPTH,), family, area_prompts) for family in ("sd21", "sdxl")),
    *(Case(f"{family}, fp16 file", (Control("depth_fp16"),), family) for family in ("sd21", "sdxl")),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_native_control_moves_the_latent(host: Host, case: Case):
    assert moved(case.native(host), case.without(host)) >= MOVES


@pytest.mark.parametrize(
    ("case", "way"),
    [
        pytest.param(case, way, id=f"{case.name}-{way}")
        for case in CASES
        for way in WAYS
        if not way.startswith("Stack") or case.stacked
    ],
)
def test_same_latent_as_native(host: Host, case: Case, way: str):
    run = host.sample(host.apply(way, case.scene(host), case.family, *case.controls), **case.sampler)
    assert_same(run, case.native(host), case.without(host))


@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
def test_a_stack_comes_before_the_control(host: Host, way: str):
    """With a stack and a control_net, the stack is first; all of them act."""
    first, second = TWO
    scene, inputs = host.scene(), host.inputs(second, "sd15")
    stack = host.stack("sd15", first)
    if way == "ApplyControl":
        scene = Scene(host.call(way, model=scene.model, stack=stack, **inputs)[0], scene.positive, scene.negative)
    else:
        conds = host.call(way, positive=scene.positive, negative=scene.negative, stack=stack, **inputs)
        scene = Scene(scene.model, *conds)
    case = Case("two", TWO)
    assert_same(host.sample(scene), case.native(host), case.without(host))


def test_different_controls_on_different_prompts(host: Host):
    """ApplyControlToPrompt twice, then combined: each area has its own control, as in the native graph."""

    def graph(apply: Callable[[Scene, Control], Scene]) -> Scene:
        left = area_prompts(host, host.scene())
        one = apply(Scene(left.model, left.positive[:1], left.negative), TWO[0])
        two = apply(Scene(left.model, left.positive[1:], left.negative), TWO[1])
        return Scene(left.model, one.positive + two.positive, one.negative + two.negative)

    native = host.sample(graph(lambda scene, control: host.native(scene, "sd15", control)))
    ours = host.sample(graph(lambda scene, control: host.apply("ApplyControlToPrompt", scene, "sd15", control)))
    assert_same(ours, native, host.sample(area_prompts(host, host.scene())))


# -- other guiders ---------------------------------------------------------------------------------------------------


def basic(host: Host, scene: Scene) -> Run:
    return host.sample_guided(scene.model, "BasicGuider", conditioning=scene.positive)


def cfg_guider(host: Host, scene: Scene) -> Run:
    return host.sample_guided(scene.model, "CFGGuider", positive=scene.positive, negative=scene.negative, cfg=3.0)


def dual(host: Host, scene: Scene, style: str = "regular") -> Run:
    """DualCFG, whose two positive prompts are the two entries of the scene's positive."""
    return host.sample_guided(
        scene.model,
        "DualCFGGuider",
        cond1=scene.positive[:1],
        cond2=scene.positive[1:],
        negative=scene.negative,
        cfg_conds=3.0,
        cfg_cond2_negative=2.0,
        style=style,
    )


def dual_nested(host: Host, scene: Scene) -> Run:
    return dual(host, scene, "nested")


@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
@pytest.mark.parametrize("guide", [basic, cfg_guider, dual, dual_nested], ids=lambda guide: guide.__name__)
def test_other_guiders(host: Host, guide: Callable[[Host, Scene], Run], way: str):
    scene = host.scene()
    scene = Scene(scene.model, scene.positive + prompt(3), scene.negative)
    native = host.once((guide, "native"), lambda: guide(host, host.native(scene, "sd15", *TWO)))
    without = host.once((guide, "without"), lambda: guide(host, scene))
    assert_same(guide(host, host.apply(way, scene, "sd15", *TWO)), native, without)


# -- ours and native in one graph ------------------------------------------------------------------------------------


def deprecated_apply(host: Host, scene: Scene, control: Control) -> Scene:
    """The host's old ControlNetApply, which marks the positive for the host to copy its control to the negative."""
    (positive,) = host.call(
        "ControlNetApply",
        conditioning=scene.positive,
        control_net=host.load(f"sd15_{control.file}", native=True),
        image=control.image,
        strength=control.strength,
    )
    return Scene(scene.model, positive, scene.negative)


@pytest.mark.parametrize("order", ["native first", "ours first"])
@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt", "StackControlsToPrompt"])
def test_mixed_with_native(host: Host, way: str, order: str):
    first, second = TWO
    scene = host.scene()
    if order == "native first":
        scene = host.apply(way, host.native(scene, "sd15", first), "sd15", second)
    else:
        scene = host.native(host.apply(way, scene, "sd15", first), "sd15", second)
    case = Case("two", TWO)
    assert_same(host.sample(scene), case.native(host), case.without(host))


@pytest.mark.parametrize(
    ("way", "order"),
    [("ApplyControl", "native first"), ("ApplyControl", "ours first"), ("ApplyControlToPrompt", "native first")],
)
def test_mixed_with_the_deprecated_apply_node(host: Host, way: str, order: str):
    """The old node's control reaches both halves, ours too: the graph that ControlNetApplyAdvanced makes of them."""
    first, second = TWO
    scene = host.scene()
    if order == "native first":
        scene = host.apply(way, deprecated_apply(host, scene, first), "sd15", second)
    else:
        scene = deprecated_apply(host, host.apply(way, scene, "sd15", first), second)
    case = Case("two", TWO)
    assert_same(host.sample(scene), case.native(host), case.without(host))


def test_the_deprecated_apply_node_after_ours_on_prompts(host: Host):
    """Here the host finds a control on the negative and copies nothing: as after ControlNetApplyAdvanced."""
    first, second = TWO
    ours = deprecated_apply(host, host.apply("ApplyControlToPrompt", host.scene(), "sd15", first), second)
    native = deprecated_apply(host, host.native(host.scene(), "sd15", first), second)
    assert_same(host.sample(ours), host.sample(native), Case("plain").without(host))


# -- what only our nodes have, where the host can show the same ------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_weight_dtype_rounds_as_a_file_of_that_type(host: Host, dtype: str):
    """`weight_dtype` fp16 on a fp32 file gives what the fp16 file gives (computed in fp32 on this CPU)."""
    if dtype == "bf16":
        state = {name: tensor.bfloat16() for name, tensor in host.state("sd15_depth").items()}
        host.write("sd15_depthbf16", state)
    reference = host.sample(host.native(host.scene(), "sd15", Control(f"depth{'_fp16' if dtype == 'fp16' else dtype}")))
    control = host.load("sd15_depth", weight_dtype=dtype)
    (model,) = host.call("ApplyControl", model=host.model("sd15"), control_net=control, image=DEPTH.image)
    run = host.sample(Scene(model, prompt(1), prompt(2)))
    assert_same(run, reference, Case("plain").without(host))


@pytest.mark.parametrize("way", WAYS)
def test_cond_only_is_native_control_on_the_positive_alone(host: Host, way: str):
    control = Control(options={"guidance": "cond_only"})
    without = Case("plain").without(host)
    both = host.native(host.scene(), "sd15", DEPTH)
    one_sided = host.sample(Scene(both.model, both.positive, host.scene().negative))
    run = host.sample(host.apply(way, host.scene(), "sd15", control))
    assert moved(one_sided, without) >= MOVES
    assert moved(one_sided, Case("plain").native(host)) >= MOVES
    assert (run.latent - one_sided.latent).abs().max() <= TOLERANCE * one_sided.latent.abs().max()
    assert sum(batch for _, batch in run.calls("control")) == STEPS  # one sample a step: the positive half alone


def test_cond_only_with_one_guidance_half_controls_it(host: Host):
    """BasicGuider has no negative: cond_only and both are the same there."""
    control = Control(options={"guidance": "cond_only"})
    native = basic(host, host.native(host.scene(), "sd15", DEPTH))
    assert_same(
        basic(host, host.apply("ApplyControl", host.scene(), "sd15", control)), native, basic(host, host.scene())
    )


@pytest.mark.parametrize("way", WAYS)
def test_mask_of_ones_changes_nothing_and_of_zeros_everything(host: Host, way: str):
    case = Case("plain")
    ones = Control(options={"mask": torch.ones(1, 128, 128)})
    assert_same(host.sample(host.apply(way, host.scene(), "sd15", ones)), case.native(host), case.without(host))
    zeros = Control(options={"mask": torch.zeros(1, 128, 128)})
    run = host.sample(host.apply(way, host.scene(), "sd15", zeros))
    assert torch.equal(run.latent, case.without(host).latent)


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
@torch.no_grad()
def test_residuals_are_those_of_the_hosts_own_network(host: Host, family: str):
    """One by one, before anything is added up; the same file also moves the latent by 5 % in the cases above."""
    controls = host.load(f"{family}_depth", native=True), host.load(f"{family}_depth")
    host.place(*(model for control in controls for model in control.get_models()))
    native, ours = controls[0].control_model, controls[1].loaded.control
    place = next(ours.parameters())
    torch.manual_seed(0)
    x, t, context = torch.randn(2, 4, 16, 24), torch.tensor([900.0, 100.0]), torch.randn(2, 7, CONTEXT)
    y = torch.randn(2, ours.config.adm_in_channels).to(place) if family == "sdxl" else None
    x, t, context = x.to(place), t.to(place.device), context.to(place)
    hint = picture(1, height=128, width=192).movedim(-1, 1).to(place)
    theirs = native(x=x, hint=hint.expand(2, -1, -1, -1), timesteps=t, context=context, y=y)
    found = list(ours(x, t, context, ours.encode_hint(hint), y))
    other = list(ours(x, t, context, ours.encode_hint(1 - hint), y))
    expected = [*theirs["output"], *theirs["middle"]]
    assert len(found) == len(expected) == (10 if family == "sdxl" else 13)
    for residual, reference, changed in zip(found, expected, other, strict=True):
        assert (changed - reference).norm() >= MOVES * reference.norm()
        assert (residual - reference).abs().max() <= TOLERANCE * reference.abs().max()
