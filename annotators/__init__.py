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


_SAFE = Parameter("safe", True, "Soft edges of black, grey and white alone: no faint texture comes through.")

_POSE_STYLE = "openpose is what published pose controls read; coco17 the 17 joints as Openpifpaf paints them."
_XINSIR_STICKS = "Wider limbs, as xinsir's SDXL openpose ControlNet was trained; for style openpose."

ANNOTATORS: tuple[Annotator, ...] = (
    # -- edges and lines ---------------------------------------------------------------------------------------------
    Annotator(
        "canny",
        "canny:canny",
        (
            Parameter("low", 100.0, "A gradient below this is no edge.", 0.0, 255.0, 1.0),
            Parameter("high", 200.0, "A gradient above this always is an edge.", 0.0, 255.0, 1.0),
            Parameter(
                "backend",
                "cv2",
                "cv2 is what published Canny controls were trained on; kornia runs on the GPU and finds fewer edges.",
                choices=("cv2", "kornia"),
            ),
        ),
    ),
    Annotator(
        "hough_lines",
        "lines:hough_lines",
        (
            Parameter("low", 50.0, "Canny's lower threshold: a gradient below this is no edge.", 0.0, 255.0, 1.0),
            Parameter("high", 100.0, "Canny's upper threshold: a gradient above this is an edge.", 0.0, 255.0, 1.0),
            Parameter("smoothing", 1.5, "Blur before the edges are sought, in pixels; 0 is none.", 0.0, 10.0, 0.1),
            Parameter("votes", 10, "How many edge pixels a line needs at least.", 1, 200, 1),
            Parameter("length", 25, "Shortest line, in pixels.", 1, 1000, 1),
            Parameter("gap", 3, "Widest gap in a line, in pixels.", 0, 100, 1),
            Parameter("seed", 0, "The transform takes edge pixels in a random order: this one.", 0, 2147483647, 1),
        ),
    ),
    Annotator(
        "lsd",
        "lines:lsd",
        (Parameter("length", 20, "Shortest line, in pixels.", 0, 1000, 1),),
    ),
    Annotator("hed", "hed:hed", (_SAFE,), networks=("hed",)),
    Annotator(
        "mlsd",
        "mlsd:mlsd",
        (
            Parameter("score_threshold", 0.1, "A line of which the network is less sure than this is left out."),
            Parameter("dist_threshold", 0.1, "A line shorter than this is left out: 1 is 2 pixels.", 0.0, 20.0, 0.1),
        ),
        networks=("mlsd",),
    ),
    # -- drawings ----------------------------------------------------------------------------------------------------
    Annotator("scribble", "drawings:scribble"),
    Annotator(
        "scribble_xdog",
        "drawings:scribble_xdog",
        (Parameter("threshold", 32, "Lower draws more strokes.", 1, 64, 1),),
    ),
    Annotator(
        "lineart_standard",
        "drawings:lineart_standard",
        (
            Parameter("sigma", 6.0, "How far around a pixel is looked, in pixels: higher is softer.", 0.1, 100.0, 0.1),
            Parameter("threshold", 8, "Differences up to this do not count when brightness is set.", 0, 16, 1),
        ),
    ),
    Annotator(
        "cartoon_lines",
        "drawings:cartoon_lines",
        (
            Parameter("width", 1.4, "Half a line's width, in pixels.", 0.5, 10.0, 0.1),
            Parameter("smoothing", 0.1, "Colours that differ by less become one. Higher drops more detail.", 0.01, 1.0),
            Parameter("threshold", 0.01, "How much darker than its surroundings a line is.", 0.0, 0.5),
        ),
    ),
    Annotator(
        "threshold",
        "drawings:threshold",
        (Parameter("level", 100, "Grey levels above this become white; 0 chooses the level by itself.", 0, 255, 1),),
    ),
    Annotator(
        "scribble_hed",
        "hed:scribble_hed",
        (
            _SAFE,
            Parameter("threshold", 127.0, "Only soft edges brighter than this get a stroke.", 0.0, 255.0, 1.0),
        ),
        networks=("hed",),
    ),
    Annotator("lineart_realistic", "lineart:lineart", networks=("lineart_realistic",)),
    Annotator("lineart_coarse", "lineart:lineart", networks=("lineart_coarse",)),
    Annotator("lineart_anime", "lineart:lineart_anime", networks=("lineart_anime",)),
    # -- depth and normals -------------------------------------------------------------------------------------------
    Annotator(
        "normal_from_depth",
        "normals:normal_from_depth",
        (
            Parameter("background", 0.4, "Depths below this, black being 0 and white 1, become flat."),
            Parameter("strength", 6.28, "Lower makes slopes steeper.", 0.1, 15.7),
            Parameter("smoothing", 1.5, "Blur against the steps of 8-bit depth, in pixels; 0 is none.", 0.0, 20.0, 0.1),
            Parameter(
                "front",
                "blue",
                "Colour of what faces the viewer: blue for ControlNet 1.1 and newer, red for ControlNet 1.0.",
                choices=("blue", "red"),
            ),
        ),
    ),
    Annotator("depth_large", "depth:depth_midas", networks=("dpt_large",)),
    Annotator("depth_small", "depth:depth_midas", networks=("dpt_hybrid",)),
    Annotator("depth_anything", "depth:depth_anything", networks=("depth_anything_v2_small",)),
    Annotator("depth_zoe", "depth:depth_zoe", networks=("zoedepth",)),
    Annotator(
        "normal_midas",
        "depth:normal_midas",
        (
            Parameter("background", 0.1, "Depths below this, farthest being 0 and nearest 1, become flat."),
            Parameter("strength", 6.28, "Lower makes slopes steeper.", 0.1, 15.7),
            Parameter(
                "front",
                "red",
                "Colour of what faces the viewer: red for the normal ControlNet 1.0, blue for 1.1 and newer.",
                choices=("red", "blue"),
            ),
        ),
        networks=("dpt_hybrid",),
    ),
    Annotator("normal_moge", "moge:normal_moge", networks=("moge2_small",)),
    # -- segments ----------------------------------------------------------------------------------------------------
    Annotator(
        "superpixels",
        "superpixels:superpixels",
        (
            Parameter("count", 200, "About how many patches.", 1, 10000, 1),
            Parameter("compactness", 30.0, "Higher makes square patches, lower lets them follow colour.", 0.01, 100.0),
            Parameter("colours", "mean", "Each patch's own mean, or colours at random.", choices=("mean", "palette")),
            Parameter("seed", 0, "Which random colours.", 0, 2147483647, 1),
        ),
    ),
    Annotator("segments_ade20k", "segments:segments_ade20k", networks=("oneformer_ade20k",), packages=("scipy",)),
    Annotator("segments_coco", "segments:segments_coco", networks=("oneformer_coco",), packages=("scipy",)),
    # -- pose --------------------------------------------------------------------------------------------------------
    Annotator(
        "pose",
        "pose:pose",
        (
            Parameter("style", "openpose", _POSE_STYLE, choices=("openpose", "coco17")),
            Parameter("body", True, "Draw bodies."),
            Parameter("hands", True, "Draw hands where the keypoints have them; style openpose alone does."),
            Parameter("face", True, "Draw faces where the keypoints have them; style openpose alone does."),
            Parameter("xinsir_sticks", False, _XINSIR_STICKS),
        ),
        reads_pose=True,
    ),
    Annotator(
        "human_pose",
        "pose_estimation:human_pose",
        (
            Parameter("detection_threshold", 0.3, "Whom the detector is less sure to be a person is left out."),
            Parameter("keypoint_threshold", 0.3, "A joint of which the network is less sure than this is left out."),
            Parameter("style", "openpose", _POSE_STYLE, choices=("openpose", "coco17")),
            Parameter("xinsir_sticks", False, _XINSIR_STICKS),
        ),
        networks=("person_detector", "pose_estimator"),
        packages=("transformers",),
        gives_pose=True,
    ),
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
    Annotator(
        "tile",
        "colour:tile",
        (Parameter("halvings", 3, "How many times the picture is halved before it is enlarged again.", 1, 6, 1),),
    ),
    Annotator(
        "blur",
        "colour:blur",
        (Parameter("sigma", 9.0, "Radius of the Gaussian, in pixels.", 0.1, 64.0, 0.1),),
    ),
    Annotator(
        "luminance",
        "colour:luminance",
        (Parameter("gamma", 1.0, "Above 1 darkens the middle greys, below 1 brightens them.", 0.1, 2.0),),
    ),
    Annotator(
        "intensity",
        "colour:intensity",
        (Parameter("gamma", 1.0, "Above 1 darkens the middle greys, below 1 brightens them.", 0.1, 2.0),),
    ),
    Annotator("color", "colour:color"),
    Annotator(
        "shuffle",
        "colour:shuffle",
        (Parameter("seed", 0, "Another number pushes the picture about in another way.", 0, 2147483647, 1),),
    ),
)
"""In the order in which the node's inputs came to be: saved workflows count on it, so that entries are never moved."""
