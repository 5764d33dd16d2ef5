"""What a pass hands to the networks: its share of the items, their draws, and the text that goes with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..data.dataset import Batch, Batches, Dataset, TextEmbedding
from ..data.manifest import DatasetError
from ..networks.layers import timestep_embedding
from ..networks.unet import UNetConfig
from . import objective
from .distributed import Process
from .options import TrainingOptions


@dataclass(frozen=True)
class Inputs:
    """One pass over B examples, all of it tensors.

    `latents` and `noise` (B,4,h,w), `timesteps` (B,), `context` (B,T,C), `hint_bytes` (B,3,8h,8w) uint8, and SDXL's
    vector `y` (B,D), None for other families.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    context: Tensor
    hint_bytes: Tensor
    y: Tensor | None


@dataclass(frozen=True, eq=False)
class Passes:
    """The passes of a training: `passes[k]` are the inputs of the k-th on the CPU, whatever was asked before.

    Of the batch each process takes its share. `timesteps` is their number, that of the noise schedule.
    """

    dataset: Dataset
    batches: Batches
    options: TrainingOptions
    process: Process
    timesteps: int

    def __getitem__(self, k: int) -> Inputs:
        items = self.batches[k]
        share = self.process.share(len(items))
        batch = self.dataset.read(items[share])
        # Drawn for the whole batch, so that the number of processes changes nothing.
        shape = torch.Size((len(items), *batch.latents.shape[1:]))
        draws = objective.draw(self.options, k, shape, self.timesteps).part(share)
        context, pooled = text_embeddings(batch, draws.empty_prompts, self.dataset.empty_prompt)
        return Inputs(
            batch.latents, draws.noise, draws.timesteps, context, batch.hint_bytes, sdxl_vector(pooled, batch.sizes)
        )


class Ahead:
    """`passes`, each read and drawn in a thread while the one before it is trained on; there are `count` of them.

    For a CUDA device they come in memory from which it copies by itself.
    """

    def __init__(self, passes: Passes, count: int):
        self._passes, self._count = passes, count
        self._pinned = passes.process.device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, "passes")
        self._next: tuple[int, Future[Inputs]] | None = None

    def __getitem__(self, k: int) -> Inputs:
        known = self._next is not None and self._next[0] == k
        found = self._next[1] if known and self._next else self._thread.submit(self._read, k)
        inputs = found.result()
        self._next = (k + 1, self._thread.submit(self._read, k + 1)) if k + 1 < self._count else None
        return inputs

    def _read(self, k: int) -> Inputs:
        inputs = self._passes[k]
        if not self._pinned:
            return inputs
        tensors = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
        return replace(inputs, **{name: x.pin_memory() for name, x in tensors.items() if x is not None})

    def close(self) -> None:
        """Let go of the thread, once it has read what it reads now."""
        self._thread.shutdown(cancel_futures=True)


FIXED = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where in the noise schedule a held-out loss is measured."""


def fixed(dataset: Dataset, items: Sequence[int], options: TrainingOptions, timesteps: int) -> Iterator[Inputs]:
    """The held-out `items` with their own prompts, at each of FIXED, from noise that follows from the seed alone."""
    batch = dataset.read(items)
    context, pooled = text_embeddings(batch, torch.zeros(len(items), dtype=torch.bool), dataset.empty_prompt)
    y = sdxl_vector(pooled, batch.sizes)
    for number, share in enumerate(FIXED):
        generator = torch.Generator().manual_seed(options.seed + number)
        noise = torch.randn(batch.latents.shape, generator=generator)
        at = torch.full((len(items),), int(share * timesteps))
        yield Inputs(batch.latents, noise, at, context, batch.hint_bytes, y)


def text_embeddings(batch: Batch, empty: Tensor, empty_prompt: TextEmbedding) -> tuple[Tensor, Tensor | None]:
    """Context (B,T,C) and pooled embedding (B,D) of the batch, those of the empty prompt where `empty` (B,) says so."""
    context, pooled = empty_prompt
    # Attention over a context that is repeated as a whole is the same.
    repeats = batch.context.shape[1] // context.shape[0]
    chosen = torch.where(empty[:, None, None], context.repeat(repeats, 1)[None], batch.context)
    if batch.pooled is None or pooled is None:
        return chosen, None
    return chosen, torch.where(empty[:, None], pooled[None], batch.pooled)


def sdxl_vector(pooled: Tensor | None, sizes: Tensor | None) -> Tensor | None:
    """SDXL's vector y (B, D + 6*256): pooled text, then sizes and crop as sinusoids; `None` for other families.

    (Stability-AI/generative-models, sgm/modules/encoders/modules.py.)
    """
    if pooled is None or sizes is None:
        return None
    numbers = timestep_embedding(sizes.flatten().float(), 256).reshape(len(pooled), -1)
    return torch.cat([pooled, numbers.to(pooled)], dim=1)


def check_text_embeddings(dataset: Dataset, config: UNetConfig) -> None:
    """Raise DatasetError unless the dataset's text embeddings are of the kind that this UNet takes."""
    context, pooled = dataset.empty_prompt
    if context.shape[1] != config.context_dim or (pooled is None) != (config.adm_in_channels is None):
        kind = f"{context.shape[1]} wide, {'without' if pooled is None else 'with'} a pooled vector"
        wanted = f"{config.context_dim} wide, {'without' if config.adm_in_channels is None else 'with'} a pooled vector"
        raise DatasetError(
            f"{dataset.folder} holds text embeddings {kind}; this model takes them {wanted}: make the dataset again "
            "with the model's own CLIP and VAE"
        )
