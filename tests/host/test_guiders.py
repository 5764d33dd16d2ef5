"""Which half of guidance gets control, whatever order a guider hands its prompts on in, and inside context windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from graphs import MOVES, TOLERANCE, Control, Run, Scene, latent, moved, off_by, prompt

if TYPE_CHECKING:
    from hosting import Host

COND_ONLY = Control(options={"guidance": "cond_only"})


def dual(host: Host, model: Any, cond1: list, cond2: list, negative: list, **inputs: Any) -> Run:
    """DualCFGGuider: its calls list the negative first."""
    return host.sample_guided(
        model,
        "DualCFGGuider",
        cond1=cond1,
        cond2=cond2,
        negative=negative,
        cfg_conds=3.0,
        cfg_cond2_negative=2.0,
        style="regular",
        **inputs,
    )


def windowed(host: Host, model: Any) -> Any:
    """The host's own context windows of 2 of 3 frames, one of them shared."""
    return host.windows(model, 2, 1)


def native_on(host: Host, entries: list) -> list:
    """The host's own control on these prompts, and on no others."""
    nothing = prompt(9)
    controlled = host.native(Scene(None, entries, nothing), "sd15", Control())
    return controlled.positive


@pytest.mark.parametrize("windows", [False, True], ids=["whole", "windows"])
@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
def test_cond_only_leaves_the_negative_of_dual_guidance_alone(host: Host, way: str, windows: bool):
    first, second, negative = prompt(1), prompt(3), prompt(2)
    model = windowed(host, host.model("sd15")) if windows else host.model("sd15")
    # 0.3.75 compares the list of sigmas with one sigma for each frame: as many of these as of those.
    frames: dict[str, Any] = {"steps": 2, "latent_image": latent(3)} if windows else {}

    expected = dual(host, model, native_on(host, first), native_on(host, second), negative, **frames)
    without = dual(host, model, first, second, negative, **frames)
    inputs = host.inputs(COND_ONLY, "sd15")
    if way == "ApplyControl":
        (controlled,) = host.call(way, model=model, **inputs)
        run = dual(host, controlled, first, second, negative, **frames)
    else:
        positive, other = host.call(way, positive=first + second, negative=negative, **inputs)
        run = dual(host, model, positive[:1], positive[1:], other, **frames)
    assert moved(expected, without) >= MOVES
    assert off_by(run, expected) <= TOLERANCE


@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
def test_one_sided_control_costs_no_more_unet_calls(host: Host, way: str):
    without = host.sample(host.scene())
    run = host.sample(host.apply(way, host.scene(), "sd15", COND_ONLY))
    assert run.calls("unet") == without.calls("unet")


@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
def test_a_call_with_the_negative_alone_gets_no_control(host: Host, way: str):
    """Self-attention guidance asks once more for the negative prompt by itself."""
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    def guided(scene: Scene) -> Scene:
        (model,) = SelfAttentionGuidance.execute(scene.model, 0.5, 2.0).result  # type: ignore[misc]
        return Scene(model, scene.positive, scene.negative)

    run = host.sample(guided(host.apply(way, host.scene(), "sd15", COND_ONLY)))
    controlled, unet = run.calls("control"), run.calls("unet")
    assert len(unet) > len(controlled), "the guidance calls the UNet more often than control acts"
    assert {batch for _, batch in controlled} == {1}
    assert len(controlled) == len({sigma for sigma, _ in unet})


def test_the_weights_of_control_need_no_negative(host: Host):
    """A guider of one prompt has no negative list: cfg_resolution acts on that prompt."""
    control = Control(options={"guidance": "cfg_resolution"})
    scene = host.apply("ApplyControl", host.scene(), "sd15", control)
    run = host.sample_guided(scene.model, "BasicGuider", conditioning=scene.positive)
    without = host.sample_guided(host.model("sd15"), "BasicGuider", conditioning=scene.positive)
    assert moved(run, without) >= MOVES


def test_timesteps_are_not_rounded_with_the_rest(host: Host):
    """bf16 has no number for most of them: 981 would be 980."""
    import torch

    control = host.load("sd15_depth", weight_dtype="bf16").copy()
    control.compute_dtype = torch.bfloat16
    told: list[tuple[torch.dtype, torch.Tensor]] = []
    hook = control.network.register_forward_pre_hook(lambda _, args: told.append((args[0].dtype, args[1])))
    scene = host.scene()
    (model,) = host.call("ApplyControl", model=scene.model, control_net=control, image=Control().image)
    run = host.sample(Scene(model, scene.positive, scene.negative))
    hook.remove()
    sampling = scene.model.model.model_sampling
    assert [dtype for dtype, _ in told] == [torch.bfloat16] * len(told) and len(told) == len(run.calls("unet"))
    for (_, timesteps), (sigma, _) in zip(told, run.calls("unet"), strict=True):
        assert timesteps.tolist() == [float(sampling.timestep(torch.tensor(sigma)))] * len(timesteps)
