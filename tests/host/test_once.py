"""Nothing is computed twice in a run: counts of operations, on a real host, without a clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import STEPS, TOLERANCE, Control, Scene, latent, off_by, picture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from hosting import Host

WAYS = ("ApplyControl", "ApplyControlToPrompt", "ControlNetApplyAdvanced")


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do, views left out, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Counting:
    """While it is entered, what each call of `get_control` takes: the operations by name, and the flops of products."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, control: Any):
        self.operations: list[Counter[str]] = []
        self.flops: list[int] = []
        kind = next(base for base in type(control).__mro__ if "get_control" in vars(base))
        plain = kind.get_control

        def counted(*args: Any) -> Any:
            with FlopCounterMode(display=False) as flops, Operations() as operations:
                result = plain(*args)
            self.operations.append(operations.counts)
            self.flops.append(flops.get_total_flops())
            return result

        monkeypatch.setattr(kind, "get_control", counted)


def scene(host: Host, way: str, given: Scene, **options: Any) -> Scene:
    """The control at strength 1 on this scene."""
    control = Control(strength=1.0, start=0.0, end=1.0, options=options)
    if way == "ControlNetApplyAdvanced":
        return host.native(given, "sd15", control, own=True)
    return host.apply(way, given, "sd15", control)


def counted(host: Host, monkeypatch: pytest.MonkeyPatch, given: Scene, **sampler: Any) -> Counting:
    """What the calls of one sampling take."""
    with monkeypatch.context() as patch:
        counting = Counting(patch, host.load("sd15_depth"))
        host.sample(given, **sampler)
    assert len(counting.flops) == STEPS
    return counting


@pytest.mark.parametrize("way", WAYS)
def test_halves_share_what_comes_before_their_texts(host: Host, monkeypatch: pytest.MonkeyPatch, way: str):
    both = counted(host, monkeypatch, scene(host, way, host.scene()))
    one = counted(host, monkeypatch, scene(host, way, host.scene()), cfg=1.0)
    assert set(both.flops[1:]) == {both.flops[1]} and set(one.flops[1:]) == {one.flops[1]}
    assert one.flops[1] < both.flops[1] < 1.95 * one.flops[1]


@pytest.mark.parametrize("way", WAYS)
def test_equal_texts_are_one(host: Host, monkeypatch: pytest.MonkeyPatch, way: str):
    given = host.scene()
    one = counted(host, monkeypatch, scene(host, way, given), cfg=1.0)
    twin = [[embedding.clone(), dict(options)] for embedding, options in given.positive]
    same = counted(host, monkeypatch, scene(host, way, replace(given, negative=twin)))
    assert same.flops[1:] == one.flops[1:]


def test_equal_texts_give_the_latent_of_the_hosts_own_control(host: Host):
    given = host.scene()
    same = replace(given, negative=[[embedding.clone(), dict(options)] for embedding, options in given.positive])
    control = Control(strength=0.7)
    expected = host.sample(host.native(same, "sd15", control), latent_image=latent(2))
    assert off_by(host.sample(host.apply("ApplyControl", same, "sd15", control), latent_image=latent(2)), expected) <= (
        TOLERANCE
    )


def test_one_half_takes_no_more_operations_than_both(host: Host, monkeypatch: pytest.MonkeyPatch):
    both = counted(host, monkeypatch, scene(host, "ApplyControl", host.scene()))
    half = counted(host, monkeypatch, scene(host, "ApplyControl", host.scene(), guidance="cond_only"))
    residuals = 13
    # Each residual is put beside zeros, and that is all that comes on top.
    assert sum(half.operations[1].values()) <= sum(both.operations[1].values()) + residuals
    assert half.flops[1] < 0.6 * both.flops[1]  # both share what comes before their texts


def test_at_strength_1_nothing_is_multiplied(host: Host, monkeypatch: pytest.MonkeyPatch):
    def taken(strength: float) -> Counter[str]:
        given = host.apply("ApplyControl", host.scene(), "sd15", Control(strength=strength, start=0.0, end=1.0))
        return counted(host, monkeypatch, given).operations[1]

    residuals = 13
    assert taken(0.5) - taken(1.0) == Counter(mul=residuals)


MADE = ("zeros", "new_zeros", "zeros_like", "ones", "full", "arange", "lift_fresh", "index", "index_put", "index_put_")
FITTED = ("adaptive_avg_pool2d", "avg_pool2d", "upsample_nearest2d", "_upsample_nearest_exact2d", "matmul")


@pytest.mark.parametrize("guidance", ["both", "cond_only", "cfg_resolution"])
def test_masks_rows_and_zeros_are_made_at_the_first_step(host: Host, monkeypatch: pytest.MonkeyPatch, guidance: str):
    mask = picture(3)[..., 0]
    (schedule,) = host.call("ControlSchedule", curve="constant", per_image="0.5, 0.75")
    given = scene(host, "ApplyControl", host.scene(), guidance=guidance, mask=mask, schedule=schedule)
    counting = counted(host, monkeypatch, given, latent_image=latent(2))
    first, *rest = ({name: each[name] for name in (*MADE, *FITTED) if each[name]} for each in counting.operations)
    assert any(first.get(name, 0) > 1 for name in FITTED)  # there are sizes that the mask is fitted to
    # The frequencies of the timestep embedding are the one thing that is made at every step.
    assert rest == [{"arange": 1}] * (STEPS - 1)


# -- whether the halves are alike --------------------------------------------------------------------------------------


def distinct(host: Host, x: Tensor, numbers: list[int], **told: Any) -> int:
    """How many samples of a call the control takes for different ones."""
    from zeroconv.nodes.host import run

    control = scene(host, "ApplyControlToPrompt", host.scene()).positive[0][1]["control"]
    model = host.model("sd15").model
    control.pre_run(model, model.model_sampling.percent_to_sigma)
    t = torch.full((len(x),), 5.0, device=x.device)
    options = {"cond_or_uncond": numbers, **({run.LATENT: told["latent"]} if told else {})}
    options["sigmas"] = t[: told.get("sigmas", len(x) // len(numbers))]
    call = control._call(x, t, {}, len(numbers), options)
    return call.distinct


def test_latents_on_the_cpu_are_compared(host: Host):
    x = torch.randn(2, 4, 8, 8)
    assert distinct(host, torch.cat([x, x]), [1, 0]) == 2
    assert distinct(host, torch.cat([x, x, x]), [1, 1, 0]) == 2
    assert distinct(host, torch.cat([x, x.roll(1, 0)]), [1, 0]) == 4
    assert distinct(host, x, [0]) == 2


def test_elsewhere_the_host_says_whether_each_cond_has_the_whole_latent(host: Host):
    x = torch.empty(4, 4, 8, 8, device="meta")  # no number of it can be read
    assert distinct(host, x, [1, 0]) == 4, "nobody tells"
    assert distinct(host, x, [1, 0], latent=(2, 4, 8, 8)) == 2
    assert distinct(host, x, [1, 0], latent=(2, 4, 8, 16)) == 4, "two areas of one size"
    assert distinct(host, x, [1, 0], latent=(4, 4, 8, 8)) == 4, "two windows of some frames"


def test_tiles_are_samples_of_their_own(host: Host):
    tiles = torch.randn(2, 4, 8, 8).repeat_interleave(2, dim=0)  # both halves of one tile after those of the other
    assert distinct(host, tiles, [1, 0], latent=(1, 4, 8, 16), sigmas=1) == 4
