"""Control files as they should not be, through LoadControlNet: each loads, or one sentence says why it does not."""

from __future__ import annotations

import io
import json
import pickle
import time
import zipfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import Control, moved
from safetensors.torch import save
from torch import Tensor

from zeroconv.controlnet_core.errors import ZeroConvError

if TYPE_CHECKING:
    from hosting import Host

State = dict[str, Tensor]
KEY = "zero_convs.3.0.weight"


def saved(content: object, **settings: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **settings)
    return file.getvalue()


def load(host: Host, name: str, data: bytes, **options: Any) -> Any:
    (host.folder / name).write_bytes(data)
    return host.call("LoadControlNet", control_net_name=name, **options)[0]


def refusal(host: Host, name: str, data: bytes, **options: Any) -> str:
    with pytest.raises(ZeroConvError) as caught:
        load(host, name, data, **options)
    text = str(caught.value)
    assert text.startswith(name) and text.isprintable() and len(text) <= 1000
    return text


def weights(control: Any) -> State:
    return control.get_models()[-1].model.state_dict()


# -- what holds a control loads ---------------------------------------------------------------------------------------

WRAPPED: dict[str, Callable[[State], object]] = {
    "with an epoch": lambda state: {**state, "epoch": 3, "best": 0.1, "config": {"lr": 1}},
    "module": lambda state: {"module": state},
    "module and optimizer": lambda state: {"module": state, "optimizer": {"state": {}, "param_groups": []}},
    "model of module": lambda state: {"model": {"module": state}, "epoch": 1},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "an unknown word": lambda state: {"student": state},
    "module. before each": lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
    "two before each": lambda state: {f"_forward_module.control_model.{key}": t for key, t in state.items()},
    "compiled": lambda state: {f"_orig_mod.{key}": tensor for key, tensor in state.items()},
    "training": lambda state: {
        **{f"module.control_model.{key}": tensor for key, tensor in state.items()},
        "module.model.diffusion_model.out.0.weight": torch.ones(64),
        "module.betas": torch.ones(10),
    },
}


@pytest.mark.parametrize("how", WRAPPED)
def test_what_stands_around_a_control_is_taken_off(host: Host, how: str):
    state = host.state("sd15_depth")
    control = load(host, "wrapped.pth", saved(WRAPPED[how](state)))
    found = weights(control)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in (KEY, "input_hint_block.0.weight"))


@pytest.mark.parametrize(
    "name", ["torch.safetensors", "torch.sft", "legacy.safetensors", "safe.pth", "safe.ckpt", "safe.PT"]
)
def test_files_are_read_by_what_is_in_them(host: Host, name: str):
    state = host.state("sd15_depth")
    legacy = {"_use_new_zipfile_serialization": False} if name.startswith("legacy") else {}
    data = save(state) if name.startswith("safe") else saved(state, **legacy)
    assert torch.equal(weights(load(host, name, data))[KEY], state[KEY])


def test_a_checkpoint_of_the_whole_training_loads_as_the_host_loads_it(host: Host):
    state = host.state("sd15_depth")
    whole = {f"control_model.{key}": tensor for key, tensor in state.items()}
    others = ("scale_factor", "global_step", "denoiser.sigmas", "model_ema.decay", "logvar", "v_pred", "ztsnr")
    control = load(host, "whole.safetensors", save(whole | {key: torch.ones(1) for key in others}))
    assert torch.equal(weights(control)[KEY], state[KEY])
    assert control.loaded.dropped == len(others)


@pytest.mark.parametrize("indexed", [False, True])
def test_parts_are_joined(host: Host, indexed: bool):
    state = host.state("sd15_depth")
    names = ["first.safetensors", "second.safetensors"] if indexed else [
        f"in_parts-0000{i}-of-00002.safetensors" for i in (1, 2)
    ]  # fmt: skip
    keys = sorted(state)
    halves = [{key: state[key] for key in keys[half::2]} for half in (0, 1)]
    if indexed:
        index = {key: names[half] for half in (0, 1) for key in halves[half]}
        (host.folder / "any.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (host.folder / names[1]).write_bytes(save(halves[1]))
    try:
        for chosen, half in ((0, 0), (1, 1)):
            found = weights(load(host, names[chosen], save(halves[half])))
            assert found.keys() == state.keys() and torch.equal(found[KEY], state[KEY])
        (host.folder / names[0]).unlink()
        said = refusal(host, names[1], save(halves[1]))
        assert f"this is part 2 of 2, and {names[0]} is not beside it: put all parts into one folder" in said
    finally:
        (host.folder / "any.index.json").unlink(missing_ok=True)


# -- what does not is named -------------------------------------------------------------------------------------------


def edited_header(state: State, edit: Callable[[dict[str, Any]], object]) -> bytes:
    data = save(state)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    made = edit(header)
    text = made if isinstance(made, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def offsets(*numbers: object) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["b"].update(data_offsets=list(numbers))


PAIR = {"a": torch.ones(4), "b": torch.ones(4)}
HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "nested": (lambda _: b"{" + b'"a":[' * 100_000, "its header is no JSON"),
    "5,000 digits": (lambda _: b'{"a":{"dtype":"F32","shape":[' + b"1" * 5000 + b"]}}", "its header is no JSON"),
    "one offset": (offsets(0), "b has no data_offsets of two whole numbers"),
    "offsets below 0": (offsets(-16, 0), "b has no data_offsets of two whole numbers"),
    "offsets that are true": (offsets(True, 17), "b has no data_offsets of two whole numbers"),
    "overlapping": (offsets(8, 24), "b begins at byte 8 of the data, expected at 16"),
    "with a hole": (offsets(20, 36), "b begins at byte 20 of the data, expected at 16"),
    "too long": (offsets(16, 36), "b of 4 F32 needs 16 bytes and has 20"),
    "missing bytes": (lambda header: header["b"].update(shape=[40], data_offsets=[16, 176]), "is truncated: expected"),
    "more bytes": (lambda header: header.pop("b") and None, "16 bytes follow the last tensor"),
    "no dtype": (lambda header: header["b"].pop("dtype") and None, "b is of the type 'None'"),
    "a dtype of old": (lambda header: header["b"].update(dtype="Q4"), "b is of the type 'Q4', which is none that"),
    "a shape of shapes": (lambda header: header["b"].update(shape=[[4]]), "b has no shape of at most 8 whole numbers"),
    "nine dimensions": (lambda header: header["b"].update(shape=[1] * 8 + [4]), "b has no shape of at most 8"),
    "twice": (
        lambda header: json.dumps(header).replace('"b"', '"a"').encode(),
        "its header is no JSON (a is there 2 times)",
    ),
    "a long name": (lambda header: header.update({"c" * 2000: header.pop("b")}), "a tensor's name has 2000 characters"),
    "a list": (lambda _: b"[]", "neither a safetensors file nor one that torch saved"),
    "entries of words": (lambda header: header.update(b="x"), "b is of the type 'None'"),
    "metadata of numbers": (
        lambda header: header.update(__metadata__={"a": 1}),
        "its metadata are no texts with names",
    ),
}


@pytest.mark.parametrize("how", HEADERS)
def test_a_header_is_believed_when_all_of_it_holds(host: Host, how: str):
    edit, says = HEADERS[how]
    assert says in refusal(host, "header.safetensors", edited_header(PAIR, edit))


def zipped(**files: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


OPTIMIZER = {"state": {0: {"step": torch.ones(1), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
OTHERS: dict[str, tuple[bytes, str]] = {
    "optimizer": (saved(OPTIMIZER), "this is the state of an optimizer, kept to go on with a training"),
    "scheduler": (saved({"base_lrs": [1e-5], "last_epoch": 4}), "this is the state of a learning rate schedule"),
    "scaler": (saved({"scale": 65536.0, "_growth_tracker": 0}), "this is the state of a gradient scaler"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(64), "this is a GGUF file, whose weights are quantized"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(64), "this is a picture"),
    "Keras": (b"\x89HDF\r\n\x1a\n" + bytes(64), "this is an HDF5 file"),
    "archive": (zipped(readme=b"hello"), "this is a zip archive, of readme and others, and torch did not write it"),
    "compressed": (zipped(**{"archive/data.pkl": b"\x80\x02}."}), "this zip archive is compressed"),
    "three bytes": (b"\x80\x02}", "torch cannot read this file, "),
    "a number": (saved(3), "expected a dictionary of tensors, found a int without any"),
    "shapes alone": (saved({"a": torch.ones(3, device="meta")}), "a has a shape and no numbers"),
    "sparse": (saved({"a": torch.ones(3, 3).to_sparse()}), "a is torch.sparse_coo, expected plain numbers"),
    "larger than it is": (saved({"a": torch.ones(1).expand(10**6, 10**6)}), "a needs 4000000000000 bytes, and there"),
    "code": (pickle.dumps(Exception("x"), 2), "the file holds more than tensors, "),
}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_control_is_named(host: Host, what: str, suffix: str):
    data, says = OTHERS[what]
    assert says in refusal(host, f"other.{suffix}", data)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_flipped_bit_is_loaded_or_named(host: Host, legacy: bool):
    """Flipped in the description, not in the numbers of the tensor."""
    data, said = saved({"a": torch.ones(3)}, _use_new_zipfile_serialization=not legacy), set()
    for at in range(0, len(data), 9):
        damaged = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        said.add(refusal(host, "flipped.pth", damaged))  # whatever is read of it is no control
    assert len(said) > 5


# -- numbers ----------------------------------------------------------------------------------------------------------


def changed(state: State, edit: Callable[[Tensor], Tensor]) -> bytes:
    return save({**state, KEY: edit(state[KEY].clone()).contiguous()})


def infinite(tensor: Tensor) -> Tensor:
    tensor.view(-1)[5] = float("inf")
    return tensor


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "NaN": (lambda t: t * float("nan"), f"1 of 302 weights are not finite (NaN or infinite), the first {KEY}"),
    "infinite": (infinite, f"1 of 302 weights are not finite (NaN or infinite), the first {KEY}"),
    "int8": (
        lambda t: t.to(torch.int8),
        f"1 of 302 weights are no floating numbers, the first {KEY} of 64x64x1x1 int8",
    ),
    "bool": (lambda t: t > 0, f"1 of 302 weights are no floating numbers, the first {KEY} of 64x64x1x1 bool"),
    "empty": (lambda t: t[:0], f"1 of 302 weights are empty, the first {KEY} of 0x64x1x1 float32"),
    "a number": (lambda t: t.flatten()[0], f"1 of a wrong shape: {KEY} (expected 64x64x1x1, found a number)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_weights_that_are_no_finite_numbers_are_refused(host: Host, what: str):
    edit, says = WRONG[what]
    state = host.state("sd15_depth")
    says = says.replace("302", str(len(state)))
    assert says in refusal(host, "numbers.safetensors", changed(state, edit))


def test_complex_weights_are_refused(host: Host):
    state = host.state("sd15_depth")
    said = refusal(host, "complex.pth", saved({**state, KEY: state[KEY].to(torch.complex64)}))
    assert f"weights are no floating numbers, the first {KEY} of 64x64x1x1 complex64" in said


def test_what_a_dtype_cannot_hold_is_refused_and_the_next_load_is_right(host: Host):
    state = host.state("sd15_depth")
    data = changed(state, lambda tensor: tensor + 5e5)
    said = refusal(host, "large.safetensors", data, weight_dtype="fp16")
    assert f"weights are too large for float16, the first {KEY}, up to 500000" in said
    assert said.endswith("choose bf16 or fp32 as weight_dtype")
    assert weights(load(host, "large.safetensors", data, weight_dtype="fp32"))[KEY].min() > 4e5


# -- keys -------------------------------------------------------------------------------------------------------------

HIGH = ["controlnet_cond_embedding.blocks.999999999.x", "down_blocks.999999999.x", "transformer_layes.999999999.x"]
HIGH += ["input_blocks.999999999.x", "lite_blocks.999999999.x", "middle_block.999999999.x", "body.999999999.x"]
HIGH += ["input_blocks.1.1.transformer_blocks.99999999999999999999.x", "adapter.body.0.resnets.99999999.x"]


@pytest.mark.parametrize("key", HIGH)
@pytest.mark.parametrize("beside", ["nothing", "ldm", "diffusers"])
def test_numbers_in_keys_are_not_counted_to(host: Host, key: str, beside: str):
    from zeroconv.controlnet_core.files.layouts import to_diffusers

    state = host.state("sd15_depth")
    if beside == "diffusers":
        state = to_diffusers(state, host.load("sd15_depth").loaded.control.config)
    elif beside == "nothing":
        state = {}
    started = time.monotonic()
    refusal(host, "high.safetensors", save({**state, key: torch.ones(1)}))
    assert time.monotonic() - started < 5


def test_the_queue_goes_on_after_all_of_them(host: Host):
    """A control that was refused leaves nothing behind: the next one acts as it always did."""
    for data in (b"", b"GGUF", saved(OPTIMIZER), save(PAIR)):
        refusal(host, "hostile.safetensors", data)
    run, without = host.sample(host.apply("ApplyControl", host.scene(), "sd15", Control())), host.sample(host.scene())
    native = host.sample(host.native(host.scene(), "sd15", Control()))
    assert moved(run, without) > 0.05
    assert (run.latent - native.latent).abs().max() <= 1e-4 * native.latent.abs().max()
