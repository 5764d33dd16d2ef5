"""The controlled block on any module, the two hint encoders, and ControlNet as a copy that starts without effect."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zeroconv.controlnet_core.networks.controlnet import (
    BaseMismatch,
    ControlledBlock,
    ControlNet,
    copy_encoder,
    paper_hint_encoder,
    released_hint_encoder,
    zero_convolution,
)
from zeroconv.controlnet_core.networks.layers import ResBlock
from zeroconv.controlnet_core.networks.unet import UNet

from ..small import SMALL, TINY, inputs, randomise_zeros, relative_change, seeded, tensors


class AtOneTimestep(nn.Module):
    """A ResBlock as a function of its picture alone."""

    def __init__(self):
        super().__init__()
        self.block = ResBlock(32, 16, 64)
        self.register_buffer("emb", torch.randn(1, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, self.emb)


BLOCKS = {
    "convolution": (lambda: nn.Conv2d(32, 64, 3, padding=1), (2, 64, 6, 6)),
    "down-sampling": (lambda: nn.Conv2d(32, 64, 3, stride=2, padding=1), (2, 64, 3, 3)),
    "ResBlock": (AtOneTimestep, (2, 64, 6, 6)),
    "several layers": (lambda: nn.Sequential(nn.Conv2d(32, 8, 1), nn.SiLU(), nn.Conv2d(8, 64, 1)), (2, 64, 6, 6)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_controlled_block_starts_as_the_block_itself(name: str):
    build, shape = BLOCKS[name]
    block = build()
    x, c = torch.randn(2, 32, 6, 6), torch.randn(2, 5, 6, 6)
    expected = block(x)
    controlled = ControlledBlock(block, 5, 32, 64)
    output = controlled(x, c)
    assert output.shape == shape
    assert torch.equal(output, expected)
    assert relative_change(expected, randomise_zeros(controlled)(x, c)) > 0.01


@pytest.mark.parametrize("name", BLOCKS)
def test_the_copy_is_a_real_copy_and_only_it_is_trained(name: str):
    block = BLOCKS[name][0]()
    block.requires_grad_(False)  # a base model often comes locked already; its copy must not be
    controlled = ControlledBlock(block, 5, 32, 64)
    assert controlled.locked is block
    for (key, ours), (same_key, theirs) in zip(
        controlled.copy.named_parameters(), block.named_parameters(), strict=True
    ):
        assert key == same_key
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
    trained = {key.partition(".")[0] for key, p in controlled.named_parameters() if p.requires_grad}
    assert trained == {"copy", "zero_in", "zero_out"}
    randomise_zeros(controlled)(torch.randn(2, 32, 6, 6), torch.randn(2, 5, 6, 6)).sum().backward()
    assert all(parameter.grad is None for parameter in block.parameters())
    assert all(parameter.grad is not None for parameter in controlled.copy.parameters())


def test_a_controlled_block_is_built_where_it_is_asked_to_be():
    controlled = ControlledBlock(nn.Conv2d(8, 8, 1, device="meta", dtype=torch.float16), 5, 8, 8, device="meta")
    assert {parameter.device.type for parameter in controlled.parameters()} == {"meta"}


def test_zero_convolution():
    convolution = zero_convolution(3, 5)
    assert {key: tuple(p.shape) for key, p in convolution.named_parameters()} == {"weight": (5, 3, 1, 1), "bias": (5,)}
    assert not convolution(torch.randn(2, 3, 4, 4)).any()


def test_the_released_hint_encoder_has_the_published_keys_and_shapes():
    encoder = released_hint_encoder(3, 320)
    assert {key: tuple(weight.shape) for key, weight in encoder.state_dict().items() if key.endswith("weight")} == {
        "0.weight": (16, 3, 3, 3),
        "2.weight": (16, 16, 3, 3),
        "4.weight": (32, 16, 3, 3),
        "6.weight": (32, 32, 3, 3),
        "8.weight": (96, 32, 3, 3),
        "10.weight": (96, 96, 3, 3),
        "12.weight": (256, 96, 3, 3),
        "14.weight": (320, 256, 3, 3),
    }
    convolutions = [layer for layer in encoder if isinstance(layer, nn.Conv2d)]
    assert [layer.stride for layer in convolutions] == [(n, n) for n in (1, 1, 2, 1, 2, 1, 2, 1)]
    assert [type(layer) for layer in encoder][1::2] == [nn.SiLU] * 7
    assert encoder[0].weight.any()
    assert not encoder[14].weight.any() and not encoder[14].bias.any()
    assert encoder(torch.rand(2, 3, 64, 40)).shape == (2, 320, 8, 5)


def test_the_papers_hint_encoder_has_four_4x4_convolutions():
    encoder = paper_hint_encoder(3, 320)
    assert {key: tuple(weight.shape) for key, weight in encoder.state_dict().items() if key.endswith("weight")} == {
        "0.weight": (16, 3, 4, 4),
        "2.weight": (32, 16, 4, 4),
        "4.weight": (64, 32, 4, 4),
        "6.weight": (128, 64, 4, 4),
        "8.weight": (320, 128, 1, 1),
    }
    assert sum(isinstance(module, nn.ReLU) for module in encoder.modules()) == 4
    assert not encoder[8].weight.any() and not encoder[8].bias.any()
    weight = encoder[6].weight
    assert abs(weight.mean().item()) < 1e-3
    assert weight.std().item() == pytest.approx((2 / (16 * 64)) ** 0.5, rel=0.02)


@pytest.mark.filterwarnings("error")
def test_the_papers_hint_encoder_ends_at_an_eighth_of_the_picture():
    encoder = randomise_zeros(paper_hint_encoder(3, 32))
    hint = torch.rand(2, 3, 64, 40)
    assert encoder(hint).shape == (2, 32, 8, 5)
    # the last 4x4 kernel looks one pixel to the left and two to the right, as torch's padding="same" would
    before = encoder[:5](hint).relu()
    same = nn.functional.conv2d(nn.functional.pad(before, (1, 2, 1, 2)), encoder[6].weight, encoder[6].bias)
    torch.testing.assert_close(encoder(hint), encoder[8](same.relu()))


@pytest.mark.parametrize("hint_encoder", ["released", "paper"])
def test_a_hint_that_does_not_fit_is_refused(hint_encoder: str):
    control = ControlNet(TINY, hint_encoder=hint_encoder)
    assert control.encode_hint(torch.rand(1, 3, 64, 64)).shape == (1, 64, 8, 8)
    with pytest.raises(ValueError, match=r"hint has 3 channels of 64x65; .* multiples of 8: resize the hint"):
        control.encode_hint(torch.rand(1, 3, 65, 64))
    with pytest.raises(ValueError, match=r"hint has 1 channels of 64x64; this ControlNet takes 3 channels"):
        control.encode_hint(torch.rand(1, 1, 64, 64))


def test_a_guided_hint_of_another_size_is_refused():
    control, numbers = seeded(ControlNet, TINY), inputs(TINY)
    for height, width in ((8, 16), (1, 1)):  # one pixel would be spread over the whole picture
        with pytest.raises(
            ValueError, match=f"guided hint is 64x{height}x{width}, this latent needs 64x16x16: encode a hint"
        ):
            control(numbers.x, numbers.timesteps, numbers.context, torch.rand(2, 64, height, width))


def test_one_guided_hint_serves_a_whole_batch():
    control, numbers = randomise_zeros(seeded(ControlNet, TINY)), inputs(TINY)
    one = control.encode_hint(numbers.hint[:1])
    both = control(numbers.x, numbers.timesteps, numbers.context, one.expand(2, -1, -1, -1))
    alone = control(numbers.x, numbers.timesteps, numbers.context, one)
    assert all(torch.equal(a, b) for a, b in zip(tensors(alone), tensors(both), strict=True))


def test_the_hint_counts_and_other_channel_numbers_work():
    control, numbers = randomise_zeros(seeded(ControlNet, TINY, hint_channels=6)), inputs(TINY)
    assert control.state_dict()["input_hint_block.0.weight"].shape == (16, 6, 3, 3)
    results = [
        control(numbers.x, numbers.timesteps, numbers.context, control.encode_hint(hint.expand(1, 6, 128, 128)))
        for hint in (torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    ]
    for dark, bright in zip(*map(tensors, results), strict=True):
        assert relative_change(dark, bright) > 0


@pytest.mark.parametrize("layout", SMALL)
def test_the_copy_has_the_bases_weights_and_starts_without_effect(layout: str):
    config = SMALL[layout]
    numbers = inputs(config)
    unet, control = seeded(UNet, config), ControlNet(config)
    copy_encoder(control, unet.state_dict())
    base = unet.state_dict()
    added = ("zero_convs.", "middle_block_out.", "input_hint_block.")
    copied = {key: weight for key, weight in control.state_dict().items() if not key.startswith(added)}
    left_out = {key.partition(".")[0] for key in base if key not in copied}
    assert left_out == {"output_blocks", "out"}
    for key, weight in copied.items():
        assert torch.equal(weight, base[key])
        assert weight.data_ptr() != base[key].data_ptr()
    assert len(control.zero_convs) == len(config.skip_channels) == {"SDXL": 9}.get(layout, 12)

    residuals = numbers.control(control)
    assert not any(residual.any() for residual in tensors(residuals))
    assert torch.equal(numbers.predict(unet, residuals), numbers.predict(unet))


def test_a_base_that_lacks_a_weight_is_named():
    weights = dict(seeded(UNet, TINY).state_dict())
    control = ControlNet(TINY)
    before = {key: weight.clone() for key, weight in control.state_dict().items()}
    del weights["time_embed.2.bias"]
    weights["middle_block.0.in_layers.2.weight"] = torch.zeros(1)
    count = sum(not key.startswith(("zero_convs", "middle_block_out", "input_hint_block")) for key in before)
    message = f"the base UNet lacks 2 of {count} encoder weights in the control.s shapes, the first time_embed.2.bias"
    with pytest.raises(BaseMismatch, match=message):
        copy_encoder(control, weights)
    assert all(torch.equal(weight, before[key]) for key, weight in control.state_dict().items())
