"""Straight lines, drawn white on black and one pixel wide, as the published line ControlNets expect."""

from __future__ import annotations

import numpy as np

from . import Annotator, Parameter
from .images import AnnotatorError, to_bytes

ALONG = 22.5
"""Degrees by which an edge may turn off a line that it is part of; those of LSD (von Gioi et al. 2010)."""


def hough_lines(
    image: np.ndarray,
    low: float = 50.0,
    high: float = 100.0,
    smoothing: float = 1.5,
    votes: int = 10,
    length: int = 25,
    gap: int = 3,
    seed: int = 0,
    agreement: float = 0.5,
) -> np.ndarray:
    """The Hough lines of an RGB image (H,W,3), float 0..1 or uint8, as (H,W,3) float32 0..1.

    scikit-image's probabilistic Hough transform on the Canny edges with thresholds `low` and `high` (0..255) of the
    picture under a Gaussian of `smoothing` pixels, 0 for none: hair and cloth would else give lines in all directions.
    A line needs `votes` edge pixels, is `length` pixels long or longer and bridges gaps of `gap` pixels. Edge pixels
    are taken in a random order: `seed` says in which. In grass and foliage some lie in a row by chance: a line is kept
    where at least the part `agreement` of its pixels are edges that run as it does, 0 keeps all.
    """
    import cv2
    from skimage.transform import probabilistic_hough_line

    pixels = to_bytes(image)
    if smoothing > 0:
        pixels = cv2.GaussianBlur(pixels, (0, 0), smoothing)
    edges = cv2.Canny(pixels, low, high) > 0
    segments = probabilistic_hough_line(edges, threshold=votes, line_length=length, line_gap=gap, rng=seed)
    segments = np.asarray(segments, np.int64).reshape(-1, 4)
    if agreement > 0:
        right, down = _slopes(pixels)
        segments = segments[[_agreement(segment, edges, right, down) >= agreement for segment in segments]]
    return draw_segments(segments, *image.shape[:2])


def _slopes(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How brightness (H,W,3) changes to the right and down, (H,W) each, in the channel where it changes most."""
    import cv2

    right, down = (cv2.Sobel(pixels, cv2.CV_32F, along, 1 - along, ksize=3) for along in (1, 0))
    strongest = (np.abs(right) + np.abs(down)).argmax(axis=2)[:, :, None]
    return np.take_along_axis(right, strongest, 2)[:, :, 0], np.take_along_axis(down, strongest, 2)[:, :, 0]


def _agreement(segment: np.ndarray, edges: np.ndarray, right: np.ndarray, down: np.ndarray) -> float:
    """The part of a segment's pixels that are edges across which brightness changes, within ALONG degrees."""
    (x0, y0), (x1, y1) = segment[:2], segment[2:]
    count = int(max(abs(x1 - x0), abs(y1 - y0))) + 1
    x, y = np.rint(np.linspace((x0, y0), (x1, y1), count)).astype(int).T
    across = np.abs(right[y, x] * (y1 - y0) - down[y, x] * (x1 - x0))
    whole = np.hypot(right[y, x], down[y, x]) * np.hypot(x1 - x0, y1 - y0)
    return float((edges[y, x] & (across > np.cos(np.radians(ALONG)) * whole)).mean())


def lsd(image: np.ndarray, length: int = 20) -> np.ndarray:
    """The line segments that OpenCV's LineSegmentDetector finds in the grey picture, as (H,W,3) float32 0..1.

    `image` is RGB (H,W,3), float 0..1 or uint8; segments shorter than `length` pixels are left out. Raises
    AnnotatorError where OpenCV comes without the detector: 3.4.6 to 3.4.15 and 4.1.0 to 4.5.3.
    """
    import cv2

    grey = cv2.cvtColor(to_bytes(image), cv2.COLOR_RGB2GRAY)
    try:
        detector = cv2.createLineSegmentDetector()
    except (AttributeError, cv2.error) as error:
        raise AnnotatorError(
            f"OpenCV {cv2.__version__} comes without its line segment detector: install OpenCV 4.5.4 or newer, or use "
            "hough_lines"
        ) from error
    found = detector.detect(grey)[0]
    segments = np.zeros((0, 4)) if found is None else np.asarray(found, np.float64).reshape(-1, 4)
    long = np.hypot(segments[:, 2] - segments[:, 0], segments[:, 3] - segments[:, 1]) >= length
    return draw_segments(segments[long], *grey.shape)


def draw_segments(segments: np.ndarray, height: int, width: int) -> np.ndarray:
    """Segments (N,4) of x, y to x, y in pixels as white lines of one pixel, (height,width,3) float32 0..1."""
    import cv2

    canvas = np.zeros((height, width), np.uint8)
    for start_x, start_y, end_x, end_y in np.rint(segments).astype(int).tolist():
        cv2.line(canvas, (start_x, start_y), (end_x, end_y), 255, 1)
    return np.repeat(canvas[:, :, None].astype(np.float32) / 255, 3, axis=2)


RECORDS = (
    Annotator(
        "hough_lines",
        hough_lines,
        (
            Parameter("low", "Canny's lower threshold: a gradient below this is no edge.", 0.0, 255.0, 1.0),
            Parameter("high", "Canny's upper threshold: a gradient above this is an edge.", 0.0, 255.0, 1.0),
            Parameter("smoothing", "Blur before the edges are sought, in pixels; 0 is none.", 0.0, 10.0, 0.1),
            Parameter("votes", "How many edge pixels a line needs at least.", 1, 200, 1),
            Parameter("length", "Shortest line, in pixels.", 1, 1000, 1),
            Parameter("gap", "Widest gap in a line, in pixels.", 0, 100, 1),
            Parameter("seed", "The transform takes edge pixels in a random order: this one.", 0, 2147483647, 1),
            Parameter("agreement", "Part of a line's pixels whose edges run as it does, at least; 0 keeps all lines."),
        ),
    ),
    Annotator(
        "lsd",
        lsd,
        (Parameter("length", "Shortest line, in pixels.", 0, 1000, 1),),
    ),
)
