"""The graphs that these tests run and what comes of a run; nothing here imports the host, so tests can be collected."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Of the largest latent value. On a GPU in half precision test_cuda.py sets a wider one.
TOLERANCE = float(os.environ.get("ZEROCONV_HOST_TOLERANCE", "1e-4"))
MOVES = 0.05  # what control must at least do to the latent, or a test of it proves nothing

STEPS = 4  # of a sampling that does not say

CONTEXT = 64  # width of the tiny models' text embeddings
POOLED = 64  # and of the pooled one

WAYS = ("ApplyControl", "ApplyControlToPrompt", "StackControls", "StackControlsToPrompt")


@dataclass(frozen=True)
class Control:
    """One control of a graph: which file, which seeded hint of which (batch, height, width), how strong and when."""

    file: str = "depth"
    hint: int = 1
    size: tuple[int, int, int] = (1, 128, 128)
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)  # inputs that only our nodes have

    @property
    def image(self) -> Tensor:
        """The hint, (B,H,W,3) in 0..1."""
        return picture(self.hint, *self.size)


@dataclass(frozen=True)
class Scene:
    """What goes into a sampler."""

    model: Any
    positive: list
    negative: list


@dataclass(frozen=True)
class Event:
    """One forward pass: `what` ("unet", "control" or "hint") at which sigma, on how many samples, of which module."""

    what: str
    sigma: float | None
    batch: int
    module: int = 0


@dataclass(frozen=True)
class Run:
    """One sampling: its latent, the sigmas given to the sampler, and the forward passes in order."""

    latent: Tensor
    sigmas: list[float]
    events: list[Event]

    def count(self, what: str) -> int:
        """How many forward passes of this kind ran."""
        return sum(event.what == what for event in self.events)

    def calls(self, what: str) -> list[tuple[float | None, int]]:
        """(sigma, samples) of each forward pass of this kind."""
        return [(event.sigma, event.batch) for event in self.events if event.what == what]


def picture(seed: int, batch: int = 1, height: int = 128, width: int = 128) -> Tensor:
    """A seeded hint, (B,H,W,3) in 0..1: coarse blobs, so that resizing it does not change it beyond recognition."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, height // 16, width // 16, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear").movedim(1, -1).contiguous()


def prompt(seed: int) -> list:
    """A seeded CONDITIONING of one entry."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, 7, CONTEXT, generator=generator)
    return [[context, {"pooled_output": torch.randn(1, POOLED, generator=generator)}]]


def latent(batch: int = 1, height: int = 16, width: int = 16) -> dict[str, Tensor]:
    """An empty LATENT."""
    return {"samples": torch.zeros(batch, 4, height, width)}


def moved(run: Run, without: Run) -> float:
    """How far control moves the latent, relative to its size."""
    return float((run.latent - without.latent).norm() / without.latent.norm())


def off_by(run: Run, reference: Run) -> float:
    """The largest difference between two latents, in parts of the largest reference value."""
    return float((run.latent - reference.latent).abs().max() / reference.latent.abs().max())


def assert_same(run: Run, reference: Run, without: Run) -> None:
    """`run` gives what `reference` gives, in as many UNet calls, and control does something in it."""
    assert moved(reference, without) >= MOVES, f"control moves the latent by {moved(reference, without):.2%} only"
    assert off_by(run, reference) <= TOLERANCE
    assert run.calls("unet") == reference.calls("unet")
