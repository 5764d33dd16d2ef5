"""Weights as they should not be, without a host: what its own tests (tests/host/test_hostile_files.py) do not reach."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from zeroconv.controlnet_core.errors import ZeroConvError
from zeroconv.controlnet_core.files.header import HeaderError, read_header
from zeroconv.controlnet_core.files.kinds import unwrapped
from zeroconv.controlnet_core.files.layouts import to_diffusers
from zeroconv.controlnet_core.files.loading import LoadError, load_control, load_unet, read_weights
from zeroconv.controlnet_core.files.shards import parts
from zeroconv.controlnet_core.keys import numbered
from zeroconv.controlnet_core.limits import BLOCKS, TEXT
from zeroconv.controlnet_core.networks.control_lora import ControlLora, to_control_lora
from zeroconv.controlnet_core.networks.controlnet import ControlNet
from zeroconv.controlnet_core.networks.lite import ControlNetLite
from zeroconv.controlnet_core.networks.lllite import ControlLLLite, LLLite
from zeroconv.controlnet_core.networks.t2i_adapter import AdapterConfig, T2IAdapter
from zeroconv.controlnet_core.networks.t2i_adapter import to_diffusers as adapter_to_diffusers
from zeroconv.controlnet_core.networks.unet import UNet, UNetConfig
from zeroconv.controlnet_core.networks.union import UnionControlNet

State = dict[str, Tensor]

TINY = UNetConfig(
    model_channels=32, channel_mult=(1, 2), transformer_depth=(1, 1), context_dim=8, num_heads=4, num_res_blocks=1
)
HEADS = {"num_heads": "4"}


def kinds() -> dict[str, State]:
    """A tiny control of each kind and layout."""
    control, union = ControlNet(TINY).state_dict(), UnionControlNet(TINY).state_dict()
    adapter = T2IAdapter(AdapterConfig(channels=(16, 16, 16, 16))).state_dict()
    light = T2IAdapter(AdapterConfig(channels=(16, 16, 16, 16), light=True)).state_dict()
    lllite = {
        "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": LLLite(16, 8, 8, 1, False),
        "lllite_unet_input_blocks_3_0_op": LLLite(16, 8, 8, 2, True),
    }
    return {
        "ldm": control,
        "diffusers": to_diffusers(control, TINY),
        "Union": union,
        "Union, diffusers": to_diffusers(union, TINY),
        "Control-LoRA": to_control_lora(ControlLora.fresh(TINY, 4).state_dict()),
        "lite": ControlNetLite(TINY).state_dict(),
        "T2I-Adapter": adapter,
        "T2I-Adapter, light": light,
        "T2I-Adapter, diffusers": adapter_to_diffusers(adapter),
        "ControlLLLite": ControlLLLite(lllite).state_dict(),
    }


ALL = {name: dict(state) for name, state in kinds().items()}
ODD: dict[str, Tensor] = {
    "a number": torch.tensor(1.0),
    "flat": torch.ones(7),
    "empty": torch.ones(0, 3),
    "whole": torch.ones(3, 3, dtype=torch.int8),
    "six dimensions": torch.ones(1, 1, 1, 1, 1, 1),
    "NaN": torch.full((4, 4, 3, 3), float("nan")),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", ALL)
def test_each_odd_tensor_of_each_kind_is_named(kind: str, odd: str):
    """One after the other, each in the place of one of the first or of one of the last of each shape."""
    seen: set[tuple[int, str]] = set()
    for key, tensor in ALL[kind].items():
        if (tensor.ndim, key[-9:]) in seen or not tensor.numel():
            continue
        seen.add((tensor.ndim, key[-9:]))
        with pytest.raises(LoadError) as caught:
            load_control({**ALL[kind], key: ODD[odd]}, HEADS, name="odd")
        assert str(caught.value).startswith("odd: ") and len(str(caught.value)) <= TEXT
    assert seen


@pytest.mark.parametrize("kind", ALL)
def test_each_missing_tensor_of_each_kind_is_a_sentence(kind: str):
    for key in list(ALL[kind])[:: max(1, len(ALL[kind]) // 40)]:
        state = {name: tensor for name, tensor in ALL[kind].items() if name != key}
        with pytest.raises(ZeroConvError):
            load_control(state, HEADS)


@pytest.mark.parametrize("kind", ALL)
def test_what_stands_before_every_key_is_taken_off(kind: str):
    for prefix in ("module.", "_forward_module.control_model.", "a.b.c."):
        wrapped = {prefix + key: tensor for key, tensor in ALL[kind].items()}
        loaded, plain = load_control(wrapped, HEADS), load_control(ALL[kind], HEADS)
        assert loaded.format.name.removesuffix(" with prefix") == plain.format.name
        assert loaded.control.state_dict().keys() == plain.control.state_dict().keys()
        assert loaded.dropped == plain.dropped
    state = {"module.a": torch.ones(1)}
    assert unwrapped(state) is state


@pytest.mark.parametrize("depth", [10**5])
def test_what_stands_before_keys_may_be_long(depth: int):
    started = time.monotonic()
    with pytest.raises(LoadError):
        load_control({"a." * depth + "b": torch.ones(1)})
    assert time.monotonic() - started < 2


def test_numbers_in_keys_are_bounded():
    state = {f"blocks.{number}.weight": torch.ones(1) for number in (0, 11, BLOCKS, 10**9, "9" * 5000, "-1", "x", "")}
    assert numbered(state, "blocks.") == 12
    assert numbered({f"blocks.{BLOCKS - 1}": torch.ones(1)}, "blocks.") == BLOCKS


def test_transformers_that_keys_promise_are_not_built_without_them():
    """A few keys, and numbers in them that multiply to thousands of transformer blocks."""
    state = dict(ALL["ldm"])
    for i in range(1, 60):
        for key in ("0.in_layers.2.weight", "1.transformer_blocks.60.x"):
            state[f"input_blocks.{i}.{key}"] = torch.ones(32, 32, 1, 1)
        state.pop(f"input_blocks.{i}.0.op.weight", None)
    started = time.monotonic()
    with pytest.raises(LoadError, match="its keys speak of 3600 transformer blocks, and there are"):
        load_control(state, HEADS)
    assert time.monotonic() - started < 2


def test_a_unet_is_checked_as_a_control_is():
    state = UNet(TINY).state_dict()
    key = "out.2.weight"
    with pytest.raises(LoadError, match=rf"1 of {len(state)} weights are not finite .*, the first {key}"):
        load_unet({**state, key: state[key] * float("nan")}, HEADS)
    with pytest.raises(LoadError, match=rf"weights are no floating numbers, the first {key} .* int8"):
        load_unet({**state, key: state[key].to(torch.int8)}, HEADS)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_checked_as_well(dtype: torch.dtype):
    state = {key: tensor.to(dtype) for key, tensor in ALL["ldm"].items()}
    assert load_control(state, HEADS).control.state_dict()["time_embed.0.weight"].dtype == dtype
    wrong = state["time_embed.0.weight"].clone()
    wrong.view(torch.uint8)[3, 3] = 0xFF
    with pytest.raises(LoadError, match="1 of .* weights are not finite .* time_embed.0.weight"):
        load_control({**state, "time_embed.0.weight": wrong}, HEADS)
    large = {**ALL["ldm"], "time_embed.0.bias": ALL["ldm"]["time_embed.0.bias"] * 0 - 500}
    with pytest.raises(LoadError, match="are too large for float8_e4m3fn, the first time_embed.0.bias, up to 500:"):
        load_control(large, HEADS, dtype=torch.float8_e4m3fn)


def test_the_header_is_what_the_file_was_written_with(tmp_path: Path):
    save_file(ALL["ldm"], tmp_path / "a.safetensors", {"made": "here"})
    entries, metadata = read_header(tmp_path / "a.safetensors")
    assert {key: entry.shape for key, entry in entries.items()} == {
        key: tuple(tensor.shape) for key, tensor in ALL["ldm"].items()
    }
    assert metadata == {"made": "here"}
    assert {entry.dtype for entry in entries.values()} == {"F32"}


def test_a_header_is_not_read_beyond_its_limit(tmp_path: Path):
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write((1 << 30).to_bytes(8, "little") + b"{")
        file.truncate(2 << 30)  # sparse: no disk is filled
    with pytest.raises(HeaderError, match="its header has 1073741824 bytes, and at most 16777216 are read"):
        read_header(path)


def test_parts_lie_beside_the_file_that_is_named(tmp_path: Path):
    for name in ("x-00001-of-00002.bin", "x-00002-of-00002.bin", "x-00009-of-00002.bin", "alone.bin"):
        (tmp_path / name).touch()
    (tmp_path / "other.index.json").write_text('{"weight_map": {"a": "../../etc/passwd", "b": "x.bin"}}')
    (tmp_path / "broken.index.json").write_text("[" * 10**5)
    found = [tmp_path / f"x-0000{i}-of-00002.bin" for i in (1, 2)]
    assert parts(found[0]) == parts(found[1]) == found
    for name in ("alone.bin", "x-00009-of-00002.bin"):
        assert parts(tmp_path / name) == [tmp_path / name]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_name_that_is_no_utf8_is_printed(tmp_path: Path):
    path = tmp_path / os.fsdecode(b"lat\xe9.safetensors")
    path.write_bytes(b"<html>")
    with pytest.raises(LoadError, match=r"^lat\\udce9.safetensors: this is an HTML page"):
        read_weights(path)
