"""Files in fp8 with scales load as the weights they stand for, of each kind; other formats are refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from zeroconv.controlnet_core.files.kinds import KINDS, ControlKind
from zeroconv.controlnet_core.files.loading import LoadError, load_control, load_unet
from zeroconv.controlnet_core.files.saving import to_file
from zeroconv.controlnet_core.files.scales import unscaled
from zeroconv.controlnet_core.networks.controlnet import ControlNet
from zeroconv.controlnet_core.networks.network import ControlNetwork
from zeroconv.controlnet_core.networks.unet import UNet

from ..small import SMALL, randomise_zeros, seeded
from .test_kinds import CONFIG, NETWORKS, kind_name

State = dict[str, Tensor]
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
STEP = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3}
"""How far a weight is off at most, as a share of it."""
SMALLEST = {torch.float8_e4m3fn: 2**-9, torch.float8_e5m2: 2**-16}


def trained(kind: type) -> ControlNetwork:
    """A small network of a kind, the same in every run, in which no weight is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = NETWORKS[kind]()
    assert isinstance(network, torch.nn.Module)
    return randomise_zeros(network)


def quantized(
    state: State, dtype: torch.dtype = torch.float8_e4m3fn, newer: bool = True, each: bool = False, prefix: str = ""
) -> State:
    """`state` as a quantizer writes it: matrices and kernels in fp8 with a scale, all else in fp16."""
    written: State = {} if newer else {prefix + "scaled_fp8": torch.zeros(0, dtype=dtype)}
    for key, tensor in state.items():
        name = prefix + key
        if not key.endswith(".weight") or tensor.ndim < 2:
            written[name] = tensor.half() if key != "lora_controlnet" else tensor
            continue
        dims = tuple(range(1, tensor.ndim)) if each else tuple(range(tensor.ndim))
        scale = tensor.abs().amax(dims).clamp(min=1e-9) / LARGEST[dtype]
        written[name] = (tensor / scale.reshape(-1, *[1] * (tensor.ndim - 1))).to(dtype)
        module = name.removesuffix("weight")
        written[module + ("weight_scale" if newer else "scale_weight")] = scale
        written[module + ("input_scale" if newer else "scale_input")] = torch.ones(1)
        if newer:
            said = json.dumps({"format": str(dtype).removeprefix("torch.")}).encode()
            written[module + "comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
    return written


def assert_near(found: State, exact: State, dtype: torch.dtype = torch.float8_e4m3fn) -> None:
    """Each weight is off by no more than fp8 rounds it, and so far only where it was in fp8."""
    assert found.keys() == exact.keys()
    for key, tensor in exact.items():
        wide = tensor.float()
        # next to 0 the steps are even: fp8's smallest times the scale, and that of the fp16 that it is kept in
        least = wide.abs().amax() / LARGEST[dtype] * SMALLEST[dtype] + 2**-25 if wide.numel() else 0.0
        off = (found[key].float() - wide).abs()
        assert (off <= wide.abs() * (STEP[dtype] * 1.01) + least).all(), key


CASES = [(kind, layout) for kind in KINDS for layout in kind.layouts]


@pytest.mark.parametrize("newer", [True, False])
@pytest.mark.parametrize(("kind", "layout"), CASES, ids=lambda v: v if isinstance(v, str) else kind_name(v))
def test_a_scaled_file_of_each_kind_is_the_unscaled_one_to_rounding(kind: ControlKind, layout: str, newer: bool):
    network = trained(kind.network)
    plain, metadata = to_file(network, layout)
    state = quantized(plain, newer=newer)
    before = {key: tensor.clone() for key, tensor in state.items()}
    loaded = load_control(state, metadata)
    own = loaded.control.state_dict()
    assert type(loaded.control) is kind.network
    assert {tensor.dtype for tensor in own.values()} == {torch.float16}
    assert_near(own, load_control(plain, metadata).control.state_dict())
    assert list(state) == list(before)
    assert all(
        torch.equal(state[key].view(torch.uint8), before[key].view(torch.uint8)) for key in state if state[key].ndim
    )


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("prefix", ["", "control_model."])
def test_scales_of_a_tensor_and_of_each_output_under_a_prefix(dtype: torch.dtype, each: bool, prefix: str):
    network = trained(ControlNet)
    plain, metadata = to_file(network, "ldm")
    for newer in (True, False):
        found = load_control(quantized(plain, dtype, newer, each, prefix), metadata, dtype=torch.float32).control
        assert {tensor.dtype for tensor in found.state_dict().values()} == {torch.float32}
        assert_near(found.state_dict(), plain, dtype)


def test_a_scale_multiplies_and_bf16_stays():
    weight = torch.tensor([[1.0, -2.0], [4.0, 0.5]]).to(torch.float8_e4m3fn)
    state = {"a.weight": weight, "a.bias": torch.ones(2).bfloat16(), "a.weight_scale": torch.tensor([0.5, 3.0])}
    found = unscaled(state)
    assert found.keys() == {"a.weight", "a.bias"}
    assert found["a.weight"].dtype == torch.bfloat16
    assert found["a.weight"].tolist() == [[0.5, -1.0], [12.0, 1.5]]
    assert len(state) == 3 and state["a.weight"] is weight


def test_without_scales_nothing_is_touched():
    state = {"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}
    assert unscaled(state) is state


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_scaled_unet_loads(prefix: str):
    unet = randomise_zeros(seeded(UNet, SMALL["SD1.x"]))
    found = load_unet(quantized(unet.state_dict(), prefix=prefix), {"num_heads": "8"})
    assert_near(found.state_dict(), unet.state_dict())


def test_a_scaled_difference_file_adds_what_it_stands_for():
    network = trained(ControlNet)
    base = randomise_zeros(seeded(UNet, CONFIG)).state_dict()
    plain, metadata = to_file(network, "ldm")
    taken = {key: tensor - base[key] if key in base else tensor for key, tensor in plain.items()}
    marker = {"difference": torch.ones(0)}
    exact = load_control({**taken, **marker}, metadata, base=base, dtype=torch.float32).control.state_dict()
    found = load_control({**quantized(taken), **marker}, metadata, base=base, dtype=torch.float32).control.state_dict()
    assert_near(
        {key: found[key] - base[key] if key in base else found[key] for key in found},
        {key: exact[key] - base[key] if key in base else exact[key] for key in exact},
    )


KEY = "middle_block.0.in_layers.2"


def int8(state: State) -> None:
    state[KEY + ".weight"] = state[KEY + ".weight"].float().to(torch.int8)


def says(text: bytes) -> Callable[[State], None]:
    return lambda state: state.update({KEY + ".comfy_quant": torch.tensor(list(text), dtype=torch.uint8)})


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (int8, f"{KEY}.weight_scale has no fp8 weight beside it"),
        (lambda state: state.pop(KEY + ".weight"), f"{KEY}.weight_scale has no fp8 weight beside it"),
        (says(b'{"format": "nvfp4"}'), f"{KEY}.comfy_quant says that the weights are 'nvfp4': load"),
        (says(b"[1]"), f"{KEY}.comfy_quant says that the weights are 'unknown': load"),
        (says(b"\xff"), f"{KEY}.comfy_quant says that the weights are 'unknown': load"),
        (
            lambda state: state.update({KEY + ".weight_scale": torch.ones(3, 5)}),
            f"{KEY}.weight_scale is 3x5 for a weight of 64x64x3x3, expected one number or one for each output",
        ),
        (lambda state: state.update({KEY + ".weight_scale": torch.tensor(torch.inf)}), "weights are not finite"),
    ],
)
def test_other_formats_and_wrong_scales_are_refused(edit: Callable[[State], object], text: str):
    plain, metadata = to_file(trained(ControlNet), "ldm")
    state = quantized(plain)
    edit(state)
    with pytest.raises(LoadError, match="^a file: .*" + re.escape(text)) as caught:
        load_control(state, metadata, name="a file")
    assert "\n" not in str(caught.value)
