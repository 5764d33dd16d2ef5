"""A training step of ours is one written with diffusers' public API: loss, every gradient, and the weights after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from zeroconv.controlnet_core import diffusion
from zeroconv.controlnet_core.data.dataset import Batch
from zeroconv.controlnet_core.files.layouts import from_diffusers, to_diffusers
from zeroconv.controlnet_core.keys import Weights
from zeroconv.controlnet_core.networks.unet import UNetConfig
from zeroconv.controlnet_core.training import loop, objective
from zeroconv.controlnet_core.training.controlled_unet import ControlledUNet, build
from zeroconv.controlnet_core.training.inputs import sdxl_vector, text_embeddings
from zeroconv.controlnet_core.training.options import TrainingOptions

from ..networks.test_parity_diffusers import random_weights, their_unet
from ..small import SMALL, assert_within, relative_change

CONFIGS = {
    # With one channel in each group a norm would take out the biases before it, whose gradients were 0.
    "SD1.x": replace(SMALL["SD1.x"], model_channels=64, channel_mult=(1, 2, 2, 2)),
    "SD2.x": SMALL["SD2.x"],
    # The sizes' sinusoids are 256 numbers each.
    "SDXL": replace(SMALL["SDXL"], transformer_depth=(0, 1, 2), transformer_depth_middle=2, adm_in_channels=2816),
}
SIDE = 16
HINT = "controlnet_cond_embedding."
ALPHAS = diffusion.alphas_cumprod()
ITEMS, PASS = [0, 5], 4
"""The batch of the comparisons of one pass, and a pass that leaves out some of the prompts."""


@dataclass
class Data:
    """What training asks of a dataset, with items that are seeded random numbers of one size."""

    config: UNetConfig
    hint_channels: int = 3
    fingerprint: str = "seeded"

    @property
    def stamps(self) -> dict[str, str]:
        return {}

    def __len__(self) -> int:
        return 6

    def bucket_of(self, index: int) -> tuple[int, int]:
        return 8 * SIDE, 8 * SIDE

    def split(self, held_out: int, seed: int) -> tuple[list[int], list[int]]:
        assert held_out == 0
        return [], list(range(len(self)))

    def _text(self, seed: int) -> tuple[Tensor, Tensor | None]:
        random = torch.Generator().manual_seed(100 + seed)
        context = torch.randn(5, self.config.context_dim, generator=random)
        sdxl = self.config.adm_in_channels is not None
        return context, torch.randn(2816 - 6 * 256, generator=random) if sdxl else None

    @property
    def empty_prompt(self) -> tuple[Tensor, Tensor | None]:
        return self._text(0)

    def read(self, indices: list[int]) -> Batch:
        items = []
        for index in indices:
            random = torch.Generator().manual_seed(index)
            latents = torch.randn(4, SIDE, SIDE, generator=random)
            hints = torch.randint(0, 256, (3, 8 * SIDE, 8 * SIDE), dtype=torch.uint8, generator=random)
            sizes = torch.tensor([512 + 64 * index, 640, 4 * index, 0, 512, 512], dtype=torch.int32)
            items.append((latents, hints, sizes, *self._text(1 + index)))
        latents, hints, sizes, context, pooled = zip(*items)
        sdxl = self.config.adm_in_channels is not None
        return Batch(
            latents=torch.stack(latents),
            context=torch.stack(context),
            pooled=torch.stack(pooled) if sdxl else None,
            sizes=torch.stack(sizes) if sdxl else None,
            hint_bytes=torch.stack(hints),
            prompts=1 + torch.tensor(indices),
        )


# -- the peer ---------------------------------------------------------------------------------------------------------


@dataclass
class Peer:
    """ControlNet training with diffusers: a locked UNet, the ControlNet that begins as its copy, DDPM's noise."""

    unet: Any
    control: Any
    scheduler: Any

    @classmethod
    def make(cls, unet: Any, prediction: str) -> Peer:
        from diffusers.models.controlnets.controlnet import ControlNetModel
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        scheduler = DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction],
        )
        unet.requires_grad_(False).zero_grad()
        return cls(unet, ControlNetModel.from_unet(unet).train(), scheduler)

    def predict(self, noisy: Tensor, timesteps: Tensor, context: Tensor, hints: Tensor | None, added: Any) -> Tensor:
        """The UNet's prediction with the ControlNet, and without it where there are no hints."""
        residuals: dict[str, Any] = {}
        if hints is not None:
            skips, middle = self.control(noisy, timesteps, context, hints, added_cond_kwargs=added, return_dict=False)
            residuals = {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}
        return self.unet(noisy, timesteps, context, added_cond_kwargs=added, **residuals).sample

    def inputs(self, batch: Batch, draws: objective.Draws, empty: tuple[Tensor, Tensor | None]) -> tuple[Any, ...]:
        """What the networks are called with but for the hints: noisy latents, timesteps, context, SDXL's additions."""
        noisy = self.scheduler.add_noise(batch.latents, draws.noise, draws.timesteps)
        context, pooled = batch.context.clone(), None if batch.pooled is None else batch.pooled.clone()
        for i, dropped in enumerate(draws.empty_prompts.tolist()):
            if dropped:
                context[i] = empty[0]
                if pooled is not None:
                    pooled[i] = empty[1]
        return noisy, draws.timesteps, context, {"text_embeds": pooled, "time_ids": batch.sizes}

    def loss(self, batch: Batch, draws: objective.Draws, empty: tuple[Tensor, Tensor | None]) -> Tensor:
        noisy, timesteps, context, added = self.inputs(batch, draws, empty)
        if self.scheduler.config.prediction_type == "epsilon":
            target = draws.noise
        else:
            target = self.scheduler.get_velocity(batch.latents, draws.noise, timesteps)
        return F.mse_loss(self.predict(noisy, timesteps, context, batch.hints, added).float(), target.float())

    def gradients(self) -> Weights:
        """All gradients there are, as ours are called."""
        found: Weights = {}
        for prefix, network in (("control.", self.control), ("unet.", self.unet)):
            grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
            found |= {prefix + name: grad for name, grad in _renamed(grads, network).items()}
        return found


def _renamed(tensors: Weights, network: nn.Module) -> Weights:
    """Tensors of some parameters of a network of diffusers under our names, which depend on all keys there are."""
    whole = {name: tensors.get(name) for name in network.state_dict()}
    return {name: tensor for name, tensor in from_diffusers(whole).items() if tensor is not None}  # type: ignore[arg-type]


# -- both -------------------------------------------------------------------------------------------------------------


@cache
def base(layout: str) -> nn.Module:
    """diffusers' UNet with seeded random weights, which no training changes."""
    return random_weights(their_unet, CONFIGS[layout])


def both(layout: str, prediction: str = "eps", **settings: Any) -> tuple[Peer, ControlledUNet, TrainingOptions]:
    """The peer and ours on the same seeded base, each with the control that it makes of it."""
    config = CONFIGS[layout]
    unet = base(layout)
    plain: dict[str, Any] = {"precision": "fp32", "sample_every": 0, "held_out": 0}
    options = TrainingOptions(batch_size=2, prediction=prediction, **plain, **settings)
    controlled = build(options, from_diffusers(unet.state_dict()), config, hint_channels=3)
    return Peer.make(unet, prediction), controlled, options


@torch.no_grad()
def trained(peer: Peer, controlled: ControlledUNet) -> None:
    """Give both controls the same zero convolutions and hint encoder, as if they had been trained."""
    random = torch.Generator().manual_seed(11)
    for name, parameter in peer.control.named_parameters():
        if name.startswith(HINT) and parameter.ndim == 4:
            scale = (2 / parameter[0].numel()) ** 0.5  # so that the hint gets through
        elif name.startswith((HINT, "controlnet_down_blocks.", "controlnet_mid_block.")):
            scale = 0.1
        else:
            continue
        parameter.copy_(torch.randn(parameter.shape, generator=random) * scale)
    controlled.control.load_state_dict(from_diffusers(peer.control.state_dict()))


def our_loss(controlled: ControlledUNet, data: Data, options: TrainingOptions) -> Tensor:
    """The loss of `PASS`, put together as the loop does it."""
    batch: Batch = data.read(ITEMS)
    draws = draws_of(options, PASS, batch)
    context, pooled = text_embeddings(batch, draws.empty_prompts, data.empty_prompt)
    noisy = diffusion.add_noise(batch.latents, draws.noise, draws.timesteps, ALPHAS)
    predicted = controlled(noisy, draws.timesteps, context, batch.hints, sdxl_vector(pooled, batch.sizes))
    wanted = objective.target(options.prediction, batch.latents, draws.noise, draws.timesteps, ALPHAS)
    return objective.loss(predicted, wanted, objective.weights(options, draws.timesteps, ALPHAS))


def draws_of(options: TrainingOptions, number: int, batch: Batch) -> objective.Draws:
    return objective.draw(options, number, batch.latents.shape)


@pytest.fixture(params=list(CONFIGS))
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_new_control_is_the_one_that_diffusers_makes(layout: str):
    peer, controlled, _ = both(layout)
    ours, theirs = controlled.control.state_dict(), from_diffusers(peer.control.state_dict())
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        if not name.startswith("input_hint_block."):  # begins at random but for its last layer
            assert torch.equal(ours[name], tensor), name
    assert not theirs["zero_convs.3.0.weight"].any() and theirs["middle_block.0.in_layers.2.weight"].any()


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_loss_and_gradients_agree(layout: str, prediction: str):
    peer, controlled, options = both(layout, prediction)
    trained(peer, controlled)
    data = Data(CONFIGS[layout])
    batch = data.read(ITEMS)
    draws = draws_of(options, PASS, batch)
    assert 0 < draws.empty_prompts.sum() < 2  # both kinds of prompt
    assert_control_matters(peer, batch, draws, data)

    theirs = peer.loss(batch, draws, data.empty_prompt)
    theirs.backward()
    ours = our_loss(controlled, data, options)
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert_gradients_agree(controlled, peer)
    assert all(parameter.grad is None for parameter in controlled.unet.parameters())


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_gradients_of_an_unlocked_decoder_agree(prediction: str):
    peer, controlled, options = both("SD2.x", prediction, unlock_decoder=True)
    trained(peer, controlled)
    for part in (peer.unet.up_blocks, peer.unet.conv_norm_out, peer.unet.conv_out):
        part.requires_grad_(True)
    data = Data(CONFIGS["SD2.x"])
    batch = data.read(ITEMS)
    peer.loss(batch, draws_of(options, PASS, batch), data.empty_prompt).backward()
    our_loss(controlled, data, options).backward()
    assert_gradients_agree(controlled, peer)
    assert {name.split(".")[0] for name, p in controlled.unet.named_parameters() if p.grad is not None} == {
        "output_blocks",
        "out",
    }


def test_the_comparison_tells_another_step_from_this_one():
    """What a wrong target, a prompt too much or another pass would do to the gradients is far beyond the tolerance."""
    peer, controlled, options = both("SD1.x")
    trained(peer, controlled)
    data = Data(CONFIGS["SD1.x"])
    batch = data.read(ITEMS)
    peer.loss(batch, draws_of(options, PASS, batch), data.empty_prompt).backward()
    for other in (replace(options, prediction="v"), replace(options, empty_prompts=1.0), replace(options, seed=1)):
        controlled.zero_grad()
        our_loss(controlled, data, other).backward()
        with pytest.raises(AssertionError, match="off by"):
            assert_gradients_agree(controlled, peer)


@torch.no_grad()
def assert_control_matters(peer: Peer, batch: Batch, draws: objective.Draws, data: Data) -> None:
    """Control moves the peer's prediction by 5 % or more, and so does the hint alone."""
    noisy, timesteps, context, added = peer.inputs(batch, draws, data.empty_prompt)
    lit = peer.predict(noisy, timesteps, context, batch.hints, added)
    for without in (None, torch.zeros_like(batch.hints)):
        assert relative_change(peer.predict(noisy, timesteps, context, without, added), lit) >= 0.05


def assert_gradients_agree(controlled: ControlledUNet, peer: Peer) -> None:
    """Each of our gradients is the peer's to 1e-4 of its largest number; every trained parameter has one, not 0."""
    theirs = peer.gradients()
    ours = {name: p.grad for name, p in controlled.named_parameters() if p.requires_grad}
    assert set(ours) == set(theirs)
    for name, grad in ours.items():
        assert grad is not None and grad.any(), name
        assert_within(grad, theirs[name], 1e-4)


# -- a few steps ------------------------------------------------------------------------------------------------------


def test_training_from_the_beginning_agrees(tmp_path: Path):
    """Three steps of the loop, from zero convolutions on: losses, gradient norms and weights."""
    settings: dict[str, Any] = {"steps": 3, "accumulation": 2, "learning_rate": 1e-3, "clip": 0.1}
    config, data = CONFIGS["SD1.x"], Data(CONFIGS["SD1.x"])
    peer, controlled, options = both("SD1.x", **settings)
    peer.control.load_state_dict(to_diffusers(controlled.control.state_dict(), config))  # the same random hint encoder
    before = {name: tensor.clone() for name, tensor in controlled.control.state_dict().items()}
    stand_in: Any = data
    weights = controlled.unet.state_dict()
    ours = list(loop.train(options, weights, config, ALPHAS, stand_in, tmp_path))[1:]
    theirs = list(_train(peer, data, options))
    for mine, (loss, norm) in zip(ours, theirs, strict=True):
        assert mine.loss == pytest.approx(loss, rel=1e-4)
        assert mine.gradient_norm == pytest.approx(norm, rel=1e-3)
    assert max(norm for _, norm in theirs) > options.clip  # it was clipped

    assert ours[-1].loss != pytest.approx(ours[0].loss, rel=1e-2)

    after, expected = load_file(tmp_path / "control.safetensors"), from_diffusers(peer.control.state_dict())
    moved = [(after[name] - before[name], expected[name] - before[name]) for name in expected]
    assert all(theirs.any() for _, theirs in moved)
    # Adam divides each gradient by its size: where it is next to 0, its sign is chance, and with it the whole move.
    apart = sum((mine - theirs).double().square().sum() for mine, theirs in moved).sqrt()  # type: ignore[union-attr]
    assert apart / sum(theirs.double().square().sum() for _, theirs in moved).sqrt() < 0.01  # type: ignore[union-attr]


def _train(peer: Peer, data: Data, options: TrainingOptions) -> Iterator[tuple[float, float]]:
    """Loss and gradient norm of each step of diffusers' own way to train, on the batches and draws of ours."""
    stand_in: Any = data
    batches = loop.Batches(stand_in, range(len(data)), options.batch_size, options.seed)
    optimizer = torch.optim.AdamW(peer.control.parameters(), lr=options.learning_rate, weight_decay=1e-2, eps=1e-8)
    for step in range(options.steps):
        losses = []
        for number in range(step * options.accumulation, (step + 1) * options.accumulation):
            batch = data.read(batches[number])
            loss = peer.loss(batch, draws_of(options, number, batch), data.empty_prompt)
            (loss / options.accumulation).backward()
            losses.append(loss.item())
        norm = nn.utils.clip_grad_norm_(peer.control.parameters(), options.clip).item()
        optimizer.step()
        optimizer.zero_grad()
        yield sum(losses) / len(losses), norm
