"""Surface normals as colours: from depth, as the paper's extended normals, and by a network of their own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from . import Annotator, Parameter
from .images import AnnotatorError

if TYPE_CHECKING:
    from transformers import DPTForDepthEstimation

    from .networks.marigold import Marigold
    from .networks.moge import MoGe

GREY_LEVELS = 255.0
COLOURFUL = 0.02
"""How far channels lie apart, on average, in a picture that is not meant to be grey; what JPEG does stays below."""


def normals_of_depth(
    depth: np.ndarray, background: float = 0.4, strength: float = 2 * math.pi, front: str = "blue"
) -> np.ndarray:
    """Normals (H,W,3) float32, each from -1..1 to 0..1, of a depth (H,W) of any range, larger being nearer.

    The normal is (slope to the right, slope down, `strength`), made one long: slopes by Sobel filters of size 3 in the
    depth's own units, which sum to 8 times the change per pixel. Where the depth, stretched to 0..1, is below
    `background`, the normal faces the viewer. With a blue front, what faces left is red and what faces up is green;
    with a red `front`, the same colours are in the order blue, green, red. Sources: lllyasviel/ControlNet
    annotator/midas and gradio_normal2image.py (red, for ControlNet 1.0); lllyasviel/ControlNet-v1-1-nightly README
    (blue, for 1.1).
    """
    import cv2

    depth = np.asarray(depth, np.float32)
    above = depth - depth.min()
    near = above >= background * above.max()
    slopes = [cv2.Sobel(depth, cv2.CV_32F, right, 1 - right, ksize=3) * near for right in (1, 0)]
    normal = np.stack([*slopes, np.full_like(depth, strength)], axis=2)
    normal /= np.maximum(np.linalg.norm(normal, axis=2, keepdims=True), 1e-12)
    colours = (normal + 1) / 2
    return np.ascontiguousarray(colours if front == "blue" else colours[:, :, ::-1], dtype=np.float32)


def normal_from_depth(
    image: np.ndarray,
    background: float = 0.4,
    strength: float = 6.28,
    smoothing: float = 1.5,
    front: str = "blue",
) -> np.ndarray:
    """Normals (H,W,3) float32 0..1 of a depth picture (H,W,3), 0..1, near is white.

    The depth counts in grey levels, 0..255. A picture of 8 bits has steps of one, which would show as terraces: a
    Gaussian of `smoothing` pixels goes over them first, 0 for none. The others as in `normals_of_depth`; the
    published strength, 2 pi, is rounded to what a widget shows. Raises AnnotatorError for a picture with colours.
    """
    import cv2

    if float(np.ptp(image, axis=2).mean()) > COLOURFUL:
        raise AnnotatorError(
            "image has colours, and a depth picture is grey: connect what a depth annotator made, or choose "
            "normal_midas or normal_moge for a photograph"
        )
    depth = image.mean(axis=2, dtype=np.float32) * GREY_LEVELS
    if smoothing > 0:
        depth = cv2.GaussianBlur(depth, (0, 0), smoothing)
    return normals_of_depth(depth, background, strength, front)


def normal_midas(
    network: DPTForDepthEstimation,
    image: np.ndarray,
    background: float = 0.1,
    strength: float = 6.28,
    front: str = "red",
) -> np.ndarray:
    """The paper's extended normals (H,W,3) float32 0..1: Sobel slopes of the MiDaS depth, in its own units.

    The parameters are those of `normals_of_depth`; their defaults are comfyui_controlnet_aux's, and the colours
    those that lllyasviel/ControlNet gradio_normal2image.py hands to the ControlNet.
    """
    from .networks.depth import midas

    return normals_of_depth(midas(network, image), background, strength, front)


def normal_moge(network: MoGe, image: np.ndarray) -> np.ndarray:
    """Normals (B,H,W,3) float32 0..1 of pictures (B,H,W,3), or of one: what faces left is red, up green, us blue.

    ScanNet's colours, in which ControlNet 1.1's normals are (lllyasviel/ControlNet-v1-1-nightly README). Where the
    network knows none, as of the sky, the viewer is faced. Raises AnnotatorError for an answer that is not finite.
    """
    from .networks.moge import normals

    return (1 - normals(network, image)) / 2


def normal_marigold(network: Marigold, image: np.ndarray, seed: int = 0) -> np.ndarray:
    """Normals (B,H,W,3) float32 0..1 of pictures (B,H,W,3), or of one, in the colours of `normal_moge`.

    `seed` is that of the noise, the same for each picture. Raises AnnotatorError for a picture too thin to be looked
    at, and for an answer that is not finite.
    """
    from .networks.marigold import normals

    return (1 + normals(network, image, seed) * np.array([-1, 1, 1], np.float32)) / 2


RECORDS = (
    Annotator(
        "normal_from_depth",
        normal_from_depth,
        (
            Parameter("background", "Depths below this, black being 0 and white 1, become flat."),
            Parameter("strength", "Lower makes slopes steeper.", 0.1, 15.7),
            Parameter("smoothing", "Blur against the steps of 8-bit depth, in pixels; 0 is none.", 0.0, 20.0, 0.1),
            Parameter(
                "front",
                "Colour of what faces the viewer: blue for ControlNet 1.1 and newer, red for ControlNet 1.0.",
                choices=("blue", "red"),
            ),
        ),
    ),
    Annotator(
        "normal_midas",
        normal_midas,
        (
            Parameter("background", "Depths below this, farthest being 0 and nearest 1, become flat."),
            Parameter("strength", "Lower makes slopes steeper.", 0.1, 15.7),
            Parameter(
                "front",
                "Colour of what faces the viewer: red for the normal ControlNet 1.0, blue for 1.1 and newer.",
                choices=("red", "blue"),
            ),
        ),
        networks=("dpt_hybrid",),
    ),
    Annotator("normal_moge", normal_moge, networks=("moge2_small",), batched=True),
    Annotator("normal_moge_large", normal_moge, networks=("moge2_large",), batched=True),
    Annotator(
        "normal_marigold",
        normal_marigold,
        (Parameter("seed", "Which noise the diffusion begins with.", 0, 2147483647, 1),),
        networks=("marigold_normals",),
        packages=("diffusers",),
        batched=True,
    ),
)
