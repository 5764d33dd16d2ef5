"""Networks become files that load back bit for bit, move to another base by arithmetic, and begin as a base's copy."""

from __future__ import annotations

import errno
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zeroconv.controlnet_core.files import saving
from zeroconv.controlnet_core.files.loading import load_control, read_weights
from zeroconv.controlnet_core.files.saving import (
    SaveError,
    difference,
    fresh,
    to_difference_file,
    to_file,
    to_transferred_file,
    transfer,
    write,
)
from zeroconv.controlnet_core.networks import control_lora
from zeroconv.controlnet_core.networks.configuration import heads_metadata
from zeroconv.controlnet_core.networks.control_lora import ControlLora
from zeroconv.controlnet_core.networks.controlnet import BaseMismatch, ControlNet
from zeroconv.controlnet_core.networks.lite import ControlNetLite
from zeroconv.controlnet_core.networks.lllite import ControlLLLite, LLLite
from zeroconv.controlnet_core.networks.t2i_adapter import AdapterConfig, AdapterError, T2IAdapter
from zeroconv.controlnet_core.networks.unet import SD15, SD21, SDXL, UNet, UNetConfig
from zeroconv.controlnet_core.networks.union import UnionControlNet

from ..small import SMALL, inputs, randomise_zeros, relative_change, seeded, tensors

State = dict[str, Tensor]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def control(config: UNetConfig = SMALL["SD1.x"], **settings: object) -> ControlNet:
    """A small random ControlNet whose zero convolutions have been trained."""
    return randomise_zeros(seeded(ControlNet, config, **settings))


def adapter(**settings: object) -> T2IAdapter:
    return seeded(T2IAdapter, AdapterConfig(channels=(32, 64, 64, 64), **settings))


def union(n_types: int) -> UnionControlNet:
    return randomise_zeros(seeded(UnionControlNet, SMALL["SDXL"], n_types=n_types))


def lora(family: str) -> ControlLora:
    """One of rank 4, with norms of its own here and there, in all of whose layers something was learnt."""
    full = control(SMALL[family])
    weights = dict(randomise_zeros(ControlLora.fresh(full.config, rank=4)).state_dict())
    norms = ("in_layers.0.weight", "in_layers.0.bias")
    weights |= {key: tensor + 0.1 for key, tensor in full.state_dict().items() if key.endswith(norms)}
    heads = {"num_heads": "8"} if full.config.num_heads else {}
    network = control_lora.build(weights, heads)
    network.load_state_dict(weights)
    return network


def lllite() -> ControlLLLite:
    name = "lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    nets = {f"{name[:-1]}{part}": LLLite(256, 8, 16, depth, False) for depth, part in enumerate("qkv", start=1)}
    return ControlLLLite({**nets, "lllite_unet_input_blocks_4_0_in_layers_2": LLLite(64, 8, 16, 2, True)})


NO_ATTENTION = replace(SMALL["SDXL"], transformer_depth=(0, 0, 0), context_dim=0)
NETWORKS = {
    **{family: lambda config=config: control(config) for family, config in SMALL.items()},
    "SDXL mid": lambda: control(replace(SMALL["SDXL"], transformer_depth=(0, 0, 1), transformer_depth_middle=1)),
    "SDXL small": lambda: control(replace(NO_ATTENTION, transformer_depth_middle=0)),
    "SDXL, one ResBlock in the middle": lambda: control(
        replace(NO_ATTENTION, transformer_depth_middle=-1, use_linear=False)
    ),
    "heads of 16": lambda: control(replace(SMALL["SD2.x"], head_dim=16)),
    "one hint channel, the paper's encoder": lambda: control(hint_channels=1, hint_encoder="paper"),
    "adapter": adapter,
    "light adapter": lambda: adapter(light=True, blocks=4),
    "SDXL adapter": lambda: adapter(hint_multiple=16, hint_channels=1),
    "Union": lambda: union(6),
    "ProMax": lambda: union(8),
    "Control-LoRA, SD1.x": lambda: lora("SD1.x"),
    "Control-LoRA, SDXL": lambda: lora("SDXL"),
    "ControlLLLite": lllite,
    "ControlNet-lite": lambda: randomise_zeros(seeded(ControlNetLite, SMALL["SDXL"])),
}
BOTH = ("ldm", "diffusers")


@cache
def network_of(name: str) -> Any:
    """One of `NETWORKS`, made once; no test changes it."""
    return NETWORKS[name]()


# Control-LoRA, ControlLLLite and ControlNet-lite have one layout alone.
CASES = [(name, layout) for name in NETWORKS for layout in BOTH if layout == "ldm" or "Control" not in name]


def assert_bits(found: State, expected: State) -> None:
    """The same keys, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype, key
        # fp8 cannot be compared, its bytes can
        as_bytes = tensor.dtype.itemsize == 1
        ours, theirs = (t.view(torch.uint8) if as_bytes else t for t in (tensor, expected[key]))
        assert torch.equal(ours, theirs), key


# -- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_load_save_load_is_bit_exact(tmp_path: Path, name: str, layout: str, dtype: torch.dtype):
    network = network_of(name)
    path = tmp_path / "a.safetensors"
    write(path, *to_file(network, layout, dtype))
    first = load_control(*read_weights(path))
    assert type(first.control) is type(network)
    assert ("diffusers" in first.format.name) == (layout == "diffusers")
    assert_bits(first.control.state_dict(), {key: t.to(dtype) for key, t in network.state_dict().items()})

    second = tmp_path / "b.safetensors"
    write(second, *to_file(first.control, layout, metadata=first.metadata))
    for ours, theirs in zip(read_weights(second), read_weights(path), strict=True):
        assert ours.keys() == theirs.keys()
    again = load_control(*read_weights(second))
    assert again.metadata == first.metadata
    assert_bits(again.control.state_dict(), first.control.state_dict())
    if isinstance(network, ControlNet):
        assert again.control.config == network.config
        assert again.control.hint_channels == network.hint_channels


@pytest.mark.parametrize("layout", BOTH)
def test_a_saved_control_gives_the_same_residuals(layout: str):
    net = control(SMALL["SDXL"])
    batch = inputs(net.config)
    loaded = load_control(*to_file(net, layout)).control
    with torch.no_grad():
        for ours, theirs in zip(tensors(batch.control(loaded)), tensors(batch.control(net)), strict=True):
            assert theirs.abs().max() > 0.01
            assert torch.equal(ours, theirs)


def test_what_was_saved_is_on_the_cpu_and_the_network_stays_as_it_is():
    net = control()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    weights, _ = to_file(net, "diffusers", torch.float16)
    assert {(t.device.type, t.dtype, t.requires_grad) for t in weights.values()} == {("cpu", torch.float16, False)}
    assert_bits(net.state_dict(), before)


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (SD15, {}),
        (SD21, {}),
        (SDXL, {}),
        (SMALL["SD1.x"], {"num_heads": "8"}),
        (replace(SD21, head_dim=32), {"head_dim": "32"}),
        (replace(SD15, num_heads=0), {"head_dim": "64"}),
        (replace(SD15, num_heads=5), {"num_heads": "5"}),
    ],
)
def test_metadata_tells_heads_only_where_shapes_do_not(config: UNetConfig, heads: dict[str, str]):
    net = ControlNet(config, device="meta")
    found = heads_metadata(config)
    assert found == heads
    written = load_control(net.state_dict(), found, device="meta")
    channels = config.model_channels
    assert written.control.config.heads(channels) == config.heads(channels)


def test_metadata_of_the_file_is_kept_and_the_facts_are_added():
    given = {"author": "someone", "num_heads": "8", "layout": "as it was"}
    _, metadata = to_file(control(), "diffusers", metadata=given)
    assert metadata == {
        "author": "someone",
        "num_heads": "8",
        "format": "pt",
        "made_by": "ZeroConv",
        "kind": "ControlNet",
        "family": "SD1.x",
        "layout": "diffusers",
        "content": "control",
    }
    assert given["layout"] == "as it was"


def test_a_layout_that_a_family_lacks_is_refused():
    with pytest.raises(SaveError, match="^a ControlNet is not published in the kohya layout: choose ldm or diffusers$"):
        to_file(control(), "kohya")
    for network in (lora("SD1.x"), lllite()):
        with pytest.raises(SaveError, match=f"^a {network.kind} is not published in the diffusers layout: choose ldm$"):
            to_file(network, "diffusers")
    with pytest.raises(AdapterError, match="3x3 kernels .* save it in its own layout"):
        to_file(adapter(kernel=3), "diffusers")


def test_numbers_too_large_for_a_dtype_are_refused():
    net = control()
    with torch.no_grad():
        net.time_embed[0].bias[3] = -70000.0
    with pytest.raises(SaveError, match="^time_embed.0.bias holds 70000, too large for torch.float16: save it as bf16"):
        to_file(net, "ldm", torch.float16)
    assert to_file(net, "ldm", torch.bfloat16)[0]["time_embed.0.bias"][3] == -70144
    with torch.no_grad():
        net.time_embed[0].bias[3] = torch.inf  # as it came: nothing is lost
    assert to_file(net, "ldm", torch.float16)[0]["time_embed.0.bias"][3] == torch.inf


def test_weights_kept_in_fp8_are_saved_as_they_are_or_in_any_other_type():
    net = control().to(torch.float8_e4m3fn)
    for dtype in (None, *DTYPES):
        loaded = load_control(*to_file(net, "ldm", dtype)).control
        assert_bits(loaded.state_dict(), {key: t.to(dtype or t.dtype) for key, t in net.state_dict().items()})


# -- arithmetic -------------------------------------------------------------------------------------------------------

NEW_PARTS = ("zero_convs.", "middle_block_out.", "input_hint_block.")
KEY = "middle_block.0.in_layers.2.weight"


def base(seed: int, config: UNetConfig = SMALL["SD1.x"]) -> State:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dict(UNet(config).state_dict())


@pytest.mark.parametrize("dtype", DTYPES)
def test_transfer_is_control_plus_target_minus_base(dtype: torch.dtype):
    state, old, new = control().to(dtype).state_dict(), base(1), {key: t.half() for key, t in base(2).items()}
    before = {key: tensor.clone() for key, tensor in state.items()}
    moved = transfer(state, old, new)
    assert moved.keys() == state.keys()
    copied = {key for key in state if not key.startswith(NEW_PARTS)}
    assert 200 < len(copied) < len(state)
    for key, tensor in moved.items():
        assert tensor.dtype == dtype
        expected = state[key].double() + new[key].double() - old[key].double() if key in copied else state[key].double()
        step = torch.finfo(dtype).eps * expected.abs() + 1e-6
        assert ((tensor.double() - expected).abs() <= step).all(), key
    assert relative_change(state[KEY], moved[KEY]) > 0.5
    assert_bits(state, before)


def test_transfer_to_the_same_base_changes_nothing_and_there_and_back_next_to_nothing():
    state, old, new = control().state_dict(), base(1), base(2)
    assert_bits(transfer(state, old, old), state)
    back = transfer(transfer(state, old, new), new, old)
    assert max((back[key] - state[key]).abs().max().item() for key in state) < 1e-6


@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("family", ["SD1.x", "SDXL"])
def test_a_transferred_control_is_written_in_every_layout(family: str, layout: str):
    config = SMALL[family]
    net = union(6) if family == "SDXL" else control(config)
    models = base(1, config), base(2, config)
    weights, metadata = to_transferred_file(net, *models, layout)
    assert metadata["layout"] == layout
    assert_bits(load_control(weights, metadata).control.state_dict(), transfer(net.state_dict(), *models))


def test_what_holds_no_copy_of_a_base_is_not_transferred():
    for network in (adapter(), lllite(), lora("SD1.x")):
        with pytest.raises(
            SaveError, match=f"^a {network.kind} holds no copy of a base model to exchange: use it with"
        ):
            to_transferred_file(network, base(1), base(2))


@pytest.mark.parametrize("which", ["base", "target"])
def test_transfer_refuses_models_of_other_shapes(which: str):
    models = {"base": base(1), "target": base(2)}
    other = {**models, which: base(3, SMALL["SD2.x"])}
    with pytest.raises(
        SaveError, match=rf"^the {which} model does not fit the control: expected input_blocks.0.0.bias"
    ):
        transfer(control().state_dict(), **other)
    del models[which][KEY]
    text = f"the {which} model does not fit the control: expected {KEY} of 128x128x3x3, found no such weights: connect"
    with pytest.raises(SaveError, match=text):
        transfer(control().state_dict(), **models)


def test_a_difference_file_holds_control_minus_base_under_the_published_names():
    state, old = control().state_dict(), base(1)
    made = difference(state, old)
    assert made.pop("difference").shape == (1,)
    assert made.keys() == {f"control_model.{key}" for key in state}
    for key, tensor in state.items():
        expected = tensor if key.startswith(NEW_PARTS) else tensor - old[key]
        assert torch.equal(made[f"control_model.{key}"], expected), key


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_difference_and_its_base_give_the_control_back(tmp_path: Path, dtype: torch.dtype):
    """To the bound that `difference` states, and exactly wherever the two are nearer than a factor of 2."""
    net, old = control().to(dtype), base(1)
    path = tmp_path / "difference.safetensors"
    write(path, *to_difference_file(net, old))
    loaded = load_control(*read_weights(path), base=old)
    assert loaded.format.name == "difference"
    assert loaded.metadata["content"] == "difference"
    near = 0
    for key, tensor in loaded.control.state_dict().items():
        p, found = net.state_dict()[key].double(), tensor.double()
        if key.startswith(NEW_PARTS):
            assert torch.equal(found, p)
            continue
        b = old[key].double()
        assert ((found - p).abs() <= 2**-24 * ((p - b).abs() + p.abs()) * 1.0001).all(), key
        exact = (p * b > 0) & (b.abs() / 2 <= p.abs()) & (p.abs() <= 2 * b.abs())
        assert torch.equal(found[exact], p[exact]), key
        near += int(exact.sum())
        # In half precision the bound is less than half a step of p, but for those that are next to nothing.
        sure = 2**-24 * (p - b).abs() < torch.finfo(dtype).eps / 8 * p.abs()
        if dtype != torch.float32:
            assert sure.float().mean() > 0.9
            assert torch.equal(tensor.to(dtype)[sure], net.state_dict()[key][sure]), key
    assert near > 100_000


def test_differences_of_a_real_training_are_exact():
    """A control begins as its base and moves by little: base / 2 <= p <= 2 base nearly everywhere."""
    old = base(1)
    net = fresh(SMALL["SD1.x"], old)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if not key.startswith(NEW_PARTS):
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape))
    loaded = load_control(*to_difference_file(net, old), base=old)
    assert_bits(loaded.control.state_dict(), net.state_dict())


def test_differences_from_another_model_or_of_another_kind_are_refused():
    with pytest.raises(SaveError, match="^the base model does not fit the control: expected input_blocks.0.0.bias"):
        to_difference_file(control(), base(1, SMALL["SD2.x"]))
    for network in (adapter(), union(6), lora("SD1.x")):
        with pytest.raises(
            SaveError, match=f"^difference files exist of ControlNets only, found a {network.kind}: sav"
        ):
            to_difference_file(network, base(1))


# -- fresh ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["released", "paper"])
@pytest.mark.parametrize("family", SMALL)
def test_a_fresh_control_is_the_base_and_changes_nothing(family: str, encoder: str):
    config = SMALL[family]
    unet = randomise_zeros(seeded(UNet, config))
    net = fresh(config, unet.state_dict(), hint_encoder=encoder)
    assert net.config == config
    own = net.state_dict()
    copied = [key for key in own if not key.startswith(NEW_PARTS)]
    assert len(copied) > 200
    assert all(torch.equal(own[key], unet.state_dict()[key]) for key in copied)
    assert not any(own[key].any() for key in own if key.startswith(NEW_PARTS[:2]))
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert own["input_hint_block.0.weight"].std() > 0
    with torch.no_grad():
        batch = inputs(config, 8, 8)
        assert torch.equal(batch.predict(unet, batch.control(net)), batch.predict(unet))
        hint = torch.rand(1, 3, 64, 64)
        features = net.input_hint_block[:-1](hint)  # all but the last layer, which is zero
        assert relative_change(features, net.input_hint_block[:-1](1 - hint)) > 1e-3


def test_a_fresh_control_has_the_hint_channels_and_dtype_asked_for():
    weights = {key: tensor.half() for key, tensor in base(1).items()}
    net = fresh(SMALL["SD1.x"], weights, hint_channels=1)
    assert net.hint_channels == 1
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float16}
    assert net.get_parameter(KEY).data_ptr() != weights[KEY].data_ptr(), "the base is copied, not shared"


def test_a_fresh_control_of_an_inpainting_base_takes_the_latent_alone():
    config = replace(SMALL["SD1.x"], in_channels=9)
    weights = base(1, config)
    net = fresh(config, weights)
    assert net.config == SMALL["SD1.x"]
    assert torch.equal(net.get_parameter("input_blocks.0.0.weight"), weights["input_blocks.0.0.weight"][:, :4])


def test_a_fresh_control_of_other_weights_is_refused():
    with pytest.raises(BaseMismatch, match="encoder weights in the control's shapes"):
        fresh(SMALL["SD1.x"], base(1, SMALL["SD2.x"]))
    with pytest.raises(BaseMismatch, match="the first time_embed.0.weight"):
        fresh(SMALL["SD1.x"], {})


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_written_file_is_whole_and_nothing_is_left_beside_it(tmp_path: Path):
    path = tmp_path / "some" / "folder" / "a.safetensors"
    write(path, {"a": torch.arange(6).reshape(2, 3)}, {"made": "here"})
    assert [found.name for found in path.parent.iterdir()] == ["a.safetensors"]
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"made": "here"}
        assert torch.equal(file.get_tensor("a"), torch.arange(6).reshape(2, 3))


def test_tensors_that_share_memory_or_lie_across_it_are_written(tmp_path: Path):
    whole = torch.arange(12.0).reshape(3, 4)
    weights = {"whole": whole, "same": whole, "part": whole[1:], "across": whole.T}
    before = dict(weights)
    path = tmp_path / "a.safetensors"
    write(path, weights)
    found, _ = read_weights(path)
    assert_bits(found, before)
    assert weights["across"].stride() == (1, 4)


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_write_that_fails_says_why_and_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    path = tmp_path / "a.safetensors"
    write(path, {"a": torch.ones(3)})

    def half_written(_: State, temporary: Path, __: dict[str, str]) -> None:
        temporary.write_bytes(b"half of a file")
        raise error

    monkeypatch.setattr(saving, "save_file", half_written)
    with pytest.raises(SaveError) as caught:
        write(path, {"a": torch.zeros(2**18)})
    text = str(caught.value)
    assert text.startswith(f"a.safetensors cannot be written into {tmp_path}: ")
    assert ("No space left" in text) or ("Permission denied" in text)
    assert "It needs 1.0 MiB, " in text
    assert [found.name for found in tmp_path.iterdir()] == ["a.safetensors"]
    assert torch.equal(read_weights(path)[0]["a"], torch.ones(3))


def test_a_folder_that_is_a_file_is_named(tmp_path: Path):
    (tmp_path / "here").write_text("no folder")
    with pytest.raises(SaveError, match="^a.safetensors cannot be written into .*here: .* MiB are free"):
        write(tmp_path / "here" / "a.safetensors", {"a": torch.ones(1)})
