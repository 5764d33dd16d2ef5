"""T2I-Adapters in our nodes: the latents of the host's own loader and apply node, from one pass of the adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import MOVES, TOLERANCE, WAYS, Control, Run, Scene, assert_same, latent, moved, off_by, picture, prompt
from torch import Tensor

if TYPE_CHECKING:
    from hosting import Host

from zeroconv.controlnet_core.networks.t2i_adapter import AdapterConfig, T2IAdapter, to_diffusers

# The host's loader takes a full adapter's channels to be c, 2c, 4c, 4c; these models have them where features go.
CHANNELS = (64, 128, 256, 256)
MULTIPLIERS = {"sd15": [1, 2, 4, 4], "sdxl": [1, 2, 4]}

KINDS = {
    "full": AdapterConfig(CHANNELS),
    "gray": AdapterConfig(CHANNELS, hint_channels=1),
    "convolved": AdapterConfig(CHANNELS, kernel=3, learned_halving=True),
    "light": AdapterConfig(CHANNELS, blocks=4, kernel=3, light=True),
    "XL": AdapterConfig(CHANNELS, hint_multiple=16),
    "gray XL": AdapterConfig(CHANNELS, hint_channels=1, hint_multiple=16),
}


def family(kind: str) -> str:
    return "sdxl" if kind.endswith("XL") else "sd15"


def weights(kind: str) -> dict[str, Tensor]:
    """Seeded weights in the authors' layout that keep a signal near unit size."""
    generator = torch.Generator().manual_seed(77)
    state = T2IAdapter(KINDS[kind]).state_dict()
    for key, tensor in sorted(state.items()):
        noise = torch.randn(tensor.shape, generator=generator)
        state[key] = noise * (2 / tensor[0].numel()) ** 0.5 if tensor.ndim == 4 else 0.1 * noise
    return state


LAYOUTS = {
    "authors": lambda state: state,
    "wrapped": lambda state: {f"adapter.{key}": tensor for key, tensor in state.items()},
    "diffusers": to_diffusers,
}


@pytest.fixture(scope="module")
def scenes(host: Host) -> dict[str, Scene]:
    from tiny_models import tiny_model

    return {
        name: Scene(tiny_model(name, channel_mult=mult), prompt(1), prompt(2)) for name, mult in MULTIPLIERS.items()
    }


def load(host: Host, kind: str, layout: str = "authors") -> Any:
    """The adapter from our loader, once for each file."""
    name = f"{kind} adapter {layout}"
    if not (host.folder / f"{name}.safetensors").exists():
        host.write(name, {key: tensor.contiguous() for key, tensor in LAYOUTS[layout](weights(kind)).items()})
    return host.call("LoadControlNet", control_net_name=f"{name}.safetensors")[0]


def load_native(host: Host, kind: str) -> Any:
    """The adapter from the host's loader, which knows light ones at their published width alone; else as it does."""
    load(host, kind)
    if kind != "light":
        return host.call("ControlNetLoader", control_net_name=f"{kind} adapter authors.safetensors")[0]
    import comfy.controlnet
    from comfy.t2i_adapter.adapter import Adapter_light

    network = Adapter_light(cin=192, channels=list(CHANNELS), nums_rb=4)
    network.load_state_dict(weights(kind))
    return comfy.controlnet.T2IAdapter(network, network.input_channels, 8, "nearest-exact")


@contextmanager
def counted(control: Any) -> Iterator[list[tuple[int, ...]]]:
    """The hints that the adapter's network was given, by their shapes."""
    seen: list[tuple[int, ...]] = []
    network = control.get_models()[-1].model
    handle = network.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    try:
        yield seen
    finally:
        handle.remove()


def native_graph(host: Host, scene: Scene, control: Any, given: Control) -> Scene:
    """The host's own apply node."""
    positive, negative = host.call(
        "ControlNetApplyAdvanced",
        positive=scene.positive,
        negative=scene.negative,
        control_net=control,
        image=given.image,
        strength=given.strength,
        start_percent=given.start,
        end_percent=given.end,
    )
    return replace(scene, positive=positive, negative=negative)


def apply(host: Host, scene: Scene, control: Any, given: Control, way: str = "ApplyControl", **more: Any) -> Scene:
    """Our nodes, one of `WAYS`."""
    inputs = {
        "control_net": control,
        "image": given.image,
        "strength": given.strength,
        "start": given.start,
        "end": given.end,
        **given.options,
        **more,
    }
    if way.startswith("Stack"):
        inputs = {"stack": host.call("StackControls", **inputs)[0]}
    if way in ("ApplyControlToPrompt", "StackControlsToPrompt"):
        conds = host.call("ApplyControlToPrompt", positive=scene.positive, negative=scene.negative, **inputs)
        return Scene(scene.model, *conds)
    return replace(scene, model=host.call("ApplyControl", model=scene.model, **inputs)[0])


@dataclass(frozen=True)
class Case:
    """One graph of one adapter; `shapes` are the hints that its network is to be given, in order."""

    name: str
    kind: str = "full"
    control: Control = field(default_factory=Control)
    sampler: dict[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = ((1, 3, 128, 128),)

    def native(self, host: Host, scene: Scene) -> Run:
        def run() -> Run:
            return host.sample(native_graph(host, scene, load_native(host, self.kind), self.control), **self.sampler)

        return host.once(("native adapter", self.name), run)

    def without(self, host: Host, scene: Scene) -> Run:
        return host.once(("without adapter", self.name), lambda: host.sample(scene, **self.sampler))


CASES = [
    Case("full"),
    Case("gray", "gray", shapes=((1, 1, 128, 128),)),
    Case("convolved", "convolved"),
    Case("light", "light"),
    Case("XL", "XL"),
    Case("gray XL", "gray XL", shapes=((1, 1, 128, 128),)),
    Case("strength and window", "full", Control(strength=1.5, start=0.2, end=0.8)),
    Case("XL, strength and window", "XL", Control(strength=1.5, start=0.2, end=0.8)),
    Case("wide hint", "light", Control(size=(1, 96, 208))),
    Case(
        "batch 2, hint batch 2", "full", Control(size=(2, 128, 128)), {"latent_image": latent(2)}, ((2, 3, 128, 128),)
    ),
    Case(
        "batch 3, hint batch 2", "full", Control(size=(2, 128, 128)), {"latent_image": latent(3)}, ((2, 3, 128, 128),)
    ),
    # 8 * 15 = 120 pixels are rounded up to 128, a multiple of the 16 that an XL adapter unshuffles.
    Case("XL, rounded up", "XL", sampler={"latent_image": latent(1, 15, 16)}),
    Case("cfg 1", "full", sampler={"cfg": 1.0}),
    Case("heun", "full", sampler={"sampler_name": "heun"}),
]
PLAIN, WINDOW = (next(case for case in CASES if case.name == name) for name in ("full", "strength and window"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_latent_as_native_from_one_pass(host: Host, scenes: dict[str, Scene], case: Case):
    scene, control = scenes[family(case.kind)], load(host, case.kind)
    with counted(control) as seen:
        run = host.sample(apply(host, scene, control, case.control), **case.sampler)
    assert_same(run, case.native(host, scene), case.without(host, scene))
    assert tuple(seen) == case.shapes


@pytest.mark.parametrize("kind", ["full", "light", "XL"])
def test_the_hint_moves_the_latent_not_the_biases_alone(host: Host, scenes: dict[str, Scene], kind: str):
    scene, case = scenes[family(kind)], next(case for case in CASES if case.name == kind)
    positive, negative = host.call(
        "ControlNetApplyAdvanced",
        positive=scene.positive,
        negative=scene.negative,
        control_net=load_native(host, kind),
        image=torch.zeros(1, 128, 128, 3),
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    dark = host.sample(Scene(scene.model, positive, negative))
    assert moved(case.native(host, scene), dark) >= MOVES


@pytest.mark.parametrize("kind", ["full", "XL"])
def test_odd_sizes_are_controlled_too(host: Host, scenes: dict[str, Scene], kind: str):
    """Without a native twin: it averages other pixels there. A feature of a wrong size would raise."""
    scene, odd = scenes[family(kind)], latent(1, 13, 11)
    run = host.sample(apply(host, scene, load(host, kind), Control()), latent_image=odd)
    without = host.sample(scene, latent_image=odd)
    assert moved(run, without) >= MOVES
    assert run.calls("unet") == without.calls("unet")


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_apply_it(host: Host, scenes: dict[str, Scene], way: str):
    case, control = WINDOW, load(host, "full")
    with counted(control) as seen:
        run = host.sample(apply(host, scenes["sd15"], control, case.control, way))
    assert_same(run, case.native(host, scenes["sd15"]), case.without(host, scenes["sd15"]))
    assert len(seen) == 1


def test_ours_in_the_hosts_apply_node(host: Host, scenes: dict[str, Scene]):
    case = WINDOW
    run = host.sample(native_graph(host, scenes["sd15"], load(host, "full"), case.control))
    assert_same(run, case.native(host, scenes["sd15"]), case.without(host, scenes["sd15"]))


@pytest.mark.parametrize("layout", ["wrapped", "diffusers"])
@pytest.mark.parametrize("kind", ["full", "light", "XL"])
def test_every_layout_is_the_same_network(host: Host, kind: str, layout: str):
    """Tensor for tensor, so the latents above are theirs too."""
    expected, control = weights(kind), load(host, kind, layout)
    assert control.loaded.format.name == ("T2I-Adapter, diffusers" if layout == "diffusers" else "T2I-Adapter")
    found = control.loaded.control.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key].cpu(), expected[key].to(found[key].dtype)) for key in expected)


@pytest.mark.parametrize("kind", ["full", "XL"])
def test_with_a_controlnet_it_gives_the_sum_in_any_order(host: Host, scenes: dict[str, Scene], kind: str):
    """That of the host's own graph with both."""
    name, scene, hint = family(kind), scenes[family(kind)], Control(hint=2, strength=0.7)
    host.write(f"{name} deep", deep_control(name))
    ours, theirs = (
        host.call(node, control_net_name=f"{name} deep.safetensors")[0]
        for node in ("LoadControlNet", "ControlNetLoader")
    )
    adapter = Control(strength=0.8)
    native = native_graph(host, scene, load_native(host, kind), adapter)
    reference = host.sample(native_graph(host, native, theirs, hint))
    alone = host.sample(native), host.sample(native_graph(host, scene, theirs, hint))
    assert all(moved(reference, one) >= MOVES for one in alone)
    for first, second in (((ours, hint), (load(host, kind), adapter)), ((load(host, kind), adapter), (ours, hint))):
        run = host.sample(apply(host, apply(host, scene, *first), *second))
        assert off_by(run, reference) <= TOLERANCE
        assert run.calls("unet") == reference.calls("unet")


def deep_control(name: str) -> dict[str, Tensor]:
    """A ControlNet for these models."""
    import comfy.cldm.cldm
    import comfy.ops
    from tiny_models import randomise, unet_config

    config: dict[str, Any] = unet_config(name) | {"channel_mult": MULTIPLIERS[name]}
    del config["out_channels"]
    net = comfy.cldm.cldm.ControlNet(
        **config, num_heads=-1, num_head_channels=64, hint_channels=3, operations=comfy.ops.disable_weight_init
    )
    randomise(net, 505)
    return {key: tensor.detach().clone() for key, tensor in net.state_dict().items()}


def test_cond_only_is_native_control_on_the_positive_alone(host: Host, scenes: dict[str, Scene]):
    scene, case = scenes["sd15"], PLAIN
    both = native_graph(host, scene, load_native(host, "full"), case.control)
    one_sided = host.sample(Scene(both.model, both.positive, scene.negative))
    run = host.sample(apply(host, scene, load(host, "full"), case.control, guidance="cond_only"))
    assert moved(one_sided, case.without(host, scene)) >= MOVES
    assert moved(one_sided, case.native(host, scene)) >= MOVES
    assert off_by(run, one_sided) <= TOLERANCE


def test_a_mask_of_ones_changes_nothing_and_of_zeros_everything(host: Host, scenes: dict[str, Scene]):
    scene, case, control = scenes["sd15"], PLAIN, load(host, "full")
    ones = host.sample(apply(host, scene, control, case.control, mask=torch.ones(1, 128, 128)))
    assert_same(ones, case.native(host, scene), case.without(host, scene))
    with counted(control) as seen:
        zeros = host.sample(apply(host, scene, control, case.control, mask=torch.zeros(1, 128, 128)))
    assert seen == []
    assert torch.equal(zeros.latent, case.without(host, scene).latent)


@pytest.mark.parametrize("kind", ["full", "XL"])
@torch.no_grad()
def test_a_mask_weighs_each_feature_at_its_own_size(host: Host, scenes: dict[str, Scene], kind: str):
    """What the UNet is given: strength times feature times the mask's mean over each pixel of it."""
    scene, control = scenes[family(kind)], load(host, kind)
    mask = torch.rand(1, 128, 128, generator=torch.Generator().manual_seed(3))
    given: list[dict[str, list[Tensor | None]]] = []

    def spy(executor: Any, *args: Any, **kwargs: Any) -> Any:
        given.append({place: list(found) for place, found in args[4].items()})
        return executor(*args, **kwargs)

    from comfy.patcher_extension import WrappersMP

    watched = apply(host, scene, control, Control(strength=0.5), mask=mask)
    watched.model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "spy", spy)
    host.sample(watched, steps=1)
    (step,) = given
    host.place(*control.get_models())
    network = control.loaded.control
    plain = network(picture(1).movedim(-1, 1).to(next(network.parameters())))
    places = [i for i, feature in enumerate(plain.encoder) if feature is not None]
    found = list(reversed(step["input"]))
    assert [i for i, feature in enumerate(found) if feature is not None] == places
    assert (step["middle"][0] is None) == (kind == "full")
    middle = [] if plain.middle is None else [(step["middle"][0], plain.middle)]
    for actual, feature in [*((found[i], plain.encoder[i]) for i in places), *middle]:
        assert actual is not None and feature is not None
        assert actual.shape == feature.shape  # one for both halves, to which the host's addition broadcasts it
        mean = torch.nn.functional.adaptive_avg_pool2d(mask[None], feature.shape[2:])
        expected = 0.5 * feature.cpu() * mean
        torch.testing.assert_close(actual.cpu().float(), expected, rtol=TOLERANCE, atol=0.1 * TOLERANCE)


def test_an_adapter_of_another_family_is_refused(host: Host, scenes: dict[str, Scene]):
    with pytest.raises(Exception, match="this T2I-Adapter is made for SD1.x, the model is SDXL: load a T2I-Adapter"):
        host.sample(apply(host, scenes["sdxl"], load(host, "full"), Control()))


def test_an_adapter_for_sd1_runs_on_sd2_and_one_of_another_width_does_not(host: Host, scenes: dict[str, Scene]):
    from tiny_models import tiny_model

    scene = replace(scenes["sd15"], model=tiny_model("sd21", channel_mult=MULTIPLIERS["sd15"]))
    control = load(host, "full")
    without, run = host.sample(scene), host.sample(apply(host, scene, control, Control()))
    native = host.sample(native_graph(host, scene, load_native(host, "full"), Control()))
    assert_same(run, native, without)
    with pytest.raises(Exception, match="features of this SD1.x T2I-Adapter have 64 128 256 256 channels"):
        host.sample(apply(host, host.scene("sd15"), control, Control()))


def test_inspect_says_what_it_is(host: Host, scenes: dict[str, Scene]):
    (text,) = host.call("InspectControl", control_net=load(host, "XL"), model=scenes["sdxl"].model)
    assert "T2I-Adapter" in text
    assert "SDXL" in text
    assert "fits: yes" in text
