"""Control-LoRAs in our nodes: the latents of the host's own loader and apply node, and no network built for a run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import CONTEXT, MOVES, TOLERANCE, Run, Scene, assert_same, latent, moved, off_by, picture, prompt
from torch import Tensor

if TYPE_CHECKING:
    from hosting import Host

FAMILIES = ("sd15", "sd21", "sdxl")
ENCODER = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.")
IMAGE = picture(1)

MODELS_OWN: dict[str, Any] = {"lacking": ("norm", "in_layers.0", "emb_layers", "ff.net.2.bias")}
"""A file without these: parameters that only the model has."""


def file(family: str, rank: int = 4, lacking: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A seeded Control-LoRA for the tiny model of `family`, as published; keys that hold one of `lacking` left out."""
    from tiny_models import control_state_dict

    generator = torch.Generator().manual_seed(808)
    state = {"lora_controlnet": torch.empty(0)}
    for key, tensor in control_state_dict(family, seed=909).items():
        if any(part in key for part in lacking):
            continue
        name, _, part = key.rpartition(".")
        if not key.startswith(ENCODER) or part != "weight" or tensor.ndim == 1:
            state[key] = tensor
            continue
        up = torch.randn(tensor.shape[0], rank, *[1] * (tensor.ndim - 2), generator=generator)
        down = torch.randn(rank, *tensor.shape[1:], generator=generator)
        state[f"{name}.up"], state[f"{name}.down"] = 0.6 * up / rank**0.5, down / tensor[0].numel() ** 0.5
    return state


def load(host: Host, family: str, native: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The CONTROL_NET of `file(family, **options)` from our loader or the host's."""
    name = " ".join(["lora", family, str(dtype), *map(str, options.values())]).replace("/", "")
    if not (host.folder / f"{name}.safetensors").exists():
        host.write(name, {key: tensor.to(dtype) for key, tensor in file(family, **options).items()})
    return host.call("ControlNetLoader" if native else "LoadControlNet", control_net_name=f"{name}.safetensors")[0]


def scene(host: Host, family: str, model: Any = None) -> Scene:
    return Scene(model or host.model(family), prompt(1), prompt(2))


def native_apply(host: Host, start: Scene, control: Any, image: Tensor = IMAGE, strength: float = 1.0) -> Scene:
    """The host's own graph."""
    positive, negative = host.call(
        "ControlNetApplyAdvanced",
        positive=start.positive,
        negative=start.negative,
        control_net=control,
        image=image,
        strength=strength,
        start_percent=0.0,
        end_percent=1.0,
    )
    return Scene(start.model, positive, negative)


def apply(host: Host, start: Scene, control: Any, image: Tensor = IMAGE, strength: float = 1.0) -> Scene:
    """The same with our node."""
    (model,) = host.call(
        "ApplyControl", model=start.model, control_net=control, image=image, strength=strength, start=0.0, end=1.0
    )
    return Scene(model, start.positive, start.negative)


def both(host: Host, start: Scene, family: str, **options: Any) -> tuple[Run, Run, Run]:
    """Our run, the host's, and one without control."""
    ours = host.sample(apply(host, start, load(host, family, **options)))
    native = host.sample(native_apply(host, start, load(host, family, native=True, **options)))
    return ours, native, host.sample(start)


def assert_hint_matters(host: Host, start: Scene, native: Run, family: str, **options: Any) -> None:
    other = native_apply(host, start, load(host, family, native=True, **options), image=1 - IMAGE)
    assert moved(native, host.sample(other)) >= MOVES


# -- the host's results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_residuals_are_those_of_the_hosts_own_network(host: Host, family: str):
    model = host.model(family).model
    native, control = load(host, family, native=True), load(host, family)
    device, ours = host.place(host.model(family), *control.get_models()), control.network
    native.set_cond_hint(IMAGE.movedim(-1, 1), 1.0, (0.0, 1.0))
    native.pre_run(model, model.model_sampling.percent_to_sigma)
    ours.bind(model.diffusion_model)
    torch.manual_seed(0)
    x, t, context = torch.randn(2, 4, 16, 24), torch.tensor([900.0, 100.0]), torch.randn(2, 7, CONTEXT)
    y = torch.randn(2, ours.config.adm_in_channels) if family == "sdxl" else None
    hint = picture(1, height=128, width=192).movedim(-1, 1)
    place: dict[str, Any] = {"device": device, "dtype": model.get_dtype()}
    x, t, context, hint = x.to(**place), t.to(device), context.to(**place), hint.to(**place)
    y = None if y is None else y.to(**place)
    theirs = native.control_model(x=x, hint=hint.expand(2, -1, -1, -1), timesteps=t, context=context, y=y)
    found = list(ours(x, t, context, ours.encode_hint(hint), y))
    other = list(ours(x, t, context, ours.encode_hint(1 - hint), y))
    expected = [*theirs["output"], *theirs["middle"]]
    assert len(found) == len(expected) == (10 if family == "sdxl" else 13)
    for residual, reference, changed in zip(found, expected, other, strict=True):
        assert (changed - reference).norm() >= MOVES * reference.norm()
        assert (residual - reference).abs().max() <= TOLERANCE * reference.abs().max()
    native.cleanup()
    ours.unbind()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sd15", {}),
        ("sd21", {}),
        ("sdxl", {}),
        ("sdxl", {"rank": 1}),
        ("sd15", {"dtype": torch.float16}),
        ("sd15", MODELS_OWN),
    ],
    ids=["sd15", "sd21", "sdxl", "rank 1", "fp16 file", "parameters that only the model has"],
)
def test_same_latent_as_native(host: Host, family: str, options: dict[str, Any]):
    ours, native, without = both(host, scene(host, family), family, **options)
    assert_same(ours, native, without)
    assert_hint_matters(host, scene(host, family), native, family, **options)


@pytest.mark.parametrize("native", [False, True], ids=["ours in the host's node", "the host's in our node"])
def test_in_the_others_apply_node(host: Host, native: bool):
    start = scene(host, "sd15")
    crossed = (apply if native else native_apply)(host, start, load(host, "sd15", native=native), strength=0.7)
    reference = host.sample(native_apply(host, start, load(host, "sd15", native=True), strength=0.7))
    assert_same(host.sample(crossed), reference, host.sample(start))


def test_beside_a_controlnet_and_twice(host: Host):
    """A chain of two Control-LoRAs that share a network, and a ControlNet."""
    start = scene(host, "sd15")
    runs = []
    for native, add in ((True, native_apply), (False, apply)):
        lora, net = load(host, "sd15", native=native), host.load("sd15_depth", native=native)
        chained = start
        for control, image, strength in ((lora, IMAGE, 0.6), (net, picture(2), 0.5), (lora, picture(3), 0.4)):
            chained = add(host, chained, control, image, strength)
        runs.append(host.sample(chained))
    native, ours = runs
    assert_same(ours, native, host.sample(start))


@pytest.mark.parametrize(
    ("stored", "computed"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["fp16 model in fp32", "bf16 model"],
)
def test_runs_in_the_models_dtype(host: Host, stored: torch.dtype, computed: torch.dtype):
    """Whatever the file's: the layers are the model's."""
    start = scene(host, "sd15", model_of_dtype("sd15", stored, computed))
    for dtype in (torch.float32, torch.float16):
        ours, native, without = both(host, start, "sd15", dtype=dtype)
        assert moved(native, without) >= MOVES
        if computed == torch.float32:
            assert_same(ours, native, without)
        else:
            # Both round their own way; the same control in fp32 is what they are to be near.
            exact = host.sample(native_apply(host, scene(host, "sd15"), load(host, "sd15", native=True)))
            assert moved(ours, exact) <= 1.5 * moved(native, exact)


def model_of_dtype(family: str, stored: torch.dtype, computed: torch.dtype) -> Any:
    """The tiny model with its weights stored and computed in these types."""
    import comfy.model_management
    import comfy.model_patcher
    import tiny_models

    with torch.inference_mode():
        config = tiny_models._CLASSES[family](tiny_models.unet_config(family))
        config.set_inference_dtype(stored, None if stored == computed else computed)
        model = config.get_model({}, "", device=torch.device("cpu"))
        tiny_models.randomise(model.diffusion_model, 11)
        management = comfy.model_management
        return comfy.model_patcher.ModelPatcher(model, management.get_torch_device(), management.unet_offload_device())


# -- a model that something else has changed ---------------------------------------------------------------------------


def patched(host: Host, family: str) -> Any:
    """The tiny model with a LoRA on every weight of its encoder, and on biases too."""
    model = host.model(family).clone()
    generator = torch.Generator().manual_seed(33)
    patches = {}
    for key, tensor in model.model.diffusion_model.state_dict().items():
        if key.startswith(ENCODER):
            scale = 0.4 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.1
            patches[f"diffusion_model.{key}"] = ("diff", (scale * torch.randn(tensor.shape, generator=generator),))
    assert set(model.add_patches(patches, 1.0)) == set(patches)
    return model


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_follows_a_lora_on_the_model(host: Host, family: str):
    """As the host's does, which copies the patched weights."""
    start = scene(host, family, patched(host, family))
    ours, native, without = both(host, start, family)
    assert_same(ours, native, without)
    assert moved(ours, host.sample(apply(host, scene(host, family), load(host, family)))) >= MOVES
    # The control itself follows: that of the model without the LoRA would give other residuals.
    assert (residuals(host, start.model, family) - residuals(host, host.model(family), family)).norm() >= MOVES * (
        residuals(host, start.model, family).norm()
    )
    back, again, plain = both(host, scene(host, family), family)
    assert_same(back, again, plain)


@torch.no_grad()
def residuals(host: Host, model: Any, family: str) -> Tensor:
    """The middle residual of our control on the model as the host loads it."""
    loaded = load(host, family)
    device, control = host.place(model, *loaded.get_models()), loaded.network
    place: dict[str, Any] = {"device": device, "dtype": model.model.get_dtype()}
    control.bind(model.model.diffusion_model)
    torch.manual_seed(4)
    y = torch.randn(1, control.config.adm_in_channels) if family == "sdxl" else None
    guided = control.encode_hint(IMAGE.movedim(-1, 1).to(**place))
    x, context = torch.randn(1, 4, 16, 16).to(**place), torch.randn(1, 7, CONTEXT).to(**place)
    y = None if y is None else y.to(**place)
    found = control(x, torch.tensor([500.0], device=device), context, guided, y).middle
    control.unbind()
    return found


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "with a LoRA"])
@pytest.mark.parametrize(
    ("family", "options"),
    [("sd15", {}), ("sdxl", {}), ("sd15", MODELS_OWN)],
    ids=["sd15", "sdxl", "parameters that only the model has"],
)
def test_low_vram(host: Host, monkeypatch: pytest.MonkeyPatch, family: str, options: dict[str, Any], lora: bool):
    """Every layer of the model waits to be cast, its patches with it: the same latent as from a model loaded whole.

    The host's own Control-LoRA is no reference here: of a model that waits it copies weights without their patches, and
    norms that it does not cast.
    """
    import comfy.model_management
    import comfy.model_patcher

    model = patched(host, family) if lora else host.model(family)
    start = scene(host, family, model)
    reference, native, without = both(host, start, family, **options)
    assert_same(reference, native, without)

    whole = comfy.model_patcher.ModelPatcher.load
    offloaded = []

    def load_little(self: Any, device_to: Any = None, lowvram_model_memory: int = 0, **options: Any) -> None:
        whole(self, device_to, lowvram_model_memory=1, **{**options, "full_load": False})
        offloaded.append(sum(hasattr(m, "prev_comfy_cast_weights") for m in self.model.modules()))

    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", load_little)
    waiting: list[int] = []

    def count(_: int) -> None:
        layers = model.model.diffusion_model.modules()
        waiting.append(
            sum(len(getattr(m, "weight_function", [])) + len(getattr(m, "bias_function", [])) for m in layers)
        )

    run = host.sample(apply(host, start, load(host, family, **options)), before_unet=count)
    comfy.model_management.unload_all_models()
    assert max(offloaded) > 100 and (min(waiting) > 100 if lora else max(waiting) == 0)
    assert_same(run, reference, without)


# -- what a run costs, and what it leaves ------------------------------------------------------------------------------


def test_no_network_is_built_for_a_run(host: Host, monkeypatch: pytest.MonkeyPatch):
    import comfy.cldm.cldm

    from zeroconv.controlnet_core.networks.unet import Encoder

    built = []
    for kind in (comfy.cldm.cldm.ControlNet, Encoder):

        def count(self: Any, *args: Any, init: Callable[..., None] = kind.__init__, **options: Any) -> None:
            built.append(type(self))
            init(self, *args, **options)

        monkeypatch.setattr(kind, "__init__", count)
    start = scene(host, "sd15")
    native = native_apply(host, start, load(host, "sd15", native=True))
    host.sample(native)
    assert len(built) >= 1  # the host builds one, so this counts
    built.clear()
    ours = apply(host, start, load(host, "sd15"))
    assert len(built) <= 1  # by the loader, unless it has this file already
    built.clear()
    first, second = host.sample(ours), host.sample(ours)
    assert built == []
    assert torch.equal(first.latent, second.latent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_host_manages_its_memory(host: Host, dtype: torch.dtype):
    """One ModelPatcher, of the file's size, none of the model's weights in it, shared by all copies."""
    load(host, "sdxl", dtype=dtype)
    kept = "fp16" if dtype == torch.float16 else "fp32"  # on a CPU the host would keep all as fp32
    (control,) = host.call("LoadControlNet", control_net_name=f"lora sdxl {dtype}.safetensors", weight_dtype=kept)
    (patcher,) = control.get_models()
    tensors = [tensor.to(dtype) for key, tensor in file("sdxl").items() if key != "lora_controlnet"]
    assert patcher.model_size() == sum(tensor.nbytes for tensor in tensors)
    assert control.copy().get_models() == [patcher]
    host.sample(apply(host, scene(host, "sdxl"), control))
    assert patcher.model_size() == sum(tensor.nbytes for tensor in tensors)
    assert len(patcher.model_state_dict()) == len(tensors)


def test_the_model_is_left_as_it_was_and_let_go(host: Host):
    import tiny_models

    model = tiny_models.tiny_model("sd15", seed=77)
    unet = model.model.diffusion_model
    before = {name: (id(p), p.clone(), p.requires_grad) for name, p in unet.named_parameters()}
    modules = [(name, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in unet.named_modules()]
    control = load(host, "sd15")
    host.sample(apply(host, scene(host, "sd15", model), control))
    for name, p in unet.named_parameters():
        assert (id(p), p.requires_grad) == (before[name][0], before[name][2])
        assert torch.equal(p, before[name][1])
    assert modules == [
        (name, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in unet.named_modules()
    ]
    assert all(layer._base is None and layer._base_bias is None for layer in control.network.borrowed())


def test_a_run_that_ends_with_an_error_of_its_own_lets_the_model_go(host: Host):
    """Residuals that are not finite are told when the run ends."""
    control = load(host, "sd15").copy()
    control.network.bind(host.model("sd15").model.diffusion_model)
    control._finite._sums.append(torch.tensor([0.0, float("inf")]))
    with pytest.raises(ValueError, match="its residuals are not finite"):
        control.cleanup()
    assert all(layer._base is None and layer._base_bias is None for layer in control.network.borrowed())


def test_a_run_that_fails_keeps_no_model_alive(host: Host):
    """The host ends no run after an error; the next run is as ever."""
    import comfy.model_management
    import tiny_models

    control = load(host, "sd15")
    model = tiny_models.tiny_model("sd15", seed=78)
    unet = weakref.ref(model.model.diffusion_model)

    def fail(call: int) -> None:
        if call == 2:
            raise RuntimeError("as if memory ran out")

    graph = apply(host, scene(host, "sd15", model), control)
    with pytest.raises(RuntimeError, match="as if memory ran out"):
        host.sample(graph, before_unet=fail)
    assert unet() is not None
    comfy.model_management.unload_all_models()
    comfy.model_management.current_loaded_models.clear()
    del model, graph
    host._kept.clear()
    gc.collect()
    assert unet() is None
    start = scene(host, "sd15")
    ours = host.sample(apply(host, start, control))
    native = host.sample(native_apply(host, start, load(host, "sd15", native=True)))
    assert_same(ours, native, host.sample(start))


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "model", "message"),
    [
        ("sd15", "sdxl", "is made for SD1.x, the model is SDXL: load a control made for SDXL"),
        ("sdxl", "sd21", "is made for SDXL, the model is SD2.x: load a control made for SD2.x"),
    ],
)
def test_another_family_is_refused(host: Host, family: str, model: str, message: str):
    from zeroconv.nodes.host.control import ControlError

    with pytest.raises(ControlError, match=message):
        host.sample(apply(host, scene(host, model), load(host, family)))


def test_another_depth_is_refused(host: Host):
    """A ControlNet would fit; a Control-LoRA runs on layers that this model lacks."""
    from zeroconv.nodes.host.control import ControlError

    keys = [".transformer_blocks.1."]
    state = {key: t for key, t in file("sdxl").items() if not any(part in key for part in keys)}
    host.write("shallow lora", state)
    (control,) = host.call("LoadControlNet", control_net_name="shallow lora.safetensors")
    with pytest.raises(
        ControlError, match=r"with 0 1 1 1 transformer blocks .* the SDXL model has 0 1 2 2: load one made"
    ):
        host.sample(apply(host, scene(host, "sdxl"), control))


def test_a_stronger_control_moves_more(host: Host):
    start = scene(host, "sd15")
    without = host.sample(start)
    half, whole = (host.sample(apply(host, start, load(host, "sd15"), strength=s)) for s in (0.5, 1.0))
    assert MOVES <= moved(half, without) < moved(whole, without)
    none = host.sample(apply(host, start, load(host, "sd15"), strength=0.0))
    assert off_by(none, without) == 0 <= TOLERANCE
    wide = host.sample(apply(host, start, load(host, "sd15")), latent_image=latent(2))
    assert wide.latent.shape[0] == 2
