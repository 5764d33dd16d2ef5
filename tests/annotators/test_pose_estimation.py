"""People in a picture: small random RT-DETR and ViTPose against transformers' own processors, and planted answers."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from skimage.data import astronaut
from torch import nn

from zeroconv.annotators import ANNOTATORS, pipeline
from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.keypoints import COCO_JOINTS, OPENPOSE_JOINTS, coco_to_openpose
from zeroconv.annotators.networks import NETWORKS
from zeroconv.annotators.networks.people import _areas, _crops, build_estimator, detect, estimate, peaks
from zeroconv.annotators.pose import COLOURS, draw_pose, human_pose

from . import pretrained_tiny as tiny

transformers = pytest.importorskip("transformers")
reference = pytest.importorskip("transformers.models.vitpose.image_processing_vitpose")
(RECORD,) = (annotator for annotator in ANNOTATORS if annotator.name == "human_pose")


def photograph() -> np.ndarray:
    return astronaut().astype(np.float32) / 255


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def test_the_lists_know_both_networks_and_the_functions_defaults():
    assert RECORD.networks == ("person_detector", "pose_estimator") and RECORD.gives_pose
    entries = [next(network for network in NETWORKS if network.name == name) for name in RECORD.networks]
    assert [entry.build for entry in entries] == [
        "people:build_detector",
        "people:build_estimator",
    ]
    for entry in entries:
        assert [file.name for file in entry.files] == ["config.json", "model.safetensors"]
        assert entry.licence == "Apache-2.0"
    defaults = {"detection_threshold": 0.3, "keypoint_threshold": 0.3, "style": "openpose", "xinsir_sticks": False}
    assert {parameter.name: parameter.default for parameter in RECORD.parameters} == defaults
    signature = inspect.signature(human_pose).parameters
    assert {name: signature[name].default for name in defaults} == defaults


# -- against transformers' own processors ----------------------------------------------------------------------------


def test_boxes_are_those_of_the_published_processor(detector: Any):
    image = photograph()[:448, :384]
    seen: list[torch.Tensor] = []
    hook = detector.register_forward_pre_hook(lambda _, values: seen.append(values[0]))
    with torch.no_grad():
        ours = detect(detector, tensor(image), 0.0)
    hook.remove()
    processor = transformers.RTDetrImageProcessor()
    squeezed = processor((image * 255).astype(np.uint8), return_tensors="pt")["pixel_values"]
    assert squeezed.shape == (1, 3, 640, 640) and squeezed.std() > 0.1
    # Theirs is rounded to bytes on the way, twice.
    torch.testing.assert_close(seen[0], squeezed, atol=1.01 / 255, rtol=0)
    with torch.no_grad():
        outputs, moved = detector(seen[0]), detector(1 - seen[0])
    # The picture decides, not the biases alone.
    assert (outputs.pred_boxes - moved.pred_boxes).abs().max() > 0.05 * outputs.pred_boxes.abs().max()
    (expected,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[image.shape[:2]])
    assert (expected["labels"] == 0).all() and expected["scores"].unique().numel() == 12
    assert ours.shape == (12, 4) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected["boxes"], atol=1e-3, rtol=1e-5)
    with torch.no_grad():
        surest = detect(detector, tensor(image), float(expected["scores"][4:6].mean()))
    torch.testing.assert_close(surest, ours[:5])


def test_joints_are_those_of_the_published_processor(estimator: Any):
    image = photograph()
    boxes = np.array([[150.0, 120.0, 290.0, 340.0], [200.0, 60.0, 300.0, 160.0]])
    sides = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    seen: list[torch.Tensor] = []
    hook = estimator.register_forward_pre_hook(lambda _, values: seen.append(values[0]))
    with torch.no_grad():
        ours = estimate(estimator, tensor(image), torch.from_numpy(boxes).float())
    hook.remove()
    processor = transformers.VitPoseImageProcessor(size={"height": 64, "width": 48})
    crops = processor(image, boxes=[sides], do_rescale=False, return_tensors="pt", input_data_format="channels_last")
    torch.testing.assert_close(seen[0], crops["pixel_values"].float(), atol=1e-3, rtol=0)
    with torch.no_grad():
        outputs, moved = estimator(seen[0]), estimator(seen[0].flip(2))
    assert (outputs.heatmaps - moved.heatmaps).abs().max() > 0.05 * outputs.heatmaps.abs().max()
    (expected,) = processor.post_process_pose_estimation(outputs, boxes=[sides])
    assert ours.shape == (2, 17, 3) and ours.dtype == np.float32
    # Maps that are flat at their peak throw theirs far off, ours by a cell at most; below 0 theirs does not look.
    coarse, scores = reference.get_keypoint_predictions(outputs.heatmaps.numpy())
    steps = reference.post_dark_unbiased_data_processing(coarse.copy(), outputs.heatmaps.numpy(), 11) - coarse
    near = (np.abs(steps).max(axis=2) <= 1) & (scores[:, :, 0] > 0)
    assert near.sum() >= 28
    for person, theirs, same in zip(ours, expected, near, strict=True):
        np.testing.assert_allclose(person[:, 2], theirs["scores"], rtol=1e-5)
        # Theirs count from the middle of the first pixel, ours from its edge.
        np.testing.assert_allclose(person[same, :2] - 0.5, theirs["keypoints"][same], atol=0.01)


def test_crops_are_those_of_the_published_processor():
    image = photograph()
    boxes = np.array([[150.0, 120.0, 290.0, 340.0], [200.0, 200.0, 260.0, 220.0], [5.0, 300.0, 200.0, 505.0]])
    sides = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    processor = transformers.VitPoseImageProcessor(do_rescale=False, do_normalize=False)
    theirs = processor(image, boxes=[sides], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    areas = _areas(torch.from_numpy(boxes).float(), (256, 192))
    ours = _crops(tensor(image), areas, (256, 192))
    assert ours.shape == (3, 3, 256, 192)
    np.testing.assert_allclose(ours[:2], theirs[:2], atol=1e-3)
    # Where the picture ends, ours fades out over one pixel, as OpenCV's warp with which ViTPose was trained.
    assert ((ours[2] - theirs[2]).abs() > 1e-3).float().mean() < 0.02
    assert (ours[2] == 0).float().mean() > 0.1


def planted(people: int, seed: int = 0, height: int = 64, width: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Heat maps (P,17,h,w) with one Gaussian each, as ViTPose was trained to give, and where: (P,17,2) in cells."""
    generator = np.random.default_rng(seed)
    places = generator.uniform([4, 4], [width - 5, height - 5], (people, 17, 2))
    rows, columns = np.mgrid[:height, :width]
    x, y = places[:, :, 0, None, None], places[:, :, 1, None, None]
    heat = 0.9 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 2.0**2))
    return heat.astype(np.float32), places


def test_peaks_are_found_between_the_cells_as_published():
    heat, places = planted(3)
    found, scores = peaks(heat)
    assert found.shape == (3, 17, 2) and scores.shape == (3, 17)
    assert np.abs(found - places).max() < 0.05
    np.testing.assert_array_equal(scores, heat.max(axis=(2, 3)))
    coarse, _ = reference.get_keypoint_predictions(heat)
    theirs = reference.post_dark_unbiased_data_processing(coarse.copy(), heat, kernel=11)
    np.testing.assert_allclose(found, theirs, atol=1e-3)
    assert np.abs(found - coarse).max() > 0.3


def test_peaks_at_the_edge_and_flat_maps_stay_where_they_are():
    heat = np.zeros((1, 3, 8, 6), np.float32)
    heat[0, 1, 0, 0] = 1.0
    heat[0, 2, 7, 5] = 1.0
    found, scores = peaks(heat)
    assert np.isfinite(found).all() and scores.tolist() == [[0.0, 1.0, 1.0]]
    assert np.abs(found[0] - [[0, 0], [0, 0], [5, 7]]).max() <= 1


# -- the whole way ---------------------------------------------------------------------------------------------------


class Planted(nn.Module):
    """Stands for a network: says what it was told to, and remembers what it saw."""

    def __init__(self, config: Any, **answer: torch.Tensor):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1))
        self.config, self.answer, self.seen = config, SimpleNamespace(**answer), []

    def forward(self, values: torch.Tensor) -> Any:
        self.seen.append(values)
        return self.answer


def scene(scores: list[float], boxes: list[list[float]], heat: np.ndarray) -> tuple[Planted, Planted]:
    """A detector that sees people in these boxes (relative centre and size), and an estimator with these heat maps."""
    logits = torch.logit(torch.tensor([[[0.9, score] for score in scores]]))
    finds = SimpleNamespace(label2id={"car": 0, "person": 1})
    sees = SimpleNamespace(backbone_config=SimpleNamespace(image_size=[256, 192]))
    return Planted(finds, logits=logits, pred_boxes=torch.tensor([boxes])), Planted(sees, heatmaps=torch.tensor(heat))


def test_joints_land_where_the_heat_is():
    heat, places = planted(2)
    heat[1, COCO_JOINTS.index("left_wrist")] *= 0.3
    # A box of 96x160 pixels at (128, 160) in a picture of 320x256, and one of 30x80, that is widened to 60x80.
    boxes = [[0.5, 0.5, 30 / 256, 80 / 320], [0.9, 0.5, 0.1, 0.1], [0.5, 0.5, 96 / 256, 160 / 320]]
    finds, sees = scene([0.8, 0.2, 0.9], boxes, heat)
    image = np.random.default_rng(0).random((320, 256, 3), np.float32)
    before = image.copy()
    hint, frame = human_pose(finds, sees, image)
    assert sees.seen[0].shape == (2, 3, 256, 192) and finds.seen[0].shape == (1, 3, 640, 640)
    areas = [(128 - 75, 160 - 100, 150, 200), (128 - 37.5, 160 - 50, 75, 100)]
    assert frame["canvas_width"] == 256 and frame["canvas_height"] == 320 and len(frame["people"]) == 2
    bodies = []
    for person, (left, top, wide, high), cells in zip(frame["people"], areas, places, strict=True):
        body = np.reshape(person["pose_keypoints_2d"], (18, 3))
        expected = np.stack([left + wide * cells[:, 0] / 47 + 0.5, top + high * cells[:, 1] / 63 + 0.5], axis=1)
        for name, place in zip(COCO_JOINTS, expected, strict=True):
            joint = body[OPENPOSE_JOINTS.index(name)]
            if len(bodies) == 1 and name == "left_wrist":
                assert joint.tolist() == [0, 0, 0]  # 0.27 is below the threshold of 0.3
            else:
                np.testing.assert_allclose(joint, [*place, 1], atol=0.2)
        np.testing.assert_allclose(body[1, :2], (body[2, :2] + body[5, :2]) / 2, atol=1e-3)
        assert person["face_keypoints_2d"] is None
        bodies.append(body)
    np.testing.assert_array_equal(hint, draw_pose(bodies, 320, 256))
    x, y = bodies[1][0, :2]
    np.testing.assert_allclose(hint[int(y), int(x)] * 255, COLOURS[0], atol=1e-3)
    np.testing.assert_array_equal(image, before)


def test_thresholds_leave_out_people_and_joints():
    heat, _ = planted(1)
    finds, sees = scene([0.8, 0.2], [[0.5, 0.5, 0.5, 0.5], [0.3, 0.3, 0.2, 0.2]], heat)
    image = np.zeros((64, 64, 3), np.float32)
    assert len(human_pose(finds, sees, image)[1]["people"]) == 1
    finds, sees = scene([0.8, 0.2], [[0.5, 0.5, 0.5, 0.5], [0.3, 0.3, 0.2, 0.2]], np.repeat(heat, 2, axis=0))
    assert len(human_pose(finds, sees, image, detection_threshold=0.1)[1]["people"]) == 2
    hint, frame = human_pose(finds, sees, image, 0.1, keypoint_threshold=0.95)
    assert frame["people"] == [] and hint.max() == 0


def test_nobody_gives_a_black_hint_and_no_people():
    finds, sees = scene([0.1], [[0.5, 0.5, 0.5, 0.5]], planted(1)[0])
    hint, frame = human_pose(finds, sees, np.ones((128, 64, 3), np.float32))
    assert hint.shape == (128, 64, 3) and hint.dtype == np.float32 and hint.max() == 0
    assert frame == {"people": [], "canvas_width": 64, "canvas_height": 128}
    assert sees.seen == []


def test_numbers_that_are_none_do_not_pass_for_nobody():
    finds, sees = scene([float("nan")], [[0.5, 0.5, 0.5, 0.5]], planted(1)[0])
    image = np.zeros((64, 64, 3), np.float32)
    with pytest.raises(AnnotatorError, match=r"RT-DETR's answer in torch.float32 has numbers that are not finite"):
        human_pose(finds, sees, image)
    finds, sees = scene([0.9], [[0.5, 0.5, 0.5, 0.5]], planted(1)[0] * np.float32("nan"))
    with pytest.raises(AnnotatorError, match=r"ViTPose's answer in torch.float32 has numbers that are not finite"):
        human_pose(finds, sees, image)


def test_the_pipeline_shows_the_picture_as_it_is_and_gives_the_frame_in_pixels_of_the_hint():
    """Without a margin: reflected legs would be somebody's."""
    heat, places = planted(1)
    finds, sees = scene([0.9], [[0.5, 0.5, 48 / 150, 64 / 100]], heat)
    hint, frame = pipeline.annotate(RECORD, np.zeros((100, 150, 3), np.uint8), networks=(finds, sees))
    assert hint.shape == (100, 150, 3) and frame is not None
    assert (frame["canvas_width"], frame["canvas_height"]) == (150, 100)
    x = 75 - 30 + 60 * places[0, 0, 0] / 47 + 0.5
    assert frame["people"][0]["pose_keypoints_2d"][0] == pytest.approx(x, abs=0.2)


def test_the_whole_way_on_a_photograph(detector: Any, estimator: Any):
    image = photograph()
    before = image.copy()
    boxes = detect(detector, tensor(image), 0.0)
    joints = estimate(estimator, tensor(image), boxes)
    threshold = float(np.median(joints[:, :, 2]))
    joints[joints[:, :, 2] <= threshold] = 0
    expected = [coco_to_openpose(person) for person in joints if person[:, 2].any()]
    assert 0 < len(expected)
    for style in ("openpose", "coco17"):
        own = {"detection_threshold": 0.0, "keypoint_threshold": threshold, "style": style}
        hint, frame = pipeline.annotate(RECORD, image, networks=(detector, estimator), parameters=own)
        assert hint.shape == (512, 512, 3) and 0 < hint.max() <= 1 and frame is not None
        assert len(frame["people"]) == len(expected)
        for person, body in zip(frame["people"], expected, strict=True):
            numbers = np.reshape(person["pose_keypoints_2d"], (18, 3))
            np.testing.assert_allclose(numbers[:, :2], body[:, :2], rtol=1e-5)
        again, _ = pipeline.annotate(RECORD, image, networks=(detector, estimator), parameters=own)
        np.testing.assert_array_equal(hint, again)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (90, 1), (64, 64, 1), (50, 60, 4)])
def test_any_picture_gives_a_hint(detector: Any, estimator: Any, shape: tuple[int, ...]):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    own = {"detection_threshold": 0.0, "keypoint_threshold": 0.0}
    hint, frame = pipeline.annotate(RECORD, image, networks=(detector, estimator), parameters=own)
    assert hint.shape == (*shape[:2], 3) and frame is not None and frame["canvas_width"] == shape[1]
    json.dumps(frame)


def test_the_estimator_runs_in_its_own_dtype(estimator: Any, folders: tuple[Path, Path]):
    half = build_estimator(*tiny.files(folders[1])).to(torch.bfloat16)
    boxes = torch.tensor([[150.0, 120.0, 290.0, 340.0]])
    with torch.no_grad():
        full, less = (estimate(network, tensor(photograph()), boxes) for network in (estimator, half))
    assert less.dtype == np.float32
    assert 0 < np.abs(full[:, :, 2] - less[:, :, 2]).max() < 0.05 * np.abs(full[:, :, 2]).max()
