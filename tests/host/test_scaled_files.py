"""Files in fp8 with scales give the host's pictures of the weights that they stand for; fp8_e5m2 is kept in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import moved, off_by, picture
from torch import Tensor

if TYPE_CHECKING:
    from graphs import Run
    from hosting import Host

FP8 = torch.float8_e4m3fn


def scaled(state: dict[str, Tensor], newer: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file in fp8 with scales, and the weights that it stands for, both with all else in fp32."""
    file, exact = {}, {}
    for key, tensor in state.items():
        if not key.endswith(".weight") or tensor.ndim < 2:
            file[key] = exact[key] = tensor.contiguous()
            continue
        # a power of two, so that what it stands for is exact in 16 bits
        scale = torch.exp2(torch.ceil(torch.log2(tensor.abs().max().clamp(min=1e-6) / 448)))
        file[key] = (tensor / scale).to(FP8).contiguous()
        exact[key] = file[key].float() * scale
        module = key.removesuffix("weight")
        file[module + ("weight_scale" if newer else "scale_weight")] = scale
        if newer:
            said = json.dumps({"format": "float8_e4m3fn"}).encode()
            file[module + "comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
    if not newer:
        file["scaled_fp8"] = torch.zeros(0, dtype=FP8)
    return file, exact


def run(host: Host, control: Any, family: str) -> Run:
    (model,) = host.call("ApplyControl", model=host.model(family), control_net=control, image=picture(1))
    return host.sample(replace(host.scene(family), model=model))


@pytest.mark.parametrize("newer", [True, False])
@pytest.mark.parametrize("kind", ["ControlNet", "Union", "Control-LoRA", "lite", "T2I-Adapter"])
def test_a_scaled_file_gives_the_latent_of_what_it_stands_for(host: Host, kind: str, newer: bool):
    from tiny_kinds import adapter_state, lite_state, lora_state, union_state  # it imports the host

    family = "sdxl" if kind == "Union" else "sd15"
    state = {
        "ControlNet": lambda: host.state("sd15_depth"),
        "Union": union_state,
        "Control-LoRA": lora_state,
        "lite": lite_state,
        "T2I-Adapter": adapter_state,
    }[kind]()
    runs = []
    for name, tensors in zip(("scaled", "exact"), scaled(state, newer), strict=True):
        host.write(f"{name} {kind} {newer}", tensors)
        options = {"control_type": "auto", "weight_dtype": "fp32"}
        (control,) = host.call("LoadControlNet", control_net_name=f"{name} {kind} {newer}.safetensors", **options)
        runs.append(run(host, control, family))
    assert moved(runs[0], host.sample(host.scene(family))) > 0.01
    assert off_by(runs[0], runs[1]) <= 1e-5


def test_fp8_e5m2_is_kept_and_gives_nearly_the_same(host: Host):
    narrow, own = host.load("sd15_depth", weight_dtype="fp8_e5m2"), host.load("sd15_depth")
    assert {p.dtype for p in narrow.loaded.control.parameters()} == {torch.float8_e5m2}
    assert 0 < off_by(run(host, narrow, "sd15"), run(host, own, "sd15")) < 0.5


def test_another_format_is_refused_with_the_files_name(host: Host):
    file, _ = scaled(host.state("sd15_depth"))
    key = next(key for key in file if key.endswith("comfy_quant"))
    file[key] = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    host.write("nvfp4", file)
    with pytest.raises(Exception, match=r"nvfp4.safetensors: .*says that the weights are 'nvfp4': load"):
        host.call("LoadControlNet", control_net_name="nvfp4.safetensors")
