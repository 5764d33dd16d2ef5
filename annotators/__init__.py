"""Annotators make a hint from a picture. This list is all of them; importing it loads no image library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Parameter:
    """Something that a user may set: its name, its default, and what it does.

    A number has a range and a step, and is whole when its default is; a text has `choices`; a default of True or False
    is a switch.
    """

    name: str
    default: float | int | bool | str
    tooltip: str
    minimum: float = 0.0
    maximum: float = 1.0
    step: float = 0.01
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Annotator:
    """One annotator: `name` as users choose it, `function` as 'module:function' in this package, its parameters.

    The function takes the networks named by `networks` (entries of `networks.NETWORKS`, loaded, in this order), the
    picture (H,W,3) float32 0..1, which it leaves as it is, and its parameters by name; it gives a hint (H,W,3) of the
    same size. With `reads_mask` it takes a `mask` (H,W), 0..1, and with `reads_pose` one `frame` of POSE_KEYPOINT, and
    cannot do without. With `gives_pose` it gives (hint, frame). `packages` are what it needs beyond those of the pack.
    Pictures come to annotators with networks with sides that are multiples of 64.
    """

    name: str
    function: str
    parameters: tuple[Parameter, ...] = ()
    networks: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    reads_mask: bool = False
    reads_pose: bool = False
    gives_pose: bool = False

    def load(self) -> Callable[..., Any]:
        """The function itself; what it needs is imported with it."""
        module, function = self.function.split(":")
        return getattr(import_module(f".{module}", __package__), function)


ANNOTATORS: tuple[Annotator, ...] = (
    # -- edges and lines ---------------------------------------------------------------------------------------------
    Annotator(
        "canny",
        "canny:canny",
        (
            Parameter("low", 100.0, "A gradient below this is no edge.", 0.0, 255.0, 1.0),
            Parameter("high", 200.0, "A gradient above this always is an edge.", 0.0, 255.0, 1.0),
        ),
    ),
    # -- drawings ----------------------------------------------------------------------------------------------------
    # -- depth and normals -------------------------------------------------------------------------------------------
    # -- segments ----------------------------------------------------------------------------------------------------
    # -- pose --------------------------------------------------------------------------------------------------------
    # -- colour and texture ------------------------------------------------------------------------------------------
    Annotator(
        "inpaint",
        "inpaint:inpaint",
        (
            Parameter(
                "masked_value",
                -1.0,
                "What the hint has where the mask is white: -1 for SD1.5's inpaint ControlNet, 0 for those of SDXL.",
                -1.0,
                1.0,
                0.5,
            ),
        ),
        reads_mask=True,
    ),
)
"""In the order in which the node's inputs came to be: saved workflows count on it, so that entries are never moved."""
