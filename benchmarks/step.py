"""What controls add to one sampling step: ours, the host's own and diffusers', in turns in one process.

Every case is a sampling of a real ComfyUI that has begun and takes one step whenever it is its turn, at full size with
random weights: without a control, under one or more of the host's own ControlNets, and under ours, which load the very
same file. diffusers takes its turns on networks of the same layout. A step is both halves of guidance; a ratio is that
to the step without controls of the same side and round. MACs and operations (views left out) are counted in the first
round and do not depend on what else the machine does. Hints are encoded before, in half a step that is not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..controlnet_core.networks.controlnet import ControlNet
from ..controlnet_core.networks.unet import SD15, SDXL, UNetConfig
from ..devtools import DevError, comfyui
from ._report import machine
from .training import forget_peak, peak, synchronize, used

RESULTS = Path(__file__).parent / "results"
TOKENS = 77
POOLED = 1280
CONFIGS = {"SD1.5": SD15, "SDXL": SDXL}


@dataclass(frozen=True)
class Setting:
    """What is sampled: a model of this family at full size, square pictures of `size` pixels, so many at once."""

    device: str
    family: str
    size: int
    batch: int

    @property
    def config(self) -> UNetConfig:
        return CONFIGS[self.family]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.device == "cuda" else torch.float32

    def __str__(self) -> str:
        return f"{self.family}, {self.size}x{self.size}, batch {self.batch}"


@dataclass
class Measured:
    """One case: seconds of its steps, those that processors worked, MACs, operations, and the most bytes of a step.

    Bytes are those beyond what all cases together hold between their steps.
    """

    name: str
    bare: str
    seconds: list[float] = field(default_factory=list)
    work: list[float] = field(default_factory=list)
    macs: int = 0
    operations: int = 0
    memory: int = 0


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


ATTENTION: dict[Any, Any] = {
    torch.ops.aten.scaled_dot_product_attention: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}
"""What torch's counter leaves out: attention on a CPU, by itself and, inside inference mode, as a whole."""


# -- random networks of full size --------------------------------------------------------------------------------------


@torch.no_grad()
def fill(network: torch.nn.Module) -> torch.nn.Module:
    """Random numbers that keep signals near unit size: a million of them over and over, since drawing takes long."""
    drawn = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for name, parameter in network.named_parameters():
        count = parameter.numel()
        numbers = drawn.repeat(-(-count // len(drawn)))[:count].view(parameter.shape)
        if parameter.ndim > 1:
            numbers = numbers / parameter[0].numel() ** 0.5
        else:
            numbers = float(name.endswith("weight")) + 0.1 * numbers
        parameter.copy_(numbers.to(parameter))
    return network


def host_model(setting: Setting) -> Any:
    """A MODEL of the host of this setting's family."""
    supported, patcher, management = _host("supported_models", "model_patcher", "model_management")
    config = setting.config
    depth = [each for each in config.transformer_depth for _ in range(config.num_res_blocks)]
    layout = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": config.model_channels,
        "num_res_blocks": [config.num_res_blocks] * len(config.channel_mult),
        "channel_mult": list(config.channel_mult),
        "transformer_depth": depth,
        "transformer_depth_output": [
            each for each in config.transformer_depth for _ in range(config.num_res_blocks + 1)
        ],
        "transformer_depth_middle": config.transformer_depth_middle,
        "use_linear_in_transformer": config.use_linear,
        "context_dim": config.context_dim,
        "adm_in_channels": config.adm_in_channels,
        "use_spatial_transformer": True,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        "use_checkpoint": False,
        "legacy": False,
        **({} if config.adm_in_channels is None else {"num_classes": "sequential"}),
    }
    kind = (supported.SD15 if setting.family == "SD1.5" else supported.SDXL)(layout)
    kind.set_inference_dtype(setting.dtype, None)
    model = kind.get_model({}, "", device=torch.device("cpu"))
    fill(model.diffusion_model)
    return patcher.ModelPatcher(
        model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


def _host(*names: str) -> list[Any]:
    return [__import__(f"comfy.{name}", fromlist=[name]) for name in names]


@contextmanager
def host(device: str) -> Iterator[None]:
    """A real ComfyUI in this process."""
    sys.path.insert(0, str(comfyui.find()))
    options = __import__("comfy.options", fromlist=["options"])
    options.enable_args_parsing()
    before, sys.argv = sys.argv, ["main.py", *(["--cpu"] if device == "cpu" else [])]
    try:
        _host("cli_args")
    finally:
        sys.argv = before
    with torch.inference_mode():
        yield


# -- the cases ---------------------------------------------------------------------------------------------------------

Step = Callable[[], object]
Sampling = Callable[[Callable[[Step], None]], None]
"""Begins a sampling, and hands what takes a step of it to its argument; ends when that returns."""


def sampling(model: Any, prompts: list[list[Any]], setting: Setting, warm: bool = True) -> Sampling:
    """A sampling of the host of `model` under these prompts, the positive one first; `warm`: after half a step."""
    samplers = _host("samplers")[0]

    def begin(then: Callable[[Step], None]) -> None:
        guider = samplers.CFGGuider(model)
        guider.set_conds(*prompts)

        def steps(predict: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, **_: Any) -> Tensor:
            def step() -> object:
                # Samplings that have begun meanwhile are of clones of one model, which knows the last of them alone.
                guider.inner_model.current_patcher = guider.model_patcher
                return predict(x, sigmas[:1].expand(len(x)), **(extra_args or {}))

            if warm:  # hints are encoded, and the device sets up what it does once: one half is enough
                guider.set_cfg(1.0)
                step()
            guider.set_cfg(7.0)

            then(step)
            return x

        noise = torch.randn(setting.batch, 4, *[setting.size // 8] * 2, generator=torch.Generator().manual_seed(1))
        schedule = torch.tensor([10.0, 5.0, 0.0])
        guider.sample(noise, torch.zeros_like(noise), samplers.KSAMPLER(steps), schedule, seed=1)

    return begin


def prompt(setting: Setting, seed: int, **options: Any) -> list[Any]:
    """A CONDITIONING of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, TOKENS, setting.config.context_dim, generator=generator)
    return [[context, {"pooled_output": torch.randn(1, POOLED, generator=generator), **options}]]


def host_cases(setting: Setting, controls: int, folder: Path) -> Iterator[tuple[str, Sampling]]:
    """Without a control, and with 1 to `controls` of them, the host's and ours; and one of ours on one half alone."""
    from ..controlnet_core.dosing.strength import Strength
    from ..nodes.host import files
    from ..nodes.host.attach import attach_to_model

    paths, native_files, save = __import__("folder_paths"), _host("controlnet")[0], __import__("safetensors.torch")
    network = fill(ControlNet(setting.config, dtype=torch.float16))
    save.torch.save_file(dict(network.state_dict()), folder / "bench.safetensors")
    del network
    paths.add_model_folder_path("controlnet", str(folder))
    model, hint = host_model(setting), torch.rand(1, 3, setting.size, setting.size)
    plain = [prompt(setting, 2), prompt(setting, 3)]
    yield "bare", sampling(model, plain, setting)
    native, ours = native_files.load_controlnet(str(folder / "bench.safetensors")), files.load("bench.safetensors")
    for count in range(1, controls + 1):
        chain = None
        for _ in range(count):
            chain = native.copy().set_cond_hint(hint, 1.0, (0.0, 1.0)).set_previous_controlnet(chain)
        given = [prompt(setting, seed, control=chain, control_apply_to_uncond=False) for seed in (2, 3)]
        yield f"native, {count}", sampling(model, given, setting)
        dosed = [ours.with_dosing(Strength(), "crop").set_cond_hint(hint, 1.0, (0.0, 1.0)) for _ in range(count)]
        yield f"ours, {count}", sampling(attach_to_model(model, dosed), plain, setting)
    if controls:
        half = ours.with_dosing(Strength(guidance="cond_only"), "crop").set_cond_hint(hint, 1.0, (0.0, 1.0))
        yield "ours, cond_only", sampling(attach_to_model(model, [half]), plain, setting)


def diffusers_cases(setting: Setting, controls: int) -> Iterator[tuple[str, Sampling]]:
    """diffusers' UNet as its pipelines call it, bare and under its ControlNets."""
    unets: Any = __import__("diffusers.models.unets.unet_2d_condition", fromlist=["x"])
    networks: Any = __import__("diffusers.models.controlnets.controlnet", fromlist=["x"])
    config, place = setting.config, {"device": setting.device, "dtype": setting.dtype}
    widths = tuple(config.model_channels * mult for mult in config.channel_mult)
    kinds: dict[str, Any] = {"block_out_channels": widths, "cross_attention_dim": config.context_dim}
    if setting.family == "SDXL":
        kinds |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": config.adm_in_channels,
        }
    with torch.device("meta"):
        unet: Any = unets.UNet2DConditionModel(**kinds)
        control: Any = networks.ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    unet, control = (fill(network.to_empty(device="cpu").to(**place)).eval() for network in (unet, control))
    count = 2 * setting.batch
    x = torch.randn(count, 4, *[setting.size // 8] * 2).to(**place)
    context, hint = torch.randn(count, TOKENS, config.context_dim), torch.rand(count, 3, setting.size, setting.size)
    context, hint = context.to(**place), hint.to(**place)
    added = {"text_embeds": torch.randn(count, POOLED).to(**place), "time_ids": torch.ones(count, 6).to(**place)}
    more = {"added_cond_kwargs": added} if setting.family == "SDXL" else {}
    timestep = torch.tensor(500, device=setting.device)

    def taking(controls: int) -> Step:
        def step() -> object:
            skips, middle = None, None
            for _ in range(controls):
                found, last = control(x, timestep, context, hint, return_dict=False, **more)
                skips = found if skips is None else [a + b for a, b in zip(skips, found, strict=True)]
                middle = last if middle is None else middle + last
            return unet(
                x,
                timestep,
                context,
                down_block_additional_residuals=skips,
                mid_block_additional_residual=middle,
                return_dict=False,
                **more,
            )

        return step

    def endless(step: Step) -> Sampling:
        return lambda then: then(step)

    for number in range(controls + 1):
        yield f"diffusers, {number}" if number else "diffusers, bare", endless(taking(number))


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(setting: Setting, controls: int, rounds: int, steps: int, diffusers: bool) -> list[Measured]:
    """Every case's steps, which take turns, in an order that turns round each time."""
    found: list[Measured] = []
    takes: list[Step] = []

    def take_turns() -> None:
        for turn in range(rounds):
            pairs = list(zip(found, takes, strict=True))
            for case, step in pairs[:: 1 if turn % 2 == 0 else -1]:
                with counted(case, setting.device, steps) if turn == 0 else nullcontext():
                    timed(case, setting.device, steps, step)
                print(f"round {turn + 1} of {rounds}: {case.name}: {case.seconds[-1]:.2f} s", file=sys.stderr)

    def begin(left: list[tuple[str, Sampling]]) -> None:
        """Each sampling begins within the one before, so that all are going on when the turns begin."""
        if not left:
            take_turns()
            return
        (name, sampled), *rest = left

        def begun(step: Step) -> None:
            found.append(Measured(name, "diffusers, bare" if name.startswith("diffusers") else "bare"))
            takes.append(step)
            begin(rest)

        sampled(begun)

    with tempfile.TemporaryDirectory() as temporary, host(setting.device):
        cases = [*host_cases(setting, controls, Path(temporary))]
        begin([*cases, *(diffusers_cases(setting, controls) if diffusers else ())])
    return found


@contextmanager
def counted(case: Measured, device: str, steps: int) -> Iterator[None]:
    """Count within what so many steps take; at full size the counters take a few thousandths of the time."""
    before = used(device)
    forget_peak(device)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as flops, Operations() as operations:
        yield
    case.macs, case.operations = flops.get_total_flops() // 2 // steps, operations.count // steps
    case.memory = peak(device) - before


def timed(case: Measured, device: str, steps: int, step: Step) -> None:
    """Take so many steps by the clock."""
    synchronize(device)
    start, worked = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    synchronize(device)
    case.seconds.append((time.perf_counter() - start) / steps)
    case.work.append((time.process_time() - worked) / steps)


def ratios(case: Measured, found: list[Measured], what: str) -> list[float]:
    """A case's seconds or work over those of its bare step, round by round."""
    (bare,) = (other for other in found if other.name == case.bare)
    return [mine / theirs for mine, theirs in zip(getattr(case, what), getattr(bare, what), strict=True)]


def table(found: list[Measured]) -> str:
    """A line for each case, in Markdown."""
    lines = [
        "| case | s a step | ratio (lowest to highest) | by processor time | GMACs | ratio | operations | MiB on top |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in found:
        (bare,) = (other for other in found if other.name == case.bare)
        time, work = (_spread(ratios(case, found, what)) for what in ("seconds", "work"))
        lines.append(
            f"| {case.name} | {median(case.seconds):.3g} | {time} | {work} | {case.macs / 1e9:.1f} | "
            f"{case.macs / bare.macs:.3f} | {case.operations} | {case.memory / 2**20:.0f} |"
        )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def plot(found: list[Measured], title: str, path: Path) -> None:
    """Bars of the time ratios with their spread, and a mark where the MACs alone would put each."""
    from matplotlib.figure import Figure

    cases = [case for case in found if case.name != case.bare]
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(cases)), layout="constrained")
    axes = figure.add_subplot()
    for row, case in enumerate(cases):
        (bare,) = (other for other in found if other.name == case.bare)
        values = ratios(case, found, "seconds")
        middle = median(values)
        colour = {"o": "#2a6fbb", "n": "#8a8a8a", "d": "#c8a24a"}[case.name[0]]
        axes.barh(row, middle, color=colour, xerr=[[middle - min(values)], [max(values) - middle]], capsize=3)
        axes.plot([case.macs / bare.macs] * 2, [row - 0.4, row + 0.4], color="black", linewidth=2)
    axes.set_yticks(range(len(cases)), [case.name for case in cases])
    axes.invert_yaxis()
    axes.set_xlim(left=0.9)
    axes.set_xlabel("time of a step over one without controls; black: its MACs over theirs")
    axes.set_title(title)
    figure.savefig(path, dpi=110)


def main(arguments: list[str]) -> int:
    """Print a table, and leave it with a plot and the numbers in the results; 0 when it is done."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="dev.py bench step", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--family", choices=tuple(CONFIGS), default="SD1.5")
    parser.add_argument("--size", type=int, default=512, help="sides of the square picture: 256 to 1024, by 64")
    parser.add_argument("--batch", type=int, default=1, help="pictures, 1 to 8; each is two samples")
    parser.add_argument("--controls", type=int, default=2, help="up to so many controls at once, 0 to 4")
    parser.add_argument("--rounds", type=int, help="left out: 1 on a CPU, 8 on a GPU")
    parser.add_argument("--steps", type=int, help="steps of a round; left out: 1 on a CPU, 10 on a GPU")
    parser.add_argument("--without-diffusers", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder for table, plot and numbers")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not cuda:
        raise DevError("torch finds no CUDA device here: choose --device cpu")
    gpu = given.device == "cuda"
    rounds, steps = (n or d for n, d in ((given.rounds, 8 if gpu else 1), (given.steps, 10 if gpu else 1)))
    if given.size % 64 or not (64 <= given.size <= 1024 and 1 <= given.batch <= 8 and 0 <= given.controls <= 4):
        raise DevError("--size is 64 to 1024 by 64, --batch 1 to 8, --controls 0 to 4")
    setting = Setting(given.device, given.family, given.size, given.batch)
    found = measure(setting, given.controls, rounds, steps, not given.without_diffusers)
    command = f"python dev.py bench step {' '.join(arguments)}".rstrip()
    text = f"`{command}`\n\n{setting}; {machine(given.device)}; {rounds} rounds of {steps} steps\n\n{table(found)}\n"
    print(text)
    given.output.mkdir(parents=True, exist_ok=True)
    name = f"step_{given.device}_{given.family.lower().replace('.', '')}_{given.size}_{given.batch}"
    (given.output / f"{name}.md").write_text(text)
    numbers = {"command": command, "machine": machine(given.device), **asdict(setting)}
    (given.output / f"{name}.json").write_text(
        json.dumps({**numbers, "cases": [asdict(case) for case in found]}, indent=1) + "\n"
    )
    plot(found, f"{setting}\n{machine(given.device)}", given.output / f"{name}.png")
    return 0
