"""What cannot work is refused before sampling, in one sentence that says what was found."""

from __future__ import annotations

import json
import re
from itertools import permutations
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import WAYS, Control, Scene

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hosting import Host

FAMILY_NAMES = {"sd15": r"SD ?1(\.5|\.x)?\b", "sd21": r"SD ?2(\.0|\.1|\.x)?\b", "sdxl": r"SD ?XL\b"}


def assert_one_sentence(text: str) -> None:
    """One line, and no sentence after another ("SD1.5" and file names have dots too)."""
    assert text.strip() == text
    assert "\n" not in text
    assert len(re.findall(r"[.!?](?=\s+[A-Z]|$)", text)) <= 1, text
    assert len(text) <= 400


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("control", "model"), list(permutations(FAMILY_NAMES, 2)))
def test_a_control_of_another_family_is_refused_before_sampling(host: Host, control: str, model: str, way: str):
    host.load(f"{control}_depth")
    host.forget()
    with pytest.raises(Exception, match=FAMILY_NAMES[control]) as caught:
        host.sample(host.apply(way, host.scene(model), control, Control()))
    assert re.search(FAMILY_NAMES[model], str(caught.value))
    assert_one_sentence(str(caught.value))
    assert host.unet_calls == 0


def test_a_control_of_another_width_is_refused_before_sampling(host: Host):
    """The same layout, but 128 wide: the residuals would not fit, and the host would only log that."""
    host.write_wide_control("sd15_wide")
    host.forget()
    with pytest.raises(Exception, match="128") as caught:
        host.sample(host.apply("ApplyControl", host.scene(), "sd15", Control("wide")))
    assert "64" in str(caught.value)
    assert_one_sentence(str(caught.value))
    assert host.unet_calls == 0


def test_a_mismatch_in_the_second_place_of_a_stack_is_refused(host: Host):
    stack = host.stack("sd15", Control())
    (stack,) = host.call("StackControls", stack=stack, **host.inputs(Control(), "sdxl"))
    host.forget()

    def run() -> None:
        (model,) = host.call("ApplyControl", model=host.model("sd15"), stack=stack)
        host.sample(Scene(model, host.scene().positive, host.scene().negative))

    with pytest.raises(Exception, match=FAMILY_NAMES["sdxl"]):
        run()
    assert host.unet_calls == 0


def test_the_right_control_still_works_after_a_refusal(host: Host):
    with pytest.raises(Exception, match=FAMILY_NAMES["sdxl"]):
        host.sample(host.apply("ApplyControl", host.scene("sdxl"), "sd15", Control()))
    run = host.sample(host.apply("ApplyControl", host.scene("sdxl"), "sdxl", Control()))
    native = host.sample(host.native(host.scene("sdxl"), "sdxl", Control()))
    assert (run.latent - native.latent).abs().max() <= 1e-4 * native.latent.abs().max()


@pytest.mark.parametrize("node", ["ApplyControl", "ApplyControlToPrompt"])
def test_neither_control_nor_stack_is_an_error(host: Host, node: str):
    with pytest.raises(Exception, match=r"(?i)control_net.*stack|stack.*control_net"):
        host.call(node, **sockets(host, node))


@pytest.mark.parametrize("node", ["ApplyControl", "ApplyControlToPrompt", "StackControls"])
def test_a_control_without_its_image_is_an_error(host: Host, node: str):
    with pytest.raises(Exception, match=r"image|hint"):
        host.call(node, control_net=host.load("sd15_depth"), **sockets(host, node))


@pytest.mark.parametrize("node", ["ApplyControl", "ApplyControlToPrompt"])
def test_a_mask_that_limits_nothing_is_an_error(host: Host, node: str):
    """With a stack alone, every control has its own mask already."""
    with pytest.raises(Exception, match=r"mask.*Stack Controls"):
        host.call(node, stack=host.stack("sd15", Control()), mask=torch.ones(1, 8, 8), **sockets(host, node))


def sockets(host: Host, node: str) -> dict[str, Any]:
    """What is connected to this node besides control."""
    scene = host.scene()
    prompts = {"positive": scene.positive, "negative": scene.negative}
    return {"ApplyControl": {"model": scene.model}, "ApplyControlToPrompt": prompts, "StackControls": {}}[node]


# -- files that are no ControlNet ------------------------------------------------------------------------------------


def lora() -> dict[str, torch.Tensor]:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    return {
        f"{name}.lora_down.weight": torch.ones(4, 320),
        f"{name}.lora_up.weight": torch.ones(320, 4),
        f"{name}.alpha": torch.tensor(4.0),
    }


def flux_control() -> dict[str, torch.Tensor]:
    names = ["controlnet_x_embedder", "controlnet_blocks.0", "x_embedder", "context_embedder"]
    names += ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q", "controlnet_single_blocks.0"]
    return {f"{name}.weight": torch.ones(8, 8) for name in names} | {f"{name}.bias": torch.ones(8) for name in names}


def vae() -> dict[str, torch.Tensor]:
    return {f"first_stage_model.{side}.conv_in.weight": torch.ones(8, 3, 3, 3) for side in ("encoder", "decoder")}


LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 722601104\n"
HTML = "<!DOCTYPE html>\n<html><head><title>404</title></head><body>Sorry</body></html>\n"


def write_bytes(data: bytes) -> Callable[[Host, Path], object]:
    return lambda host, path: path.write_bytes(data)


def write_tensors(make: Callable[[], dict[str, torch.Tensor]]) -> Callable[[Host, Path], None]:
    return lambda host, path: host.write(path.stem, make())


def truncated(host: Host, path: Path) -> None:
    host.state("sd15_depth")
    whole = (host.folder / "sd15_depth.safetensors").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def only_header(host: Host, path: Path) -> None:
    header = json.dumps({"zero_convs.0.0.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def base_model(host: Host, path: Path) -> None:
    unet = host.model("sd15").model.diffusion_model.state_dict()
    host.write(path.stem, {f"model.diffusion_model.{name}": tensor.clone() for name, tensor in unet.items()})


STRANGERS: dict[str, tuple[str, Callable[[Host, Path], object], str]] = {
    "LoRA": ("a_lora.safetensors", write_tensors(lora), r"LoRA"),
    "Flux ControlNet": ("a_flux.safetensors", write_tensors(flux_control), r"(?i)flux"),
    "VAE": ("a_vae.safetensors", write_tensors(vae), r"VAE"),
    "base model": ("a_base.safetensors", base_model, r"(?i)checkpoint|base model|UNet"),
    "HTML page": ("a_page.safetensors", write_bytes(HTML.encode()), r"HTML"),
    "HTML page named pth": ("a_page.pth", write_bytes(HTML.encode()), r"HTML"),
    "Git LFS pointer": ("a_pointer.safetensors", write_bytes(LFS.encode()), r"LFS"),
    "Git LFS pointer named pth": ("a_pointer.pth", write_bytes(LFS.encode()), r"LFS"),
    "truncated file": ("a_half.safetensors", truncated, r"(?i)truncated|incomplete|cut"),
    "header without data": ("a_header.safetensors", only_header, r"(?i)truncated|incomplete|cut"),
    "empty file": ("an_empty.safetensors", write_bytes(b""), r"(?i)empty|0 bytes"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_file_that_is_no_controlnet_says_what_it_is(host: Host, kind: str):
    name, write, says = STRANGERS[kind]
    write(host, host.folder / name)
    with pytest.raises(Exception, match=says) as caught:
        host.call("LoadControlNet", control_net_name=name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", ["missing", "unknown", "shape"])
def test_weights_load_strictly(host: Host, wrong: str):
    """A key that is missing, a key nobody knows and a wrong shape are named."""
    state = host.state("sd15_depth")
    key = "middle_block.0.in_layers.2.weight"
    if wrong == "missing":
        del state[key]
    elif wrong == "unknown":
        key = "time_embed.7.weight"
        state[key] = torch.ones(3)
    else:
        state[key] = state[key][:7].clone()
    host.write(f"sd15_{wrong}", state)
    with pytest.raises(Exception, match=re.escape(key)):
        host.call("LoadControlNet", control_net_name=f"sd15_{wrong}.safetensors")


@pytest.mark.parametrize("after_skip", [True, False])
@pytest.mark.parametrize("way", ["ApplyControl", "ApplyControlToPrompt"])
def test_a_node_that_shrinks_the_models_blocks_is_refused(host: Host, way: str, after_skip: bool):
    """Deep Shrink: the host would add what still fits and only log the rest."""
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale as DeepShrink

    scene = host.scene()
    made = DeepShrink.execute(scene.model, 3, 2.0, 0.0, 0.35, after_skip, "bicubic", "bicubic")
    shrunk = Scene(made.result[0], scene.positive, scene.negative)  # type: ignore[index]
    host.sample(shrunk)
    with pytest.raises(
        Exception, match="encoder block . of the model gives 64x4x4, and control has 64x8x8 for it: ano"
    ):
        host.sample(host.apply(way, shrunk, "sd15", Control()))
    late = Control(start=0.4)
    host.sample(host.apply(way, shrunk, "sd15", late))  # where the two never meet, nothing is wrong


def test_a_model_for_a_file_without_differences_is_refused(host: Host):
    host.load("sd15_depth")
    with pytest.raises(Exception, match="these weights hold no differences from one: leave it out"):
        host.call("LoadControlNet", control_net_name="sd15_depth.safetensors", model=host.model("sd15"))


def test_a_union_type_on_another_control_is_refused(host: Host):
    (typed,) = host.call("SetUnionControlNetType", control_net=host.load("sd15_depth"), type="depth")
    with pytest.raises(Exception, match="a ControlNet, which has one type only: take SetUnionControlNetType off"):
        host.call("ApplyControl", model=host.model("sd15"), control_net=typed, image=Control().image)
    (auto,) = host.call("SetUnionControlNetType", control_net=typed, type="auto")
    host.call("ApplyControl", model=host.model("sd15"), control_net=auto, image=Control().image)
