"""What fp8 weights of a control save and what they cost, on the lab's embedded model.

Held-out scenes are sampled with each control as its file has it (fp16), with its weights in either fp8, and with a file
whose weights are in fp8 with a scale each. Computed in fp32. Fidelity is the lab's own measure, as in `bench reuse`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..controlnet_core.files.loading import load_control
from ..controlnet_core.networks.controlnet import ControlNet
from ..lab.evaluate import HeldOut, held_out, judge
from ..lab.models import control_name, load_weights, read_weights
from ..lab.pipeline import GUIDANCE_SCALE, LabModel, scene_noise
from ..lab.segmenter import Segmenter
from ._report import leave, machine

RESULTS = Path(__file__).parent / "results"
HINTS = ("depth", "canny", "pose")
STORED = {
    "fp16": (torch.float16, False),
    "fp8_e4m3fn": (torch.float8_e4m3fn, False),
    "fp8_e5m2": (torch.float8_e5m2, False),
    "fp8_e4m3fn, scaled": (None, True),
}
"""By name: the weight_dtype, and whether the file has scales."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One control as it is stored: MiB of its file and in memory, and the pictures against those of fp16."""

    hint: str
    stored: str
    file: float
    memory: float
    weights: float  # RMS of the difference of all weights against their own
    fidelity: float  # mean IoU; figures for pose, figures and solids for the rest
    grey: float  # mean difference, in levels of 255


def scaled(state: State) -> State:
    """`state` with matrices and kernels in fp8, each with the scale that makes its largest number fp8's largest."""
    written: State = {}
    for key, tensor in state.items():
        if tensor.ndim < 2:
            written[key] = tensor
        else:
            scale = tensor.float().abs().max().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
            written[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            written[f"{key}_scale"] = scale
    return written


def mib(state: State) -> float:
    """The size of all tensors in MiB."""
    return sum(tensor.nbytes for tensor in state.values()) / 2**20


def measure(scenes: HeldOut, steps: int, hints: list[str]) -> list[Row]:
    """All rows, printed as they come."""
    model, segmenter = LabModel.load(hints), load_weights(Segmenter(), "segmenter")
    rows: list[Row] = []
    print(HEAD)
    for hint in hints:
        exact, best = read_weights(control_name(hint)), None
        for name, (dtype, scales) in STORED.items():
            file = scaled(exact) if scales else {key: tensor.to(dtype) for key, tensor in exact.items()}
            control = load_control(file, dtype=dtype).control
            assert isinstance(control, ControlNet)
            kept = control.state_dict()
            off = sum((kept[key].double() - exact[key].double()).square().sum().item() for key in exact)
            size = sum(tensor.double().square().sum().item() for tensor in exact.values())
            memory = mib(kept)
            ours = replace(model, controls={hint: control.float().eval().requires_grad_(False)})
            noise, told = scene_noise(scenes.seeds), {hint: scenes.hints[hint]}
            pictures = ours.sample(scenes.prompts, noise, told, steps)
            found = judge(segmenter, pictures, scenes.segments).nanmean(0)
            best = pictures if best is None else best
            row = Row(
                hint,
                name,
                mib(file),
                memory,
                (off / size) ** 0.5,
                (found[0] if hint == "pose" else found.mean()).item(),
                (pictures - best).abs().mean().item() * 255,
            )
            rows.append(row)
            print(line(row), flush=True)
    return rows


HEAD = (
    "| hint | stored | file, MiB | memory, MiB | weights off | fidelity | grey levels |\n|---|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    """A row of the table."""
    return (
        f"| {row.hint} | {row.stored} | {row.file:.2f} | {row.memory:.2f} | {row.weights:.2%} | {row.fidelity:.4f} | "
        f"{row.grey:.2f} |"
    )


def main(arguments: list[str]) -> int:
    """Measure, print the table and write it into benchmarks/results."""
    parser = argparse.ArgumentParser(prog="dev.py bench precision", description=__doc__)
    parser.add_argument("--scenes", type=int, default=16, help="held-out scenes (default: 16)")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: 20)")
    parser.add_argument("--hints", nargs="+", choices=HINTS, default=list(HINTS))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of precision.json and precision.md")
    chosen = parser.parse_args(arguments)
    about = (
        f"{chosen.scenes} held-out scenes of the lab, {chosen.steps} steps, guidance scale {GUIDANCE_SCALE:g}, "
        f"{machine('cpu')}"
    )
    print(about)
    rows = measure(held_out(chosen.scenes), chosen.steps, chosen.hints)
    leave(chosen.output, "precision", about, HEAD, rows, line)
    return 0
