"""People found in a picture: RT-DETR finds them, ViTPose their joints, or DWPose those and their hands and faces.

RT-DETR and ViTPose are those of transformers, DWPose is published as TorchScript.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..images import AnnotatorError, to_picture
from ..keypoints import OPENPOSE_JOINTS, Person, person_of
from . import pretrained, scripted

DETECTOR_SIDE = 640
"""RT-DETR sees the whole picture squeezed to this square (PekingU/rtdetr_r50vd_coco_o365, preprocessor_config.json)."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's RGB, which both estimators want taken out (vitpose-base-simple, preprocessor_config.json; mmpose)."""
BOX_MARGIN = 1.25
"""An estimator sees a person's box, widened to its own aspect, times this."""
BLUR_SIGMA, BLUR_RADIUS = 0.8, 5
"""Of the heat maps before their peak is refined (transformers, VitPoseImageProcessor)."""
WHOLE_SIZE, WHOLE_BATCH, WHOLE_CELLS = (384, 288), 5, 2
"""DWPose sees five crops of this height and width, always, and says places in halves of their pixels (SimCC)."""
PUPILS = ("right_eye", "left_eye")
"""The last 2 of OpenPose's 70 points of a face, which DWPose does not find, are a body's own."""


def build_detector(config: Path, weights: Path) -> nn.Module:
    """RT-DETR of its config.json and model.safetensors: eval, fp32, on the CPU. Raises AnnotatorError."""
    return pretrained.build(*pretrained.classes("RTDetrForObjectDetection", "RTDetrConfig", "4.48"), config, weights)


def build_estimator(config: Path, weights: Path) -> nn.Module:
    """ViTPose of its config.json and model.safetensors: eval, fp32, on the CPU. Raises AnnotatorError."""
    return pretrained.build(*pretrained.classes("VitPoseForPoseEstimation", "VitPoseConfig", "4.48"), config, weights)


def build_whole_estimator(path: Path) -> nn.Module:
    """DWPose of its TorchScript: eval, fp32, on the CPU. Raises AnnotatorError."""
    return scripted.build(path)


@torch.inference_mode()
def find(
    detector: Any, estimator: Any, image: np.ndarray, detection_threshold: float, keypoint_threshold: float
) -> list[Person]:
    """The people of a picture (H,W,3), 0..1, the surest first, in its pixels; by ViTPose, which finds bodies alone.

    Both networks run where they lie and in their own dtype, the estimator on all people at once. Left out are people of
    whom the detector is not surer than `detection_threshold`, joints of which the estimator is not surer than
    `keypoint_threshold`, and who then has none.
    """
    return _found(detector, estimator, estimate, image, detection_threshold, keypoint_threshold)


@torch.inference_mode()
def find_whole(
    detector: Any, estimator: Any, image: np.ndarray, detection_threshold: float, keypoint_threshold: float
) -> list[Person]:
    """As `find`, by DWPose: with hands of 21 points and faces of 70, or `None` for those of which it finds no point."""
    people = _found(detector, estimator, estimate_whole, image, detection_threshold, keypoint_threshold)
    return [_with_pupils(person) for person in people]


def _found(
    detector: Any,
    estimator: Any,
    estimate: Callable[[Any, Tensor, Tensor], np.ndarray],
    image: np.ndarray,
    detection_threshold: float,
    keypoint_threshold: float,
) -> list[Person]:
    picture = rearrange(torch.from_numpy(to_picture(image)), "h w c -> 1 c h w")
    boxes = detect(detector, picture, detection_threshold)
    if not len(boxes):
        return []
    joints = estimate(estimator, picture, boxes)
    joints[joints[:, :, 2] <= keypoint_threshold] = 0
    return [person_of(found) for found in joints if found[:, 2].any()]


def detect(detector: Any, picture: Tensor, threshold: float) -> Tensor:
    """The boxes (P,4) float32 of people in a picture (1,3,H,W), 0..1, the surest first.

    A box is left, top, right and bottom in pixels.
    """
    place = next(detector.parameters())
    seen = picture.to(place.device, torch.float32)
    seen = F.interpolate(seen, (DETECTOR_SIDE, DETECTOR_SIDE), mode="bilinear", antialias=True)
    found = detector(seen.to(place.dtype))
    scores = found.logits[0, :, detector.config.label2id["person"]].float().sigmoid()
    _check(scores, "RT-DETR", place.dtype)
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] > threshold]
    middle, size = found.pred_boxes[0, order].float().chunk(2, dim=1)
    height, width = picture.shape[2:]
    return torch.cat([middle - size / 2, middle + size / 2], dim=1) * seen.new_tensor([width, height, width, height])


def estimate(estimator: Any, picture: Tensor, boxes: Tensor) -> np.ndarray:
    """COCO's 17 joints (P,17,3) float32 of each box (P,4) of a picture (1,3,H,W), 0..1: x, y in pixels, confidence."""
    place = next(estimator.parameters())
    areas = _areas(boxes.to(place.device), estimator.config.backbone_config.image_size)
    crops = _crops(picture.to(place.device, torch.float32), areas, estimator.config.backbone_config.image_size)
    mean, std = (crops.new_tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
    heat = estimator(((crops - mean) / std).to(place.dtype)).heatmaps.float()
    _check(heat, "ViTPose", place.dtype)
    places, scores = peaks(heat.cpu().numpy())
    # Areas count from the middle of the first pixel, POSE_KEYPOINT from its edge.
    left, top, wide, high = (side[:, None] for side in areas.cpu().numpy().T)
    x = left + wide * places[:, :, 0] / (heat.shape[3] - 1) + 0.5
    y = top + high * places[:, :, 1] / (heat.shape[2] - 1) + 0.5
    return np.stack([x, y, scores], axis=2).astype(np.float32)


def estimate_whole(estimator: Any, picture: Tensor, boxes: Tensor) -> np.ndarray:
    """COCO-WholeBody's 133 points (P,133,3) float32 of each box (P,4) of a picture (1,3,H,W), 0..1, as `estimate`.

    Along each side the network gives a row of cells for each point: it is at the highest cells, and as sure as the less
    sure of the two (open-mmlab/mmpose, SimCCLabel; IDEA-Research/DWPose).
    """
    place = next(estimator.parameters())
    areas = _areas(boxes.to(place.device), WHOLE_SIZE)
    crops = _crops(picture.to(place.device, torch.float32), areas, WHOLE_SIZE, ends=False)
    mean, std = (crops.new_tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
    places, scores = [], []
    for few in ((crops - mean) / std).to(place.dtype).split(WHOLE_BATCH):
        full = torch.cat([few, few.new_zeros(WHOLE_BATCH - len(few), *few.shape[1:])])
        rows = [row[: len(few)].float() for row in scripted.run(estimator, full)]
        for row in rows:
            _check(row, "DWPose", place.dtype)
        (sure_x, x), (sure_y, y) = (row.max(dim=2) for row in rows)
        places.append(torch.stack([x, y], dim=2))
        scores.append(torch.minimum(sure_x, sure_y))
    # Of the area's width and height; as for `estimate`, areas count from the middle of the first pixel.
    shares = torch.cat(places) / (WHOLE_CELLS * crops.new_tensor(WHOLE_SIZE[::-1]))
    spots = areas[:, None, :2] + areas[:, None, 2:] * shares + 0.5
    return torch.cat([spots, torch.cat(scores)[:, :, None]], dim=2).cpu().numpy()


def peaks(heat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where heat maps (P,J,h,w) are highest, (P,J,2) x, y in cells from the middle of the first, and how high, (P,J).

    The highest cell, refined by one Newton step on the logarithm of the blurred map, as ViTPose does (DARK, Zhang et
    al., CVPR 2020; transformers, VitPoseImageProcessor), but never by more than a cell.
    """
    wide = heat.shape[3]
    highest = rearrange(heat, "p j h w -> p j (h w)").argmax(axis=2)
    column, row = highest % wide, highest // wide
    people, joints = np.indices(highest.shape)
    smooth = np.pad(np.log(_blur(heat).clip(0.001, 50)), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")

    def at(right: int, down: int) -> np.ndarray:
        return smooth[people, joints, row + 1 + down, column + 1 + right]

    slope = 0.5 * np.stack([at(1, 0) - at(-1, 0), at(0, 1) - at(0, -1)], axis=-1)
    across = 0.5 * (at(1, 1) - at(1, 0) - at(0, 1) + 2 * at(0, 0) - at(-1, 0) - at(0, -1) + at(-1, -1))
    along_x = at(1, 0) - 2 * at(0, 0) + at(-1, 0)
    along_y = at(0, 1) - 2 * at(0, 0) + at(0, -1)
    bend = np.stack([np.stack([along_x, across], -1), np.stack([across, along_y], -1)], -2)
    bend = bend + np.finfo(np.float32).eps * np.eye(2)
    step = np.einsum("pjab,pjb->pja", np.linalg.inv(bend), slope).clip(-1, 1)
    return np.stack([column, row], axis=-1) - step, heat[people, joints, row, column]


def _blur(heat: np.ndarray) -> np.ndarray:
    """The maps blurred, mirrored at their edges."""
    weights = np.exp(-0.5 * (np.arange(-BLUR_RADIUS, BLUR_RADIUS + 1) / BLUR_SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (2, 3):
        around = [(BLUR_RADIUS, BLUR_RADIUS) if i == axis else (0, 0) for i in range(4)]
        padded = np.pad(heat.astype(np.float64), around, mode="symmetric")
        heat = np.lib.stride_tricks.sliding_window_view(padded, 2 * BLUR_RADIUS + 1, axis=axis) @ weights
    return heat


def _with_pupils(person: Person) -> Person:
    """A whole body as OpenPose's files have it: without the parts of which no point was found."""

    def seen(part: np.ndarray | None) -> np.ndarray | None:
        return part if part is not None and part[:, 2].any() else None

    face = seen(person.face)
    if face is not None and person.body is not None:
        face = np.concatenate([face, person.body[[OPENPOSE_JOINTS.index(eye) for eye in PUPILS]]])
    return Person(person.body, seen(person.left_hand), seen(person.right_hand), face)


def _areas(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """What the estimator sees of boxes (P,4): left, top, width and height (P,4), in the aspect of `size` (h, w)."""
    middle, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    aspect = size[1] / size[0]
    wide = torch.maximum(sides[:, 0], sides[:, 1] * aspect) * BOX_MARGIN
    sides = torch.stack([wide, wide / aspect], dim=1)
    return torch.cat([middle - sides / 2, sides], dim=1)


def _crops(picture: Tensor, areas: Tensor, size: tuple[int, int], ends: bool = True) -> Tensor:
    """The areas (P,4) of a picture (1,3,H,W) as (P,3,height,width); black outside of the picture.

    The first and last sample lie on the area's edges, as ViTPose was trained (unbiased data processing, Huang et al.,
    CVPR 2020); without `ends` the last lies a step before, as DWPose was.
    """
    (high, wide), (height, width) = size, picture.shape[2:]
    last_x, last_y = (1, 1) if ends else ((wide - 1) / wide, (high - 1) / high)
    x = areas[:, :1] + areas[:, 2:3] * torch.linspace(0, last_x, wide, device=areas.device)
    y = areas[:, 1:2] + areas[:, 3:4] * torch.linspace(0, last_y, high, device=areas.device)
    x, y = 2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1
    count = len(areas)
    grid = torch.stack([x[:, None, :].expand(-1, high, -1), y[:, :, None].expand(-1, -1, wide)], dim=-1)
    return F.grid_sample(picture.expand(count, -1, -1, -1), grid, mode="bilinear", align_corners=True)


def _check(answer: Tensor, network: str, dtype: torch.dtype) -> None:
    """Numbers that are none must not pass for nobody."""
    if not torch.isfinite(answer).all():
        raise AnnotatorError(f"{network}'s answer in {dtype} has numbers that are not finite: run it in torch.float32")
