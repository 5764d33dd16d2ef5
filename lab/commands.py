"""The lab's command line: `python dev.py lab train | evaluate | claims | score | scene`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..controlnet_core.errors import ZeroConvError
from . import train
from .claims import claim as claims
from .claims import runs
from .claims.catalogue import CLAIMS
from .dataset import HINTS, render_arrays
from .evaluate import SETTINGS, SOLIDS, evaluate, held_out, judge, verdicts
from .models import SIZE, MissingWeights, device, load_weights
from .pipeline import GUIDANCE_SCALE, STEPS, LabModel
from .render import RenderError, render
from .scene import Scene, SceneError, describe, random_scene
from .segmenter import Segmenter
from .sheet import contact_sheet

ROOT = Path(__file__).parent.parent
README = Path(__file__).parent / "README.md"
WORK, OUTPUT = ROOT / ".dev" / "lab", ROOT / "output"

STAGES: dict[str, Callable[..., None]] = {
    "autoencoder": train.train_autoencoder,
    "base": train.train_base,
    "segmenter": train.train_segmenter,
    "decoder": train.train_decoder,
    **{hint: partial(train.train_control, hint=hint) for hint in HINTS},
}
"""What there is to train, each after those that it needs."""

FOLLOWS = 0.6
"""IoU from which one picture is said to follow its hint: midway between no control (0.40) and a good one (0.80)."""


class CommandError(ZeroConvError):
    """A command was given something that it cannot use."""


def main(arguments: list[str]) -> int:
    """Run one command and give its exit code: 0, or 1 for a missed bound or something that cannot be used."""
    chosen = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        return chosen.run(chosen)
    except (CommandError, MissingWeights, RenderError, SceneError) as error:
        print(f"lab {chosen.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dev.py lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        added.set_defaults(run=run)
        return added

    add = command("train", _train).add_argument
    add("stages", nargs="*", metavar="stage", help=f"of {', '.join(STAGES)}; none: all, in this order")
    add("--work", type=Path, default=WORK, help="folder for scenes and checkpoints (default: %(default)s)")
    add("--steps", type=int, help="optimizer steps of each stage (default: its own)")

    add = command("evaluate", _evaluate).add_argument
    add("--scenes", type=int, default=64, help="how many held-out scenes (default: %(default)s)")
    add("--batch", type=int, default=16, help="pictures sampled at a time (default: %(default)s)")
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="only these (default: all)")
    add("--steps", type=int, default=STEPS, help="sampling steps (default: %(default)s)")
    add("--guidance", type=float, default=GUIDANCE_SCALE, help="guidance scale (default: %(default)s)")
    add("--output", type=Path, help="also write a contact sheet there")

    add = command("claims", _claims).add_argument
    add("names", nargs="*", metavar="name", help=f"of {', '.join(claim.name for claim in CLAIMS)}; none: all")
    add("--work", type=Path, default=WORK, help="folder for all that is made (default: %(default)s)")
    add(
        "--seeds",
        type=int,
        nargs="+",
        choices=runs.SEEDS,
        default=runs.SEEDS,
        help="train from these alone: processes can share the work",
    )
    add("--list", action="store_true", help="only say what is finished")
    add("--again", action="store_true", help="measure again what was measured; trainings are kept")
    add("--publish", action="store_true", help="put tables and pictures of what is finished into lab/README.md")

    add = command("score", _score).add_argument
    add("--scene", type=json.loads, required=True, help="inputs of a LabScene node as JSON")
    add("pictures", nargs="+", metavar="label=path", help="pictures that were made from the scene's hints")

    add = command("scene", _scene).add_argument
    add("seed", type=int, help="held-out seeds start at 1000000")
    add("--output", type=Path, help="where to write the picture (default: output/scene_SEED.png)")
    return parser


def _train(chosen: argparse.Namespace) -> int:
    """Train the embedded model, or some stages of it; goes on from its checkpoints."""
    unknown = [name for name in chosen.stages if name not in STAGES]
    if unknown:
        raise CommandError(f"there is no stage {unknown[0]!r}; the stages are: {', '.join(STAGES)}")
    for name, stage in STAGES.items():
        if name in (chosen.stages or STAGES):
            print(f"train {name}", flush=True)
            stage(chosen.work, **({} if chosen.steps is None else {"steps": chosen.steps}))
    return 0


def _evaluate(chosen: argparse.Namespace) -> int:
    """Measure on held-out scenes how well the controls work; exit code 1 when a bound is missed."""
    if chosen.scenes < 2:
        raise CommandError(f"--scenes is {chosen.scenes}; with fewer than 2 there are no other scene's hints")
    controls = {hint for setting in chosen.settings for hint in SETTINGS[setting]}
    model = LabModel.load([hint for hint in HINTS if hint in controls])
    segmenter = load_weights(Segmenter(), "segmenter").to(model.place)
    scenes = held_out(chosen.scenes)
    report = evaluate(model, segmenter, scenes, chosen.settings, chosen.batch, chosen.steps, chosen.guidance)
    print(
        f"{len(scenes.seeds)} held-out scenes (seeds {scenes.seeds[0]} to {scenes.seeds[-1]}), "
        f"{chosen.steps} DDIM steps, guidance scale {chosen.guidance:g}, on {model.place.type}\n"
    )
    print(report.table())
    results = verdicts(report.rows)
    print("\n" + "\n".join(line for _, line in results))
    if chosen.output:
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        report.sheet().save(chosen.output)
        print(f"\nlook at {chosen.output}")
    return 0 if all(reached for reached, _ in results) else 1


def _claims(chosen: argparse.Namespace) -> int:
    """Try the paper's claims: train what they need, measure, and print tables; goes on where it was left."""
    known = {claim.name: claim for claim in CLAIMS}
    unknown = [name for name in chosen.names if name not in known]
    if unknown:
        raise CommandError(f"there is no claim {unknown[0]!r}; the claims are: {', '.join(known)}")
    work = claims.Work(chosen.work)
    wanted = [claim for claim in CLAIMS if claim.name in (chosen.names or known)]
    seeds: Sequence[int] = chosen.seeds
    for claim in () if chosen.list or chosen.publish else wanted:
        if chosen.again or claims.kept(work, claim) is None:
            for name, seed in product(claim.trainings, seeds):
                runs.run(work, name, seed)
            if all(runs.finished(work, *training) for training in product(claim.trainings, runs.SEEDS)):
                claims.keep(work, claim, claim.measure(work))
    found = {claim.name: claims.kept(work, claim) for claim in wanted}
    for claim in wanted:
        trainings = product(claim.trainings, runs.SEEDS)
        left = [f"{name} (seed {seed})" for name, seed in trainings if not runs.finished(work, name, seed)]
        state = "measured" if found[claim.name] else f"left to train: {', '.join(left)}" if left else "left to measure"
        print(f"\n{claim.name}: {state}\nthe paper: {claim.says}")
        if (kept := found[claim.name]) and not chosen.list:
            print("\n".join(["", kept[0], *(f"look at {path}" for path in kept[1])]))
    if chosen.publish:
        claims.publish(README, {name: kept for name, kept in found.items() if kept})
    return 0


def _score(chosen: argparse.Namespace) -> int:
    """Say how well pictures follow the scene that their hints came from."""
    segments = torch.from_numpy(render(scene_of(chosen.scene), SIZE).segments).long().clamp(max=SOLIDS)[None]
    segmenter = load_weights(Segmenter(), "segmenter").to(device())
    # A hint is no result: what a graph saves under such a label is not judged.
    named = [word.partition("=") for word in chosen.pictures if "hint" not in word.partition("=")[0].lower()]
    head = "IoU with the scene"
    width = max([len(head), *(len(label) for label, _, _ in named)]) + 2
    print(f"\n{head:<{width}}{'figure':>8}{'solids':>8}")
    for label, _, path in named:
        scores = judge(segmenter, _read(path), segments)[0].tolist()
        numbers = "".join(f"{'-' if np.isnan(value) else f'{value:.2f}':>8}" for value in scores)
        print(f"{label:<{width}}{numbers}  {meaning(*scores)}")
    return 0


def scene_of(inputs: Mapping[str, Any]) -> Scene:
    """The scene that a LabScene node renders for its inputs `seed`, `solids` and `figure`; it looks alike at any size.

    Raises SceneError for what the node would refuse, and for a seed that comes from another node.
    """
    if not isinstance(inputs.get("seed"), int):
        raise SceneError(f"the scene's seed is {inputs.get('seed')!r}; it must be a whole number")
    return random_scene(inputs["seed"], inputs.get("solids"), inputs.get("figure", True))


def meaning(figure: float, solids: float) -> str:
    """What two IoUs of one picture mean in a word; NaN stands for something that the scene does not have."""
    present = {name: value for name, value in (("figure", figure), ("solids", solids)) if not np.isnan(value)}
    following = [name for name, value in present.items() if value >= FOLLOWS]
    if not following:
        return "does not follow"
    return "follows" if len(following) == len(present) else f"only the {following[0]}"


def _read(path: str) -> torch.Tensor:
    """A picture file as (1,3,SIZE,SIZE) in [0,1]: the size that the judge learned on."""
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(path).convert("RGB")
    except (FileNotFoundError, UnidentifiedImageError) as error:
        raise CommandError(f"{path!r} is no picture: write label=path/of/picture.png") from error
    if picture.width != picture.height:
        raise CommandError(f"{path} is {picture.width}x{picture.height}; the lab's pictures are square")
    pixels = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32)
    return torch.from_numpy(pixels / 255).permute(2, 0, 1)[None]


def _scene(chosen: argparse.Namespace) -> int:
    """Draw a scene with its hints and print its prompt."""
    output = chosen.output or OUTPUT / f"scene_{chosen.seed}.png"
    scene = random_scene(chosen.seed)
    arrays = render_arrays(chosen.seed, SIZE)
    output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet({name: arrays[name][None] / 255 for name in ("image", *HINTS)}).save(output)
    print(f"{describe(scene)}\nlook at {output}")
    return 0
