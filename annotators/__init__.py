"""Annotators make a hint from a picture. `ORDER` is all of them; importing it loads no image library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Parameter:
    """Something that a user may set: its name and what it does. Its `default` is that of the annotator's function.

    A number has a range and a step, and is whole when its default is; a text has `choices`; a default of True or False
    is a switch.
    """

    name: str
    tooltip: str
    minimum: float = 0.0
    maximum: float = 1.0
    step: float = 0.01
    choices: tuple[str, ...] = ()
    default: Any = None


@cache
def _read(function: Callable[..., Any]) -> Mapping[str, Any]:
    """The parameters that a function reads, by name."""
    return signature(function).parameters


@dataclass(frozen=True)
class Annotator:
    """One annotator: `name` as users choose it, its function and the parameters of it that they may set.

    The function takes the networks named by `networks` (entries of `networks.NETWORKS`, loaded, in this order), the
    picture (H,W,3) float32 0..1, which it leaves as it is, and its parameters by name; it gives a hint (H,W,3) of the
    same size. With `reads_mask` it takes a `mask` (H,W), 0..1, and with `reads_pose` one `frame` of POSE_KEYPOINT, and
    cannot do without. With `gives_pose` it gives (hint, frame). `packages` are what it needs beyond those of the pack.
    Pictures come with sides that are multiples of `multiple`, continued by reflection; `batched` functions take several
    at once, (B,H,W,3), and give as much. With `draw` the function gives what it sees, (H,W) float32, and `draw` makes
    the hints of what was seen of all pictures of a batch, one after the other, with parameters of its own.
    """

    name: str
    function: Callable[..., Any]
    parameters: tuple[Parameter, ...] = ()
    networks: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    multiple: int = 1
    batched: bool = False
    draw: Callable[..., Iterator[np.ndarray]] | None = None
    reads_mask: bool = False
    reads_pose: bool = False
    gives_pose: bool = False

    def __post_init__(self) -> None:
        own = {**_read(self.function), **(_read(self.draw) if self.draw else {})}
        filled = tuple(replace(parameter, default=own[parameter.name].default) for parameter in self.parameters)
        object.__setattr__(self, "parameters", filled)

    def own(self, function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters that `function`, one of the two, reads: as `given`, else their defaults."""
        names = _read(function)
        return {p.name: given.get(p.name, p.default) for p in self.parameters if p.name in names}


ORDER: tuple[tuple[str, ...], ...] = (
    # edges and lines
    ("canny:canny", "low", "high", "backend"),
    ("lines:hough_lines", "low", "high", "smoothing", "votes", "length", "gap", "seed"),
    ("lines:lsd", "length"),
    ("hed:hed", "safe"),
    ("mlsd:mlsd", "score_threshold", "dist_threshold"),
    # drawings
    ("drawings:scribble",),
    ("drawings:scribble_xdog", "threshold"),
    ("drawings:lineart_standard", "sigma", "threshold"),
    ("drawings:cartoon_lines", "width", "smoothing", "threshold"),
    ("drawings:threshold", "level"),
    ("hed:scribble_hed", "safe", "threshold"),
    ("lineart:lineart_realistic",),
    ("lineart:lineart_coarse",),
    ("lineart:lineart_anime",),
    # depth and normals
    ("normals:normal_from_depth", "background", "strength", "smoothing", "front"),
    ("depth:depth_large",),
    ("depth:depth_small",),
    ("depth:depth_anything",),
    ("depth:depth_zoe",),
    ("normals:normal_midas", "background", "strength", "front"),
    ("normals:normal_moge",),
    # segments
    ("superpixels:superpixels", "count", "compactness", "colours", "seed"),
    ("segments:segments_ade20k",),
    ("segments:segments_coco",),
    # pose
    ("pose:pose", "style", "body", "hands", "face", "xinsir_sticks"),
    ("pose:human_pose", "detection_threshold", "keypoint_threshold", "style", "xinsir_sticks"),
    # colour and texture
    ("inpaint:inpaint", "masked_value"),
    ("colour:tile", "halvings"),
    ("colour:blur", "sigma"),
    ("colour:luminance", "gamma"),
    ("colour:intensity", "gamma"),
    ("colour:color",),
    ("colour:shuffle", "seed"),
    # what came later
    ("pose:pose", "threshold"),
    ("depth:depth_large", "range"),
    ("depth:depth_small", "range"),
    ("depth:depth_anything", "range"),
    ("depth:depth_zoe", "range"),
    ("lines:hough_lines", "agreement"),
    ("drawings:scribble_xdog", "balance"),
    ("drawings:cartoon_lines", "balance"),
    ("superpixels:superpixels", "merge"),
    ("colour:blur", "kind"),
    ("drawings:threshold", "around"),
    ("drawings:invert",),
    # by networks, what came later
    ("hed:teed", "safe"),
    ("pose:dwpose", "detection_threshold", "keypoint_threshold", "body", "hands", "face", "xinsir_sticks"),
    ("segments:segments_sam2", "points", "confidence", "colours", "seed"),
    ("segments:mask_sam2",),
    ("inpaint:inpaint_lama", "detail"),
    ("depth:depth_moge", "range", "farthest"),
    ("hed:anyline", "smallest"),
    ("lineart:lineart_manga",),
    ("normals:normal_marigold", "seed"),
    ("depth:depth_anything_3", "range"),
    ("normals:normal_moge_large",),
)
"""Each annotator as 'file:name', with the parameters that came with it: its record is in RECORDS of that file.

The node's inputs come in this order, and saved workflows count on their places: nothing here is ever moved or taken
away. A new annotator is a new line at the end, and so is a new parameter of an old one, below its annotator's name.
"""

GROUPS: dict[str, tuple[str, ...]] = {
    "edges": ("canny", "hed", "teed"),
    "lines": (
        *("mlsd", "hough_lines", "lsd", "lineart_realistic", "lineart_coarse", "lineart_anime", "lineart_manga"),
        *("lineart_standard", "anyline", "cartoon_lines", "scribble_hed", "scribble_xdog", "scribble"),
        *("invert", "threshold"),
    ),
    "depth": ("depth_anything", "depth_anything_3", "depth_moge", "depth_small", "depth_large", "depth_zoe"),
    "pose": ("human_pose", "dwpose", "pose"),
    "segments": ("segments_ade20k", "segments_coco", "segments_sam2", "mask_sam2", "superpixels"),
    "normals": ("normal_moge", "normal_moge_large", "normal_marigold", "normal_midas", "normal_from_depth"),
    "picture": ("tile", "blur", "inpaint", "inpaint_lama", "luminance", "intensity", "color", "shuffle"),
}
"""The annotators as lists show them: by what the hint is, first in each group what most controls want."""

if TYPE_CHECKING:
    ANNOTATORS: tuple[Annotator, ...]
    PARAMETERS: tuple[tuple[Annotator, Parameter], ...]


def __getattr__(name: str) -> Any:
    """`ANNOTATORS`, the records in this order, and `PARAMETERS`, all of theirs; read from the files at first."""
    if name not in ("ANNOTATORS", "PARAMETERS"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    records: dict[str, Annotator] = {}
    parameters = []
    for line in ORDER:
        file, _, which = line[0].partition(":")
        (record,) = (one for one in import_module(f".{file}", __name__).RECORDS if one.name == which)
        records[which] = record
        own = {parameter.name: parameter for parameter in record.parameters}
        parameters += [(record, own[parameter]) for parameter in line[1:]]
    globals().update(ANNOTATORS=tuple(records.values()), PARAMETERS=tuple(parameters))
    return globals()[name]
