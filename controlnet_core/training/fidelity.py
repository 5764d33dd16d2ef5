"""Does a sample follow its hint? Held-out pictures sampled from fixed noise, and scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.dataset import Batch, Dataset, TextEmbedding, to_device
from ..diffusion import guide, sample_ddim
from .controlled_unet import ControlledUNet
from .distributed import ALONE, Process
from .inputs import sdxl_vector, text_embeddings
from .options import TrainingOptions

Score = Callable[[Tensor, Batch], float]
"""(sampled latents (B,4,h,w), the held-out items), on the CPU -> how well samples follow hints; higher is better."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The pictures `items` of a dataset that are never trained on: sampled now and then, and scored.

    With them the user's own `prompts`, each a batch of one item, are sampled, and not scored. Many processes take turns
    with all of it.
    """

    dataset: Dataset
    items: Sequence[int]
    alphas: Tensor
    options: TrainingOptions
    score: Score
    prompts: Sequence[Batch] = ()
    process: Process = ALONE

    def is_due(self, step: int) -> bool:
        """Whether they are sampled after this step."""
        every = self.options.sample_every
        return bool(self.items or self.prompts) and every > 0 and (step % every == 0 or step == self.options.steps)

    def times_due(self, step: int) -> int:
        """How often they are still sampled after this step."""
        every, last = self.options.sample_every, self.options.steps
        if not (self.items or self.prompts) or every == 0 or step >= last:
            return 0
        return last // every - step // every + (last % every > 0)

    def measure(self, controlled: ControlledUNet) -> tuple[float, Tensor] | tuple[None, None]:
        """The score of samples of them all, and these samples: latents (B,4,h,w), on the CPU.

        All processes sample, and the first alone is given them.
        """
        batch = self.dataset.read(self.items)
        found = self.process.divided(len(self.items), lambda own: self._sampled(controlled, _of(batch, own), own))
        if not found:
            return None, None
        samples = torch.stack(found)
        return self.score(samples, batch), samples

    def sample_prompts(self, controlled: ControlledUNet) -> tuple[Tensor, ...]:
        """A sample of each of the user's own prompts, one after the other: latents (1,4,h,w), on the CPU.

        All processes sample, and the first alone is given them.
        """
        return tuple(
            self.process.divided(
                len(self.prompts), lambda own: (self._sampled(controlled, self.prompts[i], range(1)) for i in own)
            )
        )

    def _sampled(self, controlled: ControlledUNet, batch: Batch, places: Sequence[int]) -> Tensor:
        device = self.alphas.device
        context, pooled = self.dataset.empty_prompt
        empty_prompt = context.to(device), None if pooled is None else pooled.to(device)
        with self.options.autocast(device):
            return sample(controlled, to_device(batch, device), places, empty_prompt, self.alphas, self.options).cpu()


def _of(batch: Batch, own: range) -> Batch:
    """These items of a batch."""
    tensors = {each.name: getattr(batch, each.name) for each in fields(batch)}
    return replace(batch, **{name: x[own.start : own.stop : own.step] for name, x in tensors.items() if x is not None})


@torch.no_grad()
def sample(
    controlled: ControlledUNet,
    batch: Batch,
    places: Sequence[int],
    empty_prompt: TextEmbedding,
    alphas: Tensor,
    options: TrainingOptions,
) -> Tensor:
    """Latents (B,4,h,w) for the items of `batch`, with prompt and hint, each from the noise of its place and the seed.

    `empty_prompt` is for the other half of guidance; the control is on both.
    """
    shape, device = batch.latents.shape, batch.latents.device
    noise = torch.stack(
        [torch.randn(shape[1:], generator=torch.Generator().manual_seed(options.seed + place)) for place in places]
    ).to(device)
    guided = options.guidance_scale != 1
    own, empty = (torch.full((shape[0],), flag, device=device) for flag in (False, True))
    halves = [text_embeddings(batch, half, empty_prompt) for half in ([own, empty] if guided else [own])]
    context = torch.cat([context for context, _ in halves])
    vectors = [y for _, pooled in halves if (y := sdxl_vector(pooled, batch.sizes)) is not None]
    y = torch.cat(vectors) if vectors else None
    guided_hint = controlled.control.encode_hint(batch.hints).repeat(len(halves), 1, 1, 1)

    def predict(x: Tensor, timesteps: Tensor) -> Tensor:
        n = len(halves)
        found = controlled.predict(x.repeat(n, 1, 1, 1), timesteps.repeat(n), context, guided_hint, y).float()
        if not guided:
            return found
        cond, uncond = found.chunk(2)
        return guide(cond, uncond, options.guidance_scale)

    return sample_ddim(predict, noise, alphas, options.sample_steps, options.prediction)


def structure(samples: Tensor, batch: Batch) -> float:
    """How far samples change where the pictures of their hints change: a mean correlation, 1 at most, 0 by chance.

    Compares the size of the latents' gradients, not the latents: a hint tells where things are, the prompt what colour
    they have. No VAE, no annotator, and any kind of hint.
    """
    ours, theirs = (_edges(latents) for latents in (samples, batch.latents))
    return F.cosine_similarity(ours, theirs, dim=1).mean().item()


def _edges(latents: Tensor) -> Tensor:
    """The length of the gradient at each pixel, over all channels, slightly blurred: (B, n) of mean 0."""
    x = latents.float()
    across, down = x[..., 1:, 1:] - x[..., 1:, :-1], x[..., 1:, 1:] - x[..., :-1, 1:]
    length = (across.square() + down.square()).sum(1, keepdim=True).sqrt()
    length = F.avg_pool2d(length, 3, stride=1, padding=1, count_include_pad=False).flatten(1)
    return length - length.mean(1, keepdim=True)
