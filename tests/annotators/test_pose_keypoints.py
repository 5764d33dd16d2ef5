"""POSE_KEYPOINT frames are read as they come from other packs, and drawn as the published drawing functions draw."""

from __future__ import annotations

import colorsys
import copy
import json
import sys
import types
from typing import Any

import numpy as np
import pytest

from zeroconv.annotators import ANNOTATORS, pipeline
from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.keypoints import (
    COCO_JOINTS,
    OPENPOSE_JOINTS,
    Person,
    canvas_of,
    coco_to_openpose,
    openpose_to_coco,
    read_frame,
    read_frames,
    write_frame,
)
from zeroconv.annotators.pose import COCO_COLOURS, COCO_LIMBS, FINGERS, draw_people, pose

PICTURE = np.zeros((512, 512, 3), np.float32)
(RECORD,) = (annotator for annotator in ANNOTATORS if annotator.name == "pose")


def points(count: int, seed: int = 0, low: float = 20.0, high: float = 490.0) -> np.ndarray:
    """(count,3) points, all there."""
    generator = np.random.default_rng(seed)
    return np.concatenate([generator.uniform(low, high, (count, 2)), np.ones((count, 1))], axis=1)


def frame_of(canvas: int = 512, **parts: Any) -> dict[str, Any]:
    return {"people": [parts], "canvas_width": canvas, "canvas_height": canvas}


# -- reading ---------------------------------------------------------------------------------------------------------


def test_pixels_are_scaled_from_the_canvas_to_the_picture():
    body = points(18)
    (person,) = read_frame(frame_of(pose_keypoints_2d=body.reshape(-1).tolist()), 256, 1024)
    assert person.body is not None and person.body.shape == (18, 3) and person.body.dtype == np.float32
    np.testing.assert_allclose(person.body, body * [2, 0.5, 1], rtol=1e-6)
    assert person.left_hand is None and person.right_hand is None and person.face is None


def test_shares_of_the_canvas_need_no_canvas():
    body = points(18, low=0.1, high=0.9)
    frame = {"people": [{"pose_keypoints_2d": body.reshape(-1).tolist()}]}
    (person,) = read_frame(frame, 100, 200)
    np.testing.assert_allclose(person.body, body * [200, 100, 1], rtol=1e-6)


def test_most_joints_say_whether_all_are_shares_or_pixels():
    shares = points(18, low=0.1, high=0.9)
    shares[10] = (0.5, 1.04, 1)  # an ankle below the picture
    (person,) = read_frame(frame_of(pose_keypoints_2d=shares.reshape(-1).tolist()), 100, 200)
    np.testing.assert_allclose(person.body, shares * [200, 100, 1], rtol=1e-6)
    pixels = points(18)
    pixels[4, :2] = (0.3, 0.9)  # a wrist in the corner
    (person,) = read_frame(frame_of(pose_keypoints_2d=pixels.reshape(-1).tolist()), 512, 512)
    np.testing.assert_allclose(person.body, pixels, rtol=1e-6)
    # People apart in one frame: shares of one are shares of all, and 300 of them are a mistake.
    shares[4, 0] = 300
    with pytest.raises(AnnotatorError, match=r"a joint at \(300, 0\.\d+\), far off its canvas of 1x1"):
        read_frame(frame_of(pose_keypoints_2d=shares.reshape(-1).tolist()), 512, 512)


def test_joints_of_little_confidence_are_not_there():
    """Raw scores, as networks and the host's own extractor give them."""
    body = points(18)
    body[:, 2] = [0.9, 0.02, 0.3, 0.29, 1.0, 3.5, *[0.8] * 12]
    frame = frame_of(pose_keypoints_2d=body.reshape(-1).tolist())
    for threshold, seen in ((0.3, body[:, 2] >= 0.3), (0.0, body[:, 2] > 0), (1.0, body[:, 2] >= 1)):
        (person,) = read_frame(frame, 512, 512, threshold)
        assert person.body is not None
        np.testing.assert_array_equal(person.body[:, 2] > 0, seen)
        expected = np.where(seen[:, None], np.concatenate([body[:, :2], np.ones((18, 1))], axis=1), 0)
        hint = pose(PICTURE, frame, threshold=threshold)
        np.testing.assert_array_equal(hint, pose(PICTURE, frame_of(pose_keypoints_2d=expected.reshape(-1).tolist())))
    assert (pose(PICTURE, frame) != pose(PICTURE, frame, threshold=0.0)).any()
    ones = frame_of(pose_keypoints_2d=points(18).reshape(-1).tolist())
    for threshold in (0.0, 1.0):
        np.testing.assert_array_equal(pose(PICTURE, ones), pose(PICTURE, ones, threshold=threshold))


def test_joints_that_are_none_are_missing_one_by_one_and_in_triples():
    body = points(18)
    body[[3, 7]] = 0
    triples: list[Any] = [None if not joint[2] else joint.tolist() for joint in body]
    flat: list[Any] = [number for joint in triples for number in joint or [None, None, 1.0]]
    for numbers in (triples, flat):
        (person,) = read_frame(frame_of(pose_keypoints_2d=numbers), 512, 512)
        np.testing.assert_allclose(person.body, body, rtol=1e-6)
    (person,) = read_frame(frame_of(pose_keypoints_2d=[None] * 54), 512, 512)
    assert person.body is not None and not person.body.any()


@pytest.mark.parametrize("size", [133, 134])
def test_whole_bodies_come_apart(size: int):
    """In the order of COCO-WholeBody (jin-s13/COCO-WholeBody), and in DWPose's, which begins with OpenPose's 18."""
    body = size - 116
    whole = points(size)
    (person,) = read_frame(frame_of(pose_keypoints_2d=whole.reshape(-1).tolist()), 512, 512)
    wanted = coco_to_openpose(whole[:17]) if body == 17 else whole[:18]
    parts = (wanted, whole[-42:-21], whole[-21:], whole[body + 6 : body + 74])
    for part, expected in zip(vars(person).values(), parts, strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-6)
    own = points(21, 3)
    given = frame_of(pose_keypoints_2d=whole.reshape(-1), hand_left_keypoints_2d=own.reshape(-1))
    np.testing.assert_allclose(read_frame(given, 512, 512)[0].left_hand, own, rtol=1e-6)


def test_text_and_lists_and_one_frame_are_frames():
    one, two = frame_of(pose_keypoints_2d=points(18).reshape(-1).tolist()), frame_of(9)
    for given in ([one, two], (one, two), json.dumps([one, two]), [json.dumps(one), two], [json.dumps([one, two])]):
        assert read_frames(given) == [one, two]
    assert read_frames(one) == read_frames(json.dumps(one)) == [one]
    assert read_frames(None) is None and read_frames([]) == []
    with pytest.raises(AnnotatorError, match=r"pose_keypoints is text and no JSON \(Expecting value: line 1 column 1"):
        read_frames("nobody")
    with pytest.raises(AnnotatorError, match=r"pose_keypoints is int; expected frames, or their JSON text"):
        read_frames("3")


def test_files_of_cmu_are_in_pixels_of_the_picture_they_were_found_in():
    """With the version and the person's number that CMU's openpose writes, and no canvas."""
    body = np.zeros((25, 3))
    body[2], body[3] = (100, 50, 0.9), (300, 50, 0.8)
    person = {"person_id": [-1], "pose_keypoints_2d": body.reshape(-1).tolist(), "face_keypoints_2d": []}
    text = json.dumps({"version": 1.3, "people": [person]})
    frame = (read_frames(text) or [])[0]
    hint, _ = pipeline.annotate(RECORD, np.zeros((100, 400, 3), np.uint8), 512, frame=frame)
    canvas = {**frame, "canvas_width": 400, "canvas_height": 100}
    expected, _ = pipeline.annotate(RECORD, np.zeros((100, 400, 3), np.uint8), 512, frame=canvas)
    np.testing.assert_array_equal(hint, expected)
    np.testing.assert_allclose(hint[256, 1024] * 255, [153, 102, 0], atol=1e-3)
    with pytest.raises(
        AnnotatorError, match=r"pose: pose_keypoints names no canvas, and most joints lie beyond the pic"
    ):
        pipeline.annotate(RECORD, np.zeros((100, 150, 3), np.uint8), 512, frame=frame)


def test_a_frame_names_its_canvas_or_none():
    assert canvas_of({"people": [], "canvas_width": 640.4, "canvas_height": np.float32(480)}) == (480, 640)
    assert canvas_of({"people": [], "canvas_width": 0.2, "canvas_height": 3}) == (3, 1)
    assert canvas_of({"people": [], "version": 1.3}) is None
    for frame, says in (
        ({"people": [], "canvas_width": 640}, "canvas_height None"),
        ({"people": [], "canvas_width": float("inf"), "canvas_height": 5}, "canvas_width inf"),
        ({"canvas_width": 640, "canvas_height": 480}, "keys 'canvas_width', 'canvas_height'"),
        ("nobody", "has str; a frame of it has 'people'"),
    ):
        with pytest.raises(AnnotatorError, match=says):
            canvas_of(frame)


def test_what_is_missing_does_not_tell_shares_from_pixels_and_comes_as_zeros():
    body = points(18, low=0.1, high=0.9)
    body[3] = (700, -1, 0)
    (person,) = read_frame(frame_of(pose_keypoints_2d=body.reshape(-1).tolist()), 100, 100)
    assert person.body is not None
    np.testing.assert_array_equal(person.body[3], [0, 0, 0])
    assert person.body[0, 0] == pytest.approx(body[0, 0] * 100)


def test_body_25_and_coco_17_become_the_18():
    body = points(25)
    (person,) = read_frame(frame_of(pose_keypoints_2d=body.reshape(-1)), 512, 512)
    assert person.body is not None
    np.testing.assert_allclose(person.body[[0, 1, 7, 8, 13, 14, 17]], body[[0, 1, 7, 9, 14, 15, 18]], rtol=1e-6)
    coco = points(17, 1)
    (person,) = read_frame(frame_of(pose_keypoints_2d=coco.reshape(-1)), 512, 512)
    np.testing.assert_allclose(person.body, coco_to_openpose(coco), rtol=1e-6)


def test_hands_and_faces_of_both_sizes():
    for size in (68, 70):
        frame = frame_of(
            pose_keypoints_2d=None,
            hand_left_keypoints_2d=points(21, 1).reshape(-1).tolist(),
            hand_right_keypoints_2d=[],
            face_keypoints_2d=points(size, 2).reshape(-1).tolist(),
        )
        (person,) = read_frame(frame, 512, 512)
        assert person.body is None and person.right_hand is None
        assert person.left_hand is not None and person.left_hand.shape == (21, 3)
        assert person.face is not None and person.face.shape == (size, 3)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ([], r"pose_keypoints has list; a frame of it has 'people', 'canvas_width' and 'canvas_height'"),
        ({"animals": []}, r"pose_keypoints has keys 'animals'; a frame of it has 'people'"),
        ({"people": [[1, 2]]}, r"a person of pose_keypoints is list; it must be a dict of joint lists"),
        (
            frame_of(pose_keypoints_2d=[1.0] * 53),
            r"pose_keypoints_2d of pose_keypoints has 53 numbers; expected x, y and confidence of 17 or 18 or 25 or ",
        ),
        (
            frame_of(hand_left_keypoints_2d=[1.0] * 60),
            r"hand_left_keypoints_2d of pose_keypoints has 60 numbers; expected x, y and confidence of 21 points",
        ),
        (frame_of(face_keypoints_2d=["a"] * 204), r"face_keypoints_2d of pose_keypoints is no list of numbers"),
        (frame_of(pose_keypoints_2d=[float("nan")] * 54), r"pose_keypoints_2d .* has a joint that is not finite"),
        (frame_of(0, pose_keypoints_2d=[5.0] * 54), r"canvas_width 0 and coordinates in pixels; it must be above 0"),
        ({"people": [{"pose_keypoints_2d": [5.0] * 54}]}, r"canvas_width None and coordinates in pixels"),
        (frame_of(pose_keypoints_2d=[1e6] * 54), r"a joint at \(1e\+06, 1e\+06\), far off its canvas of 512x512"),
    ],
)
def test_what_cannot_be_read_is_refused(frame: Any, message: str):
    with pytest.raises(AnnotatorError, match=message):
        read_frame(frame, 512, 512)


def test_a_frame_comes_back_as_it_was_written():
    body = points(18)
    body[5] = 0
    people = [Person(body, points(21, 1), None, points(68, 2)), Person(points(18, 3))]
    frame = write_frame(people, 512, 512)
    assert frame["canvas_width"] == 512 and frame["canvas_height"] == 512
    assert [len(numbers) if numbers else None for numbers in frame["people"][0].values()] == [54, 63, None, 204]
    assert frame["people"][0]["pose_keypoints_2d"][15:18] == [0.0, 0.0, 0.0]
    for before, after in zip(people, read_frame(frame, 512, 512), strict=True):
        for part, again in zip(vars(before).values(), vars(after).values(), strict=True):
            if part is None:
                assert again is None
            else:
                np.testing.assert_allclose(again, part, rtol=1e-6)


def test_confidences_are_written_as_one_or_nothing():
    body = points(18)
    body[:, 2] = 0.4
    body[7, 2] = 0
    numbers = np.reshape(write_frame([Person(body)], 512, 512)["people"][0]["pose_keypoints_2d"], (18, 3))
    assert numbers[0, 2] == 1 and not numbers[7].any()


# -- from one body to the other --------------------------------------------------------------------------------------


def test_the_neck_is_the_middle_of_the_shoulders_and_needs_both():
    coco = points(17)
    coco[COCO_JOINTS.index("left_shoulder")] = (100, 200, 0.9)
    coco[COCO_JOINTS.index("right_shoulder")] = (60, 210, 0.5)
    np.testing.assert_allclose(coco_to_openpose(coco)[1], [80, 205, 0.5])
    coco[COCO_JOINTS.index("right_shoulder"), 2] = 0
    np.testing.assert_array_equal(coco_to_openpose(coco)[1], [0, 0, 0])


def test_joints_keep_their_names():
    coco = points(17)
    body = coco_to_openpose(coco)
    for name in COCO_JOINTS:
        np.testing.assert_allclose(body[OPENPOSE_JOINTS.index(name)], coco[COCO_JOINTS.index(name)], rtol=1e-6)
    # What transformers and CMU call them: VitPose's 10 is the right wrist, OpenPose's 4; 3 is the left ear, 17.
    np.testing.assert_allclose(body[4], coco[10], rtol=1e-6)
    np.testing.assert_allclose(body[17], coco[3], rtol=1e-6)
    np.testing.assert_allclose(openpose_to_coco(body), coco, rtol=1e-6)


# -- drawing ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> Any:
    """controlnet_aux's drawing functions; of matplotlib they need the one conversion that Python has as well."""
    if "matplotlib" not in sys.modules:
        matplotlib = types.ModuleType("matplotlib")
        matplotlib.colors = types.SimpleNamespace(hsv_to_rgb=lambda hsv: np.array(colorsys.hsv_to_rgb(*hsv)))  # type: ignore[attr-defined]
        sys.modules["matplotlib"] = matplotlib
    from controlnet_aux.open_pose import util
    from controlnet_aux.open_pose.body import Keypoint

    yield lambda draw, part: getattr(util, draw)(
        np.zeros((512, 512, 3), np.uint8), [Keypoint(x / 512, y / 512) if seen else None for x, y, seen in part]
    )
    if not hasattr(sys.modules["matplotlib"], "__version__"):
        del sys.modules["matplotlib"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("part", "size", "draw"),
    [
        ("pose_keypoints_2d", 18, "draw_bodypose"),
        ("hand_right_keypoints_2d", 21, "draw_handpose"),
        ("hand_left_keypoints_2d", 21, "draw_handpose"),
        ("face_keypoints_2d", 70, "draw_facepose"),
        ("face_keypoints_2d", 68, "draw_facepose"),
    ],
)
def test_agrees_with_controlnet_aux_to_the_pixel(published: Any, part: str, size: int, draw: str, seed: int):
    joints = points(size, seed)
    if part == "pose_keypoints_2d":
        joints[seed + 2] = 0
    expected = published(draw, joints)
    assert 0.002 < (expected > 0).any(axis=2).mean() < 0.5
    hint = pose(PICTURE, frame_of(**{part: joints.reshape(-1).tolist()}))
    np.testing.assert_array_equal(np.rint(hint * 255), expected)


def test_all_parts_lie_over_one_another_as_published(published: Any):
    body, hand, face = points(18), points(21, 1), points(70, 2)
    hint = pose(
        PICTURE,
        frame_of(
            pose_keypoints_2d=body.reshape(-1),
            hand_left_keypoints_2d=hand.reshape(-1),
            face_keypoints_2d=face.reshape(-1),
        ),
    )
    expected = published("draw_bodypose", body)
    for layer in (published("draw_handpose", hand), published("draw_facepose", face)):
        expected = np.where((layer > 0).any(axis=2, keepdims=True), layer, expected)
    np.testing.assert_array_equal(np.rint(hint * 255), expected)


def test_switches_leave_parts_out():
    parts: dict[str, Any] = {
        "pose_keypoints_2d": points(18).reshape(-1),
        "hand_left_keypoints_2d": points(21, 1).reshape(-1),
        "face_keypoints_2d": points(70, 2).reshape(-1),
    }
    frame = frame_of(**parts)
    for switch, part in zip(("body", "hands", "face"), parts, strict=True):
        only = {name: name == switch for name in ("body", "hands", "face")}
        np.testing.assert_array_equal(pose(PICTURE, frame, **only), pose(PICTURE, frame_of(**{part: parts[part]})))
    assert pose(PICTURE, frame, body=False, hands=False, face=False).max() == 0


def test_one_finger_in_numbers():
    assert FINGERS[:5] == ((0, 1), (1, 2), (2, 3), (3, 4), (0, 5)) and FINGERS[19] == (19, 20) and len(FINGERS) == 20
    hand = np.zeros((21, 3))
    hand[5], hand[6] = (100.5, 100.5, 1), (160.5, 100.5, 1)
    hint = np.rint(pose(PICTURE, frame_of(hand_left_keypoints_2d=hand.reshape(-1))) * 255)
    # Edge 5 of 20 has the hue 0.25: (127.5, 255, 0).
    assert hint[100, 130].tolist() == [128, 255, 0]
    assert hint[100, 100].tolist() == [0, 0, 255]
    assert (hint[:, 100].max(1) > 0).sum() == 9


def test_xinsir_sticks_are_wider_and_joints_are_not():
    body = np.zeros((18, 3))
    body[2], body[3] = (200, 500, 1), (800, 500, 1)

    def widths(height: int, width: int) -> tuple[int, int]:
        hint = draw_people([Person(body)], height, width, xinsir_sticks=True)
        return int((hint[:, 500].max(1) > 0).sum()), int((hint[500, :200].max(1) > 0).sum())

    # Half-widths 4 * min(2 + long side // 1000, 7): 4*2 below 1000 pixels, 4*3 below 2000, and so on up to 4*7.
    assert widths(999, 999)[0] == 17
    assert widths(1024, 1024)[0] == 25
    assert widths(1000, 6000)[0] == 57
    assert widths(1024, 1024)[1] == 8  # a disc of 4 * 1024 / 512 pixels
    small = draw_people([Person(body * [0.4, 0.4, 1])], 499, 499, xinsir_sticks=True)
    assert small[:, 200].max(1).sum() * 255 / 153 == pytest.approx(9, abs=1)


def test_coco17_in_numbers():
    assert len(COCO_LIMBS) == len(COCO_COLOURS) == 19
    body = np.zeros((17, 3))
    body[COCO_JOINTS.index("left_shoulder")] = (400.5, 200.5, 1)
    body[COCO_JOINTS.index("right_shoulder")] = (100.5, 200.5, 1)
    hint = draw_people([Person(coco_to_openpose(body))], 512, 512, style="coco17")
    # Between the shoulders is Openpifpaf's eighth limb, in tab20's eighth colour, 6 points of 504 wide: 6.1 pixels.
    np.testing.assert_allclose(hint[200, 250] * 255, [255, 152, 150], atol=0.5)
    assert hint[:, 250, 0].sum() == pytest.approx(6.1, abs=0.3)
    np.testing.assert_allclose(hint[200, 100], [1, 1, 1], atol=0.01)
    assert hint[200, 396:404].min(axis=1).max() > 0.99 and hint[200, 390].tolist() == hint[200, 250].tolist()
    # The neck, which COCO does not have, is not drawn.
    assert len(np.unique(hint[200, 240:260], axis=0)) == 1


def test_coco17_keeps_its_proportions_and_leaves_out_hands():
    body = coco_to_openpose(points(17, 5))

    def share(side: int, *hands: np.ndarray) -> float:
        person = Person(body * np.array([side / 512, side / 512, 1]), *hands)
        return float(draw_people([person], side, side, style="coco17").max(axis=2).mean())

    for side in (256, 1024, 2048):
        assert share(side) == pytest.approx(share(512), rel=0.05)
    assert share(512, points(21)) == share(512)


def test_another_style_is_refused():
    with pytest.raises(AnnotatorError, match=r"style is 'stick'; choose one of openpose, coco17"):
        draw_people([], 64, 64, style="stick")


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (3, 5000), (64, 48), (640, 360)])
@pytest.mark.parametrize("style", ["openpose", "coco17"])
def test_any_size_gives_a_hint(shape: tuple[int, int], style: str):
    frame = frame_of(pose_keypoints_2d=points(18).reshape(-1), hand_left_keypoints_2d=points(21).reshape(-1))
    before = copy.deepcopy(frame)
    image = np.broadcast_to(np.float32(0.5), (*shape, 3))
    hint = pose(image, frame, style=style)
    assert hint.shape == (*shape, 3) and hint.dtype == np.float32
    assert 0 <= hint.min() and 0 < hint.max() <= 1
    np.testing.assert_array_equal(hint, pose(image, frame, style=style))
    for name, numbers in before["people"][0].items():
        np.testing.assert_array_equal(frame["people"][0][name], numbers)


def test_8k():
    hint = pose(np.zeros((4320, 7680, 3), np.float32), frame_of(pose_keypoints_2d=points(18).reshape(-1)))
    assert hint.shape == (4320, 7680, 3)
    # Discs of radius 4 * 4320 / 512 are 67 pixels wide.
    nose = points(18)[0, :2] * [7680 / 512, 4320 / 512]
    assert (hint[int(nose[1]), int(nose[0]) - 33 : int(nose[0]) + 34] == [1, 0, 0]).all()


def test_people_beyond_the_canvas_are_cut_off():
    body = points(18, low=-600, high=1100)
    for style in ("openpose", "coco17"):
        hint = pose(PICTURE, frame_of(pose_keypoints_2d=body.reshape(-1)), style=style)
        assert np.isfinite(hint).all() and hint.max() > 0


def test_the_pipeline_draws_at_the_asked_resolution():
    body = np.zeros((18, 3))
    body[2], body[3] = (100, 50, 1), (300, 50, 1)
    frame = {"people": [{"pose_keypoints_2d": body.reshape(-1)}], "canvas_width": 400, "canvas_height": 100}
    hint, found = pipeline.annotate(RECORD, np.zeros((100, 400, 3), np.uint8), 512, frame=frame)
    assert hint.shape == (512, 2048, 3) and found is None
    np.testing.assert_allclose(hint[256, 1024] * 255, [153, 102, 0], atol=1e-3)
    with pytest.raises(
        AnnotatorError,
        match=r"pose: found no pose_keypoints: for a photograph choose human_pose; to draw joints, connect them",
    ):
        pipeline.annotate(RECORD, np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(AnnotatorError, match=r"pose: pose_keypoints has keys 'x'; a frame of it has 'people'"):
        pipeline.annotate(RECORD, np.zeros((8, 8, 3), np.uint8), frame={"x": 1})


def test_a_frame_without_people_is_black():
    assert pose(PICTURE, {"people": [], "canvas_width": 9, "canvas_height": 9}).max() == 0
    assert pose(PICTURE, frame_of(pose_keypoints_2d=[0.0] * 54)).max() == 0


def test_the_record_has_the_functions_defaults():
    assert RECORD.function is pose and RECORD.reads_pose and not RECORD.networks
    frame = frame_of(pose_keypoints_2d=points(18).reshape(-1))
    given = {parameter.name: parameter.default for parameter in RECORD.parameters}
    assert list(given) == ["style", "body", "hands", "face", "xinsir_sticks", "threshold"]
    np.testing.assert_array_equal(pose(PICTURE, frame, **given), pose(PICTURE, frame))
