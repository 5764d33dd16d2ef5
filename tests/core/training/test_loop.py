"""The loop trains what it says, on what it says, in as many passes as it says, and leaves the rest as it was."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zeroconv.controlnet_core import diffusion
from zeroconv.controlnet_core.data.dataset import Batches, Dataset
from zeroconv.controlnet_core.data.manifest import DatasetError
from zeroconv.controlnet_core.files.loading import load_control, load_unet, read_weights
from zeroconv.controlnet_core.networks.controlnet import BaseMismatch
from zeroconv.controlnet_core.networks.unet import UNet, UNetConfig
from zeroconv.controlnet_core.training import inputs, loop
from zeroconv.controlnet_core.training.controlled_unet import ControlledUNet, build
from zeroconv.controlnet_core.training.options import OptionsError, TrainingOptions

from .tiny import CONFIG, base, dataset, equal, fit, losses, quick, training


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return dataset(tmp_path_factory.mktemp("data"))


def trained(folder: Path) -> dict[str, Tensor]:
    """The control that a training left."""
    return read_weights(folder / "control.safetensors")[0]


def keep_controlled(monkeypatch: pytest.MonkeyPatch) -> list[ControlledUNet]:
    """Where the controlled UNet of the next training will lie."""
    kept: list[ControlledUNet] = []

    def building(*arguments: Any) -> ControlledUNet:
        kept.append(build(*arguments))
        return kept[-1]

    monkeypatch.setattr(loop, "build", building)
    return kept


# -- what is yielded --------------------------------------------------------------------------------------------------


def test_one_progress_for_the_base_and_one_for_each_step(data: Dataset, tmp_path: Path):
    found = fit(quick(accumulation=3, sample_every=2), data, tmp_path)
    assert [progress.step for progress in found] == [0, 1, 2, 3, 4]
    assert [progress.examples for progress in found] == [0, 6, 12, 18, 24]
    assert [progress.loss is None for progress in found] == [True, False, False, False, False]
    assert [progress.fidelity is None for progress in found] == [False, True, False, True, False]
    samples = found[2].samples
    assert samples is not None
    assert samples.shape == (2, 4, 4, 4)
    seconds = [progress.seconds for progress in found]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0 < seconds[1]
    assert all(progress.steps == 4 and progress.memory is None for progress in found)


def test_nothing_of_the_arguments_is_changed(data: Dataset, tmp_path: Path):
    before = {key: tensor.clone() for key, tensor in base().items()}
    fit(quick(unlock_decoder=True), data, tmp_path)
    assert equal(before, base())


def test_the_learning_rate_of_each_step_is_the_schedules(data: Dataset, tmp_path: Path):
    found = fit(quick(schedule="linear", warmup=1, learning_rate=0.01), data, tmp_path)
    assert [progress.learning_rate for progress in found[1:]] == pytest.approx([0.01, 0.01, 0.02 / 3, 0.01 / 3])


def test_each_pass_is_one_call_of_the_network(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(UNet, "forward", count(UNet.forward, calls))
    fit(quick(steps=3, accumulation=2), data, tmp_path)
    assert len(calls) == 6


def count(function: Any, calls: list[Any]) -> Any:
    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return function(*arguments, **named)

    return counted


# -- what is learned --------------------------------------------------------------------------------------------------


def test_the_first_step_moves_the_zero_convolutions_and_the_second_the_copy_too(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept = keep_controlled(monkeypatch)
    with closing(training(quick(weight_decay=0.0), data, tmp_path)) as steps:
        next(steps)
        control = kept[0].control
        copies = {name: p.detach().clone() for name, p in control.named_parameters()}
        assert not any(p.any() for module in control.connections() for p in module.parameters())

        def moved() -> set[str]:
            return {name for name, p in control.named_parameters() if not torch.equal(p, copies[name])}

        next(steps)
        outward = {name for name in copies if name.startswith(("zero_convs.", "middle_block_out."))}
        assert moved() == outward
        next(steps)
        # the hint encoder's last convolution was 0 as well: what is before it waits for one step more
        assert {name for name in copies if name.startswith(("input_blocks.", "middle_block.", "time_embed."))} < moved()
        assert "input_hint_block.14.weight" in moved()
        assert "input_hint_block.0.weight" not in moved()
        next(steps)
        assert moved() == set(copies)


def test_the_locked_unet_stays_bit_for_bit(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept = keep_controlled(monkeypatch)
    fit(quick(weight_decay=0.1), data, tmp_path)
    assert equal(dict(kept[0].unet.state_dict()), base())
    assert all(p.grad is None for p in kept[0].unet.parameters())


def test_an_unlocked_decoder_alone_moves_of_the_unet(data: Dataset, tmp_path: Path):
    fit(quick(unlock_decoder=True, decoder_learning_rate=1e-3), data, tmp_path)
    weights = load_unet(read_weights(tmp_path / "unet.safetensors")[0], {"num_heads": "8"}).state_dict()
    moved = {key for key, tensor in weights.items() if not torch.equal(tensor, base()[key])}
    assert moved == {key for key in base() if key.startswith(("output_blocks.", "out."))}


def test_middle_only_trains_no_zero_convolution_of_the_encoder(data: Dataset, tmp_path: Path):
    fit(quick(middle_only=True), data, tmp_path)
    weights = trained(tmp_path)
    assert not any(tensor.any() for key, tensor in weights.items() if key.startswith("zero_convs."))
    assert all(tensor.any() for key, tensor in weights.items() if key.startswith("middle_block_out."))
    copied = [key for key in weights if key.startswith(("input_blocks.", "middle_block."))]
    assert all(not torch.equal(weights[key], base()[key]) for key in copied)


def test_what_middle_only_leaves_out_adds_nothing_to_the_control_either(data: Dataset, tmp_path: Path):
    fit(quick(middle_only=True, connections="gaussian", steps=1), data, tmp_path)
    weights = trained(tmp_path)
    assert not any(tensor.any() for key, tensor in weights.items() if key.startswith("zero_convs."))
    assert weights["middle_block_out.0.weight"].std() > 0.05


def test_gaussian_connections_change_the_base_from_the_first_step_on(data: Dataset, tmp_path: Path):
    zero = losses(fit(quick(steps=1), data, tmp_path / "zero"))
    gaussian = losses(fit(quick(steps=1, connections="gaussian"), data, tmp_path / "gaussian"))
    assert abs(gaussian[0] - zero[0]) > 0.02 * zero[0]


@pytest.mark.parametrize("kind", ["control_lora", "lite"])
def test_other_kinds_begin_as_the_base_and_are_loaded_by_their_kind(data: Dataset, tmp_path: Path, kind: str):
    full = losses(fit(quick(steps=1), data, tmp_path / "full"))
    other = losses(fit(quick(kind=kind, rank=4), data, tmp_path / kind))
    assert other[0] == full[0]
    control = load_control(*read_weights(tmp_path / kind / "control.safetensors")).control
    assert control.kind == {"control_lora": "Control-LoRA", "lite": "ControlNet-lite"}[kind]
    assert all(p.any() for module in control.connections() for p in module.parameters())


def test_the_papers_hint_encoder(data: Dataset, tmp_path: Path):
    fit(quick(hint_encoder="paper"), data, tmp_path)
    assert trained(tmp_path)["input_hint_block.0.weight"].shape[-2:] == (4, 4)


def test_the_file_says_what_was_trained(data: Dataset, tmp_path: Path):
    fit(quick(prediction="v"), data, tmp_path)
    weights, metadata = read_weights(tmp_path / "control.safetensors")
    assert (metadata["trained_steps"], metadata["prediction"]) == ("4", "v")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert load_control(weights, metadata).control.config == CONFIG


def test_the_average_is_what_is_saved(data: Dataset, tmp_path: Path):
    plain, averaged = quick(), quick(ema=0.9)
    assert losses(fit(plain, data, tmp_path / "plain")) == losses(fit(averaged, data, tmp_path / "averaged"))
    last, mean = trained(tmp_path / "plain"), trained(tmp_path / "averaged")
    saved = read_weights(tmp_path / "averaged" / "checkpoints" / "step-00000004.safetensors")[0]
    for key, tensor in mean.items():
        assert torch.equal(tensor, saved[f"average.control.{key}"])
        assert torch.equal(last[key], saved[f"model.control.{key}"])
    # written out for one weight: w(0) = 0, and decay min(0.9, n / (n + 10)) at step n
    key, average = "zero_convs.0.0.bias", torch.zeros(32)
    for step in range(1, 5):
        fit(quick(steps=step), data, tmp_path / str(step))
        decay = step / (step + 10)
        average = decay * average + (1 - decay) * trained(tmp_path / str(step))[key]
    torch.testing.assert_close(mean[key], average)


def test_it_learns(data: Dataset, tmp_path: Path):
    options = quick(
        steps=60, batch_size=5, learning_rate=3e-3, empty_prompts=0.0, timesteps="cubic", save_every=60, warmup=5
    )
    found = losses(fit(options, data, tmp_path))
    first, last = sum(found[:6]) / 6, sum(found[-6:]) / 6
    assert last < 0.6 * first


# -- what is read -----------------------------------------------------------------------------------------------------


def spy(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What `Dataset.read` is asked for."""
    read: list[list[int]] = []
    reading = Dataset.read

    def spied(self: Dataset, indices: Any) -> Any:
        read.append(list(indices))
        return reading(self, indices)

    monkeypatch.setattr(Dataset, "read", spied)
    return read


def test_held_out_items_are_never_trained_on(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    held, learned = data.split(2, seed=0)
    assert len(held) == 2
    assert set(held).isdisjoint(learned)
    read = spy(monkeypatch)
    fit(quick(steps=20, sample_every=20, save_every=20), data, tmp_path)
    sampled = [indices for indices in read if indices == held]
    others = [indices for indices in read if indices != held]
    assert len(sampled) == 4  # to sample and to score, at step 0 and at the end
    assert {index for indices in others for index in indices} == set(learned)


def test_the_data_comes_in_the_order_of_its_batches(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read = spy(monkeypatch)
    fit(quick(steps=3, accumulation=2, seed=4), data, tmp_path)
    _, learned = data.split(2, seed=4)
    expected = Batches(data, learned, 2, 4)
    assert read == [expected[k] for k in range(6)]


def test_accumulation_is_the_mean_over_its_passes(data: Dataset, tmp_path: Path):
    """The loss of a step of two passes is the mean of the two, and so is its gradient."""
    together = fit(quick(steps=1, accumulation=2, clip=0.0, learning_rate=0.0), data, tmp_path / "2")[1]
    apart = fit(quick(steps=2, clip=0.0, learning_rate=0.0, weight_decay=0.0), data, tmp_path / "1")
    assert together.loss == pytest.approx(sum(losses(apart)) / 2, rel=1e-6)
    assert together.gradient_norm is not None
    norms = [progress.gradient_norm for progress in apart if progress.gradient_norm is not None]
    assert together.gradient_norm < sum(norms) / 2  # of a mean of two different gradients


def test_two_passes_of_two_are_one_of_four(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Given the same examples and draws, two accumulated passes and one pass of all give the same step."""
    from zeroconv.controlnet_core.training import objective

    rows = [[0, 1, 2, 3]]
    drawing = objective.draw

    def draw(options: TrainingOptions, number: int, shape: torch.Size, timesteps: int) -> objective.Draws:
        whole = drawing(quick(), 0, torch.Size((4, *shape[1:])), timesteps)
        return whole if shape[0] == 4 else whole.part(slice(2 * number, 2 * number + 2))

    monkeypatch.setattr(inputs.objective, "draw", draw)
    monkeypatch.setattr(Batches, "__getitem__", lambda self, k: rows[0])
    one = fit(quick(steps=1, batch_size=4), data, tmp_path / "one")[1]
    monkeypatch.setattr(Batches, "__getitem__", lambda self, k: rows[0][2 * k : 2 * k + 2])
    two = fit(quick(steps=1, batch_size=2, accumulation=2), data, tmp_path / "two")[1]
    assert two.loss == pytest.approx(one.loss, rel=1e-5)
    assert two.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_empty_prompts_reach_the_network(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float):
    calls: list[Any] = []
    monkeypatch.setattr(ControlledUNet, "forward", count(ControlledUNet.forward, calls))
    read = spy(monkeypatch)
    fit(quick(empty_prompts=share), data, tmp_path)
    for call, indices in zip(calls, list(read), strict=True):
        own = data.read(indices).context
        expected = data.empty_prompt[0].expand_as(own) if share else own
        assert torch.equal(call[3], expected)


# -- precision and memory ---------------------------------------------------------------------------------------------


def test_gradient_checkpointing_gives_the_same_with_less_kept(data: Dataset, tmp_path: Path):
    found = {}
    for checkpointing in (False, True):
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        options = quick(steps=3, gradient_checkpointing=checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found[checkpointing] = losses(fit(options, data, tmp_path / str(checkpointing))), kept
    assert found[True][0] == found[False][0]
    assert equal(trained(tmp_path / "True"), trained(tmp_path / "False"))
    assert found[True][1] < 0.5 * found[False][1]


def test_bf16_keeps_what_is_locked_in_bf16_and_what_is_trained_in_fp32(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept = keep_controlled(monkeypatch)
    full = losses(fit(quick(), data, tmp_path / "fp32"))
    half = losses(fit(quick(precision="bf16"), data, tmp_path / "bf16"))
    assert half == pytest.approx(full, rel=0.02)
    assert half != full
    fit(quick(precision="bf16", unlock_decoder=True), data, tmp_path / "unlocked")
    assert [{p.dtype for p in each.unet.parameters()} for each in kept] == [
        {torch.float32},
        {torch.bfloat16},
        {torch.float32},
    ]
    assert all(p.dtype == torch.float32 for each in kept for p in each.control.parameters())
    assert {tensor.dtype for tensor in trained(tmp_path / "bf16").values()} == {torch.float32}


def test_no_samples_without_held_out_pictures(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read = spy(monkeypatch)
    found = fit(quick(sample_every=2, held_out=0, steps=8), data, tmp_path)
    assert all(progress.fidelity is None and progress.samples is None for progress in found)
    assert {index for indices in read for index in indices} == set(range(len(data)))


# -- what does not go together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (UNetConfig(context_dim=12), "8 wide, without a pooled vector; this model takes them 12 wide"),
        (UNetConfig(context_dim=8, adm_in_channels=60), "takes them 8 wide, with a pooled vector: make the"),
        (UNetConfig(context_dim=8, in_channels=9), "takes 9 channels .inpainting. and a dataset holds latents of 4"),
    ],
)
def test_a_dataset_of_another_model_is_refused(data: Dataset, tmp_path: Path, config: UNetConfig, said: str):
    steps = loop.train(quick(), {}, config, diffusion.alphas_cumprod(), data, tmp_path)
    with pytest.raises((DatasetError, BaseMismatch), match=said):
        next(steps)


def test_a_batch_that_processes_cannot_share_is_refused(data: Dataset, tmp_path: Path):
    shared = loop.Process(0, 2)
    with pytest.raises(OptionsError, match="batch_size 3 cannot be shared by 2 processes: choose a multiple"):
        next(training(quick(batch_size=3), data, tmp_path, process=shared))
