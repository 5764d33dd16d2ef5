"""Steps that are made part by part: the same numbers, the state elsewhere, and bf16 weights that still move."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from zeroconv.controlnet_core.data.dataset import Dataset
from zeroconv.controlnet_core.files.loading import read_weights
from zeroconv.controlnet_core.training import parts
from zeroconv.controlnet_core.training.parts import InParts, rounded

from ... import second_device
from .tiny import dataset, equal, fit, left_alike, quick, training


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def second() -> Iterator[torch.device]:
    with second_device.on() as device:
        yield device


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# -- rounding ---------------------------------------------------------------------------------------------------------


def test_rounding_goes_to_a_neighbour_and_its_mean_is_the_number():
    """Between 1 and 1 + 2^-7, the next bf16, at a quarter of the way."""
    x = torch.full((40_000,), 1 + 2**-9)
    found = rounded(x, seeded())
    assert found.dtype == torch.bfloat16
    assert found.float().unique().tolist() == [1, 1 + 2**-7]
    assert (found.float() > 1).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert rounded(-x, seeded()).float().mean().item() == pytest.approx(-1 - 2**-9, abs=1e-4)


def test_what_bf16_has_stays():
    x = torch.tensor([0.0, 1.0, -2.5, 2.0**-100, float("inf")])
    assert torch.equal(rounded(x, seeded()).float(), x.bfloat16().float())


def test_steps_too_small_for_bf16_are_made_in_the_mean():
    """1000 steps of 1e-5 from 1: to the nearest, none of them would move anything."""
    p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    sgd = InParts(torch.optim.SGD([p], lr=1e-5), in_ram=False, seed=0)
    for _ in range(1000):
        p.grad = torch.ones_like(p)
        sgd.step()
    assert p.dtype == torch.bfloat16
    assert p.float().mean().item() == pytest.approx(1 - 1000 * 1e-5, abs=1e-3)
    nearest = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(1000):
        nearest -= 1e-5
    assert nearest.item() == 1


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_part_by_part_gives_the_numbers_of_all_at_once(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
):
    monkeypatch.setattr(parts, "AT_ONCE", 20_000)
    whole = fit(quick(optimizer=optimizer, unlock_decoder=True), data, tmp_path / "whole")
    found = fit(quick(optimizer=optimizer, unlock_decoder=True, optimizer_in_ram=True), data, tmp_path / "parts")
    assert [progress.loss for progress in found] == [progress.loss for progress in whole]
    assert left_alike(tmp_path / "parts", tmp_path / "whole")


def test_the_state_lies_in_main_memory_between_steps(second: torch.device):
    p = nn.Parameter(torch.ones(3, 3, device=second))
    adam = InParts(torch.optim.AdamW([p], lr=1e-2, foreach=False), in_ram=True, seed=0)
    expected = nn.Parameter(torch.ones(3, 3))
    plain = torch.optim.AdamW([expected], lr=1e-2, foreach=False)
    for _ in range(3):
        p.grad, expected.grad = torch.full((3, 3), 0.5, device=second), torch.full((3, 3), 0.5)
        adam.step()
        plain.step()
        assert {key: adam.state[p][key].device.type for key in ("exp_avg", "exp_avg_sq")} == {
            "exp_avg": "cpu",
            "exp_avg_sq": "cpu",
        }
    assert p.device == second
    assert torch.equal(p.detach().cpu(), expected.detach())
    kept = {id(value) for value in adam.state[p].values()}
    p.grad = torch.ones(3, 3, device=second)
    adam.step()
    assert {id(adam.state[p][key]) for key in ("exp_avg", "exp_avg_sq")} <= kept  # no new memory for each step


def test_bf16_weights_train_as_fp32_ones_do(data: Dataset, tmp_path: Path):
    options = {"precision": "bf16", "learning_rate": 1e-4, "steps": 8, "ema": 0.9}
    full = fit(quick(**options), data, tmp_path / "fp32")
    half = fit(quick(**options, control_weights="bf16"), data, tmp_path / "bf16")
    assert [p.loss for p in half[1:]] == pytest.approx([p.loss for p in full[1:]], rel=0.01)
    weights = read_weights(tmp_path / "bf16" / "checkpoints" / "step-00000008.safetensors")[0]
    dtypes = {name.split(".")[0]: tensor.dtype for name, tensor in weights.items() if tensor.ndim > 1}
    assert dtypes == {"model": torch.bfloat16, "optimizer": torch.float32, "average": torch.float32}
    ours, theirs = (read_weights(tmp_path / name / "control.safetensors")[0] for name in ("bf16", "fp32"))
    moved = "zero_convs.0.0.weight"
    torch.testing.assert_close(ours[moved].float(), theirs[moved], rtol=0.1, atol=1e-4)
    assert ours[moved].any()


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer_in_ram": True, "ema": 0.9},
        {"precision": "bf16", "control_weights": "bf16", "optimizer": "adafactor"},
        {"precision": "bf16", "control_weights": "bf16", "base_weights": "fp8", "gradient_checkpointing": True},
    ],
    ids=lambda options: " ".join(options),
)
def test_a_run_that_is_resumed_is_the_run_that_never_stopped(data: Dataset, tmp_path: Path, options: dict):
    whole = fit(quick(**options), data, tmp_path / "whole")
    steps = training(quick(**options), data, tmp_path / "run")
    found = [progress for _, progress in zip(range(3), steps)]
    steps.close()
    found += fit(quick(**options), data, tmp_path / "run")
    assert [progress.loss for progress in found] == [progress.loss for progress in whole]
    assert left_alike(tmp_path / "run", tmp_path / "whole")


def test_a_run_may_go_on_with_its_state_elsewhere(data: Dataset, tmp_path: Path):
    whole = fit(quick(), data, tmp_path / "whole")
    fit(quick(steps=2), data, tmp_path / "run")
    found = fit(quick(optimizer_in_ram=True), data, tmp_path / "run")
    assert [progress.loss for progress in found] == [progress.loss for progress in whole[3:]]
    ours, theirs = (read_weights(tmp_path / name / "control.safetensors")[0] for name in ("run", "whole"))
    assert equal(ours, theirs)


def test_gradients_reach_a_bf16_weight_where_they_did_before_a_step():
    """DistributedDataParallel hangs its exchange on a weight's accumulator; another one would exchange nothing."""
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    adam = InParts(torch.optim.AdamW([p]), in_ram=False, seed=0)

    def accumulator() -> object:
        return p.view_as(p).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

    before = accumulator()
    for _ in range(2):
        p.square().sum().backward()
        adam.step()
        assert accumulator() is before
    assert (p < 1).any() and list(adam.state) == [p] and adam.state[p]["exp_avg"].dtype == torch.float32
