"""Straight lines, drawn white on black and one pixel wide, as the published line ControlNets expect."""

from __future__ import annotations

import numpy as np

from . import Annotator, Parameter
from .images import AnnotatorError, to_bytes


def hough_lines(
    image: np.ndarray,
    low: float = 50.0,
    high: float = 100.0,
    smoothing: float = 1.5,
    votes: int = 10,
    length: int = 25,
    gap: int = 3,
    seed: int = 0,
) -> np.ndarray:
    """The Hough lines of an RGB image (H,W,3), float 0..1 or uint8, as (H,W,3) float32 0..1.

    scikit-image's probabilistic Hough transform on the Canny edges with thresholds `low` and `high` (0..255) of the
    picture under a Gaussian of `smoothing` pixels, 0 for none: hair and cloth would else give lines in all directions.
    A line needs `votes` edge pixels, is `length` pixels long or longer and bridges gaps of `gap` pixels. Edge pixels
    are taken in a random order: `seed` says in which.
    """
    import cv2
    from skimage.transform import probabilistic_hough_line

    pixels = to_bytes(image)
    if smoothing > 0:
        pixels = cv2.GaussianBlur(pixels, (0, 0), smoothing)
    edges = cv2.Canny(pixels, low, high) > 0
    segments = probabilistic_hough_line(edges, threshold=votes, line_length=length, line_gap=gap, rng=seed)
    return draw_segments(np.asarray(segments, np.float64).reshape(-1, 4), *image.shape[:2])


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
        ),
    ),
    Annotator(
        "lsd",
        lsd,
        (Parameter("length", "Shortest line, in pixels.", 0, 1000, 1),),
    ),
)
