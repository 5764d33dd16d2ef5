"""How much memory hints take: counted, as reckoned for the host, and given back in whatever way a run ends."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import Scene, latent, picture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..test_integrity import ENDINGS, Broken, cancel_at_step_two, fail_at_step_two
from .callers import animatediff
from .controls import KINDS, WAYS, apply, native, ours
from .test_pieces import Asked, residuals

if TYPE_CHECKING:
    from hosting import Host


class Counted(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside: those `alive` now, and at most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._refs: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(one.untyped_storage()) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and id(storage) not in self._refs:
                    self._count(storage)
        return result

    def _count(self, storage: Any) -> None:
        number, size = id(storage), storage.nbytes()

        def gone(_: Any) -> None:
            self._refs.pop(number, None)
            self.alive -= size

        self._refs[number] = weakref.ref(storage, gone)
        self.alive += size
        self.peak = max(self.peak, self.alive)


def peak(host: Host, control: Any, *asked: Asked) -> int:
    """The most bytes alive while a control is asked these calls, one after the other, in one run."""
    with torch.inference_mode(), Counted() as counted:
        for i, one in enumerate(asked):
            residuals(host, control, one, begin=i == 0)
    control.cleanup()
    return counted.peak


def with_hints(control: Any, hints: Tensor) -> Any:
    """A copy of the control with hints (B,H,W,3)."""
    return control.copy().set_cond_hint(hints.movedim(-1, 1), 1.0, (0.0, 1.0))


def test_the_count_counts():
    with Counted() as counted:
        first = torch.zeros(1000)
        second = first.reshape(10, 100)
        del first
        assert counted.alive == 4000
        second.add_(1)
        del second
        assert counted.alive == 0
        _ = torch.zeros(10) + torch.zeros(10)
    assert counted.peak == 4000


# -- counted ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [128, pytest.param(512, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["controlnet", "foreign"])
def test_a_batch_of_120_frames_takes_no_more_than_native(host: Host, kind: str, size: int):
    hints = picture(1, 120, size, size)
    asked = Asked(torch.zeros(120, 4, size // 8, size // 8))
    limit = 1.3 * peak(host, with_hints(native(host, "controlnet"), hints), asked)
    scene = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, kind), hints)
    assert peak(host, scene.positive[0][1]["control"], asked) <= limit


@pytest.mark.parametrize("kind", ["controlnet", "lora", "lite"])
def test_300_frames_in_windows(host: Host, kind: str, monkeypatch: pytest.MonkeyPatch):
    """Only the window's hints are made to fit and encoded; what is kept of earlier windows has a bound."""
    from zeroconv.nodes.host import kept

    monkeypatch.setattr(kept, "LIMIT", 24 * 2**20)
    hints = picture(1, 1, 512, 512).expand(300, -1, -1, -1)
    x = torch.zeros(4, 4, 64, 64)
    one = peak(host, with_hints(native(host, "controlnet"), hints[:4]), Asked(x))
    control = apply(host, "ApplyControlToPrompt", host.scene("sdxl"), ours(host, kind), hints).positive[0][1]["control"]
    windows = [[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3] for i in (0, 1, 20, 40, 60, 74)]
    with torch.inference_mode(), Counted() as counted:
        for i, window in enumerate(windows):
            if i == 0:
                control.pre_run(host.model("sdxl").model, host.model("sdxl").model.model_sampling.percent_to_sigma)
            control.sub_idxs, control.full_latent_length, control.context_length = window, 300, 4
            residuals(host, control, Asked(x), begin=False)
    assert counted.peak <= 1.3 * one + kept.LIMIT
    assert counted.alive <= kept.LIMIT + 2**20
    control.cleanup()
    gc.collect()
    assert counted.alive <= 2**20


def test_300_frames_sampled(host: Host):
    """They run, in windows, and the last frames have their own hints."""
    first, last = (picture(seed, 1, 64, 64) for seed in (1, 2))
    hints = torch.cat([first.expand(296, -1, -1, -1), last.expand(4, -1, -1, -1)])
    given: dict[str, Any] = {"latent_image": latent(300, 8, 8), "steps": 1}

    def run(image: Tensor) -> Tensor:
        scene = apply(host, "ApplyControl", host.scene("sdxl"), ours(host, "lite"), image)
        return host.sample(replace(scene, model=animatediff(scene.model, 50, 0)), **given).latent

    each, end = run(hints), run(last)
    assert (each[296:] - end[296:]).abs().max() <= 1e-4 * end.abs().max()
    assert (each[:296] - end[:296]).abs().max() >= 0.01 * end.abs().max()


# -- reckoned ---------------------------------------------------------------------------------------------------------


def reckoned(host: Host, scene: Scene, monkeypatch: pytest.MonkeyPatch, **inputs: Any) -> float:
    """The bytes of working memory that the host is asked to keep free at least for this sampling."""
    import comfy.model_management

    asked: list[float] = []

    def load_models_gpu(models: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("minimum_memory_required") or 0)
        return load(models, *args, **kwargs)

    load = comfy.model_management.load_models_gpu
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "load_models_gpu", load_models_gpu)
        host.sample(scene, **{"steps": 1, **inputs})
    return max(asked)


def share(host: Host, scene: Scene, monkeypatch: pytest.MonkeyPatch, **inputs: Any) -> float:
    """What of it is the control's."""
    plain = replace(host.scene("sdxl"), model=inputs.pop("plain", host.model("sdxl")))
    return reckoned(host, scene, monkeypatch, **inputs) - reckoned(host, plain, monkeypatch, **inputs)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_reckoned_is_what_a_call_takes(host: Host, way: str, monkeypatch: pytest.MonkeyPatch):
    """At least the residuals of both halves, which last until the UNet has read them, and not many times as much."""
    scene = apply(host, way, host.scene("sdxl"), ours(host, "controlnet"), picture(1, 6))
    held = residuals(
        host, with_hints(ours(host, "controlnet"), picture(1, 6)), Asked(torch.zeros(12, 4, 16, 16), (0, 1))
    )
    size = sum(residual.nbytes for residual in held)
    assert size <= share(host, scene, monkeypatch, latent_image=latent(6)) <= 2 * size


@pytest.mark.parametrize("way", WAYS)
def test_a_large_hint_is_no_large_picture(host: Host, way: str, monkeypatch: pytest.MonkeyPatch):
    small, large = (
        apply(host, way, host.scene("sdxl"), ours(host, "controlnet"), image)
        for image in (picture(1), picture(1, 1, 2048, 2048))
    )
    expected = share(host, small, monkeypatch, latent_image=latent())
    assert share(host, large, monkeypatch, latent_image=latent()) == expected


@pytest.mark.parametrize("way", WAYS)
def test_the_largest_of_a_chain_is_reckoned_once(host: Host, way: str, monkeypatch: pytest.MonkeyPatch):
    one = apply(host, way, host.scene("sdxl"), ours(host, "controlnet"), picture(1))
    three = apply(host, way, apply(host, way, one, ours(host, "lora"), picture(2)), ours(host, "lite"), picture(3))
    single = share(host, one, monkeypatch, latent_image=latent())
    assert share(host, three, monkeypatch, latent_image=latent()) <= 1.01 * single


@pytest.mark.parametrize("way", WAYS)
def test_of_windows_one_is_reckoned(host: Host, way: str, monkeypatch: pytest.MonkeyPatch):
    """Newer hosts put one frame before it."""
    scene = apply(host, way, host.scene("sdxl"), ours(host, "controlnet"), picture(1, 12))
    four, five = (share(host, scene, monkeypatch, latent_image=latent(frames)) for frames in (4, 5))
    windowed = replace(scene, model=host.windows(scene.model, 4, 0))
    plain = host.windows(host.model("sdxl"), 4, 0)
    found = share(host, windowed, monkeypatch, latent_image=latent(12), steps=11, plain=plain)
    assert four <= found <= five


# -- given back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_run_is_kept(host: Host, kind: str, way: str, ending: str):
    """Prompts lie in the host's cache for long, and with them their controls: what a run computed goes with it."""
    import comfy.model_management

    scene = apply(host, way, host.scene("sdxl"), ours(host, kind), picture(1, 4, 256, 256))
    given: dict[str, Any] = {"latent_image": latent(4, 32, 32), "steps": 2}
    host.sample(scene, latent_image=latent(1, 8, 8), steps=1)  # what the host loads once and keeps
    before = {"success": None, "exception": fail_at_step_two, "cancel": cancel_at_step_two}[ending]
    with Counted() as counted:
        try:
            host.sample(scene, before_unet=before, **given)
        except (Broken, comfy.model_management.InterruptProcessingException):
            assert ending != "success"
        else:
            assert ending == "success"
    host.forget()
    gc.collect()
    assert counted.peak > 10 * 2**20
    assert counted.alive < 2**18, f"{counted.alive} bytes of the run are still there"
