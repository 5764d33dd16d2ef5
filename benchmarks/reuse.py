"""What `reuse` saves and what it costs, on the lab's embedded model.

Held-out scenes are sampled with a control that is computed at every step, and with one that is told at a part of them.
Fidelity is the lab's own measure: how well a judge finds the scene that the hint came from, in mean IoU. "held" rows
give the last residuals again as they are, without the line through the last two: what other caches do.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import add
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..controlnet_core.diffusion import alphas_cumprod, guide
from ..controlnet_core.dosing.clock import Clock
from ..controlnet_core.dosing.reuse import Reused
from ..controlnet_core.networks.residuals import Residuals
from ..lab.evaluate import SETTINGS, HeldOut, held_out, judge
from ..lab.models import load_weights
from ..lab.pipeline import GUIDANCE_SCALE, LabModel, scene_noise
from ..lab.segmenter import Segmenter
from ._report import leave, machine

RESULTS = Path(__file__).parent / "results"
SHARES = (0.0, 0.5, 2 / 3, 0.75)
HELD = (2,)
SAMPLERS = ("ddim", "ddim, ancestral", "karras")
HINTS = ("depth", "canny", "pose")


@dataclass(frozen=True)
class Row:
    """One way to sample all scenes: passes of the network, its MACs against computing every step, and the pictures."""

    hint: str
    sampler: str
    reuse: str
    passes: int
    macs: float
    seconds: float  # of controls, for all scenes
    fidelity: float  # mean IoU; figures for pose, figures and solids for the rest
    kept: float  # fidelity against that of all steps
    grey: float  # mean difference from the picture of all steps, in levels of 255
    psnr: float | None


Tell = Callable[[int, float, Callable[[], Residuals]], Residuals]
"""(step, sigma, compute) -> residuals."""


def told(share: float, sigmas: Sequence[float]) -> Tell:
    """What ours does."""
    clock, reused = Clock(lambda percent: sigmas[0] * (1 - percent), sigmas), Reused(share)
    return lambda _, sigma, compute: reused.at("all", clock.at(sigma), compute)


def held(every: int) -> Tell:
    """The last residuals once more, computed every so many steps."""
    last: list[Residuals] = []

    def tell(step: int, _: float, compute: Callable[[], Residuals]) -> Residuals:
        if step % every == 0:
            last[:] = [compute()]
        return last[0]

    return tell


def timesteps(sampler: str, steps: int) -> list[int]:
    """Timesteps that fall evenly (DDIM) or as Karras et al. space sigmas; 0 comes after the last."""
    if sampler != "karras":
        return torch.linspace(999, 0, steps + 1).round().long().tolist()[:-1]
    known = _sigmas(range(1000))
    low, high = known[0] ** (1 / 7), known[-1] ** (1 / 7)
    wanted = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)]
    return [min(range(1000), key=lambda t: abs(known[t] - sigma)) for sigma in wanted]


def _sigmas(at: Sequence[int]) -> list[float]:
    alphas = alphas_cumprod()
    return [math.sqrt((1 - alphas[t].item()) / alphas[t].item()) for t in at]


@torch.no_grad()
def sample(model: LabModel, scenes: HeldOut, hint: str, sampler: str, steps: int, tell: Callable[[list[float]], Tell]):
    """Pictures of all scenes, the passes of the network, and the seconds that controls took."""
    controls = {name: model.controls[name] for name in SETTINGS[hint]}
    count, alphas = len(scenes.seeds), alphas_cumprod()
    context = model.encode([*scenes.prompts, *[""] * count])
    hints = {name: control.encode_hint(scenes.hints[name]).repeat(2, 1, 1, 1) for name, control in controls.items()}
    at = timesteps(sampler, steps)
    sigmas = _sigmas(at)
    teller, passes, seconds = tell([*sigmas, 0.0]), 0, 0.0
    x, noise = scene_noise(scenes.seeds), torch.Generator().manual_seed(7)
    for step, (t, following) in enumerate(pairwise([*at, -1])):
        both, times = x.repeat(2, 1, 1, 1), torch.full((2 * count,), float(t))

        def compute(both: Tensor = both, times: Tensor = times) -> Residuals:
            nonlocal passes
            passes += 1
            return reduce(add, (control(both, times, context, hints[name]) for name, control in controls.items()))

        started = time.perf_counter()
        residuals = teller(step, sigmas[step], compute)
        seconds += time.perf_counter() - started
        cond, uncond = model.unet(both, times, context, residuals=residuals).chunk(2)
        eps = guide(cond, uncond, GUIDANCE_SCALE)
        a, b = alphas[t], alphas[following] if following >= 0 else torch.tensor(1.0)
        fresh = ((1 - b) / (1 - a) * (1 - a / b)).clamp(min=0).sqrt() if sampler.endswith("ancestral") else a * 0
        clean = (x - (1 - a).sqrt() * eps) / a.sqrt()
        x = b.sqrt() * clean + (1 - b - fresh**2).clamp(min=0).sqrt() * eps
        x = x + fresh * torch.randn(x.shape, generator=noise)
    return model.decode(x), passes, seconds


def measure(count: int, steps: int, hints: Sequence[str], samplers: Sequence[str]) -> list[Row]:
    """All rows, printed as they come."""
    model, segmenter, scenes = LabModel.load(), load_weights(Segmenter(), "segmenter"), held_out(count)
    rows: list[Row] = []
    ways: list[tuple[str, Callable[[list[float]], Tell]]] = [
        *((f"{share:.2f}", lambda sigmas, share=share: told(share, sigmas)) for share in SHARES),
        *((f"held, every {every}", lambda _, every=every: held(every)) for every in HELD),
    ]
    print(HEAD)
    for hint in hints:
        for sampler in samplers:
            every: Tensor | None = None
            for name, tell in ways:
                pictures, passes, seconds = sample(model, scenes, hint, sampler, steps, tell)
                found = judge(segmenter, pictures, scenes.segments).nanmean(0)
                fidelity = (found[0] if hint == "pose" else found.mean()).item()
                if every is None:
                    every, best = pictures, fidelity
                error = (pictures - every).square().mean().item()
                rows.append(
                    Row(
                        hint,
                        sampler,
                        name,
                        passes,
                        passes / steps,
                        seconds,
                        fidelity,
                        fidelity / best,
                        (pictures - every).abs().mean().item() * 255,
                        10 * math.log10(1 / error) if error else None,
                    )
                )
                print(line(rows[-1]), flush=True)
    return rows


HEAD = (
    "| hint | sampler | reuse | passes | MACs | seconds | fidelity | kept | grey levels | PSNR |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    """A row of the table."""
    psnr = "-" if row.psnr is None else f"{row.psnr:.1f}"
    return (
        f"| {row.hint} | {row.sampler} | {row.reuse} | {row.passes} | {row.macs:.2f} | {row.seconds:.1f} | "
        f"{row.fidelity:.4f} | {row.kept:.2%} | {row.grey:.2f} | {psnr} |"
    )


def share_of_step(model: LabModel) -> float:
    """MACs of a control, its hint left out, against those of the UNet."""

    def counted(run: Callable[[], object]) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    x, t, context = torch.zeros(1, 4, 16, 16), torch.zeros(1), model.encode([""])
    control = model.controls["depth"]
    guided = control.encode_hint(torch.zeros(1, 3, 128, 128))
    return counted(lambda: control(x, t, context, guided)) / counted(lambda: model.unet(x, t, context))


def main(arguments: list[str]) -> int:
    """Measure, print the table and write it into benchmarks/results."""
    parser = argparse.ArgumentParser(prog="dev.py bench reuse", description=__doc__)
    parser.add_argument("--scenes", type=int, default=16, help="held-out scenes (default: 16)")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: 20)")
    parser.add_argument("--hints", nargs="+", choices=HINTS, default=list(HINTS))
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of reuse.json and reuse.md")
    chosen = parser.parse_args(arguments)
    about = (
        f"{chosen.scenes} held-out scenes of the lab, {chosen.steps} steps, guidance scale {GUIDANCE_SCALE:g}, "
        f"{machine('cpu')}; "
        f"a control's MACs are {share_of_step(LabModel.load(['depth'])):.2f} of the UNet's"
    )
    print(about)
    rows = measure(chosen.scenes, chosen.steps, chosen.hints, chosen.samplers)
    leave(chosen.output, "reuse", about, HEAD, rows, line)
    return 0
