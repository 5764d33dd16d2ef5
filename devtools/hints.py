"""`dev.py hints`: what every annotator makes of three photographs, as pictures for the docs and for the eye.

scikit-image ships them: NASA's portrait of Eileen Collins (public domain), a cat and a cup of coffee (both CC0).
Annotators with networks run where their weights are found, and are named where not: no picture is faked.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..annotators import ANNOTATORS, Annotator, pipeline
from ..annotators.fetching import find
from ..annotators.keypoints import COCO_JOINTS, Person, coco_to_openpose, write_frame
from ..annotators.networks import NETWORKS
from ..lab.sheet import contact_sheet

if TYPE_CHECKING:
    from PIL import Image

SIDE = 512
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")
"""By their names in scikit-image; the first is the one of the single pictures, and has joints."""
READS_NO_PHOTOGRAPH = {"normal_from_depth": "a depth map", "scribble": "a drawing", "invert": "a drawing"}

JOINTS = {
    "nose": (225, 117),
    "left_eye": (246, 103),
    "right_eye": (202, 101),
    "left_ear": (274, 126),
    "right_ear": (178, 122),
    "left_shoulder": (322, 262),
    "right_shoulder": (92, 262),
    "left_elbow": (352, 372),
    "right_elbow": (48, 400),
    "right_wrist": (158, 488),
}
"""Where the joints are in the photograph, placed by hand: no estimator's weights came with the pack."""


def main(arguments: list[str]) -> int:
    """Write NAME.jpg for each hint and a sheet for each photograph into a folder; say which were left out, and why."""
    import skimage.data
    from PIL import Image

    parser = argparse.ArgumentParser(prog="dev.py hints", description=main.__doc__)
    parser.add_argument("--output", type=Path, default=Path("output") / "hints")
    parser.add_argument("--weights", type=Path, action="append", default=[], help="a folder of annotators' weights")
    parser.add_argument("--side", type=int, default=256, help="side of the pictures that are written")
    chosen = parser.parse_args(arguments)
    chosen.output.mkdir(parents=True, exist_ok=True)

    loaded: dict[str, list[Any]] = {}
    for annotator in ANNOTATORS:
        networks = _networks(annotator, chosen.weights)
        if networks is None:
            print(f"{annotator.name}: left out, its weights are in none of the folders named by --weights")
        elif annotator.name in READS_NO_PHOTOGRAPH:
            print(f"{annotator.name}: left out, it reads {READS_NO_PHOTOGRAPH[annotator.name]} and no photograph")
        else:
            loaded[annotator.name] = networks
    for photograph in PHOTOGRAPHS:
        picture = _square(getattr(skimage.data, photograph)())
        first = photograph == PHOTOGRAPHS[0]
        pictures = {"photograph": picture / 255.0}
        for annotator in (one for one in ANNOTATORS if one.name in loaded and (first or not one.reads_pose)):
            for name, parameters in _variants(annotator):
                pictures[name] = _hint(annotator, picture, loaded[annotator.name], parameters)
        small = {name: _shrunk(hint, chosen.side) for name, hint in pictures.items()}
        for name, hint in small.items() if first else ():
            Image.fromarray(np.rint(hint * 255).astype(np.uint8)).save(chosen.output / f"{name}.jpg", quality=88)
        _sheet(small).save(chosen.output / f"all_{photograph}.jpg", quality=85)
        print(f"{photograph}: {', '.join(list(small)[1:])}")
    return 0


def _square(photograph: np.ndarray) -> np.ndarray:
    """Its middle."""
    height, width = photograph.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return photograph[top : top + side, left : left + side]


def _sheet(pictures: dict[str, np.ndarray]) -> Image.Image:
    """The pictures in rows of six, with their names."""
    from PIL import Image

    columns = {name: picture[None] for name, picture in pictures.items()}
    rows = [dict(list(columns.items())[i : i + 6]) for i in range(0, len(columns), 6)]
    sheets = [np.asarray(contact_sheet(row)) for row in rows]
    wide = max(sheet.shape[1] for sheet in sheets)
    padded = [np.pad(sheet, ((0, 0), (0, wide - sheet.shape[1]), (0, 0)), constant_values=255) for sheet in sheets]
    return Image.fromarray(np.concatenate(padded))


def _variants(annotator: Annotator) -> list[tuple[str, dict[str, Any]]]:
    """The names of the pictures to make with an annotator, and the parameters of each."""
    if any(parameter.name == "style" for parameter in annotator.parameters):
        return [(f"{annotator.name}_{style}", {"style": style}) for style in ("openpose", "coco17")]
    return [(annotator.name, {})]


def _networks(annotator: Annotator, folders: list[Path]) -> list[Any] | None:
    """The annotator's networks, `None` when a file of theirs is in none of the folders."""
    made = []
    for name in annotator.networks:
        (network,) = (entry for entry in NETWORKS if entry.name == name)
        paths = find(network, folders)
        if any(path is None for path in paths):
            return None
        made.append(network.load([path for path in paths if path is not None]))
    return made


def _hint(annotator: Annotator, photograph: np.ndarray, networks: list[Any], parameters: dict[str, Any]) -> np.ndarray:
    """The hint at the photograph's size, in 0..1."""
    mask = np.zeros((SIDE, SIDE), np.float32)
    mask[60:170, 150:300] = 1
    body = np.zeros((17, 3))
    for name, (x, y) in JOINTS.items():
        body[COCO_JOINTS.index(name)] = (x, y, 1)
    frame = write_frame([Person(coco_to_openpose(body))], SIDE, SIDE)
    hint, _ = pipeline.annotate(
        annotator, photograph, SIDE, networks=networks, mask=mask, frame=frame, parameters=parameters
    )
    return hint.clip(0, 1)


def _shrunk(picture: np.ndarray, side: int) -> np.ndarray:
    import cv2

    return np.asarray(cv2.resize(picture.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA))
