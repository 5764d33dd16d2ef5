"""Controls saved by the node load back, in our loader and in the host's, and give the same latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import MOVES, TOLERANCE, Run, moved, off_by, picture
from kinds import OTHERS, SDXL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from zeroconv.controlnet_core.files.saving import to_file
from zeroconv.controlnet_core.networks.control_lora import BORROWED
from zeroconv.controlnet_core.networks.union import UnionControlNet

if TYPE_CHECKING:
    from hosting import Host

FAMILIES = ("sd15", "sd21", "sdxl")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

CONTRACT = {
    "SaveControlNet": (
        ["control_net", "filename", "layout", "dtype", "content", "base", "target"],
        ["control_net_name"],
    ),
    "NewControlNet": (["model", "hint_channels", "hint_encoder"], ["control_net"]),
}


@pytest.fixture(autouse=True)
def _nothing_saved_before(host: Host):
    """Takes away what a test saved, but for the controls that other tests load as well."""
    before = set(host.folder.rglob("*"))
    yield
    for path in sorted(set(host.folder.rglob("*")) - before, reverse=True):
        if path.is_dir():
            path.rmdir()
        elif not path.name.startswith(tuple(f"{family}_" for family in FAMILIES)):
            path.unlink()


@pytest.mark.parametrize("node", CONTRACT)
def test_sockets_are_those_that_workflows_rely_on(host: Host, node: str):
    kind = host.ours[node]
    declared = kind.INPUT_TYPES()
    names = [*declared.get("required", {}), *declared.get("optional", {})]
    assert (names, [output.display_name for output in kind.GET_SCHEMA().outputs]) == CONTRACT[node]


def load(host: Host, name: str, node: str = "LoadControlNet", **inputs: Any) -> Any:
    (control,) = host.call(node, control_net_name=name, **inputs)
    return control


def save(host: Host, control: Any, **inputs: Any) -> str:
    (name,) = host.call("SaveControlNet", control_net=control, **inputs)
    return name


def weights_of(control: Any) -> dict[str, Tensor]:
    return {key: tensor.cpu() for key, tensor in control.loaded.control.state_dict().items()}


def sample(host: Host, family: str, control: Any = None, native: bool = False) -> Run:
    """The tiny model's latent under this CONTROL_NET, applied by our node or by the host's."""
    scene = host.scene(family)
    if control is None:
        return host.once(f"{family} without", lambda: host.sample(scene))
    given = {"control_net": control, "image": picture(1)}
    if native:
        dose = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
        prompts = {"positive": scene.positive, "negative": scene.negative}
        positive, negative = host.call("ControlNetApplyAdvanced", **prompts, **given, **dose)
        return host.sample(replace(scene, positive=positive, negative=negative))
    (model,) = host.call("ApplyControl", model=scene.model, **given)
    return host.sample(replace(scene, model=model))


def assert_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor, expected[key]), key


# -- layouts and types ------------------------------------------------------------------------------------------------


@pytest.fixture
def native_sizes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The host's loader reads diffusers files of published sizes alone: tells it those of a tiny family."""
    import comfy.model_detection
    from tiny_models import unet_config

    def tell(family: str, **others: Any) -> None:
        config = {**unet_config(family), "num_heads": -1, "num_head_channels": 64, **others}
        monkeypatch.setattr(comfy.model_detection, "unet_config_from_diffusers_unet", lambda _: dict(config))

    return tell


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_control_gives_the_same_latents_in_both_loaders(
    host: Host, native_sizes: Callable[..., None], family: str, layout: str, dtype: str
):
    native_sizes(family)
    original = host.load(f"{family}_depth")
    name = save(host, original, filename=f"made/{family}", layout=layout, dtype=dtype)
    assert name == str(Path("made", f"{family}.safetensors"))
    with safe_open(host.folder / name, framework="pt") as file:
        assert ("zero_convs.0.0.weight" in file.keys()) == (layout == "ldm")  # noqa: SIM118
        assert file.metadata()["kind"] == "ControlNet"
    ours, theirs = load(host, name), load(host, name, "ControlNetLoader")
    rounded = {key: t.to(DTYPES[dtype]) for key, t in weights_of(original).items()}
    # the CPU keeps fp32: what a half was is exact in it
    assert_bits(weights_of(ours), {key: t.to(weights_of(ours)[key].dtype) for key, t in rounded.items()})
    run, reference = sample(host, family, ours), sample(host, family, theirs, native=True)
    assert moved(reference, sample(host, family)) >= MOVES
    assert off_by(run, reference) <= TOLERANCE
    if dtype == "fp32":
        # Not bit by bit: a product with one row rounds by where its weights lie in memory, and files lie as they lie.
        assert off_by(run, sample(host, family, original)) <= 1e-5


def test_as_loaded_is_the_type_in_memory(host: Host):
    control = host.load("sd15_depth", weight_dtype="fp8_e4m3fn")
    name = save(host, control, filename="small")
    assert {t.dtype for t in load_file(host.folder / name).values()} == {torch.float8_e4m3fn}
    half = save(host, control, filename="half", dtype="fp16")
    for key, tensor in load_file(host.folder / half).items():
        assert torch.equal(tensor, weights_of(control)[key].half()), key


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_a_control_of_the_hosts_own_loader_is_saved_too(host: Host, layout: str):
    name = save(host, host.load("sd15_depth", native=True), filename="foreign", layout=layout)
    assert_bits(weights_of(load(host, name)), host.state("sd15_depth"))


def wide_union() -> UnionControlNet:
    """Of the published width, the only one that the host builds."""
    return UnionControlNet(
        replace(SDXL, model_channels=320, channel_mult=(1,), num_res_blocks=1, transformer_depth=(1,))
    )


@pytest.mark.parametrize(
    ("make", "layout"),
    [(wide_union, "diffusers"), (OTHERS["T2I-Adapter"][0], "ldm"), (OTHERS["Control-LoRA"][0], "ldm")],
    ids=["ControlNet Union", "T2I-Adapter", "Control-LoRA"],
)
def test_so_is_every_kind_that_the_hosts_loader_knows(
    host: Host, native_sizes: Callable[..., None], make: Callable[[], Any], layout: str
):
    one_level = {
        "channel_mult": [1],
        "num_res_blocks": [1],
        "transformer_depth": [1],
        "transformer_depth_output": [1] * 2,
    }
    native_sizes("sdxl", model_channels=320, **one_level)
    network = make()
    weights, metadata = to_file(network, layout)
    save_file(weights, host.folder / "given.safetensors", metadata)
    name = save(host, load(host, "given.safetensors", "ControlNetLoader"), filename="foreign")
    again = load(host, name)
    assert again.loaded.control.kind == network.kind
    assert_bits(weights_of(again), {key: tensor.detach() for key, tensor in network.state_dict().items()})


@pytest.mark.parametrize(("kind", "layout"), [(kind, layout) for kind, (_, all_) in OTHERS.items() for layout in all_])
def test_every_kind_of_control_is_loaded_saved_and_loaded(host: Host, kind: str, layout: str):
    network = OTHERS[kind][0]()
    weights, metadata = to_file(network)
    save_file(weights, host.folder / "given.safetensors", metadata)
    first = load(host, "given.safetensors")
    assert first.loaded.control.kind == kind
    name = save(host, first, filename="saved", layout=layout)
    again = load(host, name)
    assert ("diffusers" in again.loaded.format.name) == (layout == "diffusers")
    assert_bits(weights_of(again), {key: tensor.detach() for key, tensor in network.state_dict().items()})


def test_a_control_is_taken_out_of_a_checkpoint(host: Host):
    state = host.state("sd15_depth")
    base = host.model("sd15").model.diffusion_model.state_dict()
    whole = {f"control_model.{key}": tensor for key, tensor in state.items()}
    whole |= {f"model.diffusion_model.{key}": tensor for key, tensor in base.items()}
    whole |= {"first_stage_model.encoder.conv_in.weight": torch.ones(1000, 1000), "betas": torch.ones(1000)}
    host.write("checkpoint", whole)
    name = save(host, load(host, "checkpoint.safetensors"), filename="taken_out")
    assert_bits(load_file(host.folder / name), state)
    saved, given = ((host.folder / file).stat().st_size for file in (name, "checkpoint.safetensors"))
    assert saved < sum(tensor.nbytes for tensor in state.values()) * 1.05 < given / 2


def test_a_shuffle_control_says_so_in_its_file(host: Host):
    host.load("sd15_depth")
    name = save(host, load(host, "sd15_depth.safetensors", control_type="shuffle"), filename="pooled")
    with safe_open(host.folder / name, framework="pt") as file:
        assert file.metadata()["control_type"] == "shuffle"
    assert load(host, name).global_average_pooling


def test_the_node_says_where_the_file_is_and_how_big(host: Host):
    output = host.ours["SaveControlNet"].execute(host.load("sd15_depth"), "told", "ldm", "fp16", "control")
    (text,) = output.ui.as_dict()["text"]
    size = (host.folder / "told.safetensors").stat().st_size
    assert text == f"saved told.safetensors\n{size / 2**20:.1f} MiB in {host.folder}"
    assert host.ours["SaveControlNet"].GET_SCHEMA().is_output_node


# -- names ------------------------------------------------------------------------------------------------------------


def test_nothing_is_written_over_another_file(host: Host):
    control = host.load("sd15_depth")
    names = [save(host, control, filename="same", dtype=dtype) for dtype in ("fp32", "fp16", "bf16")]
    assert names == ["same.safetensors", "same_2.safetensors", "same_3.safetensors"]
    dtypes = [load_file(host.folder / name)["time_embed.0.bias"].dtype for name in names]
    assert dtypes == list(DTYPES.values())
    assert save(host, control, filename="same.safetensors") == "same_4.safetensors"


def test_backslashes_make_folders_everywhere(host: Host):
    name = save(host, host.load("sd15_depth"), filename="one\\two/three v1.5")
    assert name == str(Path("one", "two", "three v1.5.safetensors"))
    assert (host.folder / "one" / "two" / "three v1.5.safetensors").is_file()


@pytest.mark.parametrize(
    "filename",
    [
        *("", "/etc/a", "../a", "a/../../b", "a/./b", "a//b", "a/", "C:\\a", "C:a", "..\\a", "\\\\server\\a"),
        *("con", "a/NUL.b", "lpt1", "a.", "a /b", "a*b", 'a"b', "a|b", "a\nb", "a:stream"),
    ],
)
def test_names_that_lead_elsewhere_or_cannot_be_are_refused(host: Host, filename: str):
    before = set(host.folder.parent.rglob("*"))
    with pytest.raises(Exception, match="filename .* has a part .*: expected names with / between them"):
        save(host, host.load("sd15_depth"), filename=filename)
    assert set(host.folder.parent.rglob("*")) == before


def test_files_go_into_the_users_folder_not_the_packs(host: Host, monkeypatch: pytest.MonkeyPatch):
    import folder_paths

    from zeroconv.lab.models import CONTROLS

    kept = set(CONTROLS.iterdir())
    folders = [str(CONTROLS), str(host.folder)]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "controlnet", (folders, {".safetensors"}))
    assert save(host, host.load("sd15_depth"), filename="mine") == "mine.safetensors"
    assert (host.folder / "mine.safetensors").is_file()
    assert set(CONTROLS.iterdir()) == kept
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "controlnet", (folders[:1], {".safetensors"}))
    with pytest.raises(Exception, match="the host has no controlnet folder to save into: name one in extra_model"):
        save(host, host.load("sd15_depth"), filename="mine")


# -- other bases ------------------------------------------------------------------------------------------------------


def encoder(model: Any) -> dict[str, Tensor]:
    """The encoder's weights of a MODEL that no patch lies on."""
    return {k: t for k, t in model.model.diffusion_model.state_dict().items() if k.startswith(BORROWED)}


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_transferred_control_is_control_plus_target_minus_base(
    host: Host, native_sizes: Callable[..., None], family: str, layout: str
):
    native_sizes(family)
    control, base, target = host.load(f"{family}_depth"), host.model(family), host.another_model(family)
    models = {"base": base, "target": target}
    name = save(host, control, filename="moved", layout=layout, content="transfer", **models)
    found, state, old, new = weights_of(load(host, name)), host.state(f"{family}_depth"), encoder(base), encoder(target)
    assert found.keys() == state.keys()
    assert 200 < len(old.keys() & state.keys()) < len(state)
    for key, tensor in state.items():
        expected = tensor.double() + new[key].double() - old[key].double() if key in old else tensor.double()
        assert (found[key] - expected).abs().max() <= 1e-6 * (1 + expected.abs().max()), key
    run = sample(host, family, load(host, name))
    assert off_by(run, sample(host, family, control)) > MOVES
    native = sample(host, family, load(host, name, "ControlNetLoader"), native=True)
    assert off_by(run, native) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_difference_and_its_model_give_the_same_latents_in_both_loaders(host: Host, family: str):
    control, model = host.load(f"{family}_depth"), host.model(family)
    name = save(host, control, filename="difference", content="difference", base=model)
    state, base = load_file(host.folder / name), encoder(model)
    key = "middle_block.0.in_layers.2.weight"
    assert torch.equal(state[f"control_model.{key}"], weights_of(control)[key] - base[key])
    assert "difference" in state
    ours = load(host, name, model=model)
    theirs = load(host, name, "DiffControlNetLoader", model=model)
    for key, tensor in weights_of(ours).items():
        assert (tensor - weights_of(control)[key]).abs().max() <= 1e-6, key
    original = sample(host, family, control)
    assert moved(original, sample(host, family)) >= MOVES
    assert off_by(sample(host, family, ours), original) <= TOLERANCE
    assert off_by(sample(host, family, theirs, native=True), original) <= TOLERANCE


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"content": "difference"}, "content difference needs base: connect the model that the control was made for"),
        ({"content": "transfer", "target": "sd15"}, "content transfer needs base: connect the model that the control"),
        ({"content": "transfer", "base": "sd15"}, "content transfer needs target: connect the model to move it to"),
        (
            {"base": "sd15"},
            "base is connected, and content control takes no base: disconnect it, or choose transfer or",
        ),
        ({"target": "sd15"}, "target is connected, and content control takes no target: disconnect it, or choose tran"),
        ({"content": "difference", "base": "sd15", "target": "sd15"}, "content difference takes no target: disconnect"),
        (
            {"content": "difference", "base": "sd15", "layout": "diffusers"},
            "difference files exist in the ldm layout alone, found diffusers: choose ldm",
        ),
        (
            {"content": "difference", "base": "sdxl"},
            "the base model does not fit the control: expected input_blocks.1.1.norm.bias of 64, found no such weights",
        ),
        (
            {"content": "transfer", "base": "sd15", "target": "sd21"},
            "the target model does not fit the control: expected input_blocks.1.1.proj_in.weight of 64x64x1x1, found 6",
        ),
    ],
)
def test_inputs_that_do_not_go_together_are_refused(host: Host, given: dict[str, str], text: str):
    inputs = {key: host.model(value) if key in ("base", "target") else value for key, value in given.items()}
    with pytest.raises(Exception, match=text):
        save(host, host.load("sd15_depth"), filename="refused", **inputs)
    assert not (host.folder / "refused.safetensors").exists()


def test_what_is_no_control_of_this_pack_is_refused(host: Host):
    import comfy.controlnet

    with pytest.raises(
        Exception, match="ControlBase of another loader holds no weights that this pack knows: load its"
    ):
        save(host, comfy.controlnet.ControlBase(), filename="refused")
    foreign = comfy.controlnet.ControlNet(torch.nn.Linear(2, 2), load_device="cpu", manual_cast_dtype=None)
    with pytest.raises(Exception, match="the ControlNet of another loader: this is no ControlNet in the ldm or diffus"):
        save(host, foreign, filename="refused")


# -- new controls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hint_encoder", ["released", "paper"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_control_is_the_models_encoder_and_changes_nothing(host: Host, family: str, hint_encoder: str):
    (control,) = host.call("NewControlNet", model=host.model(family), hint_encoder=hint_encoder)
    state, base = weights_of(control), encoder(host.model(family))
    copied = [key for key in state if key.startswith(BORROWED)]
    assert copied
    assert sorted(copied) == sorted(base)
    assert all(torch.equal(state[key], base[key]) for key in copied)
    assert not any(t.any() for key, t in state.items() if key.startswith(("zero_convs", "middle_block_out")))
    assert torch.equal(sample(host, family, control).latent, sample(host, family).latent)
    name = save(host, control, filename="new")
    again = load(host, name)
    assert_bits(weights_of(again), state)
    assert again.loaded.control.config == control.loaded.control.config


def test_a_new_control_has_the_hint_channels_asked_for(host: Host):
    (control,) = host.call("NewControlNet", model=host.model("sd15"), hint_channels=1)
    assert weights_of(control)["input_hint_block.0.weight"].shape == (16, 1, 3, 3)


KEY = "input_blocks.1.0.in_layers.2.weight"


@pytest.mark.parametrize("loaded", [False, True], ids=["at rest", "loaded"])
def test_loras_on_the_model_are_part_of_what_is_copied(host: Host, loaded: bool):
    """The same whether the host has merged them just now or not, and of the clone that they lie on alone."""
    import comfy.model_management

    model = host.another_model("sd15")
    plain = encoder(model)[KEY].clone()
    patch = torch.full_like(plain, 0.25)
    patched = model.clone()
    assert patched.add_patches({f"diffusion_model.{KEY}": ("diff", (patch,))}, 0.5)
    if loaded:
        comfy.model_management.load_models_gpu([patched])
        assert torch.allclose(encoder(model)[KEY], plain + 0.125), "the host has merged it"
    (with_lora,) = host.call("NewControlNet", model=patched)
    (without,) = host.call("NewControlNet", model=model)
    assert torch.equal(weights_of(with_lora)[KEY], plain + 0.125)
    assert torch.equal(weights_of(without)[KEY], plain)
    comfy.model_management.unload_all_models()
    assert torch.equal(encoder(model)[KEY], plain)


def test_a_difference_from_a_model_with_a_lora_is_loaded_with_the_same(host: Host):
    control, model = host.load("sd15_depth"), host.model("sd15").clone()
    patch = torch.full_like(encoder(model)[KEY], 0.25)
    model.add_patches({f"diffusion_model.{KEY}": ("diff", (patch,))}, 1.0)
    name = save(host, control, filename="difference", content="difference", base=model)
    loaded = weights_of(load(host, name, model=model))
    assert max((tensor - weights_of(control)[key]).abs().max().item() for key, tensor in loaded.items()) <= 1e-6
    without = weights_of(load(host, name, model=host.model("sd15")))
    assert torch.allclose(without[KEY], loaded[KEY] - 0.25, atol=1e-6)


def test_a_new_control_of_a_model_that_is_no_sd_unet_is_refused(host: Host):
    model = host.model("sd15").clone()
    model.model = type("Flux", (), {"model_config": type("Flux", (), {"unet_config": {"image_model": "flux"}})()})()
    with pytest.raises(Exception, match="a new ControlNet is a ControlNet of the SD UNet, the model is Flux: connect"):
        host.ours["NewControlNet"].execute(model, 3, "released")


def test_the_node_says_when_memory_was_narrower_than_the_file(host: Host):
    narrow = host.load("sd15_depth", weight_dtype="bf16")

    def told(dtype: str) -> str:
        output = host.ours["SaveControlNet"].execute(narrow, f"narrow_{dtype}", "ldm", dtype, "control")
        return output.ui.as_dict()["text"][0]

    assert "the control was in memory as bfloat16: if its own file is more exact than that, load it" in told("fp32")
    assert "in memory" not in told("bf16") + told("fp16")
