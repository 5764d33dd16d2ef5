"""The report of `InspectControl`: what a control of every kind is, which models it fits, and what it still needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from kinds import OTHERS
from safetensors.torch import save_file

from zeroconv.controlnet_core.files.kinds import KINDS
from zeroconv.controlnet_core.files.saving import to_difference_file, to_file
from zeroconv.controlnet_core.networks.control_lora import ControlLora
from zeroconv.controlnet_core.networks.controlnet import ControlNet
from zeroconv.controlnet_core.networks.t2i_adapter import AdapterConfig, T2IAdapter
from zeroconv.controlnet_core.networks.union import TYPES

if TYPE_CHECKING:
    from hosting import Host


def inspect(host: Host, control: Any, model: Any = None) -> dict[str, str]:
    """The report's facts by name."""
    (text,) = host.call("InspectControl", control_net=control, **({} if model is None else {"model": model}))
    return dict(line.split(": ", maxsplit=1) for line in text.splitlines())


def loaded(host: Host, network: Any, name: str, layout: str = "ldm", **inputs: Any) -> Any:
    weights, metadata = to_file(network, layout)
    save_file(weights, host.folder / f"{name}.safetensors", metadata)
    (control,) = host.call("LoadControlNet", control_net_name=f"{name}.safetensors", **inputs)
    return control


def test_a_controlnet_in_all_its_facts(host: Host):
    control = host.load("sd15_depth")
    parameters = list(control.loaded.control.parameters())
    count = sum(p.numel() for p in parameters)
    assert inspect(host, control, host.model("sd15")) == {
        "file": "sd15_depth.safetensors",
        "kind": "ControlNet",
        "family": "SD1.x",
        "format": "ldm",
        "parameters": f"{count / 1e6:.1f} M in {len(parameters)} tensors",
        "weights": f"float32, {count * 4 / 2**20:.1f} MiB",
        "computes in": "float32",
        "hint": "3 channels, 8 times the latent's size",
        "residuals": "12+1",
        "width": "64 channels, multipliers 1 1 2 2",
        "text": "64 numbers a token",
        "published models": "none, it is made for a model of another size",
        "fits": "yes, the model is SD1.x",
    }


def test_a_model_of_another_family_does_not_fit_and_the_report_says_why(host: Host):
    facts = inspect(host, host.load("sd15_depth"), host.model("sdxl"))
    assert facts["fits"].startswith(
        "no: sd15_depth.safetensors: this ControlNet is made for SD1.x, the model is SDXL: "
    )


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_one_hint_channel_and_the_format_are_said(host: Host, layout: str):
    control = loaded(host, ControlNet(host.load("sd15_depth").loaded.control.config, hint_channels=1), "one", layout)
    facts = inspect(host, control)
    assert facts["hint"] == "1 channel, 8 times the latent's size"
    assert facts["format"] == layout
    assert "fits" not in facts


@pytest.mark.parametrize("dtype", ["fp16", "fp8_e4m3fn"])
def test_the_weights_are_those_in_memory(host: Host, dtype: str):
    facts = inspect(host, host.load("sd15_depth", weight_dtype=dtype))
    assert facts["weights"].startswith({"fp16": "float16, ", "fp8_e4m3fn": "float8_e4m3fn, "}[dtype])
    assert facts["computes in"] == "float32"  # on this CPU


def test_a_shuffle_control_is_called_one(host: Host):
    host.load("sd15_depth")
    (control,) = host.call("LoadControlNet", control_net_name="sd15_depth.safetensors", control_type="shuffle")
    assert inspect(host, control)["control_type"].startswith("shuffle: its residuals are averaged over the picture")
    assert "control_type" not in inspect(host, host.load("sd15_depth"))


def test_a_difference_says_that_its_base_is_in(host: Host):
    network, model = host.load("sd15_depth").loaded.control, host.model("sd15")
    written = to_difference_file(network, model.model.diffusion_model.state_dict())
    save_file(written[0], host.folder / "inspected_difference.safetensors", written[1])
    (control,) = host.call("LoadControlNet", control_net_name="inspected_difference.safetensors", model=model)
    facts = inspect(host, control)
    assert facts["format"] == "difference"
    assert facts["base"] == "added to the differences, from the model connected to the loader"
    assert "left out" not in facts


def test_what_a_checkpoint_holds_beside_the_control_is_counted(host: Host):
    state = {f"control_model.{key}": tensor for key, tensor in host.state("sd15_depth").items()}
    host.write("inspected_checkpoint", {**state, "betas": torch.ones(9), "first_stage_model.a": torch.ones(1)})
    (control,) = host.call("LoadControlNet", control_net_name="inspected_checkpoint.safetensors")
    facts = inspect(host, control)
    assert facts["format"] == "ldm with prefix"
    assert facts["left out"] == "2 tensors in the file that are no part of the control"


def test_a_union_names_its_types_and_the_chosen_one(host: Host):
    facts = inspect(host, loaded(host, OTHERS["ControlNet Union"][0](), "inspected_union", control_type="depth"))
    assert facts["kind"] == "ControlNet Union"
    assert facts["types"] == f"6: {', '.join(TYPES[:6])}"
    assert facts["control_type"] == "depth"
    assert facts["residuals"] == "9+1"


def test_an_adapter_names_its_features_and_the_models_that_take_it(host: Host):
    facts = inspect(host, loaded(host, T2IAdapter(AdapterConfig()), "inspected_adapter"))
    assert facts["kind"] == "T2I-Adapter"
    assert facts["variant"] == "full"
    assert facts["features"] == "320 640 1280 1280 channels, after encoder blocks 2, 5, 8, 11"
    assert facts["published models"] == "SD1.x, SD2.x"
    assert "residuals" not in facts
    xl = T2IAdapter(AdapterConfig(channels=(64, 128, 256, 256), hint_multiple=16, hint_channels=1))
    facts = inspect(host, loaded(host, xl, "inspected_xl_adapter"))
    assert facts["family"] == "SDXL"
    assert facts["hint"] == "1 channel, 8 times the latent's size rounded up to a multiple of 16"
    assert facts["features"] == "64 128 256 256 channels, after encoder blocks 3, 5, 8, the middle"


def test_a_control_lora_names_its_rank_and_what_it_borrows(host: Host):
    network = OTHERS["Control-LoRA"][0]()
    facts = inspect(host, loaded(host, network, "inspected_lora"))
    assert facts["kind"] == "Control-LoRA"
    assert facts["rank"] == "4"
    borrowed = sum(1 for _ in network.borrowed())
    assert borrowed > 100
    assert facts["base"] == f"{borrowed} layers are borrowed from the model that it is applied to"
    assert "left out" not in facts
    mixed = ControlLora.fresh(network.config, rank=200)  # more than some layers can have
    smallest, largest = mixed.ranks
    assert smallest < largest
    assert inspect(host, loaded(host, mixed, "inspected_mixed"))["rank"] == f"{smallest} to {largest}"


def test_a_lllite_counts_its_modules(host: Host):
    facts = inspect(host, loaded(host, OTHERS["ControlLLLite"][0](), "inspected_lllite"))
    assert facts["kind"] == "ControlLLLite"
    assert facts["family"] == "SDXL"
    assert facts["modules"].startswith("1, each shifts")


def test_a_controlnet_lite_reads_no_text(host: Host):
    facts = inspect(host, loaded(host, OTHERS["ControlNet-lite"][0](), "inspected_lite"), host.model("sdxl"))
    assert (facts["kind"], facts["family"], facts["format"]) == ("ControlNet-lite", "SDXL", "ControlNet-lite")
    assert facts["residuals"] == "9+1"
    assert facts["width"] == "64 channels, multipliers 1 1 2"
    assert facts["text"] == "not read, it has no attention to it"
    assert facts["fits"] == "yes, the model is SDXL"


def test_a_control_of_another_loader_is_read_as_well(host: Host):
    facts = inspect(host, host.load("sd15_depth", native=True), host.model("sd15"))
    assert facts["format"] == "ControlNet of another loader"
    assert (facts["kind"], facts["family"]) == ("ControlNet", "SD1.x")
    assert facts["fits"] == "yes, the model is SD1.x"
    facts = inspect(host, host.load("sd15_depth", native=True), host.model("sdxl"))
    assert facts["fits"].startswith("no: this ControlNet is made for SD1.x, the model is SDXL")


def test_a_control_that_is_none_of_ours_says_so(host: Host):
    import comfy.controlnet

    facts = inspect(host, comfy.controlnet.ControlBase())
    assert facts["format"] == "ControlBase of another loader"
    assert facts["not known here"].endswith("load its file with Load ControlNet (ZeroConv)")


def test_each_kind_of_control_has_a_class_that_runs_it(host: Host):
    from zeroconv.nodes.host.files import HOST_CLASSES

    assert set(HOST_CLASSES) == {kind.network for kind in KINDS}
