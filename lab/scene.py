"""Scenes of the lab: what stands where, drawn at random from a seed, and the prompt that names it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..controlnet_core.errors import ZeroConvError
from .figure import Capsule, Figure, Limb, capsules, joints
from .trace import Box, Camera, Cone, Cylinder, Hits, Shape, bounds, pixel_centres, trace
from .vocabulary import COLOURS, GROUNDS, SOLIDS

TEXTURES = ("checks", "stripes", "speckle")
FIGURE_ID = 1
SOLID_IDS = {name: 2 + i for i, name in enumerate(SOLIDS)}
"""Segment ids: 0 ground and wall, 1 figure, 2 sphere, 3 cube, 4 cone, 5 cylinder."""
CHECK_SIZE = 64
FIGURE_VISIBLE, SOLID_VISIBLE = 0.8, 0.55
MARGIN = 0.02


class SceneError(ZeroConvError):
    """A scene was asked for that the lab cannot make."""


@dataclass(frozen=True)
class Solid:
    """One solid on the ground: its kind and colour words, where its centre stands (x, z), its size and its turn.

    `size` is half its width and `height` its height, in metres; `yaw` its turn about the vertical, in degrees. A sphere
    and a cube are as high as they are wide.
    """

    kind: str
    colour: str
    x: float
    z: float
    size: float
    height: float
    yaw: float

    def shape(self) -> Shape:
        """The solid as a shape that rays can meet."""
        if self.kind == "sphere":
            centre = np.array([self.x, self.size, self.z])
            return Capsule(centre, centre, self.size)
        if self.kind == "cube":
            return Box(self.x, self.z, self.size, self.yaw)
        return (Cone if self.kind == "cone" else Cylinder)(self.x, self.z, self.size, self.height)


@dataclass(frozen=True)
class Scene:
    """Everything a picture of the lab depends on; `light` points from the ground towards the light, unit length."""

    seed: int
    ground: str
    texture: str
    texture_size: float
    texture_angle: float
    light: tuple[float, float, float]
    figure: Figure | None
    solids: tuple[Solid, ...]
    camera: Camera = Camera()


def describe(scene: Scene) -> str:
    """The prompt that names what is in the scene, in the lab's words."""
    things = [(scene.figure.colour, "person")] if scene.figure else []
    things += [(solid.colour, solid.kind) for solid in scene.solids]
    names = [f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {noun}" for colour, noun in things]
    if not names:
        return f"empty {scene.ground} ground"
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{listed} on {scene.ground} ground"


def random_scene(seed: int, solids: int | None = None, figure: bool = True) -> Scene:
    """The scene of a seed: one figure (or none) and `solids` solids, 0 to 3 (None: 2 or 3, by the seed).

    The figure lies wholly inside the picture and is at least 80 % visible, every solid at least 55 %.
    Raises SceneError for any other number of solids and for a negative seed.
    """
    if seed < 0:
        raise SceneError(f"seed is {seed}; it must be 0 or more")
    if solids not in (None, 0, 1, 2, 3):
        raise SceneError(f"solids is {solids}; the lab has room for 0 to 3")
    rng = np.random.default_rng([seed, 0x1AB])
    count = int(rng.integers(2, 4)) if solids is None else solids
    colours = [COLOURS[i] for i in rng.permutation(len(COLOURS))]
    turn, rise = np.deg2rad(rng.uniform(-55, 55)), np.deg2rad(rng.uniform(46, 60))
    empty = Scene(
        seed=seed,
        ground=str(rng.choice(GROUNDS)),
        texture=str(rng.choice(TEXTURES)),
        texture_size=float(rng.uniform(0.5, 0.8)),
        texture_angle=float(rng.uniform(0, 90)),
        light=(float(np.cos(rise) * np.sin(turn)), float(np.sin(rise)), float(-np.cos(rise) * np.cos(turn))),
        figure=None,
        solids=(),
    )
    # A crowded draw that leaves no room is drawn again; the rng goes on, so the seed still decides everything.
    while True:
        person = _random_figure(rng, colours[0], empty.camera) if figure else None
        placed = _place_solids(rng, person, colours[1 : 1 + count], empty.camera)
        if placed is not None:
            return replace(empty, figure=person, solids=placed)


def _random_arm(rng: np.random.Generator) -> Limb:
    kind = rng.choice(["low", "out", "up", "hip", "raised", "any"])
    forward, ahead = rng.uniform(-10, 25), rng.uniform(-5, 35)
    upper, lower = {
        "low": (rng.uniform(12, 40), rng.uniform(0, 40)),
        "out": (rng.uniform(70, 105), rng.uniform(65, 120)),
        "up": (rng.uniform(120, 165), rng.uniform(140, 190)),
        "hip": (rng.uniform(45, 60), rng.uniform(-75, -50)),
        "raised": (rng.uniform(65, 110), rng.uniform(150, 200)),
        "any": (rng.uniform(15, 160), rng.uniform(-20, 190)),
    }[str(kind)]
    return Limb(upper, lower, forward, ahead)


def _random_legs(rng: np.random.Generator) -> tuple[Limb, Limb]:
    kind = str(rng.choice(["stand", "apart", "step", "lift"]))
    if kind == "lift":
        upper = rng.uniform(50, 80)
        standing = Limb(a := rng.uniform(0, 8), a)
        legs = (Limb(upper, rng.uniform(-40, 15), rng.uniform(0, 25), 0.0), standing)
    elif kind == "step":
        swing = rng.uniform(15, 30)
        legs = (
            Limb(a := rng.uniform(6, 16), a, swing, swing - 15),
            Limb(b := rng.uniform(6, 16), b, -swing, -swing - 10),
        )
    else:
        spread = (5, 12) if kind == "stand" else (16, 30)
        legs = (
            Limb(a := rng.uniform(*spread), a - rng.uniform(0, 8)),
            Limb(b := rng.uniform(*spread), b - rng.uniform(0, 8)),
        )
    return legs if rng.random() < 0.5 else (legs[1], legs[0])


def _random_figure(rng: np.random.Generator, colour: str, camera: Camera) -> Figure:
    while True:
        right_leg, left_leg = _random_legs(rng)
        figure = Figure(
            colour=colour,
            x=0.0,
            z=float(rng.uniform(3.5, 4.7)),
            yaw=float(rng.uniform(-35, 35)),
            lean=float(rng.uniform(-10, 10)),
            right_arm=_random_arm(rng),
            left_arm=_random_arm(rng),
            right_leg=right_leg,
            left_leg=left_leg,
        )
        # Moved sideways over all the room that this pose leaves, the sides a little preferred: two scenes' figures
        # should overlap little, so that a control's effect can be measured.
        rectangles = bounds(_body(figure), camera)
        room = np.array([MARGIN - rectangles[:, 0].min(), 1 - MARGIN - rectangles[:, 2].max()])
        left, right = room * figure.z / camera.focal
        figure = replace(figure, x=float(left + rng.beta(0.6, 0.6) * (right - left)))
        if _inside(_body(figure), camera):
            return figure


def _body(figure: Figure) -> Sequence[Capsule]:
    """All capsules of the figure."""
    clothed, bare = capsules(joints(figure))
    return clothed + bare


def _inside(shapes: Sequence[Shape], camera: Camera) -> bool:
    """Whether all the shapes lie wholly inside the picture, a small margin kept."""
    rectangles = bounds(shapes, camera)
    return bool((rectangles[:, :2] >= MARGIN).all() and (rectangles[:, 2:] <= 1 - MARGIN).all())


def _random_solid(rng: np.random.Generator, colour: str, camera: Camera) -> Solid:
    kind = str(rng.choice(SOLIDS))
    z = rng.uniform(3.6, 5.4)
    # Far solids are larger, so that none becomes too small to be drawn well on a 16x16 latent.
    size = rng.uniform(0.065, 0.095) * z if kind in ("sphere", "cone") else rng.uniform(0.06, 0.08) * z
    tall = {"sphere": 2.0, "cube": 2.0, "cone": rng.uniform(2.1, 2.6), "cylinder": rng.uniform(2.2, 3.0)}[kind]
    half = 0.5 * z / camera.focal
    return Solid(
        kind,
        colour,
        float(rng.uniform(-half, half)),
        float(z),
        float(size),
        float(size * tall),
        float(rng.uniform(0, 90)),
    )


def _place_solids(
    rng: np.random.Generator, person: Figure | None, colours: list[str], camera: Camera
) -> tuple[Solid, ...] | None:
    """Solids that touch neither each other nor the figure's feet and leave enough of everything visible, or None."""
    x, y = pixel_centres(CHECK_SIZE)
    feet: list[np.ndarray] = []
    layers: list[tuple[Hits, float]] = []
    if person is not None:
        found = joints(person)
        feet = [found[f"{side}_{part}"][[0, 2]] for side in ("right", "left") for part in ("knee", "ankle", "toe")]
        layers.append((trace(_body(person), camera, x, y), FIGURE_VISIBLE))
    placed: list[Solid] = []
    for _ in range(40):
        if len(placed) == len(colours):
            break
        solid = _random_solid(rng, colours[len(placed)], camera)
        shape = solid.shape()
        here = np.array([solid.x, solid.z])
        width = solid.size * (1.3 if solid.kind == "cube" else 1.0)
        if not _inside([shape], camera) or any(np.linalg.norm(here - foot) < width + 0.18 for foot in feet):
            continue
        if any(np.linalg.norm(here - (other.x, other.z)) < width + other.size * 1.3 for other in placed):
            continue
        trial = [*layers, (trace([shape], camera, x, y), SOLID_VISIBLE)]
        if _visible_enough(trial):
            layers = trial
            placed.append(solid)
    return tuple(placed) if len(placed) == len(colours) else None


def _visible_enough(layers: list[tuple[Hits, float]]) -> bool:
    nearest = np.min([hits.depth for hits, _ in layers], axis=0)
    for hits, needed in layers:
        own = hits.shape >= 0
        if (own & (hits.depth <= nearest)).sum() < needed * own.sum():
            return False
    return True
