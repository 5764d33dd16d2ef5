"""Training: an interrupted run goes on bit for bit, shards are whole and repeatable, every stage leaves its files."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from zeroconv.controlnet_core.networks.controlnet import ControlNet
from zeroconv.controlnet_core.networks.unet import UNet
from zeroconv.controlnet_core.training.checkpoint import newest
from zeroconv.lab import commands, dataset, loop, models, train
from zeroconv.lab.autoencoder import Autoencoder
from zeroconv.lab.loop import fit
from zeroconv.lab.segmenter import Segmenter
from zeroconv.lab.text_encoder import TextEncoder


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dataset, "SHARD", 2)


@pytest.fixture
def tiny_lab(monkeypatch: pytest.MonkeyPatch, small_shards: None):
    """The lab's stages on two pictures of 64 pixels and narrow networks."""
    monkeypatch.setattr(train, "SCENES", 2)
    monkeypatch.setattr(train, "SIZE", 64)
    monkeypatch.setattr(train, "UNET", replace(models.UNET, model_channels=32, channel_mult=(1, 1, 1, 1), head_dim=32))
    monkeypatch.setattr(train, "Autoencoder", partial(Autoencoder, 8, 8))
    monkeypatch.setattr(train, "Segmenter", partial(Segmenter, 8))


@pytest.fixture
def own_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(models, "WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights"


class Interrupted(Exception):
    pass


def tiny_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 3))


def recorded(model: nn.Module, losses: list[float], stop_at: int | None = None) -> Callable[[torch.Generator], Tensor]:
    """A loss that draws its batch with the loop's generator and its noise with torch's own, as training does."""

    def loss_of_step(draw: torch.Generator) -> Tensor:
        if len(losses) == stop_at:
            raise Interrupted
        x = torch.rand(4, 2, 8, 8, generator=draw).to(next(model.parameters()).device)
        loss = (model(x + 0.1 * torch.randn_like(x)) - x.mean()).square().mean()
        losses.append(loss.item())
        return loss

    return loss_of_step


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_interrupted_training_goes_on_bit_for_bit(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop, "SAVE_EVERY", 4)
    whole, first, second = [], [], []
    model = tiny_model().to(place)
    fit(model, recorded(model, whole), tmp_path / "whole", 12, lr=1e-2)

    interrupted = tiny_model().to(place)
    with pytest.raises(Interrupted):
        fit(interrupted, recorded(interrupted, first, stop_at=6), tmp_path / "parts", 12, lr=1e-2)
    torch.manual_seed(999)  # whatever happened in between must not matter
    resumed = tiny_model().to(place)
    fit(resumed, recorded(resumed, second), tmp_path / "parts", 12, lr=1e-2)

    assert len(whole) == 12 and whole[0] != whole[-1]
    assert first == whole[:6]
    assert second == whole[4:]  # from the last checkpoint on
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert not list(tmp_path.rglob("*.tmp"))


def test_finished_training_only_loads_the_averaged_weights(tmp_path: Path):
    model, again = tiny_model(), tiny_model()
    fit(model, recorded(model, []), tmp_path / "done", 3, lr=1e-2)
    fit(again, recorded(again, [], stop_at=0), tmp_path / "done", 3, lr=1e-2)
    saved = newest(tmp_path / "done")
    assert saved is not None and saved.step == 3
    average, weights = saved.part("average."), saved.part("model.")
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
        assert torch.equal(value, average[key])
    assert not torch.equal(average["0.weight"], weights["0.weight"])


def test_average_follows_the_weights(tmp_path: Path):
    model = nn.Linear(1, 1, bias=False)
    seen = []

    def loss_of_step(draw: torch.Generator) -> Tensor:
        seen.append(model.weight.item())
        return model.weight.sum()

    fit(model, loss_of_step, tmp_path / "x", 2, lr=1e-1, ema_decay=0.25)
    saved = newest(tmp_path / "x")
    assert saved is not None
    # The decay is step / (step + 10) until it reaches ema_decay: 1/11, then 2/12.
    after = [seen[1], saved.part("model.")["weight"].item()]
    first = seen[0] / 11 + after[0] * 10 / 11
    assert model.weight.item() == pytest.approx(first * 2 / 12 + after[1] * 10 / 12, rel=1e-5)


def test_shards_hold_the_scenes_in_the_order_of_their_seeds(tmp_path: Path, small_shards: None):
    paths = dataset.render_shards(tmp_path, 4, 64)
    assert [path.name for path in paths] == ["scenes-64-000000.safetensors", "scenes-64-000002.safetensors"]
    assert not list(tmp_path.glob("*.partial"))
    names = ("image", "canny", "depth", "pose", "segments", "tokens")
    arrays = dataset.load_shards(paths, names)
    for name in ("image", "canny", "depth", "pose"):
        assert arrays[name].shape == (4, 64, 64, 3) and arrays[name].dtype == np.uint8
    assert arrays["segments"].shape == (4, 64, 64) and arrays["segments"].dtype == np.uint8
    assert arrays["tokens"].shape == (4, 77) and arrays["tokens"].dtype == np.int32
    for name, value in dataset.render_arrays(3, 64).items():
        np.testing.assert_array_equal(arrays[name][3], value)
    assert (arrays["image"][0] != arrays["image"][1]).any()


def test_shards_are_resumed_and_repeatable(tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch):
    first, second = dataset.render_shards(tmp_path / "a", 4, 64)
    kept = first.read_bytes(), second.read_bytes()
    second.unlink()
    rendered = []
    render = dataset.render_arrays
    monkeypatch.setattr(dataset, "render_arrays", lambda seed, size: rendered.append(seed) or render(seed, size))
    dataset.render_shards(tmp_path / "a", 4, 64)
    assert rendered == [2, 3]
    assert (first.read_bytes(), second.read_bytes()) == kept


def test_a_shard_is_written_whole_or_not_at_all(tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch):
    render = dataset.render_arrays

    def fails_late(seed: int, size: int):
        if seed == 3:
            raise Interrupted
        return render(seed, size)

    monkeypatch.setattr(dataset, "render_arrays", fails_late)
    with pytest.raises(Interrupted):
        dataset.render_shards(tmp_path, 4, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes-64-000000.safetensors"]


def test_training_seeds_are_not_held_out():
    assert train.SCENES <= dataset.HELD_OUT


def test_every_stage_trains_and_leaves_fp16_weights(tmp_path: Path, own_weights: Path, tiny_lab: None):
    assert commands.main(["train", "--work", str(tmp_path / "work"), "--steps", "1"]) == 0
    controls = {f"controlnet/lab_{hint}" for hint in ("canny", "depth", "pose")}
    files = {path.relative_to(own_weights).with_suffix("").as_posix(): path for path in own_weights.rglob("*.*")}
    assert files.keys() == {"autoencoder", "unet", "text_encoder", "segmenter", *controls}
    for path in files.values():
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    # A second control of the same base: the other files stay as they are, and the finished stage is only loaded.
    before = {name: path.stat().st_mtime_ns for name, path in files.items()}
    assert commands.main(["train", "pose", "--work", str(tmp_path / "work"), "--steps", "1"]) == 0
    changed = {name for name, path in files.items() if path.stat().st_mtime_ns != before[name]}
    assert changed == {"controlnet/lab_pose"}


def test_a_better_decoder_leaves_the_latents_as_they_are(tmp_path: Path, own_weights: Path, tiny_lab: None):
    work = ["--work", str(tmp_path / "work"), "--steps", "1"]
    assert commands.main(["train", "autoencoder", *work]) == 0
    before = models.read_weights("autoencoder")
    assert commands.main(["train", "decoder", *work]) == 0
    after = models.read_weights("autoencoder")
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)


def test_one_training_step_moves_the_zero_convolutions_alone_at_first(
    tmp_path: Path, own_weights: Path, tiny_lab: None, monkeypatch: pytest.MonkeyPatch
):
    """The paper's derivation at work: with W = 0 the first step reaches W, and through W nothing behind it."""
    parts = {"autoencoder": Autoencoder(8, 8), "unet": UNet(train.UNET), "text_encoder": TextEncoder()}
    for name, module in parts.items():
        models.save_weights(module, name)
    gradients: dict[str, float] = {}

    def one_step(model: ControlNet, loss_of_step: Callable[[torch.Generator], Tensor], *_: object, **__: object):
        loss_of_step(torch.Generator().manual_seed(0)).backward()
        gradients.update({k: 0.0 if p.grad is None else p.grad.abs().max().item() for k, p in model.named_parameters()})

    monkeypatch.setattr(train, "fit", one_step)
    train.train_control(tmp_path, "depth", batch=2)
    zero = {key for key in gradients if key.startswith(("zero_convs.", "middle_block_out."))}
    assert len(zero) == 26
    assert all(gradients[key] > 0 for key in zero)
    assert all(gradients[key] == 0 for key in gradients.keys() - zero)


def test_unknown_stage_is_named(capsys: pytest.CaptureFixture[str]):
    assert commands.main(["train", "canny", "normal"]) == 1
    expected = "there is no stage 'normal'; the stages are: autoencoder, base, segmenter, decoder, canny, depth, pose"
    assert expected in capsys.readouterr().err
