"""Why zero convolutions learn (paper, section 3.1): the first step moves them alone, the second the copy as well."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zeroconv.controlnet_core.networks.controlnet import ControlledBlock, ControlNet, copy_encoder, zero_convolution
from zeroconv.controlnet_core.networks.unet import UNet

from ..small import TINY, inputs, seeded


def gradients(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The gradients of the parameters whose names begin with `prefix`; every one must have taken part."""
    named = {key: p.grad for key, p in module.named_parameters() if key.startswith(prefix)}
    assert named
    assert all(grad is not None for grad in named.values())
    return {key: grad for key, grad in named.items() if grad is not None}


def all_zero(module: nn.Module, prefix: str = "") -> bool:
    """Are all of these gradients exactly 0?"""
    return not any(grad.any() for grad in gradients(module, prefix).values())


def none_zero(module: nn.Module, prefix: str = "") -> bool:
    """Does every one of these weights (biases aside) get a gradient?"""
    return all(grad.any() for key, grad in gradients(module, prefix).items() if key.endswith("weight"))


def test_a_zero_convolution_alone(tolerance: dict):
    close = tolerance[torch.float32]
    convolution = zero_convolution(3, 5)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    upstream = torch.randn(2, 5, 4, 4)  # dL/dZ
    step = torch.optim.SGD(convolution.parameters(), lr=0.1)

    (convolution(x) * upstream).sum().backward()
    weight, bias = gradients(convolution).values()
    expected = torch.einsum("bohw,bihw->oi", upstream, x.detach())  # dZ/dW = x
    torch.testing.assert_close(weight[:, :, 0, 0], expected, **close)
    torch.testing.assert_close(bias, upstream.sum(dim=(0, 2, 3)), **close)  # dZ/dB = 1
    assert weight.all() and bias.all()
    assert x.grad is not None
    assert not x.grad.any()  # dZ/dx = W = 0

    moved = -0.1 * weight[:, :, 0, 0]
    step.step()
    step.zero_grad()
    x.grad = None
    (convolution(x) * upstream).sum().backward()
    assert x.grad is not None and x.grad.any()
    torch.testing.assert_close(x.grad, torch.einsum("bohw,oi->bihw", upstream, moved), **close)


def test_a_controlled_block():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 6, 3, padding=1))
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    c = torch.randn(2, 3, 5, 5, requires_grad=True)
    target = torch.randn(2, 6, 5, 5)
    F.mse_loss(block(x), target).backward()
    assert x.grad is not None
    through_the_block = x.grad.clone()

    x.grad = None
    block.zero_grad()
    controlled = ControlledBlock(block, hint_channels=3, in_channels=4, out_channels=6)
    step = torch.optim.SGD([p for p in controlled.parameters() if p.requires_grad], lr=0.1)

    def backward() -> None:
        step.zero_grad()
        x.grad = c.grad = None
        F.mse_loss(controlled(x, c), target).backward()

    backward()
    assert none_zero(controlled, "zero_out")
    assert all_zero(controlled, "copy") and all_zero(controlled, "zero_in")
    assert x.grad is not None and c.grad is not None
    assert torch.equal(x.grad, through_the_block)
    assert not c.grad.any()

    step.step()  # the outer zero convolution has grown: the copy and the inner one learn, the hint's features not yet
    backward()
    assert none_zero(controlled, "copy") and none_zero(controlled, "zero_in")
    assert c.grad is not None and not c.grad.any()

    step.step()
    backward()
    assert c.grad is not None and c.grad.any()
    assert all(parameter.grad is None for parameter in controlled.locked.parameters())


def test_a_controlnet_on_a_locked_unet():
    numbers = inputs(TINY)
    unet, control = seeded(UNet, TINY), seeded(ControlNet, TINY)
    copy_encoder(control, unet.state_dict())
    unet.requires_grad_(False)
    noise = torch.randn(numbers.x.shape, generator=torch.Generator().manual_seed(1))
    step = torch.optim.SGD(control.parameters(), lr=1.0)
    losses = []

    def backward() -> None:
        step.zero_grad()
        output = numbers.predict(unet, numbers.control(control))
        loss = F.mse_loss(output, noise)
        loss.backward()
        losses.append(loss.item())

    def trained(*parts: str) -> list[bool]:
        return [none_zero(control, part) for part in parts]

    backward()
    assert losses[0] == F.mse_loss(numbers.predict(unet), noise).item()
    assert trained("zero_convs.", "middle_block_out.") == [True, True]
    for part in ("input_blocks.", "middle_block.", "time_embed.", "input_hint_block."):
        assert all_zero(control, part), part

    step.step()
    backward()
    assert losses[1] < losses[0]
    assert trained("zero_convs.", "middle_block_out.", "input_blocks.", "middle_block.", "time_embed.") == [True] * 5
    assert trained("input_hint_block.14.") == [True]  # the hint's own zero convolution comes second
    for i in range(0, 14, 2):
        assert all_zero(control, f"input_hint_block.{i}.")

    step.step()
    backward()
    assert trained("input_hint_block.") == [True]  # and what lies before it third
    assert all(parameter.grad is None for parameter in unet.parameters())
