"""A tiny base, a tiny cached dataset and a quick training of both, for tests of training."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zeroconv.controlnet_core.data.caching import CachingOptions, make
from zeroconv.controlnet_core.data.dataset import Dataset
from zeroconv.controlnet_core.data.sources import Item
from zeroconv.controlnet_core.diffusion import alphas_cumprod
from zeroconv.controlnet_core.files import saving
from zeroconv.controlnet_core.files.loading import read_weights
from zeroconv.controlnet_core.networks.unet import UNet, UNetConfig
from zeroconv.controlnet_core.training.loop import Progress, train
from zeroconv.controlnet_core.training.options import TrainingOptions

CONFIG = UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(1, 0), context_dim=8)
"""Two levels, 4 skip connections of 32, 32, 32 and 64 channels: a step of a tenth of a second."""

QUICK: dict[str, Any] = {
    "steps": 4,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "precision": "fp32",
    "save_every": 2,
    "sample_every": 0,
    "held_out": 2,
    "sample_steps": 2,
}
"""Options under which a tiny training takes a second."""


def quick(**options: Any) -> TrainingOptions:
    """QUICK with some options changed."""
    return TrainingOptions(**{**QUICK, **options})


@cache
def base() -> dict[str, Tensor]:
    """The weights of a UNet of CONFIG, none of them zero."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        weights = UNet(CONFIG).state_dict()
        return {key: tensor + 0.02 * torch.randn(tensor.shape) for key, tensor in weights.items()}


def encode_picture(pictures: Tensor) -> Tensor:
    """Latents that are a linear map of the mean colours."""
    colours = torch.tensor([[1.6, -0.6, 0.2], [0.4, 1.8, -0.8], [-1.0, 0.4, 1.4], [0.6, 0.6, 0.6]])
    return torch.einsum("bchw,dc->bdhw", F.avg_pool2d(pictures, 8) - 0.5, colours)


def encode_prompt(prompt: str) -> tuple[Tensor, None]:
    """A context of 4 tokens that depends on the prompt."""
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(sum(map(ord, prompt)))), None


def dataset(folder: Path, count: int = 14, size: int = 32) -> Dataset:
    """Pictures of coarse squares, half of them landscape, each its own hint; made in `folder` where it is not yet."""
    items = []
    for i in range(count):
        height, width = (size, size) if i % 7 < 5 else (size // 2, 2 * size)
        squares = np.random.default_rng(i).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        picture = squares.repeat(8, axis=0).repeat(8, axis=1)
        items.append(Item(f"{i}.png", picture, ("", "squares", "more squares")[i % 3], picture))
    list(make(folder, items, encode_picture, encode_prompt, None, CachingOptions(resolution=size)))
    return Dataset.open(folder)


def fit(options: TrainingOptions, data: Dataset, folder: Path, **others: Any) -> list[Progress]:
    """All that a whole training yields."""
    return list(training(options, data, folder, **others))


def training(options: TrainingOptions, data: Dataset, folder: Path, **others: Any) -> Generator[Progress, None, None]:
    """The training itself, on `base()`."""
    return train(options, base(), CONFIG, alphas_cumprod(), data, folder, **others)


def write_config(folder: Path, data: Path, **options: Any) -> Path:
    """A TOML file in `folder` beside the base that it names; the run goes into `folder / "run"`."""
    weights = {f"model.diffusion_model.{key}": tensor for key, tensor in base().items()}
    saving.write(folder / "base.safetensors", weights, {"num_heads": "8"})
    lines = ['output = "run"', "[model]", 'base = "base.safetensors"', "[data]", f"dataset = '{data}'", "[training]"]
    lines += [f"{key} = {written(value)}" for key, value in {**QUICK, **options}.items()]
    path = folder / "config.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def written(value: Any) -> str:
    """A value as TOML has it."""
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors are the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def left_alike(a: Path, b: Path) -> bool:
    """Whether two trainings left the same weights, bit for bit, with the same metadata."""
    ours, theirs = ({path.name: read_weights(path) for path in run.glob("*.safetensors")} for run in (a, b))
    assert "control.safetensors" in ours
    return ours.keys() == theirs.keys() and all(
        equal(ours[name][0], theirs[name][0]) and ours[name][1] == theirs[name][1] for name in ours
    )


def losses(progresses: list[Progress]) -> list[float]:
    """The loss of each step."""
    return [progress.loss for progress in progresses if progress.loss is not None]
