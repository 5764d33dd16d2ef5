"""Control-LoRA: what it gives is what the ControlNet of the merged weights gives, on layers that stay the base's."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest
import torch
from torch import Tensor, nn

from zeroconv.controlnet_core.files.loading import LoadError, load_control
from zeroconv.controlnet_core.networks.control_lora import (
    BorrowedLayer,
    ControlLora,
    NotBound,
    from_control_lora,
    to_control_lora,
)
from zeroconv.controlnet_core.networks.controlnet import BaseMismatch, ControlNet, copy_encoder
from zeroconv.controlnet_core.networks.unet import SD15, SD21, SDXL, UNet, UNetConfig

from .. import small
from ..small import Inputs, assert_within, randomise_zeros, relative_change, seeded, tensors

State = dict[str, Tensor]
# Two channels in a group of a norm: where there is one, the norm takes away all that the time embedding adds.
SMALL = {**small.SMALL, "SD1.x": replace(small.SMALL["SD1.x"], model_channels=64, channel_mult=(1, 1, 2, 2))}
FAMILIES = tuple(SMALL)
ENCODER = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.")
RANKS: dict[str, Callable[[int], int]] = {"1": lambda i: 1, "8": lambda i: 8, "mixed": lambda i: 1 + i % 7}


def unet(family: str) -> UNet:
    return seeded(UNet, SMALL[family])


def inputs(family: str) -> Inputs:
    return small.inputs(SMALL[family], 8, 16)


def control_lora_file(family: str, rank: Callable[[int], int] = lambda i: 4) -> State:
    """A random Control-LoRA for `unet(family)` as it is published: the differences about as large as the weights."""
    net = randomise_zeros(seeded(ControlNet, SMALL[family]))
    random = torch.Generator().manual_seed(5)
    file, number = {"lora_controlnet": torch.empty(0)}, count()
    for key, tensor in net.state_dict().items():
        name, _, part = key.rpartition(".")
        noise = torch.randn(tensor.shape, generator=random)
        if key.startswith("input_hint_block"):  # lets the hint through, which fresh convolutions make ever smaller
            file[key] = noise * 2 / tensor[0].numel() ** 0.5 if part == "weight" else noise * 0.1
        elif not key.startswith(ENCODER):
            file[key] = tensor
        elif part == "weight" and tensor.ndim > 1:
            r = rank(next(number))
            shape = [1] * (tensor.ndim - 2)
            file[f"{name}.up"] = torch.randn(tensor.shape[0], r, *shape, generator=random) * 0.6 / r**0.5
            file[f"{name}.down"] = torch.randn(r, *tensor.shape[1:], generator=random) / tensor[0].numel() ** 0.5
        else:
            file[key] = tensor + 0.2 * noise
    return file


def loaded(family: str, file: State) -> ControlLora:
    found = load_control(file, {"num_heads": "8"} if family == "SD1.x" else {}, name="lora.safetensors")
    assert (found.format.name, found.dropped) == ("Control-LoRA", 1)
    return found.control


def merged(family: str, file: State, base: UNet) -> ControlNet:
    """The full ControlNet, by the formula that the host computes: the base's parameters by name, then the file's."""
    full = ControlNet(SMALL[family])
    wanted = full.state_dict().keys()
    state = {key: tensor for key, tensor in base.state_dict().items() if key in wanted}
    for key, tensor in file.items():
        name, _, part = key.rpartition(".")
        if part == "up":
            weight = state[f"{name}.weight"]
            product = tensor.float().flatten(1) @ file[f"{name}.down"].float().flatten(1)
            state[f"{name}.weight"] = weight + product.reshape(weight.shape)
        elif part != "down" and name:
            state[key] = tensor.float()
    full.load_state_dict(state, strict=True)
    return full


def residuals(control: ControlNet, given: Inputs) -> list[Tensor]:
    return tensors(given.control(control))


def assert_same(control: ControlLora, reference: ControlNet, given: Inputs, fraction: float = 1e-5) -> None:
    """Equal residuals, which the hint moves and which move the base's prediction."""
    expected, blind = residuals(reference, given), residuals(reference, replace(given, hint=1 - given.hint))
    assert len(expected) == len(control.config.skip_channels) + 1
    for ours, theirs, other in zip(residuals(control, given), expected, blind, strict=True):
        assert relative_change(theirs, other) >= 0.05
        assert_within(ours, theirs, fraction)


# -- the same as merged weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_the_controlnet_of_the_merged_weights(family: str, rank: str):
    base, file, given = unet(family), control_lora_file(family, RANKS[rank]), inputs(family)
    control, reference = loaded(family, file), merged(family, file, base)
    control.bind(base)
    assert_same(control, reference, given)
    without = given.predict(base)
    assert relative_change(without, given.predict(base, given.control(reference))) >= 0.05
    assert control.ranks == {"1": (1, 1), "8": (8, 8), "mixed": (1, 7)}[rank]
    assert (control.kind, control.family, control.hint_channels) == ("Control-LoRA", family, 3)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_is_the_differences_that_make_the_result(family: str):
    """Without them the residuals are others by 5 %: the parity above is no parity of two base encoders."""
    base, file, given = unet(family), control_lora_file(family), inputs(family)
    plain = {key: torch.zeros_like(t) if key.endswith(".up") else t for key, t in file.items()}
    for with_them, without in zip(
        residuals(merged(family, file, base), given), residuals(merged(family, plain, base), given), strict=True
    ):
        assert relative_change(with_them, without) >= 0.05


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_half_precision_file(family: str):
    base, given = unet(family), inputs(family)
    file = {key: tensor.half() for key, tensor in control_lora_file(family).items()}
    control = loaded(family, file)
    assert {tensor.dtype for tensor in control.state_dict().values()} == {torch.float16}
    control.float().bind(base)
    assert_same(control, merged(family, file, base), given)


@torch.no_grad()
def test_runs_in_half_precision_like_the_merged_weights():
    """The base's bias is taken away and the control's added: in fp16 that may cost no more than rounding."""
    base, file, given = unet("SD2.x"), control_lora_file("SD2.x"), inputs("SD2.x")
    reference = residuals(merged("SD2.x", file, base), given)
    control = loaded("SD2.x", file).half()
    control.bind(base.half())
    rounded = residuals(merged("SD2.x", file, unet("SD2.x")).half(), given.to("cpu", torch.float16))
    for ours, full, exact in zip(residuals(control, given.to("cpu", torch.float16)), rounded, reference, strict=True):
        assert ours.dtype == torch.float16
        assert relative_change(exact, ours) <= 2 * relative_change(exact, full) + 1e-3


@torch.no_grad()
def test_every_difference_and_every_borrowed_weight_acts(monkeypatch: pytest.MonkeyPatch):
    """Each alone, made larger, changes the residuals: nothing is left out and nothing is used in another's place."""
    shallow = replace(SMALL["SDXL"], transformer_depth=(0, 1, 1), transformer_depth_middle=1)
    monkeypatch.setitem(SMALL, "SDXL", shallow)
    base, file, given = unet("SDXL"), control_lora_file("SDXL"), small.inputs(shallow, 8, 8)
    control = loaded("SDXL", file)
    control.bind(base)
    before = residuals(control, given)
    layers = list(control.borrowed())
    linear = [
        m for name, m in base.named_modules() if name.startswith(ENCODER) and hasattr(m, "weight") and m.weight.ndim > 1
    ]
    assert len(layers) == len(linear) == sum(key.endswith(".up") for key in file)
    for layer in layers:
        for parameter in (layer.up.weight, base.get_parameter(f"{layer.name}.weight")):
            kept = parameter.clone()
            parameter.mul_(1.5)
            after = residuals(control, given)
            parameter.copy_(kept)
            assert max(relative_change(b, a) for b, a in zip(before, after, strict=True)) > 1e-5, layer.name
    assert all(torch.equal(a, b) for a, b in zip(before, residuals(control, given), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_the_file_lacks_is_the_bases(family: str):
    """Norms, biases, whole layers, and the weight of one whose bias it has."""
    base, given = unet(family), inputs(family)
    file = control_lora_file(family)
    lacking = {
        *(key for key in file if ".norm2." in key),
        *(key for key in file if key.startswith("input_blocks.2.") and ".in_layers.0." in key),
        *(f"time_embed.2.{part}" for part in ("up", "down", "bias")),
        *(f"middle_block.0.emb_layers.1.{part}" for part in ("up", "down")),
        *(f"middle_block.0.out_layers.3.{part}" for part in ("up", "down")),
        *(f"middle_block.2.out_layers.3.{part}" for part in ("bias",)),
    }
    partial = {key: tensor for key, tensor in file.items() if key not in lacking}
    assert len(file) - len(partial) == len(lacking) >= 12
    control = loaded(family, partial)
    control.bind(base)
    assert_same(control, merged(family, partial, base), given)
    full = loaded(family, file)
    full.bind(base)
    assert relative_change(residuals(full, given)[-1], residuals(control, given)[-1]) >= 0.05


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_merged_gives_the_full_controlnet(family: str):
    base, file, given = unet(family), control_lora_file(family, RANKS["mixed"]), inputs(family)
    control = loaded(family, {key: tensor.half() for key, tensor in file.items() if ".norm1." not in key})
    full = control.merged(base.state_dict())
    assert {tensor.dtype for tensor in full.values()} == {torch.float32}
    net = ControlNet(SMALL[family])
    net.load_state_dict(full, strict=True)
    control.float().bind(base)
    assert_same(control, net, given)
    weight = "middle_block.0.in_layers.2.weight"
    with pytest.raises(BaseMismatch, match=rf"the base UNet lacks {weight} of \d+x\d+x3x3: give the weights of the"):
        control.merged({key: tensor for key, tensor in base.state_dict().items() if key != weight})


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_file_layout_and_back(family: str):
    file = {key: tensor.half() for key, tensor in control_lora_file(family, RANKS["mixed"]).items()}
    kept = {key: tensor.clone() for key, tensor in file.items()}
    again = to_control_lora(loaded(family, file).state_dict())
    assert again.keys() == file.keys() == kept.keys()
    assert all(torch.equal(again[key], kept[key]) and torch.equal(file[key], kept[key]) for key in kept)
    assert len(from_control_lora(file)) == len(file) - 1


def test_factors_stored_flat():
    """The formula flattens them anyway, so files may have them so; SD1.x projections are told by the text's width."""
    config = replace(SMALL["SD1.x"], context_dim=768)
    net = ControlLora.fresh(config, rank=3)
    file = to_control_lora(net.state_dict())
    flat = {key: t.flatten(1) if key.endswith((".up", ".down")) else t for key, t in file.items()}
    assert flat["input_blocks.1.0.in_layers.2.down"].shape == (3, 64 * 9)
    assert flat["input_blocks.1.1.proj_in.up"].shape == (64, 3)
    shapes = {key: tensor.shape for key, tensor in loaded("SD1.x", flat).state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in net.state_dict().items()}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda f: f.pop("input_blocks.1.0.in_layers.2.up"),
            "input_blocks.1.0.in_layers.2.up is missing: input_blocks.1.0.in_layers.2 has",
        ),
        (lambda f: f.pop("time_embed.0.down"), "time_embed.0.down is missing: time_embed.0 has the other factor"),
        (
            lambda f: f.update({"time_embed.0.up": torch.zeros(256, 5)}),
            "time_embed.0.up is 256x5 and time_embed.0.down 4x64: expected out x rank and rank x in",
        ),
        (
            lambda f: f.update({"input_blocks.3.0.op.down": torch.zeros(4, 64 * 9 + 1)}),
            "input_blocks.3.0.op.up is 64x4x1x1 and input_blocks.3.0.op.down 4x577: expected",
        ),
        (
            lambda f: f.update({f"middle_block.0.in_layers.0.{p}": torch.zeros(128, 128) for p in ("up", "down")}),
            "middle_block.0.in_layers.0 is a GroupNorm, of which there is no low-rank difference",
        ),
        (
            lambda f: [f.pop(f"input_blocks.0.0.{p}") for p in ("up", "down")],
            "input_blocks.0.0.weight is missing, of which",
        ),
    ],
)
def test_files_that_are_not_whole_say_why(edit: Callable[[State], object], message: str):
    file = control_lora_file("SD1.x")
    edit(file)
    if "GroupNorm" in message:
        del file["middle_block.0.in_layers.0.weight"]
    with pytest.raises(LoadError, match=f"lora.safetensors: {message}"):
        loaded("SD1.x", file)


# -- the base ---------------------------------------------------------------------------------------------------------


def snapshot(module: nn.Module) -> dict[str, object]:
    return {
        "hooks": [
            (name, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), m.training, type(m))
            for name, m in module.named_modules()
        ],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "identity": [id(p) for p in module.parameters()],
        "values": b"".join(p.detach().numpy().tobytes() for p in module.parameters()),
    }


def test_the_base_is_never_part_of_the_control_nor_changed():
    base, given = unet("SDXL"), inputs("SDXL")
    control = loaded("SDXL", control_lora_file("SDXL"))
    before, keys = snapshot(base), list(control.state_dict())
    control.bind(base)
    torch.stack([r.sum() for r in residuals(control, given)]).sum().backward()
    control.double()
    assert list(control.state_dict()) == keys
    assert not {id(p) for p in control.parameters()} & {id(p) for p in base.parameters()}
    assert not set(control.modules()) & set(base.modules())
    control.unbind()
    assert snapshot(base) == before


@pytest.mark.parametrize("unbind", [True, False], ids=["after unbind", "after an error that kept us from unbinding"])
def test_holds_on_to_nothing(unbind: bool):
    base, given = unet("SD1.x"), inputs("SD1.x")
    control = loaded("SD1.x", control_lora_file("SD1.x"))
    control.bind(base)
    with torch.no_grad():
        residuals(control, given)
    if unbind:
        control.unbind()
        with pytest.raises(NotBound, match=r"bound to no base UNet, and time_embed.0 is the base's: call bind\(unet\)"):
            residuals(control, given)
    watched = weakref.ref(base)
    del base
    gc.collect()
    assert watched() is None
    with pytest.raises(NotBound, match=r"call bind\(unet\) first, and keep that UNet while the control runs"):
        residuals(control, given)


@torch.no_grad()
def test_binding_again_takes_the_new_base_whole():
    """Biases included, of which one is remembered. Twice the same base is the same, one that fails changes nothing."""
    first, given, file = unet("SD1.x"), inputs("SD1.x"), control_lora_file("SD1.x")
    second = copy.deepcopy(first)
    for parameter in second.parameters():
        parameter.add_(0.02)
    control = loaded("SD1.x", file)
    control.bind(first)
    control.bind(first)
    before, expected = residuals(control, given)[-1], residuals(merged("SD1.x", file, second), given)[-1]
    assert relative_change(before, expected) >= 0.05
    control.bind(second)
    assert_within(residuals(control, given)[-1], expected, 1e-5)
    with pytest.raises(BaseMismatch):
        control.bind(unet("SD2.x"))
    assert_within(residuals(copy.deepcopy(control), given)[-1], expected, 1e-5)
    control.bind(first)
    assert_within(residuals(control, given)[-1], before, 1e-5)


@torch.no_grad()
def test_the_bases_layers_are_called_as_modules():
    """A layer that does not hold its weight as one does: what counts is what it answers."""

    class Elsewhere(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            bias = None if self.bias is None else self.bias + 0.5
            return nn.functional.linear(x, self.weight * 1.25, bias)

    base, given, file = unet("SD2.x"), inputs("SD2.x"), control_lora_file("SD2.x")
    changed = copy.deepcopy(base)
    for name, layer in list(base.named_modules()):
        if isinstance(layer, nn.Linear):
            layer.__class__ = Elsewhere
            changed.get_submodule(name).weight.mul_(1.25)
    control = loaded("SD2.x", file)
    control.bind(base)
    assert_same(control, merged("SD2.x", file, changed), given)
    assert (
        relative_change(
            residuals(merged("SD2.x", file, changed), given)[-1],
            residuals(merged("SD2.x", file, unet("SD2.x")), given)[-1],
        )
        >= 0.05
    )


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            lambda: nn.Module(),
            "time_embed.0 of the base UNet has no such layer, this Control-LoRA borrows one with in features 64",
        ),
        (
            lambda: seeded(UNet, small.SMALL["SD1.x"]),
            "time_embed.0 of the base UNet has in features 32, out features 128, this Control-LoRA borrows",
        ),
        (
            lambda: seeded(UNet, replace(SMALL["SD1.x"], in_channels=9)),
            r"input_blocks.0.0 of the base UNet has in channels 9, out channels 64, kernel size \(3, 3\), this",
        ),
    ],
)
def test_a_base_that_does_not_fit(base: Callable[[], nn.Module], message: str):
    control = loaded("SD1.x", control_lora_file("SD1.x"))
    with pytest.raises(BaseMismatch, match=message):
        control.bind(base())
    with pytest.raises(NotBound):
        residuals(control, inputs("SD1.x"))


def test_which_models_it_fits():
    control = loaded("SDXL", control_lora_file("SDXL"))
    model = SMALL["SDXL"]
    assert control.mismatch(model) is None
    assert "made for SDXL, the model is SD1.x: load a control made for SD1.x" in str(control.mismatch(SMALL["SD1.x"]))
    for other, text in (
        (
            replace(model, transformer_depth=(0, 1, 2)),
            "0 1 3 3 transformer blocks (on each level and in the middle), the SDXL model has 0 1 2 3",
        ),
        (
            replace(model, head_dim=32),
            "0 2 4 4 heads in its attentions (on each level and in the middle), the SDXL model has 0 4 8 8",
        ),
        (replace(model, in_channels=9), "4 input channels, the SDXL model has 9"),
    ):
        assert control.mismatch(other) == (
            f"this SDXL Control-LoRA runs on the layers of a model with {text}: load one made for this model"
        )
    assert ControlLora.fresh(SMALL["SD1.x"], 1).mismatch(SMALL["SD1.x"]) is None


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_everything_of_the_control_and_nothing_of_the_base(family: str):
    base, given = unet(family), inputs(family)
    control = loaded(family, control_lora_file(family))
    control.requires_grad_(True).bind(base)
    assert all(parameter.requires_grad for parameter in base.parameters())
    torch.stack([r.square().mean() for r in residuals(control, given)]).sum().backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    assert [n for n, p in control.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_one_is_the_bases_encoder(family: str):
    config, base, given = SMALL[family], unet(family), inputs(family)
    torch.manual_seed(2)
    control = ControlLora.fresh(config, rank=8)
    control.bind(base)
    assert control.ranks == (4, 8)  # the latent has four channels
    assert not any(r.any() for r in residuals(control, given))
    reference = ControlNet(config)
    copy_encoder(reference, base.state_dict())
    own = ("zero_convs.", "middle_block_out.", "input_hint_block.")
    for key, tensor in control.state_dict().items():
        if key.startswith(own):
            tensor.copy_(0.1 * torch.randn(tensor.shape))
            reference.get_parameter(key).data.copy_(tensor)
    for ours, theirs in zip(residuals(control, given), residuals(reference, given), strict=True):
        assert_within(ours, theirs, 1e-5)
    torch.stack([r.square().mean() for r in residuals(control, given)]).sum().backward()
    assert all(layer.up.weight.grad.any() for layer in control.borrowed() if layer.rank)


def test_fresh_one_trains_and_is_saved_like_a_published_one():
    base, given = unet("SD1.x"), inputs("SD1.x")
    torch.manual_seed(2)
    control = ControlLora.fresh(SMALL["SD1.x"], rank=4)
    control.bind(base)
    goal = torch.randn(2, 4, 8, 16)
    optimizer = torch.optim.AdamW(control.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = (given.predict(base, given.control(control)) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    assert any(layer.up.weight.any() for layer in control.borrowed() if layer.rank)
    again = loaded("SD1.x", to_control_lora(control.state_dict()))
    again.bind(base)
    for ours, theirs in zip(residuals(again, given), residuals(control, given), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("rank", "parameters"), [(128, 197_779_104), (256, 387_137_184)])
def test_published_sdxl_files(rank: int, parameters: int):
    """Their 1228 tensors: 383 layers as up and down; norms, biases and the control's own parts whole."""
    full = ControlNet(SDXL, device="meta").state_dict()
    file = {"lora_controlnet": torch.empty(0)}
    for key, tensor in full.items():
        if key.startswith(ENCODER) and tensor.ndim > 1:
            r = min(rank, *tensor.shape[:2])
            file[key.replace(".weight", ".up")] = tensor.new_empty(tensor.shape[0], r, *[1] * (tensor.ndim - 2))
            file[key.replace(".weight", ".down")] = tensor.new_empty(r, *tensor.shape[1:])
        else:
            file[key] = tensor
    assert len(file) == 1228
    assert file["input_blocks.0.0.up"].shape == (320, 4, 1, 1) and file["input_blocks.0.0.down"].shape == (4, 4, 3, 3)
    found = load_control(file, device="meta")
    control = found.control
    assert (control.config, control.family, control.ranks) == (SDXL, "SDXL", (4, rank))
    assert sum(isinstance(module, BorrowedLayer) for module in control.modules()) == 383
    assert control.mismatch(SDXL) is None
    assert sum(p.numel() for p in control.parameters()) == parameters


@pytest.mark.parametrize(("config", "rank"), [(SD15, 64), (SD21, 32), (SDXL, 128)])
def test_fresh_ones_have_the_sizes_of_published_ones(config: UNetConfig, rank: int):
    control = ControlLora.fresh(config, rank, device="meta")
    file = to_control_lora(control.state_dict())
    assert file["input_blocks.0.0.down"].shape == (4, 4, 3, 3)
    assert file["input_blocks.1.0.out_layers.3.down"].shape == (rank, 320, 3, 3)
    again = load_control(file, device="meta").control
    assert (again.config, again.ranks) == (config, (4, rank))
