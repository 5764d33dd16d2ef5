"""The UNet's numbers, written out: skip connections, shapes, parameters, keys; and where its layers come from."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from zeroconv.controlnet_core.networks.controlnet import ControlNet
from zeroconv.controlnet_core.networks.layers import (
    GEGLU,
    Downsample,
    SpatialTransformer,
    Upsample,
    multi_head_attention,
    timestep_embedding,
)
from zeroconv.controlnet_core.networks.unet import SD15, SD21, SDXL, UNet, UNetConfig

from ..small import FULL, SMALL, TINY, assert_within, inputs, randomise_zeros, relative_change, seeded, tensors


@pytest.mark.parametrize("config", [SD15, SD21])
def test_skip_connections_of_sd1_and_sd2(config: UNetConfig):
    assert config.skip_channels == (320, 320, 320, 320, 640, 640, 640, 1280, 1280, 1280, 1280, 1280)
    assert config.skip_levels == (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)
    assert config.time_embed_dim == 1280
    assert config.residual_shapes(64, 64) == (
        (320, 64, 64), (320, 64, 64), (320, 64, 64), (320, 32, 32),
        (640, 32, 32), (640, 32, 32), (640, 16, 16),
        (1280, 16, 16), (1280, 16, 16), (1280, 8, 8), (1280, 8, 8), (1280, 8, 8),
        (1280, 8, 8),
    )  # fmt: skip


def test_skip_connections_of_sdxl():
    assert SDXL.skip_channels == (320, 320, 320, 320, 640, 640, 640, 1280, 1280)
    assert SDXL.skip_levels == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert SDXL.residual_shapes(128, 128) == (
        (320, 128, 128), (320, 128, 128), (320, 128, 128), (320, 64, 64),
        (640, 64, 64), (640, 64, 64), (640, 32, 32), (1280, 32, 32), (1280, 32, 32),
        (1280, 32, 32),
    )  # fmt: skip


def test_heads():
    assert [SD15.heads(channels) for channels in (320, 640, 1280)] == [8, 8, 8]
    assert [SD21.heads(channels) for channels in (320, 640, 1280)] == [5, 10, 20]
    assert [SDXL.heads(channels) for channels in (640, 1280)] == [10, 20]


def test_odd_latents_are_halved_upwards():
    config = SMALL["SD1.x"]
    numbers = inputs(config, 13, 9)
    residuals = tensors(numbers.control(seeded(ControlNet, config)))
    heights_and_widths = [(13, 9)] * 3 + [(7, 5)] * 3 + [(4, 3)] * 3 + [(2, 2)] * 4
    assert [tuple(r.shape[2:]) for r in residuals] == heights_and_widths
    assert [tuple(r.shape[1:]) for r in residuals] == list(config.residual_shapes(13, 9))
    assert numbers.predict(seeded(UNet, config)).shape == (2, 4, 13, 9)


def test_down_and_up_sampling_of_odd_sizes():
    x = torch.rand(1, 3, 13, 9)
    down = Downsample(3)(x)
    assert down.shape == (1, 3, 7, 5)
    assert Upsample(3)(down, (13, 9)).shape == x.shape


@pytest.mark.parametrize(
    ("layout", "network", "parameters", "keys"),
    [
        ("SD1.x", UNet, 859_520_964, 686),
        ("SD1.x", ControlNet, 361_279_120, 340),
        ("SD2.x", UNet, 865_910_724, 686),
        ("SD2.x", ControlNet, 364_228_240, 340),
        ("SDXL", UNet, 2_567_463_684, 1680),
        ("SDXL", ControlNet, 1_251_014_160, 844),
    ],
)
def test_published_sizes(layout: str, network: type[UNet | ControlNet], parameters: int, keys: int):
    weights = network(FULL[layout], device="meta").state_dict()
    assert sum(weight.numel() for weight in weights.values()) == parameters
    assert len(weights) == keys


def test_published_key_names():
    shapes = {key: tuple(weight.shape) for key, weight in UNet(SD15, device="meta").state_dict().items()}
    for key, shape in {
        "time_embed.0.weight": (1280, 320),
        "time_embed.2.bias": (1280,),
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.1.0.in_layers.0.weight": (320,),
        "input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
        "input_blocks.1.0.emb_layers.1.weight": (320, 1280),
        "input_blocks.1.0.out_layers.3.weight": (320, 320, 3, 3),
        "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (320, 320),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.bias": (320,),
        "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
        "input_blocks.1.1.transformer_blocks.0.ff.net.2.weight": (320, 1280),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "middle_block.1.norm.weight": (1280,),
        "middle_block.2.out_layers.0.weight": (1280,),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.11.0.in_layers.2.weight": (320, 640, 3, 3),
        "out.0.weight": (320,),
        "out.2.weight": (4, 320, 3, 3),
    }.items():
        assert shapes[key] == shape, key
    assert UNet(SD21, device="meta").state_dict()["input_blocks.1.1.proj_in.weight"].shape == (320, 320)
    assert UNet(SDXL, device="meta").state_dict()["label_emb.0.0.weight"].shape == (1280, 2816)


def test_timestep_embedding_is_cosines_then_sines():
    embedding = timestep_embedding(torch.tensor([0, 500]), 4)
    expected = torch.tensor([[1.0, 1.0, 0.0, 0.0], [-0.883849, 0.283662, -0.467772, -0.958924]])
    torch.testing.assert_close(embedding, expected, rtol=0, atol=1e-5)  # cos and sin of 500 and 500 / 100


def test_what_random_weights_would_hardly_show():
    """Constants whose neighbours differ by less than the parity tests tolerate."""
    for module in UNet(SMALL["SD2.x"], device="meta").modules():
        if isinstance(module, SpatialTransformer):
            assert module.norm.eps == 1e-6
        elif isinstance(module, nn.Sequential) and isinstance(module[0], nn.GroupNorm):
            assert module[0].eps == 1e-5
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-5
    gated = GEGLU(1, 1)
    nn.init.ones_(gated.proj.weight)
    nn.init.zeros_(gated.proj.bias)
    assert gated(torch.ones(1, 1)).item() == pytest.approx(0.8413447, abs=1e-6)  # tanh gives 0.84119


def test_sdxl_asks_for_its_pooled_vector():
    config = SMALL["SDXL"]
    numbers = inputs(config)
    unet = seeded(UNet, config)
    with pytest.raises(ValueError, match=r"takes a pooled vector y of 60 numbers \(SDXL\), found none"):
        unet(numbers.x, numbers.timesteps, numbers.context)
    other = unet(numbers.x, numbers.timesteps, numbers.context, torch.zeros(2, 60))
    assert relative_change(numbers.predict(unet), other) > 0.001


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", SMALL)
@torch.no_grad()
def test_half_precision_is_close_to_fp32(layout: str, dtype: torch.dtype, tolerance: dict):
    config = SMALL[layout]
    numbers = inputs(config, 8, 8)
    halved = numbers.to("cpu", dtype)
    unet, control = seeded(UNet, config), randomise_zeros(seeded(ControlNet, config))
    expected_residuals = numbers.control(control)
    expected = numbers.predict(unet, expected_residuals)
    unet, control = unet.to(dtype), control.to(dtype)
    residuals = halved.control(control)
    output = halved.predict(unet, residuals)
    assert output.dtype == dtype
    assert_within(output, expected, tolerance[dtype]["rtol"])
    for residual, reference in zip(tensors(residuals), tensors(expected_residuals), strict=True):
        assert residual.dtype == dtype
        assert_within(residual, reference, tolerance[dtype]["rtol"])


def counting_operations() -> tuple[SimpleNamespace, Counter[str]]:
    """A namespace of layers that counts which of them are built."""
    built: Counter[str] = Counter()

    def counting(name: str) -> type[nn.Module]:
        class Counted(getattr(nn, name)):
            def __init__(self, *args: object, **settings: object):
                super().__init__(*args, **settings)
                built[name] += 1

        return Counted

    return SimpleNamespace(**{name: counting(name) for name in ("Linear", "Conv2d", "GroupNorm", "LayerNorm")}), built


@pytest.mark.parametrize("layout", SMALL)
@pytest.mark.parametrize("network", [UNet, ControlNet])
def test_every_layer_comes_from_operations(network: type[UNet | ControlNet], layout: str):
    operations, built = counting_operations()
    net = network(SMALL[layout], operations=operations, device="meta")
    with_weights = [module for module in net.modules() if list(module.parameters(recurse=False))]
    assert sum(built.values()) == len(with_weights) > 100
    assert all(isinstance(module, tuple(vars(operations).values())) for module in with_weights)
    assert all(built.values())


@pytest.mark.parametrize("layout", SMALL)
def test_attention_is_that_of_operations_where_they_bring_one(layout: str):
    asked = []

    def own(q: Tensor, k: Tensor, v: Tensor, heads: int, precision: torch.dtype | None) -> Tensor:
        asked.append(precision)
        return multi_head_attention(q, k, v, heads, precision)

    operations = SimpleNamespace(**{name: getattr(nn, name) for name in ("Linear", "Conv2d", "GroupNorm", "LayerNorm")})
    plain, batch = seeded(UNet, SMALL[layout]), inputs(SMALL[layout])
    ours = UNet(SMALL[layout], operations=SimpleNamespace(**vars(operations), multi_head_attention=own))
    ours.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(batch.predict(ours), batch.predict(plain))
    assert len(asked) == sum(name.endswith((".attn1", ".attn2")) for name, _ in plain.named_modules()) > 10
    assert set(asked) == {torch.float32 if layout == "SD2.x" else None}


@pytest.mark.parametrize("network", [UNet, ControlNet])
def test_dtype_and_device_are_passed_through(network: type[UNet | ControlNet]):
    parameters = list(network(SDXL, dtype=torch.bfloat16, device="meta").parameters())
    assert {(parameter.dtype, parameter.device.type) for parameter in parameters} == {(torch.bfloat16, "meta")}


def test_the_arguments_stay_as_they_are():
    numbers = inputs(TINY)
    control, unet = randomise_zeros(seeded(ControlNet, TINY)), seeded(UNet, TINY)
    residuals = numbers.control(control)
    given: list[Tensor] = [numbers.x, numbers.timesteps, numbers.context, numbers.hint, *tensors(residuals)]
    before = [tensor.clone() for tensor in given]
    numbers.predict(unet, residuals)
    assert all(torch.equal(tensor, old) for tensor, old in zip(given, before, strict=True))
