"""Whole bodies by DWPose: planted answers, a seeded TorchScript against the published steps, programs that are refused.

ZEROCONV_CONTROLNET_AUX may name a checkout of Fannovel16/comfyui_controlnet_aux, whose own steps are then run.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from skimage.data import astronaut
from torch import Tensor, nn

from zeroconv.annotators import pipeline
from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.keypoints import OPENPOSE_JOINTS, read_frame
from zeroconv.annotators.networks import NETWORKS, checksum, scripted
from zeroconv.annotators.networks.people import MEAN, STD, estimate_whole, find_whole
from zeroconv.annotators.pose import draw_people, dwpose

from . import scripted_tiny
from .seeded import record
from .test_pose_estimation import Planted

(ENTRY,) = [network for network in NETWORKS if network.name == "whole_pose_estimator"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted_tiny.whole_pose(tmp_path_factory.mktemp("dwpose"))


@pytest.fixture(scope="module")
def network(file: Path) -> nn.Module:
    return scripted.build(file)


def photograph() -> np.ndarray:
    return astronaut().astype(np.float32) / 255


def tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def boxes(count: int) -> Tensor:
    """Boxes in a picture of 512x512, tall and wide ones, some beyond its edges."""
    places = np.random.default_rng(3).uniform(-20, 380, (count, 2))
    sides = np.random.default_rng(4).uniform(40, 260, (count, 2))
    return torch.from_numpy(np.concatenate([places, places + sides], axis=1)).float()


class Rows(nn.Module):
    """In place of DWPose: points of all people at the same cells, and how sure it is."""

    def __init__(self, x: np.ndarray, y: np.ndarray, sure: np.ndarray) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.across, self.down = np.zeros((5, 133, 576), np.float32), np.zeros((5, 133, 768), np.float32)
        self.across[:, np.arange(133), x] = sure
        self.down[:, np.arange(133), y] = sure + 0.1
        self.seen: list[Tensor] = []

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(crops)
        return torch.from_numpy(self.across), torch.from_numpy(self.down)


def somebody(people: int = 1) -> Planted:
    """A detector that sees people of 72x96 in the middle of whatever it is shown as 256x256."""
    finds = SimpleNamespace(label2id={"car": 0, "person": 1})
    box = [0.5, 0.5, 72 / 256, 96 / 256]
    return Planted(
        finds, logits=torch.logit(torch.tensor([[[0.1, 0.9]] * people])), pred_boxes=torch.tensor([[box] * people])
    )


def planted() -> tuple[Rows, np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x, y = random.integers(0, 576, 133), random.integers(0, 768, 133)
    sure = np.full(133, 0.9, np.float32)
    return Rows(x, y, sure), x, y, sure


# -- planted answers -----------------------------------------------------------------------------------------------


def test_points_land_where_the_cells_are_and_become_a_body_hands_and_a_face():
    rows, x, y, _ = planted()
    image = np.random.default_rng(0).random((256, 256, 3), np.float32)
    before = image.copy()
    hint, frame = dwpose(somebody(), rows, image)
    np.testing.assert_array_equal(image, before)
    assert rows.seen[0].shape == (5, 3, 384, 288)
    assert (rows.seen[0][1:] == 0).all() and rows.seen[0][0].std() > 0.1
    # The box of 72x96 at (92, 80) is seen with a quarter more, 90x120 at (83, 68); a cell is half a pixel of 288x384.
    spots = np.stack([83 + 90 * (x / 2) / 288 + 0.5, 68 + 120 * (y / 2) / 384 + 0.5, np.ones(133)], axis=1)
    (person,) = frame["people"]
    parts = {name: np.reshape(part, (-1, 3)) for name, part in person.items()}
    body = parts["pose_keypoints_2d"]
    np.testing.assert_allclose(body[OPENPOSE_JOINTS.index("nose")], spots[0], atol=1e-3)
    np.testing.assert_allclose(body[OPENPOSE_JOINTS.index("left_ankle")], spots[15], atol=1e-3)
    np.testing.assert_allclose(body[OPENPOSE_JOINTS.index("neck")], spots[5:7].mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(parts["hand_left_keypoints_2d"], spots[91:112], atol=1e-3)
    np.testing.assert_allclose(parts["hand_right_keypoints_2d"], spots[112:133], atol=1e-3)
    # 68 of its own, and the eyes, right and left, for OpenPose's pupils.
    np.testing.assert_allclose(parts["face_keypoints_2d"], [*spots[23:91], spots[2], spots[1]], atol=1e-3)
    np.testing.assert_array_equal(hint, draw_people(read_frame(frame, 256, 256), 256, 256))


def test_the_less_sure_side_decides_and_parts_without_points_are_none():
    rows, *_ = planted()
    rows.across[:, 91:112] *= 0.3  # 0.27, where down it is sure enough
    rows.down[:, 23:91] *= 0.29
    rows.across[:, 112] *= 0.3
    (person,) = find_whole(somebody(), rows, np.zeros((256, 256, 3), np.float32), 0.3, 0.3)
    assert person.left_hand is None and person.face is None
    assert person.right_hand is not None
    assert person.right_hand[:, 2].tolist() == [0.0] + [pytest.approx(0.9)] * 20
    rows.across *= 0
    assert find_whole(somebody(), rows, np.zeros((256, 256, 3), np.float32), 0.3, 0.3) == []


@pytest.mark.parametrize("part", ["body", "hands", "face"])
def test_switches_leave_parts_out_of_the_drawing_alone(part: str):
    rows, *_ = planted()
    image = np.zeros((256, 256, 3), np.float32)
    whole, frame = dwpose(somebody(), rows, image)
    hint, same = dwpose(somebody(), rows, image, **{part: False})
    assert same == frame
    assert (hint != whole).any() and hint.any()
    rest, _ = dwpose(somebody(), rows, image, **{other: other == part for other in ("body", "hands", "face")})
    assert rest.any() and (rest != whole).any()


@pytest.mark.parametrize("people", [1, 5, 7])
def test_people_are_seen_by_fives(people: int):
    rows, *_ = planted()
    found = find_whole(somebody(people), rows, np.zeros((256, 256, 3), np.float32), 0.3, 0.3)
    assert len(found) == people
    assert [len(crops) for crops in rows.seen] == [5] * -(-people // 5)


def test_nobody_gives_a_black_hint_and_no_people():
    rows, *_ = planted()
    hint, frame = dwpose(somebody(), rows, np.ones((128, 64, 3), np.float32), detection_threshold=0.95)
    assert not hint.any() and hint.shape == (128, 64, 3) and hint.dtype == np.float32
    assert frame == {"people": [], "canvas_width": 64, "canvas_height": 128}
    assert rows.seen == []


def test_numbers_that_are_none_do_not_pass_for_nobody():
    rows, *_ = planted()
    rows.down *= np.float32("nan")
    with pytest.raises(AnnotatorError, match=r"DWPose's answer in torch.float32 has numbers that are not finite"):
        dwpose(somebody(), rows, np.zeros((64, 64, 3), np.float32))


# -- a seeded program against the published steps ------------------------------------------------------------------


def by_formula(network: nn.Module, image: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points (133,2) and scores (133,) of one box, as open-mmlab/mmpose crops, asks and decodes (TopdownAffine)."""
    centre, sides = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) * 1.25
    sides = np.maximum(sides, sides[::-1] * (288 / 384, 384 / 288))
    scale = 288 / sides[0]
    warp = np.array([[scale, 0, 144 - scale * centre[0]], [0, scale, 192 - scale * centre[1]]])
    crop = (cv2.warpAffine(image, warp, (288, 384), flags=cv2.INTER_LINEAR) - MEAN) / np.array(STD)
    values = torch.from_numpy(crop).float().permute(2, 0, 1)[None]
    with torch.inference_mode():
        across, down = (row[0].numpy() for row in network(torch.cat([values, torch.zeros(4, 3, 384, 288)])))
    cells = np.stack([across.argmax(1), down.argmax(1)], axis=1)
    points = cells / 2 / (288, 384) * sides + centre - sides / 2
    return points, np.minimum(across.max(1), down.max(1))


def test_a_seeded_program_answers_as_by_the_published_steps(network: nn.Module):
    image, wanted = photograph(), boxes(7)
    with torch.inference_mode():
        ours = estimate_whole(network, tensor(image), wanted)
    assert ours.shape == (7, 133, 3) and ours.dtype == np.float32
    for found, box in zip(ours, wanted.double().numpy(), strict=True):
        points, scores = by_formula(network, image, box)
        np.testing.assert_allclose(found[:, 2], scores, atol=5e-3)
        # Rows of cells are flat near their tops here: OpenCV's crop is of 1/32 pixel.
        off = np.abs(found[:, :2] - 0.5 - points).max(axis=1)
        assert np.median(off) < 1e-3 and (off < 0.05 * (box[2:] - box[:2]).max()).mean() > 0.97
    assert ours[:, :, 2].std() > 0.05 and np.ptp(ours[0, :, 0]) > 10


@pytest.mark.skipif("ZEROCONV_CONTROLNET_AUX" not in os.environ, reason="ZEROCONV_CONTROLNET_AUX names no checkout")
def test_a_seeded_program_answers_as_in_comfyui_controlnet_aux(network: nn.Module):
    steps = Path(os.environ["ZEROCONV_CONTROLNET_AUX"]) / "src/custom_controlnet_aux/dwpose/dw_torchscript/jit_pose.py"
    spec = importlib.util.spec_from_file_location("jit_pose", steps)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wanted = boxes(7)
    with torch.inference_mode():
        points, scores = module.inference_pose(network, wanted.numpy(), astronaut())
        ours = estimate_whole(network, tensor(photograph()), wanted)
    np.testing.assert_allclose(ours[:, :, 2], scores, atol=2e-2)
    off = np.abs(ours[:, :, :2] - 0.5 - points).max(axis=2)
    assert np.median(off) < 1e-3 and (off < 5).mean() > 0.95


@pytest.mark.parametrize(
    "place", [pytest.param({"dtype": torch.bfloat16}), pytest.param({"device": "cuda"}, marks=pytest.mark.gpu)], ids=str
)
def test_points_are_found_where_the_network_is(place: dict[str, Any], file: Path, network: nn.Module):
    image, wanted = tensor(photograph()), boxes(3)
    with torch.inference_mode():
        moved = estimate_whole(scripted.build(file).to(**place), image, wanted)
        here = estimate_whole(network, image, wanted)
    assert np.abs(moved[:, :, 2] - here[:, :, 2]).mean() < 0.1 * here[:, :, 2].std()


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 90, 3), (90, 1, 3), (64, 64, 1), (50, 60, 4)], ids=str)
def test_any_picture_gives_a_hint(detector: Any, network: nn.Module, shape: tuple[int, ...]):
    picture = np.random.default_rng(1).random(shape).astype(np.float32)
    parameters = {"detection_threshold": 0.0, "keypoint_threshold": 0.0}
    hints = [
        pipeline.annotate(record("dwpose"), picture, networks=(detector, network), parameters=parameters)
        for _ in range(2)
    ]
    (hint, frame), (again, same) = hints
    assert hint.shape == (*shape[:2], 3) and hint.dtype == np.float32 and frame is not None
    np.testing.assert_array_equal(hint, again)
    assert frame == same and frame["canvas_width"] == shape[1]


# -- programs ------------------------------------------------------------------------------------------------------


def test_a_program_other_than_the_known_one_is_never_run(file: Path):
    assert ENTRY.files[0].program and ENTRY.files[0].sha256 is not None
    with pytest.raises(
        AnnotatorError, match=f"{file.name} is a program with checksum {checksum(file)}, and .* not run"
    ):
        ENTRY.load([file])
    known = replace(ENTRY, files=(replace(ENTRY.files[0], sha256=checksum(file)),))
    assert isinstance(known.load([file]), torch.jit.ScriptModule)


def test_every_program_has_a_checksum():
    programs = [file for network in NETWORKS for file in network.files if ".torchscript" in file.name or file.program]
    assert programs
    assert all(file.program and file.sha256 for file in programs)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>", b"PK\x03\x04 and no more"])
def test_files_that_are_no_programs_are_named(content: bytes, tmp_path: Path):
    path = tmp_path / "a.torchscript.pt"
    path.write_bytes(content)
    with pytest.raises(AnnotatorError, match=r"a.torchscript.pt cannot be read as TorchScript \(.+delete it, so that"):
        scripted.build(path)
