"""`EditPose` on a real host: it draws the people of its text, whoever wrote it, and those that are connected."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from graphs import picture

if TYPE_CHECKING:
    from hosting import Host

from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.keypoints import BODY_25_OF_OPENPOSE, Person
from zeroconv.annotators.pose import draw_people
from zeroconv.controlnet_core.errors import ZeroConvError


def points(count: int, height: int = 96, width: int = 128, seed: int = 0) -> np.ndarray:
    """Points (count,3) on a canvas, sure of themselves."""
    places = np.random.default_rng(seed).uniform(8, (width - 8, height - 8), (count, 2)).round(1)
    return np.concatenate([places, np.ones((count, 1))], axis=1)


def frame(*people: dict[str, np.ndarray], **canvas: int) -> dict[str, Any]:
    return {"people": [{name: part.reshape(-1).tolist() for name, part in one.items()} for one in people], **canvas}


def drawn(*parts: np.ndarray, height: int = 96, width: int = 128) -> torch.Tensor:
    """The hint of one person with these parts."""
    person = Person(*(part.astype(np.float32) for part in parts))
    return torch.from_numpy(draw_people([person], height, width))


BODY = points(18)
CANVAS = {"canvas_width": 128, "canvas_height": 96}
OPENPOSE = frame({"pose_keypoints_2d": BODY}, **CANVAS)


def test_the_text_is_drawn_and_given_on(host: Host):
    hint, keypoints = host.call("EditPose", pose=json.dumps(OPENPOSE))
    assert torch.equal(hint, drawn(BODY)[None])
    (one,) = keypoints
    assert {name: one[name] for name in CANVAS} == CANVAS
    np.testing.assert_allclose(one["people"][0]["pose_keypoints_2d"], BODY.reshape(-1), rtol=1e-6)


def test_a_file_of_cmu_lies_on_the_picture(host: Host):
    """BODY_25, and no canvas named (CMU openpose, doc/02_output.md)."""
    body = points(25)
    text = json.dumps({"version": 1.3, **frame({"pose_keypoints_2d": body, "face_keypoints_2d": np.zeros((0, 3))})})
    hint, keypoints = host.call("EditPose", pose=text, image=picture(1, height=96, width=128))
    assert torch.equal(hint, drawn(body[list(BODY_25_OF_OPENPOSE)])[None])
    assert len(keypoints[0]["people"][0]["pose_keypoints_2d"]) == 54
    with pytest.raises(AnnotatorError, match="on no canvas.*connect the picture that they were found in"):
        host.call("EditPose", pose=text)


def test_a_file_of_dwpose_keeps_its_hands_and_faces(host: Host):
    parts = {
        "pose_keypoints_2d": BODY,
        "hand_left_keypoints_2d": points(21, seed=1),
        "hand_right_keypoints_2d": points(21, seed=2),
        "face_keypoints_2d": points(68, seed=3),
    }
    hint, keypoints = host.call("EditPose", pose=json.dumps([frame(parts, **CANVAS)]))
    assert torch.equal(hint[0], drawn(*parts.values()))
    for name, part in parts.items():
        np.testing.assert_allclose(keypoints[0]["people"][0][name], part.reshape(-1), rtol=1e-6)


def test_the_hint_has_the_pictures_size_and_so_have_the_keypoints(host: Host):
    image = picture(1, height=192, width=256)
    before = image.clone()
    hint, keypoints = host.call("EditPose", pose=json.dumps(OPENPOSE), image=image)
    assert torch.equal(hint[0], drawn(BODY * (2, 2, 1), height=192, width=256))
    assert (keypoints[0]["canvas_width"], keypoints[0]["canvas_height"]) == (256, 192)
    assert torch.equal(image, before)


@pytest.mark.parametrize("text", ["", " \n"])
def test_without_text_the_connected_people_are_drawn(host: Host, text: str):
    given = [OPENPOSE]
    before = deepcopy(given)
    hint, keypoints = host.call("EditPose", pose=text, pose_keypoints=given)
    assert torch.equal(hint[0], drawn(BODY))
    other = frame({"pose_keypoints_2d": points(18, seed=5)}, **CANVAS)
    edited, _ = host.call("EditPose", pose=json.dumps(other), pose_keypoints=given)
    assert torch.equal(edited[0], drawn(points(18, seed=5)))
    again, _ = host.call("EditPose", pose="", pose_keypoints=keypoints)
    assert torch.equal(again, hint)  # what it gives it takes
    assert given == before


def test_one_frame_serves_all_pictures_and_each_picture_may_have_its_own(host: Host):
    images = picture(1, batch=2, height=96, width=128)
    other = frame({"pose_keypoints_2d": points(18, seed=5)}, **CANVAS)
    hint, keypoints = host.call("EditPose", pose=json.dumps(OPENPOSE), image=images)
    assert torch.equal(hint[0], hint[1]) and len(keypoints) == 2
    hint, keypoints = host.call("EditPose", pose=json.dumps([OPENPOSE, other]), image=images)
    assert torch.equal(hint, torch.stack([drawn(BODY), drawn(points(18, seed=5))]))
    assert len(keypoints) == 2
    with pytest.raises(AnnotatorError, match="2 images came with 3 frames of people"):
        host.call("EditPose", pose=json.dumps([OPENPOSE] * 3), image=images)


def test_nobody_is_a_black_hint(host: Host):
    hint, keypoints = host.call("EditPose", pose="")
    assert hint.shape == (1, 512, 512, 3) and not hint.any()
    assert keypoints == [{"people": [], "canvas_width": 512, "canvas_height": 512}]
    hint, _ = host.call("EditPose", pose="[]", image=picture(1, height=96, width=128))
    assert hint.shape == (1, 96, 128, 3) and not hint.any()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nobody", "pose is text and no JSON"),
        ("3", "pose is int; expected frames"),
        ('{"persons": []}', "has keys 'persons'; a frame of it has 'people'"),
        (json.dumps(frame({"pose_keypoints_2d": points(5)}, **CANVAS)), "has 15 numbers; expected x, y and"),
        (json.dumps({**OPENPOSE, "canvas_width": 10**6}), "1000000x96, expected no side over 16384"),
        (json.dumps({**OPENPOSE, "canvas_height": -1}), "canvas_height -1"),
        ('{"people": [], "canvas_height": 1e999, "canvas_width": 5}', "canvas_height inf"),
        (json.dumps({"people": [{}] * 1001, **CANVAS}), "has 1001 people, expected at most 1000"),
    ],
)
def test_a_text_that_is_no_pose_is_refused_in_a_sentence(host: Host, text: str, says: str):
    with pytest.raises((AnnotatorError, ZeroConvError), match=says):
        host.call("EditPose", pose=text)
