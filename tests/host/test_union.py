"""ControlNet Union and shuffle on the real host: types, fusing of neighbours in a stack, and what is refused."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import MOVES, TOLERANCE, WAYS, Run, Scene, moved, off_by, picture
from torch import Tensor

if TYPE_CHECKING:
    from hosting import Host

DEPTH, POSE = "depth", "openpose"


def load(host: Host, control_type: str = "auto", n_types: int = 6) -> Any:
    """The CONTROL_NET of the Union file; its network is one and the same whatever the type."""
    from tiny_kinds import union_state

    name = f"sdxl_union{n_types}"
    loaded = host.load_made(name, lambda: union_state(n_types))
    host.record(loaded)
    return host.call("SetUnionControlNetType", control_net=loaded, type=control_type)[0]


def entry(host: Host, control_type: str, hint: int, **options: Any) -> dict[str, Any]:
    """What StackControls takes for a typed hint."""
    return {"control_net": load(host, control_type), "image": picture(hint), **options}


def sample(host: Host, *entries: dict[str, Any], way: str = "ApplyControl") -> Run:
    """A sampling of the tiny SDXL model under a stack of these entries."""
    stack: dict[str, Any] = {}
    for inputs in entries:
        stack = {"stack": host.call("StackControls", **stack, **inputs)[0]}
    scene = host.scene("sdxl")
    if way == "ApplyControl":
        return host.sample(Scene(host.call(way, model=scene.model, **stack)[0], scene.positive, scene.negative))
    positive, negative = host.call(way, positive=scene.positive, negative=scene.negative, **stack)
    return host.sample(Scene(scene.model, positive, negative))


def without(host: Host) -> Run:
    return host.once("union without", lambda: host.sample(host.scene("sdxl")))


def test_the_type_says_what_the_hint_is(host: Host):
    runs = {kind: sample(host, entry(host, kind, 1)) for kind in ("auto", DEPTH, POSE)}
    for run in runs.values():
        assert moved(run, without(host)) >= MOVES
    for a, b in (("auto", DEPTH), ("auto", POSE), (DEPTH, POSE)):
        assert moved(runs[a], runs[b]) >= 1e-3, f"{a} and {b} are one"


def test_the_loaders_type_is_that_of_the_hosts_node(host: Host):
    load(host)
    (loaded,) = host.call("LoadControlNet", control_net_name="sdxl_union6.safetensors", control_type=DEPTH)
    mine = sample(host, {"control_net": loaded, "image": picture(1)})
    assert torch.equal(mine.latent, sample(host, entry(host, DEPTH, 1)).latent)


@pytest.mark.parametrize("control_type", ["auto", DEPTH])
@pytest.mark.parametrize("way", WAYS)
def test_one_hint_is_what_the_hosts_own_control_makes_of_it(host: Host, way: str, control_type: str):
    """The host's control object around the same weights; it cannot load the tiny file itself."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.model_management
    import comfy.ops
    from tiny_models import unet_config

    device = comfy.model_management.get_torch_device()
    control = load(host, control_type)
    with torch.inference_mode():  # as nodes run
        network = copy.deepcopy(control.network).to(device)  # the host moves its own network alone
    settings = unet_config("sdxl")
    del settings["out_channels"]
    net = comfy.cldm.cldm.ControlNet(
        **settings, num_head_channels=64, hint_channels=3, operations=comfy.ops.disable_weight_init
    )
    net.load_state_dict({key: value for key, value in control.network.state_dict().items() if key in net.state_dict()})
    # The host's Union is made for 320 channels at the top; ours stands in for the parts beyond a ControlNet.
    embed, forward = network.embed_types, net.input_hint_block.forward
    parts: dict[str, Any] = {
        "control_add_embedding": lambda types, dtype, device: embed(types, torch.zeros(1, dtype=dtype, device=device)),
        "num_control_type": 6,
        "union_controlnet_merge": lambda hint, types, emb, context: network.fuse(
            [forward(hint[0], emb, context)], types, [1.0]
        ),
    }
    for name, part in parts.items():
        setattr(net, name, part)
    native = comfy.controlnet.ControlNet(net, load_device=device)
    native.set_extra_arg("control_type", list(control.extra_args.get("control_type", [])))
    scene = host.scene("sdxl")
    positive, negative = host.call(
        "ControlNetApplyAdvanced",
        positive=scene.positive,
        negative=scene.negative,
        control_net=native,
        image=picture(1),
        strength=0.7,
        start_percent=0.0,
        end_percent=0.8,
    )
    expected = host.sample(Scene(scene.model, positive, negative))
    inputs = {"control_net": control, "image": picture(1), "strength": 0.7, "end": 0.8}
    if way.startswith("Stack"):
        inputs = {"stack": host.call("StackControls", **inputs)[0]}
    if way.endswith("ToPrompt"):
        positive, negative = host.call(
            "ApplyControlToPrompt", positive=scene.positive, negative=scene.negative, **inputs
        )
        run = host.sample(Scene(scene.model, positive, negative))
    else:
        (model,) = host.call("ApplyControl", model=scene.model, **inputs)
        run = host.sample(Scene(model, scene.positive, scene.negative))
    assert moved(expected, without(host)) >= MOVES
    assert off_by(run, expected) <= TOLERANCE
    assert run.calls("unet") == expected.calls("unet")


def step(host: Host, control: Any, sigma: float = 5.0) -> dict[str, list[Tensor]]:
    """What a chain of controls hands to the tiny SDXL model at one call of it, where the host wants both."""
    from graphs import CONTEXT

    model, device = host.model("sdxl").model, host.place(host.model("sdxl"), *control.get_models())
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(1, 4, 16, 16, generator=generator) * sigma
    cond = {
        "c_crossattn": torch.randn(1, 7, CONTEXT, generator=generator),
        "y": torch.randn(1, model.model_config.unet_config["adm_in_channels"], generator=generator),
    }
    control.pre_run(model, model.model_sampling.percent_to_sigma)
    with torch.inference_mode():
        return control.get_control(x.to(device), torch.tensor([sigma], device=device), cond, 1, {"cond_or_uncond": [0]})


def test_neighbours_are_fused_as_the_core_fuses_them(host: Host):
    """One pass of the network, with both types and each hint at its own strength."""
    stack: dict[str, Any] = {}
    for kind, hint, strength in ((DEPTH, 1, 0.6), (POSE, 2, 0.9)):
        stack = {"stack": host.call("StackControls", **stack, **entry(host, kind, hint, strength=strength))[0]}
    from zeroconv.nodes.host.stack import controls

    first, fused = controls(stack["stack"])
    fused.set_previous_controlnet(first)
    result = step(host, fused)
    network = fused.network
    with torch.inference_mode():
        place = next(network.parameters())
        features = [network.encode_hint(picture(hint).movedim(-1, 1).to(place)) for hint in (1, 2)]
        model = host.model("sdxl").model
        generator = torch.Generator().manual_seed(8)
        x = torch.randn(1, 4, 16, 16, generator=generator) * 5.0
        context = torch.randn(1, 7, 64, generator=generator)
        y = torch.randn(1, model.model_config.unet_config["adm_in_channels"], generator=generator)
        t = torch.tensor([5.0])
        t = t.to(place.device)
        expected = network(
            model.model_sampling.calculate_input(t, x.to(place.device)).to(place.dtype),
            model.model_sampling.timestep(t).float(),
            context.to(place),
            network.fuse(features, [1, 0], [0.6, 0.9]),
            y.to(place),
            types=[1, 0],
        )
    for mine, wanted in zip([*result["output"], *result["middle"]], expected, strict=True):
        assert wanted is not None
        assert torch.allclose(mine, wanted, atol=0.1 * TOLERANCE * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
def test_fused_hints_cost_one_pass_a_step(host: Host, way: str):
    run = sample(host, entry(host, DEPTH, 1), entry(host, POSE, 2), way=way)
    assert run.count("control") == run.count("unet")
    assert run.count("hint") == 2, "each hint is encoded once per sampling"
    alone = sample(host, entry(host, DEPTH, 1), way=way)
    assert moved(run, alone) >= 1e-3 and run.calls("unet") == alone.calls("unet")


def test_a_file_that_two_nodes_load_is_one_network_and_fused(host: Host):
    """Each loader says its own type; the network, its memory and its pass are shared, and go when nobody has it."""
    import gc
    import weakref

    from tiny_kinds import union_state

    host.write("sdxl_twice", union_state())

    def load_as(control_type: str) -> Any:
        return host.call("LoadControlNet", control_net_name="sdxl_twice.safetensors", control_type=control_type)[0]

    depth, pose = load_as(DEPTH), load_as(POSE)
    assert depth.network is pose.network and depth.get_models() == pose.get_models()
    assert (depth.type_number, pose.type_number) == (1, 0)
    host.record(depth)
    run = sample(host, {"control_net": depth, "image": picture(1)}, {"control_net": pose, "image": picture(2)})
    assert run.count("control") == run.count("unet")
    other = host.call("LoadControlNet", control_net_name="sdxl_twice.safetensors", weight_dtype="bf16")[0]
    assert other.network is not depth.network, "another dtype is another network"
    host.write("sdxl_twice", {key: tensor + 1 for key, tensor in union_state().items()})
    assert load_as(DEPTH).network is not depth.network, "and so is a file that has changed"
    gone = weakref.ref(other.network)
    del other
    gc.collect()
    assert gone() is None


def test_outside_its_window_a_hint_leaves_the_fuse(host: Host):
    first, second = entry(host, DEPTH, 1, strength=0.7), entry(host, POSE, 2, unit="step", start=2, end=-1)
    run = sample(host, first, second)
    both, alone = sample(host, first, {**second, "start": 0}), sample(host, first)
    assert moved(run, both) >= 1e-3 and moved(run, alone) >= 1e-3
    never = sample(host, first, {**second, "start": 4})
    assert torch.equal(never.latent, alone.latent)


@pytest.mark.parametrize(
    "other",
    [
        {"mask": torch.ones(1, 128, 128) * 0.5},
        {"guidance": "cond_only"},
        {"control_net": "auto"},
    ],
    ids=["mask", "guidance", "no type"],
)
def test_hints_that_are_dosed_otherwise_are_added(host: Host, other: dict[str, Any]):
    """A mask or a half of its own cannot be in one pass with another's; then their residuals add."""
    if "control_net" in other:
        other = {"control_net": load(host)}
    run = sample(host, entry(host, DEPTH, 1), {**entry(host, POSE, 2), **other})
    assert run.count("control") == 2 * run.count("unet")


def test_the_same_mask_keeps_hints_together(host: Host):
    mask = torch.ones(1, 128, 128) * 0.5
    run = sample(host, entry(host, DEPTH, 1, mask=mask), entry(host, POSE, 2, mask=mask.clone()))
    assert run.count("control") == run.count("unet")


def test_a_type_that_the_file_lacks_is_refused(host: Host):
    load(host)
    with pytest.raises(Exception, match=r"sdxl_union6.safetensors.* 6 types.*'tile'.*ProMax"):
        host.call("LoadControlNet", control_net_name="sdxl_union6.safetensors", control_type="tile")
    with pytest.raises(Exception, match="knows 6 types of hint.*tile"):
        sample(host, entry(host, "tile", 1))


@pytest.mark.parametrize("control_type", [DEPTH, "repaint"])
def test_a_type_for_a_plain_controlnet_is_refused(host: Host, control_type: str):
    host.load("sd15_depth")
    with pytest.raises(Exception, match="one type only.*choose auto"):
        host.call("LoadControlNet", control_net_name="sd15_depth.safetensors", control_type=control_type)


# -- shuffle -----------------------------------------------------------------------------------------------------------


def shuffle(host: Host, way: str, control_type: str = "auto") -> Run:
    control = host.load("sd15_depth", control_type=control_type)
    return host.once(("shuffle", way, control_type), lambda: host.sample(apply(host, way, control)))


def apply(host: Host, way: str, control: Any) -> Scene:
    scene = host.scene()
    inputs = {"control_net": control, "image": picture(1)}
    if way == "ApplyControl":
        return Scene(host.call(way, model=scene.model, **inputs)[0], scene.positive, scene.negative)
    return Scene(scene.model, *host.call(way, positive=scene.positive, negative=scene.negative, **inputs))


@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
def test_shuffle_pools_its_residuals_on_the_prompts_half_alone(host: Host, way: str):
    """Against the host's own pooling, which does not leave out the negative: put on the positive alone."""
    native = host.load("sd15_depth", native=True).copy()
    native.global_average_pooling = True
    native.set_cond_hint(picture(1).movedim(-1, 1), 1.0, (0.0, 1.0))
    scene = host.scene()
    positive = [[embedding, {**options, "control": native}] for embedding, options in scene.positive]
    expected = host.sample(Scene(scene.model, positive, scene.negative))
    run = shuffle(host, way, control_type="shuffle")
    plain = shuffle(host, way)
    assert moved(expected, host.once("shuffle off", lambda: host.sample(scene))) >= MOVES
    assert moved(run, plain) >= MOVES
    assert off_by(run, expected) <= TOLERANCE
    half = {batch for _, batch in run.calls("control")}
    assert half == {1}, "the half that gets no control is not computed"


def test_a_file_named_shuffle_is_one_as_for_the_host(host: Host):
    host.load("sd15_depth")
    for name in ("sd15_mine_shuffle", "sd15_mine_shuffle_fp16"):
        host.write(name, host.state("sd15_depth"))
        (control,) = host.call("LoadControlNet", control_net_name=f"{name}.safetensors")
        assert control.global_average_pooling
    assert not host.load("sd15_depth").global_average_pooling


def test_the_shuffle_of_a_stack_is_that_of_the_node(host: Host):
    control = host.load("sd15_depth", control_type="shuffle")
    (made,) = host.call("StackControls", control_net=control, image=picture(1))
    scene = host.scene()
    (model,) = host.call("ApplyControl", model=scene.model, stack=made)
    run = host.sample(Scene(model, scene.positive, scene.negative))
    assert torch.equal(run.latent, shuffle(host, "ApplyControl", control_type="shuffle").latent)
