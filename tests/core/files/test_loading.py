"""A ControlNet written in any layout and file loads back to the same output; what does not load says why."""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from zeroconv.controlnet_core.files.layouts import to_diffusers
from zeroconv.controlnet_core.files.loading import LoadError, load_control, load_unet, read_weights, usual_dtype
from zeroconv.controlnet_core.networks.controlnet import ControlNet
from zeroconv.controlnet_core.networks.unet import SD15, UNet, UNetConfig

from ..small import SMALL, inputs, randomise_zeros, seeded, tensors

State = dict[str, Tensor]

FAMILIES = tuple(SMALL)
HEADS = {"num_heads": "8"}  # which no shape tells of an SD1.x network 32 channels wide


def metadata(family: str) -> dict[str, str]:
    return HEADS if family == "SD1.x" else {}


def control(family: str = "SD1.x", **settings: object) -> ControlNet:
    """A small random ControlNet whose zero convolutions have been trained."""
    return randomise_zeros(seeded(ControlNet, SMALL[family], **settings))


def unet(family: str = "SD1.x") -> UNet:
    return seeded(UNet, SMALL[family])


def prefixed(state: State, prefix: str = "control_model.") -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def checkpoint(net: ControlNet) -> State:
    """The whole training model in one file, as control_sd15_*.pth."""
    base = seeded(UNet, net.config)
    return {
        **prefixed(base.state_dict(), "model.diffusion_model."),
        "first_stage_model.encoder.conv_in.weight": torch.ones(8, 3, 3, 3),
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.ones(8),
        "betas": torch.ones(1000),
        **prefixed(net.state_dict()),
    }


def through_diffusers(net: ControlNet) -> State:
    """What diffusers' own ControlNetModel saves, once it has been given these weights."""
    from diffusers.models.controlnets.controlnet import ControlNetModel

    config = net.config
    settings: dict[str, Any] = {
        "block_out_channels": [config.model_channels * mult for mult in config.channel_mult],
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in config.transformer_depth],
        "transformer_layers_per_block": [max(depth, 1) for depth in config.transformer_depth],
        "cross_attention_dim": config.context_dim,
        "use_linear_projection": config.use_linear,
    }
    if config.adm_in_channels is not None:
        settings["addition_embed_type"] = "text_time"
        settings["addition_time_embed_dim"] = 8
        settings["projection_class_embeddings_input_dim"] = config.adm_in_channels
    model = ControlNetModel(**settings)
    model.load_state_dict(to_diffusers(net.state_dict(), config))
    return model.state_dict()


LAYOUTS: dict[str, tuple[str, Callable[[ControlNet], State]]] = {
    "bare": ("ldm", lambda net: net.state_dict()),
    "prefixed": ("ldm with prefix", lambda net: prefixed(net.state_dict())),
    "checkpoint": ("ldm with prefix", checkpoint),
    "diffusers": ("diffusers", through_diffusers),
}


def assert_same(loaded: nn.Module, original: nn.Module) -> None:
    """The same weights under the same names, bit for bit."""
    state = original.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[key]), key
        assert tensor.dtype == state[key].dtype


@torch.no_grad()
def assert_same_output(loaded: ControlNet, original: ControlNet) -> None:
    batch = inputs(original.config, 8, 8)
    for ours, theirs in zip(tensors(batch.control(loaded)), tensors(batch.control(original)), strict=True):
        assert theirs.abs().max() > 0.01
        assert torch.equal(ours, theirs)


# -- from tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_back_to_the_same_output(layout: str, family: str):
    net = control(family)
    name, write = LAYOUTS[layout]
    written = dict(write(net))
    before = {key: tensor.clone() for key, tensor in written.items()}
    loaded = load_control(written, metadata(family))
    assert (loaded.format.name, loaded.control.family, loaded.control.config) == (name, family, net.config)
    assert loaded.metadata == metadata(family)
    assert loaded.dropped == len(written) - len(net.state_dict())
    assert (loaded.dropped > 600) == (layout == "checkpoint")
    assert_same(loaded.control, net)
    assert_same_output(loaded.control, net)
    assert list(written) == list(before)
    assert all(torch.equal(written[key], before[key]) for key in before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_a_difference_file_is_the_base_plus_the_difference(prefix: str, family: str):
    net, base = control(family), randomise_zeros(unet(family)).state_dict()
    added = {key: base[key] for key in net.state_dict() if key in base}
    assert len(added) > 200
    state = {key: tensor - added[key] if key in added else tensor for key, tensor in net.state_dict().items()}
    loaded = load_control({**prefixed(state, prefix), "difference": torch.ones(0)}, metadata(family), base=base)
    assert (loaded.format.name, loaded.dropped) == ("difference", 1)
    for key, tensor in loaded.control.state_dict().items():
        assert torch.equal(tensor, state[key] + added[key] if key in added else state[key]), key


def test_differences_in_half_precision_are_added_in_full():
    net, base = control().half(), unet().state_dict()
    state = net.state_dict()
    loaded = load_control({**prefixed(state), "difference": torch.ones(0)}, HEADS, base=base)
    key = "middle_block.0.in_layers.2.weight"
    expected = (state[key].float() + base[key]).half()
    assert torch.equal(loaded.control.state_dict()[key], expected)


def test_a_difference_file_without_its_base_says_what_to_connect():
    state = {**prefixed(control().state_dict()), "difference": torch.ones(0)}
    with pytest.raises(LoadError, match="^diff: .* no model is given: connect the model that the differences were"):
        load_control(state, HEADS, name="diff")
    with pytest.raises(LoadError, match=r"whose time_embed.0.weight is 128x32, the given model's is 256x64: connect"):
        load_control(state, HEADS, base=unet("SD2.x").state_dict())
    base = unet().state_dict()
    del base["middle_block.0.in_layers.2.weight"]
    with pytest.raises(LoadError, match=r"differences from a base model with middle_block.0.in_layers.2.weight: conn"):
        load_control(state, HEADS, base=base)


@pytest.mark.parametrize("hint_channels", [1, 3, 4])
@pytest.mark.parametrize("encoder", ["released", "paper"])
def test_the_hint_encoder_is_read_from_the_shapes(encoder: str, hint_channels: int):
    net = control(hint_channels=hint_channels, hint_encoder=encoder)
    loaded = load_control(net.state_dict(), HEADS).control
    assert loaded.hint_channels == hint_channels
    assert_same(loaded, net)
    hint = torch.rand(1, hint_channels, 64, 64)
    assert torch.equal(loaded.encode_hint(hint), net.encode_hint(hint))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float32])
def test_the_dtype_is_the_files_own_or_the_one_asked_for(dtype: torch.dtype):
    state = {key: tensor.to(dtype) for key, tensor in control().state_dict().items()}
    assert {p.dtype for p in load_control(state, HEADS).control.parameters()} == {dtype}
    asked = load_control(state, HEADS, dtype=torch.float32).control
    assert {p.dtype for p in asked.parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in state.values()} == {dtype}


def test_the_usual_dtype_is_the_most_frequent_of_the_floating_ones():
    half, full, whole = torch.ones(1).half(), torch.ones(9), torch.ones(9, dtype=torch.int64)
    assert usual_dtype({"a": half, "b": full, "c": half, "d": whole, "e": whole, "f": whole}) == torch.float16
    assert usual_dtype({"a": whole}) == torch.float32


def test_the_layers_are_those_of_the_given_operations():
    class Ours:
        Conv2d = type("OurConv2d", (nn.Conv2d,), {})
        Linear = type("OurLinear", (nn.Linear,), {})
        GroupNorm = type("OurGroupNorm", (nn.GroupNorm,), {})
        LayerNorm = type("OurLayerNorm", (nn.LayerNorm,), {})

    loaded = load_control(control().state_dict(), HEADS, operations=Ours).control
    leaves = {
        type(module).__name__ for module in loaded.modules() if next(module.parameters(recurse=False), None) is not None
    }
    assert leaves == {"OurConv2d", "OurLinear", "OurGroupNorm", "OurLayerNorm"}
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


def test_a_loaded_control_can_be_trained():
    net = load_control(control().state_dict(), HEADS).control
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in net.parameters())


def test_the_device_is_the_one_asked_for():
    net = load_control(control().state_dict(), HEADS, device="meta").control
    assert {parameter.device.type for parameter in net.parameters()} == {"meta"}


# -- strictness -------------------------------------------------------------------------------------------------------


def refusal(edit: Callable[[State], object], name: str = "a_control.safetensors") -> str:
    state = control().state_dict()
    edit(state)
    with pytest.raises(LoadError) as caught:
        load_control(state, HEADS, name=name)
    text = str(caught.value)
    assert text.startswith(name)
    assert "\n" not in text
    return text


KEY = "middle_block.0.in_layers.2.weight"


def test_missing_keys_are_named():
    text = refusal(lambda state: state.pop(KEY))
    assert text == f"a_control.safetensors: these are not all the weights of a ControlNet: 1 missing: {KEY}"


def test_unknown_keys_are_named():
    text = refusal(lambda state: state.update({"time_embed.7.weight": torch.ones(3)}))
    assert text.endswith("not all the weights of a ControlNet: 1 unknown: time_embed.7.weight")


def test_wrong_shapes_are_named():
    text = refusal(lambda state: state.update({KEY: state[KEY][:7]}))
    assert text.endswith(f"1 of a wrong shape: {KEY} (expected 128x128x3x3, found 7x128x3x3)")


def test_of_many_faults_the_first_are_named_and_all_are_counted():
    def edit(state: State) -> None:
        for i in range(5):
            del state[f"zero_convs.{i}.0.bias"]
        state["extra"] = torch.tensor(1.0)
        state[KEY] = torch.tensor(1.0)

    text = refusal(edit)
    assert "5 missing: zero_convs.0.0.bias, zero_convs.1.0.bias, zero_convs.2.0.bias, ...; 1 unknown: extra; " in text
    assert text.endswith(f"1 of a wrong shape: {KEY} (expected 128x128x3x3, found a number)")


@pytest.mark.parametrize("key", ["input_hint_block.0.weight", "zero_convs.0.0.weight", "input_blocks.0.0.weight"])
@pytest.mark.parametrize("edit", ["missing", "flat"])
def test_keys_that_are_looked_at_first_are_named_as_well(key: str, edit: str):
    assert key in refusal(lambda s: s.pop(key) if edit == "missing" else s.update({key: s[key].flatten()}))


def test_keys_of_diffusers_that_no_model_of_ours_has_are_named():
    state = {**to_diffusers(control().state_dict(), SMALL["SD1.x"]), "mid_block.resnets.5.norm1.weight": torch.ones(1)}
    with pytest.raises(LoadError, match=r"1 unknown: mid_block.resnets.5.norm1.weight"):
        load_control(state, HEADS)


def test_what_is_no_control_says_what_it_is():
    with pytest.raises(LoadError, match=r"^some.safetensors: this is a UNet alone"):
        load_control(unet().state_dict(), name="some.safetensors")


def test_a_width_that_has_no_heads_asks_for_metadata():
    state = control().state_dict()
    with pytest.raises(LoadError, match="attention of 32 channels cannot be cut into heads of 64 channels: write num_"):
        load_control(state)
    with pytest.raises(LoadError, match="attention of 32 channels cannot be cut into 5 heads: write num_heads or head"):
        load_control(state, {"num_heads": "5"})
    assert load_control(state, {"head_dim": "16"}).control.config.heads(128) == 8


# -- the UNet of a base model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["checkpoint", "alone", "diffusers", "another prefix"])
def test_a_base_models_unet_loads_from_each_layout(layout: str, family: str):
    net = unet(family)
    state, prefix = net.state_dict(), "model.diffusion_model."
    if layout == "checkpoint":
        state = {**prefixed(state, prefix), "first_stage_model.encoder.conv_in.weight": torch.ones(8, 3, 3, 3)}
    elif layout == "diffusers":
        state = to_diffusers(state, net.config)
    elif layout == "another prefix":
        prefix = "unet."
        state = prefixed(state, prefix)
    loaded = load_unet(state, metadata(family), prefix=prefix)
    assert loaded.config == net.config
    assert_same(loaded, net)
    with torch.no_grad():
        batch = inputs(net.config, 8, 8)
        assert torch.equal(batch.predict(loaded), batch.predict(net))


def test_a_base_models_unet_loads_strictly():
    state = unet().state_dict()
    del state["out.2.bias"]
    with pytest.raises(LoadError, match=r"^base: these are not all the weights of a UNet: 1 missing: out.2.bias$"):
        load_unet(state, HEADS, name="base")
    with pytest.raises(LoadError, match=r"^base: input_blocks.0.0.weight is missing"):
        load_unet({"a": torch.ones(1)}, name="base")


# -- files ------------------------------------------------------------------------------------------------------------


def test_safetensors_are_read_with_their_metadata(tmp_path: Path):
    net = control()
    path = tmp_path / "net.safetensors"
    save_file(net.state_dict(), path, {"num_heads": "8", "made": "here"})
    state, said = read_weights(path)
    assert said == {"num_heads": "8", "made": "here"}
    loaded = load_control(state, said, name=path.name)
    assert loaded.metadata == said
    assert_same(loaded.control, net)
    key = "input_blocks.0.0.weight"
    assert loaded.control.get_parameter(key).data_ptr() == state[key].data_ptr(), "mapped weights are not copied"


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "ckpt", "safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_what_torch_saves_is_read_whatever_its_name(tmp_path: Path, suffix: str, zipped: bool, wrapped: bool):
    net = seeded(ControlNet, replace(SMALL["SD1.x"], channel_mult=(1, 1), transformer_depth=(1, 0)))
    state: dict = net.state_dict()
    content = {"state_dict": state, "epoch": 3} if wrapped else {**state, "step": 7}
    path = tmp_path / f"net.{suffix}"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    read, said = read_weights(path)
    assert said == {}
    assert read.keys() == state.keys()
    assert_same(load_control(read, HEADS).control, net)


def saved(content: object, **settings: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **settings)
    return file.getvalue()


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ONE = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
PAGE = b"\n <!DOCTYPE html>\n<html><head><title>404</title></head></html>\n"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 722601104\n".encode()
UNREADABLE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty, 0 bytes: download it again"),
    "page": (PAGE, "this is an HTML page, not weights: download the file itself"),
    "page without doctype": (b"<HTML><body>", "this is an HTML page"),
    "pointer": (POINTER, "this is a Git LFS pointer, not the weights: fetch them with `git lfs pull`"),
    "no data": (safetensors(ONE), "the file is truncated: expected 86 bytes, found 70: download it again"),
    "half of the data": (safetensors(ONE, b"12345678"), "truncated: expected 86 bytes, found 78"),
    "half of the header": (safetensors(ONE)[:30], "truncated: its header alone needs 70 bytes, found 30"),
    "broken header": (safetensors(b"{never closed"), "this file is damaged, "),
    "header of another kind": (safetensors({"a": {"dtype": "F32"}}), "this file is damaged, "),
    "unknown dtype": (safetensors({"a": {**ONE["a"], "dtype": "Q3"}}, bytes(16)), "this file is damaged, "),
    "half a zip": (
        saved({"a": torch.ones(999)})[:2000],
        "the file is truncated: the end of its zip archive is missing",
    ),
    "half a legacy file": (
        saved({"a": torch.ones(999)}, _use_new_zipfile_serialization=False)[:2000],
        "torch cannot read this file, unexpected EOF",
    ),
    "start of a legacy file": (
        saved({"a": torch.ones(999)}, _use_new_zipfile_serialization=False)[:30],
        "torch cannot read this file, ",
    ),
    "code": (saved({"a": PurePosixPath("x")}), "the file holds more than tensors, .* convert it to safetensors"),
    "code, legacy": (pickle.dumps(PurePosixPath("x"), 2), "the file holds more than tensors"),
    "no tensors": (saved({"epoch": 3}), "expected a dictionary of tensors, found a dict without any"),
    "a list": (saved([torch.ones(1)]), "expected a dictionary of tensors, found a list without any"),
    "text": (
        b"prompt: a house",
        "neither a safetensors file nor one that torch saved; it begins with b'prompt: a house'",
    ),
    "json": (b'{"error": "not found"}', "neither a safetensors file nor one that torch saved"),
}


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, kind: str, suffix: str):
    data, says = UNREADABLE[kind]
    path = tmp_path / f"a_file.{suffix}"
    path.write_bytes(data)
    with pytest.raises(LoadError, match=says) as caught:
        read_weights(path)
    text = str(caught.value)
    assert text.startswith(path.name)
    assert "\n" not in text
    assert len(text) < 400
    assert path.read_bytes() == data


def test_a_whole_control_cut_in_two_is_truncated(tmp_path: Path):
    path = tmp_path / "half.safetensors"
    save_file(control().state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    expected = re.escape(
        f"half.safetensors: the file is truncated: expected {len(whole)} bytes, found {len(whole) // 2}"
    )
    with pytest.raises(LoadError, match=expected):
        read_weights(path)


@pytest.mark.slow
def test_a_control_of_the_published_size_loads_without_being_copied(tmp_path: Path):
    path = tmp_path / "full.safetensors"
    save_file({key: torch.zeros(t.shape, dtype=torch.float16) for key, t in meta(SD15).items()}, path)
    state, said = read_weights(path)
    loaded = load_control(state, said)
    assert loaded.control.config == SD15
    assert all(tensor.data_ptr() == state[key].data_ptr() for key, tensor in loaded.control.state_dict().items())


def meta(config: UNetConfig) -> State:
    return ControlNet(config, device="meta").state_dict()
