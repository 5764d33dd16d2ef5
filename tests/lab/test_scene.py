"""Scenes: the same seed gives the same scene, everything is in view, and the prompt says what is there."""

import numpy as np
import pytest

from zeroconv.lab.figure import FOREARM, KEYPOINT_NAMES, SHIN, THIGH, UPPER_ARM, Figure, Limb, joints
from zeroconv.lab.scene import Scene, SceneError, Solid, describe, random_scene
from zeroconv.lab.vocabulary import (
    COLOURS,
    END,
    INSUFFICIENT_PROMPT,
    LENGTH,
    START,
    TOKEN_IDS,
    UnknownWord,
    tokenize,
)

HANGING, STANDING = Limb(10.0, 10.0), Limb(5.0, 5.0)


def person(yaw: float = 0.0) -> Figure:
    return Figure("red", 0.0, 4.0, yaw, 0.0, HANGING, HANGING, STANDING, STANDING)


def scene_of(*solids: Solid, figure: Figure | None = None, ground: str = "sand") -> Scene:
    return Scene(0, ground, "checks", 0.6, 20.0, (0.0, 0.8, -0.6), figure, solids)


def solid(kind: str, colour: str) -> Solid:
    return Solid(kind, colour, 0.0, 4.0, 0.3, 0.6, 0.0)


def test_same_seed_same_scene():
    assert random_scene(7) == random_scene(7)
    assert random_scene(7) != random_scene(8)


def test_seeds_as_large_as_the_hosts():
    assert random_scene(2**64 - 1).seed == 2**64 - 1


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("figure", [True, False])
def test_scene_holds_what_was_asked_for(count: int, figure: bool):
    scene = random_scene(11, solids=count, figure=figure)
    assert len(scene.solids) == count
    assert (scene.figure is not None) == figure


def test_two_or_three_solids_by_default_all_of_different_colours():
    scenes = [random_scene(seed) for seed in range(30)]
    assert {len(scene.solids) for scene in scenes} == {2, 3}
    for scene in scenes:
        assert scene.figure is not None
        colours = [scene.figure.colour, *(each.colour for each in scene.solids)]
        assert len(set(colours)) == len(colours)


def test_impossible_scenes_are_refused():
    with pytest.raises(SceneError, match="solids is 4; the lab has room for 0 to 3"):
        random_scene(0, solids=4)
    with pytest.raises(SceneError, match="seed is -1; it must be 0 or more"):
        random_scene(-1)


def test_prompts_written_out():
    figure, sphere, cube = person(), solid("sphere", "blue"), solid("cube", "orange")
    assert describe(scene_of(sphere, cube, figure=figure)) == (
        "a red person, a blue sphere and an orange cube on sand ground"
    )
    assert describe(scene_of(cube, figure=figure, ground="snow")) == "a red person and an orange cube on snow ground"
    assert describe(scene_of(sphere)) == "a blue sphere on sand ground"
    assert describe(scene_of(ground="grass")) == "empty grass ground"


def test_every_prompt_can_be_tokenized():
    for seed in range(20):
        assert len(tokenize(describe(random_scene(seed)))) == LENGTH
    for colour in COLOURS:
        tokenize(colour)


def test_tokens_are_the_ones_the_sd1_tokenizer_gives():
    ids = tokenize("A red person, a blue sphere on sand ground")
    assert ids[:12] == [49406, 320, 736, 2533, 267, 320, 1746, 6987, 525, 5094, 2461, 49407]
    assert ids[12:] == [49407] * 65
    assert tokenize("") == [START] + [END] * 76
    assert tokenize(INSUFFICIENT_PROMPT)[1:12] == [320, 1400, 268, 3027, 267, 12609, 267, 537, 4774, 2867, END]
    assert len(set(TOKEN_IDS.values())) == len(TOKEN_IDS)


def test_unknown_words_are_named_with_the_known_ones():
    with pytest.raises(UnknownWord, match=r"the lab has no word 'dragon'; it knows: , - a an and blue"):
        tokenize("a red dragon")
    with pytest.raises(UnknownWord, match="prompt has 76 words, the text encoder reads 75: shorten it"):
        tokenize("red " * 76)


def test_bones_keep_their_lengths_in_every_pose():
    for seed in range(10):
        figure = random_scene(seed).figure
        assert figure is not None
        found = joints(figure)
        for side in ("right", "left"):
            for a, b, length in (
                ("shoulder", "elbow", UPPER_ARM),
                ("elbow", "wrist", FOREARM),
                ("hip", "knee", THIGH),
                ("knee", "ankle", SHIN),
            ):
                distance = np.linalg.norm(found[f"{side}_{a}"] - found[f"{side}_{b}"])
                assert distance == pytest.approx(length, abs=1e-9)
        middle = (found["right_shoulder"] + found["left_shoulder"]) / 2
        np.testing.assert_allclose(found["neck"], middle, atol=1e-9)


def test_figure_faces_the_camera_and_turns_with_yaw():
    found = joints(person())
    assert found["right_wrist"][0] < 0 < found["left_wrist"][0]
    assert found["nose"][2] < found["head"][2]
    # A positive yaw turns the face towards the picture's right.
    assert joints(person(yaw=30.0))["nose"][0] > found["nose"][0] + 0.05
    assert min(found["right_ankle"][1], found["left_ankle"][1]) == pytest.approx(0.095)
    assert set(KEYPOINT_NAMES) <= set(found)
