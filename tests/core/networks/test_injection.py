"""Residuals meet the UNet at the right places, and what does not fit is refused before anything is added."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zeroconv.controlnet_core.networks.controlnet import ControlNet
from zeroconv.controlnet_core.networks.injection import (
    InjectionError,
    as_host_control,
    check,
    from_host_control,
    to_decoder,
)
from zeroconv.controlnet_core.networks.residuals import Residuals
from zeroconv.controlnet_core.networks.unet import SD15, SDXL, UNet

from ..small import SMALL, inputs, randomise_zeros, seeded, tensors


def full(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value)


def zeros_for(shapes: tuple[tuple[int, int, int], ...]) -> Residuals:
    return Residuals.of(torch.zeros(1, *shape) for shape in shapes)


def test_each_residual_is_added_at_its_own_place():
    middle, skips = full(3, 1, 2, 1, 1), [full(1, 1, 1, 4, 4), full(2, 1, 2, 2, 2)]
    residuals = Residuals((full(10, 1, 1, 4, 4), full(20, 1, 2, 2, 2)), full(30, 1, 2, 1, 1))
    joined_middle, joined = to_decoder(middle, skips, residuals)
    assert [t.unique().tolist() for t in (joined_middle, *joined)] == [[33.0], [11.0], [22.0]]
    assert [t.shape for t in joined] == [t.shape for t in skips]
    assert [t.unique().tolist() for t in (middle, *skips)] == [[3.0], [1.0], [2.0]]
    assert [t.unique().tolist() for t in tensors(residuals)] == [[10.0], [20.0], [30.0]]


def test_none_adds_nothing():
    middle, skips = full(3, 1, 2, 1, 1), [full(1, 1, 1, 4, 4), full(2, 1, 2, 2, 2)]
    joined_middle, joined = to_decoder(middle, skips, Residuals((None, full(20, 1, 2, 2, 2)), None))
    assert joined_middle is middle and joined[0] is skips[0]
    assert joined[1].unique().tolist() == [22.0]
    without = to_decoder(middle, skips, None)
    assert without[0] is middle
    assert without[1] == skips and without[1] is not skips  # the decoder pops from it


def test_the_dtype_is_the_unets():
    middle, joined = to_decoder(
        full(1, 1, 1, 1, 1).half(), [full(1, 1, 1, 2, 2).half()], Residuals((full(2, 1, 1, 2, 2),), full(2, 1, 1, 1, 1))
    )
    assert {middle.dtype, joined[0].dtype} == {torch.float16}


def test_a_control_of_another_family_is_refused():
    sdxl = zeros_for(SDXL.residual_shapes(8, 8))
    with pytest.raises(
        InjectionError,
        match="the UNet has 12 skip connections and a middle block, the control brings 9 residuals and a middle one: "
        "use a control made for this family of models",
    ):
        check(sdxl, SD15.residual_shapes(8, 8))
    with pytest.raises(InjectionError, match="has 9 skip connections .* brings 12 residuals"):
        check(zeros_for(SD15.residual_shapes(8, 8)), SDXL.residual_shapes(8, 8))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (3, "skip connection 3 of the UNet has shape 320x4x4, the residual for it 320x8x8: the hint must be 8 times"),
        (12, "the middle block of the UNet has shape 1280x1x1, the residual for it 1280x8x8: the hint must be 8 times"),
    ],
)
def test_a_residual_of_the_wrong_size_is_refused(wrong: int, message: str):
    shapes = SD15.residual_shapes(8, 8)
    assert check(zeros_for(shapes), shapes) is None
    residuals = list(zeros_for(shapes))
    residuals[wrong] = torch.zeros(1, shapes[wrong][0], 8, 8)
    targets = [torch.ones(1, *shape) for shape in shapes]
    with pytest.raises(InjectionError, match=message):
        to_decoder(targets[-1], targets[:-1], Residuals.of(residuals))
    with pytest.raises(InjectionError, match=message):
        as_host_control(Residuals.of(residuals), shapes)
    residuals[wrong] = None
    assert check(Residuals.of(residuals), shapes) is None


def test_the_host_pops_from_the_end():
    shapes = ((1, 4, 4), (2, 2, 2), (2, 1, 1))
    residuals = Residuals((full(10, 1, 1, 4, 4), None), full(30, 1, 2, 1, 1))
    control = as_host_control(residuals, shapes)
    assert set(control) == {"input", "middle", "output"}
    assert control["input"] == []
    assert control["middle"].pop() is residuals.middle
    assert control["output"].pop() is None  # the deepest skip connection is the first that the decoder reads
    assert control["output"].pop() is residuals.skips[0]
    assert len(as_host_control(residuals, shapes)["output"]) == 2, "the lists are consumed, so each call makes new ones"


def test_the_encoders_residuals_are_popped_in_its_order():
    shapes = ((1, 4, 4), (2, 2, 2), (2, 1, 1))
    residuals = Residuals((None, None), None, (None, full(20, 1, 2, 2, 2)))
    control = as_host_control(residuals, shapes)
    assert control["input"].pop() is None, "encoder block 0 comes first"
    assert control["input"].pop() is residuals.encoder[1]
    assert control["output"] == [None, None] and control["middle"] == [None]
    with pytest.raises(InjectionError, match="encoder block 1 of the UNet has shape 2x2x2, the residual for it 2x1x1"):
        as_host_control(Residuals((None, None), None, (None, full(1, 1, 2, 1, 1))), shapes)


def test_what_the_host_pops_comes_back_as_residuals():
    shapes = ((1, 4, 4), (2, 2, 2), (2, 1, 1))
    residuals = Residuals((full(10, 1, 1, 4, 4), None), full(30, 1, 2, 1, 1), (None, full(20, 1, 2, 2, 2)))
    back = from_host_control(as_host_control(residuals, shapes), 2)
    assert (back.skips, back.middle, back.encoder) == (residuals.skips, residuals.middle, residuals.encoder)


def test_the_hosts_lists_are_aligned_at_the_end_that_it_pops_from():
    a, b = full(1, 1, 1, 1, 1), full(2, 1, 1, 1, 1)
    assert from_host_control({"output": [a]}, 3) == Residuals((None, None, a), None)
    assert from_host_control({"input": [None, a, None, b]}, 3) == Residuals((None,) * 3, None, (b, None, a))
    assert from_host_control({"middle": [a], "input": [b], "output": []}, 2) == Residuals((None,) * 2, a, (b, None))


@pytest.mark.parametrize("lists", [{"output": [1, 2, 3]}, {"middle": [1, 2]}, {"input": [1, 2, 3]}])
def test_a_residual_that_the_host_never_reaches_is_refused(lists: dict[str, list[int]]):
    given = {place: [full(n, 1, 1, 1, 1) for n in numbers] for place, numbers in lists.items()}
    with pytest.raises(InjectionError, match="the UNet has 2 skip connections and a middle block, the control brings"):
        from_host_control(given, 2)


@pytest.mark.parametrize("layout", SMALL)
@torch.no_grad()
def test_our_unet_adds_them_to_what_the_encoders_blocks_give(layout: str):
    config = SMALL[layout]
    numbers = inputs(config)
    unet = seeded(UNet, config)
    given, taken = [], []
    for block in unet.input_blocks:
        block.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
        block.register_forward_hook(lambda module, args, output: given.append(output))
    unet.middle_block.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    *shapes, _ = config.residual_shapes(*numbers.x.shape[2:])
    encoder = tuple(torch.randn(1, *shape) if i % 2 else None for i, shape in enumerate(shapes))
    nothing = (None,) * len(shapes)
    plain = numbers.predict(unet, Residuals(nothing, None))
    given.clear()
    taken.clear()
    assert not torch.equal(numbers.predict(unet, Residuals(nothing, None, encoder)), plain)
    for output, residual, next_input in zip(given, encoder, taken[1:], strict=True):
        assert torch.equal(next_input, output if residual is None else output + residual)


@pytest.mark.parametrize("layout", SMALL)
@torch.no_grad()
def test_our_unet_adds_them_where_the_decoder_reads(layout: str):
    config = SMALL[layout]
    numbers = inputs(config)
    unet, control = seeded(UNet, config), randomise_zeros(seeded(ControlNet, config))
    encoder: list[Tensor] = []
    decoder: list[Tensor] = []
    for block in (*unet.input_blocks, unet.middle_block):
        block.register_forward_hook(lambda module, args, output: encoder.append(output))
    for block in unet.output_blocks:
        block.register_forward_pre_hook(lambda module, args: decoder.append(args[0]))
    residuals = tensors(numbers.control(control))
    numbers.predict(unet, Residuals.of(residuals))

    *skips, middle = (output + residual for output, residual in zip(encoder, residuals, strict=True))
    assert torch.equal(decoder[0], torch.cat([middle, skips[-1]], dim=1))
    assert len(decoder) == len(skips)
    for read, skip in zip(decoder, reversed(skips), strict=True):
        assert torch.equal(read[:, -skip.shape[1] :], skip)
