"""Trainings of seconds: the node on a tiny model and nine pictures, and the same training without the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from graphs import picture
from torch import Tensor

from zeroconv.controlnet_core.data.caching import CachingOptions, make
from zeroconv.controlnet_core.data.dataset import Dataset
from zeroconv.controlnet_core.data.sources import Item
from zeroconv.controlnet_core.diffusion import alphas_cumprod
from zeroconv.controlnet_core.training import loop
from zeroconv.controlnet_core.training.options import TrainingOptions

if TYPE_CHECKING:
    from hosting import Host

SIZE = 64
WIDGETS: dict[str, Any] = {
    "steps": 4,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "precision": "fp32",
    "warmup": 0,
    "gradient_checkpointing": False,
    "sample_every": 2,
    "held_out": 2,
    "save_every": 100,
}
"""A training of seconds."""
RARER = {"sample_steps": 1, "timesteps": "cubic"}
OPTIONS = TrainingOptions(**WIDGETS, **RARER)


@pytest.fixture(scope="module")
def model(host: Host) -> Any:
    return small_model("sd15")


def small_model(family: str) -> Any:
    from tiny_models import tiny_model

    return tiny_model(family, channel_mult=[1, 1, 1, 1])


@pytest.fixture(scope="module")
def encoders(host: Host) -> dict[str, Any]:
    """The lab's CLIP and VAE, which go with the tiny models."""
    _, clip, vae = host.call("LoadLabModel")
    return {"clip": clip, "vae": vae}


@pytest.fixture(scope="module")
def dataset(encoders: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return cached(tmp_path_factory.mktemp("data") / "nine", **encoders)


def cached(folder: Path, clip: Any, vae: Any, hints: str = "given", count: int = 9) -> Dataset:
    """Nine blurred pictures with blurred hints and three prompts."""
    from zeroconv.nodes.host import dataset as host_dataset

    pictures, drawn = ((picture(seed, 9, SIZE, SIZE).numpy() * 255).astype(np.uint8) for seed in (1, 2))
    prompts = ("", "a red ball", "a blue cube")
    items = [Item(f"{i}", pictures[i], prompts[i % 3], drawn[i]) for i in range(count)]

    for _ in make(folder, items, *host_dataset.encoders(vae, clip), None, CachingOptions(SIZE, hints=hints)):
        pass
    return Dataset.open(folder)


@pytest.fixture(autouse=True)
def output(host: Host, tmp_path: Path) -> Iterator[Path]:
    """The folder of runs, this test's own; the controls that it trains are taken away."""
    import folder_paths

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    yield tmp_path / "zeroconv" / "training"
    folder_paths.set_output_directory(before)
    for path in (host.folder / "zeroconv").glob("*"):
        path.unlink()


Run = Callable[..., tuple]


@pytest.fixture
def run(host: Host, model: Any, encoders: dict[str, Any], dataset: Dataset) -> Run:
    """The node's outputs for other inputs than the usual: control, plot, samples, file name."""

    def call(**inputs: Any) -> tuple:
        given = {"model": model, **encoders, "dataset": dataset, "name": "mine", "options": RARER, **WIDGETS}
        return host.call("TrainControlNet", **{**given, **inputs})

    return call


def losses(folder: Path) -> list[str]:
    """Step and loss of each row of the log, as they are written."""
    rows = [row.split(",") for row in (folder / "losses.csv").read_text(encoding="utf-8").splitlines()]
    return [f"{row[0]} {row[rows[0].index('loss')]}" for row in rows[1:]]


def trained_by_the_core(
    model: Any, weights: dict[str, Tensor], dataset: Dataset, folder: Path, **options: Any
) -> list[str]:
    """The losses of the same training without the host, as `losses` gives them."""
    from zeroconv.nodes.host.models import unet_config

    wanted = replace(OPTIONS, **options)
    config = unet_config(model.model, "", None)
    steps = list(loop.train(wanted, weights, config, alphas_cumprod(), dataset, folder))
    return [f"{step.step} {step.loss!r}" for step in steps if step.loss is not None]


def weights_of(model: Any) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in model.model.diffusion_model.state_dict().items()}


def assert_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def cancel_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Press Cancel while this step is shown."""
    import comfy.model_management

    from zeroconv.nodes.host.watching import Watch

    see = Watch.see

    def seen(self: Any, progress: Any) -> None:
        if progress.step == step:
            comfy.model_management.interrupt_current_processing()
        see(self, progress)

    monkeypatch.setattr(Watch, "see", seen)
