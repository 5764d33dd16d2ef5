"""ControlNet-lite, a convolution for each block; Gaussian connections; and in which order a Control-LoRA learns."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from zeroconv.controlnet_core.files.loading import LoadError, load_control, read_weights
from zeroconv.controlnet_core.files.saving import SaveError, to_difference_file, to_file, write
from zeroconv.controlnet_core.networks.control_lora import BORROWED, ControlLora
from zeroconv.controlnet_core.networks.controlnet import ControlBranch, ControlNet, connect, copy_encoder
from zeroconv.controlnet_core.networks.lite import ControlNetLite
from zeroconv.controlnet_core.networks.unet import SD15, SD21, SDXL, UNet, UNetConfig

from ..small import SMALL, TINY, inputs, randomise_zeros, relative_change, seeded, tensors

CONFIGS = {**SMALL, "three levels without text": replace(TINY, transformer_depth=(0, 0, 0), context_dim=8)}


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# -- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_residuals_have_the_shapes_that_the_unet_reads(name: str):
    config = CONFIGS[name]
    control, given = randomise_zeros(seeded(ControlNetLite, config)), inputs(config, 11, 6)
    residuals = tensors(given.control(control))
    assert [tuple(r.shape[1:]) for r in residuals] == list(config.residual_shapes(11, 6))
    unet = seeded(UNet, config)
    with torch.no_grad():
        plain = given.predict(unet)
        assert relative_change(plain, given.predict(unet, given.control(control))) >= 0.05


def test_the_shapes_of_the_published_sizes_and_the_parameters_written_out():
    strides = {"SD1.x": (3, 6, 9), "SDXL": (3, 6)}
    for config, family, parameters in ((SD15, "SD1.x", 105_670_160), (SDXL, "SDXL", 56_510_480)):
        control = ControlNetLite(config, device="meta")
        assert control.family == family
        state = control.state_dict()
        blocks = len(config.skip_channels)
        assert {key for key in state if ".op." in key} == {
            f"lite_blocks.{i}.0.op.{part}" for i in strides[family] for part in ("weight", "bias")
        }
        assert tuple(state["lite_blocks.0.0.weight"].shape) == (320, 4, 3, 3)
        assert tuple(state["lite_blocks.4.0.weight"].shape) == (640, 320, 3, 3)
        assert tuple(state["lite_blocks.6.0.op.weight"].shape) == (640, 640, 3, 3)
        assert tuple(state["lite_middle.0.weight"].shape) == (1280, 1280, 3, 3)
        convolutions = [module for module in control.modules() if isinstance(module, nn.Conv2d)]
        # one for each block and the middle, eight of the hint encoder, one connection for each block and the middle
        assert len(convolutions) == (blocks + 1) + 8 + (blocks + 1)
        assert {type(module) for module in control.modules() if module._parameters} == {nn.Conv2d}
        assert sum(p.numel() for p in control.parameters()) == parameters
        assert sum(p.numel() for p in ControlNet(config, device="meta").parameters()) > 3 * parameters


@pytest.mark.parametrize("name", SMALL)
def test_one_block_is_a_convolution_and_silu_with_the_hint_behind_the_first(name: str):
    config = SMALL[name]
    control, given = randomise_zeros(seeded(ControlNetLite, config)), inputs(config)
    state = control.state_dict()
    guided = control.encode_hint(given.hint)
    h, level, expected = given.x, 0, []
    for i, depth in enumerate(config.skip_levels):
        key = f"lite_blocks.{i}.0{'.op' * (depth > level)}"
        stride, level = 1 + (depth > level), depth
        h = nn.functional.conv2d(h, state[f"{key}.weight"], state[f"{key}.bias"], stride, 1)
        h = h * h.sigmoid() + (guided if i == 0 else 0)
        expected.append(nn.functional.conv2d(h, state[f"zero_convs.{i}.0.weight"], state[f"zero_convs.{i}.0.bias"]))
    h = nn.functional.conv2d(h, state["lite_middle.0.weight"], state["lite_middle.0.bias"], 1, 1)
    h = h * h.sigmoid()
    expected.append(nn.functional.conv2d(h, state["middle_block_out.0.weight"], state["middle_block_out.0.bias"]))
    for ours, theirs in zip(tensors(given.control(control)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("name", SMALL)
def test_a_fresh_one_changes_nothing_and_its_features_keep_their_size(name: str):
    config = SMALL[name]
    control, given = seeded(ControlNetLite, config), inputs(config, 32, 32)
    unet = seeded(UNet, config)
    with torch.no_grad():
        assert torch.equal(given.predict(unet, given.control(control)), given.predict(unet))
        h, sizes = given.x, []
        for block in (*control.lite_blocks, control.lite_middle):
            h = block(h)
            sizes.append(h.square().mean().sqrt().item())
    assert 0.3 < min(sizes) and max(sizes) < 6, sizes
    assert not any(p.any() for name, p in control.named_parameters() if name.startswith("lite_") and p.ndim == 1)


def test_text_and_time_are_not_read_and_the_hint_is():
    config = SMALL["SDXL"]
    control, given = seeded(ControlNetLite, config, hint_encoder="paper"), inputs(config)
    connect(control, "gaussian", seed(5))
    before = tensors(given.control(control))
    other = replace(given, timesteps=given.timesteps + 5, context=given.context * 2, y=None)
    assert all(torch.equal(a, b) for a, b in zip(tensors(other.control(control)), before, strict=True))
    dark = replace(given, hint=torch.zeros_like(given.hint))
    for a, b in zip(tensors(dark.control(control)), before, strict=True):
        assert relative_change(b, a) >= 0.05
    with pytest.raises(ValueError, match="hint has 1 channels of 64x64; this ControlNet-lite takes 3 channels, and"):
        control.encode_hint(torch.rand(1, 1, 64, 64))
    with pytest.raises(ValueError, match="guided hint is 64x8x8, this latent needs 64x16x16: encode a hint of 8"):
        control(given.x, given.timesteps, given.context, torch.rand(2, 64, 8, 8))


def test_it_learns_from_the_first_step():
    """A goal that residuals can reach: another control's effect on the same base."""
    config = SMALL["SD1.x"]
    given, unet = inputs(config, 8, 8), seeded(UNet, config).requires_grad_(False)
    control = seeded(ControlNetLite, config)
    goal = given.predict(unet, given.control(randomise_zeros(seeded(ControlNetLite, config)))).detach()
    optimizer = torch.optim.AdamW(control.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = (given.predict(unet, given.control(control)) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert [name for name, p in control.named_parameters() if p.grad is None or not p.grad.any()] == []


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hint_encoder", ["released", "paper"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_one_is_found_and_loads_bit_for_bit(tmp_path: Path, name: str, hint_encoder: str):
    config = CONFIGS[name]
    network = randomise_zeros(seeded(ControlNetLite, config, hint_channels=3, hint_encoder=hint_encoder))
    path = tmp_path / "lite.safetensors"
    write(path, *to_file(network))
    found = load_control(*read_weights(path))
    assert (found.format.name, found.dropped, type(found.control)) == ("ControlNet-lite", 0, ControlNetLite)
    assert (found.metadata["kind"], found.metadata["family"]) == ("ControlNet-lite", network.family)
    ours, theirs = found.control.state_dict(), network.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    read = found.control.config
    assert (read.skip_channels, read.skip_levels) == (config.skip_channels, config.skip_levels)
    given = inputs(config)
    for a, b in zip(tensors(given.control(found.control)), tensors(given.control(network)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop("lite_blocks.5.0.bias"), "1 missing: lite_blocks.5.0.bias"),
        (lambda state: state.pop("lite_blocks.0.0.weight"), "lite_blocks.0.0.weight is missing, of which the network"),
        (lambda state: state.update(surplus=torch.zeros(1)), "1 unknown: surplus"),
        (
            lambda state: state.update({"lite_blocks.2.0.weight": torch.zeros(96, 64, 3, 3)}),
            "level 0 of lite_blocks has convolutions of 64 96 channels: expected 2 of one multiple of 64",
        ),
        (
            lambda state: state.update({"lite_blocks.9.0.op.weight": torch.zeros(256, 256, 3, 3)}),
            "level 3 of lite_blocks has convolutions of no channels: expected 2 of one multiple of 64",
        ),
    ],
)
def test_files_that_are_not_whole_say_why(edit, message: str):
    state: dict[str, Tensor] = dict(seeded(ControlNetLite, SMALL["SDXL"]).state_dict())
    edit(state)
    with pytest.raises(LoadError, match=f"lite.safetensors: .*({message})"):
        load_control(state, name="lite.safetensors")


def test_layouts_and_differences_that_it_has_none_of():
    network = ControlNetLite(TINY)
    with pytest.raises(SaveError, match="^a ControlNet-lite is not published in the diffusers layout: choose ldm$"):
        to_file(network, "diffusers")
    with pytest.raises(SaveError, match="^difference files exist of ControlNets only, found a ControlNet-lite: save"):
        to_difference_file(network, {})


def test_which_models_it_fits():
    small, large = (ControlNetLite(config, device="meta") for config in (SD15, SDXL))
    assert small.mismatch(SD15) is small.mismatch(SD21) is small.mismatch(replace(SD15, in_channels=9)) is None
    assert large.mismatch(SDXL) is large.mismatch(replace(SDXL, transformer_depth=(0, 0, 1))) is None
    assert small.mismatch(SDXL) == (
        "this ControlNet-lite is made for SD1.x with 12 encoder blocks, the SDXL model has 9: "
        "load a control made for this model"
    )
    for control, model, text in (
        (large, SD21, "made for SDXL with 9 encoder blocks, the SD2.x model has 12: load"),
        (small, SMALL["SD1.x"], "SD1.x with 320 320 320 320 640 640 640 1280 1280 1280 1280 1280 channels in its skip"),
        (small, replace(SD15, out_channels=16), "4 latent channels, the SD1.x model has 16: load"),
        (
            small,
            replace(SD15, channel_mult=(1, 2, 4), num_res_blocks=3),
            "0 0 0 1 1 1 2 2 2 3 3 3 halvings of the latent before its skip connections, the SD1.x model has 0 0 0 0 1",
        ),
    ):
        assert text in str(control.mismatch(model))


# -- connections ------------------------------------------------------------------------------------------------------


def lora(config: UNetConfig, **settings) -> ControlLora:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return ControlLora.fresh(config, 4, **settings)


MAKERS = {
    "ControlNet": lambda config: seeded(ControlNet, config),
    "ControlNet-lite": lambda config: seeded(ControlNetLite, config),
    "Control-LoRA": lora,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_gaussian_connections_are_normal_by_fan_in_and_nothing_else_changes(kind: str):
    control: ControlBranch = MAKERS[kind](SMALL["SD1.x"])
    assert control.kind == kind
    before = {key: tensor.clone() for key, tensor in control.state_dict().items()}
    connect(control, "gaussian", seed(5))
    after = control.state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed == {
        "input_hint_block.14.weight",
        "middle_block_out.0.weight",
        *(f"zero_convs.{i}.0.weight" for i in range(12)),
    }
    for key in changed:
        fan_in = after[key][0].numel()
        assert abs(after[key].mean()) < 5 / after[key].numel() ** 0.5 * fan_in**-0.5
        assert after[key].std().item() == pytest.approx(fan_in**-0.5, rel=0.1), key
    again = MAKERS[kind](SMALL["SD1.x"])
    connect(again, "gaussian", seed(5))
    assert all(torch.equal(tensor, after[key]) for key, tensor in again.state_dict().items())
    connect(again, "gaussian", seed(6))
    assert not torch.equal(again.middle_block_out[0].weight, after["middle_block_out.0.weight"])
    connect(again, "zero", seed(6))
    assert all(torch.equal(tensor, before[key]) for key, tensor in again.state_dict().items())


def test_without_a_generator_torchs_own_counts_and_half_precision_is_the_same_draw():
    full, half = ControlNetLite(TINY), ControlNetLite(TINY, dtype=torch.bfloat16)
    for control in (full, half):
        torch.manual_seed(9)
        connect(control, "gaussian")
    assert half.zero_convs[3][0].weight.dtype == torch.bfloat16
    for ours, theirs in zip(half.connections(), full.connections(), strict=True):
        assert torch.equal(ours.weight, theirs.weight.bfloat16())
    assert len(list(full.connections())) == 1 + 9 + 1


def test_gaussian_connections_disturb_the_base_at_once_and_zero_ones_do_not():
    config = SMALL["SD1.x"]
    unet, given = seeded(UNet, config), inputs(config)
    with torch.no_grad():
        plain = given.predict(unet)
        for kind, make in MAKERS.items():
            control = make(config)
            if kind == "ControlNet":
                copy_encoder(control, unet.state_dict())
            if kind == "Control-LoRA":
                control.bind(unet)
            assert torch.equal(given.predict(unet, given.control(control)), plain)
            connect(control, "gaussian", seed(5))
            assert relative_change(plain, given.predict(unet, given.control(control))) >= 0.05


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="^connections are zero or gaussian, found 'one': choose one of these$"):
        connect(ControlNetLite(TINY), "one")


# -- training a Control-LoRA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hint_encoder", ["released", "paper"])
def test_a_control_lora_learns_in_the_papers_order_bound_once(hint_encoder: str):
    """Step 1 zero convolutions alone; step 2 the factors `up` and the hint's own zero convolution; step 3 the rest."""
    config = SMALL["SD1.x"]
    unet, given = seeded(UNet, config).requires_grad_(False), inputs(config, 8, 8)
    base = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    control = lora(config, hint_encoder=hint_encoder)
    assert control.input_hint_block[0].weight.std() > 0.05
    control.bind(unet)
    goal = torch.randn(given.x.shape, generator=seed(1))
    step = torch.optim.SGD(control.parameters(), lr=1.0)
    outputs, learning = [], []
    last = len(control.input_hint_block) - 1
    for _ in range(4):
        output = given.predict(unet, given.control(control))
        outputs.append(output.detach())
        step.zero_grad()
        (output - goal).square().mean().backward()
        moved = {name for name, p in control.named_parameters() if p.grad is not None and p.grad.any()}
        learning.append({name.rpartition(".")[0] for name in moved})
        step.step()
    every = {name.rpartition(".")[0] for name, _ in control.named_parameters()}
    zero_convs = {name for name in every if name.startswith(("zero_convs.", "middle_block_out."))}
    ups = {name for name in every if name.startswith(BORROWED) and name.endswith(".up")}
    assert torch.equal(outputs[0], given.predict(unet))
    assert learning[0] == zero_convs
    assert learning[1] == zero_convs | ups | {f"input_hint_block.{last}"}
    assert learning[2] == learning[3] == every
    for before, after in pairwise(outputs):
        assert not torch.equal(before, after)
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert all(torch.equal(tensor, base[key]) for key, tensor in unet.state_dict().items())
    full = control.merged(unet.state_dict())
    merged = load_control(full, {"num_heads": "8"}).control
    with torch.no_grad():
        for ours, theirs in zip(tensors(given.control(control)), tensors(given.control(merged)), strict=True):
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
