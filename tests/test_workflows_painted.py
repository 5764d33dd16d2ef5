"""The shipped workflows on a real host: they run to their end, and what the lab's paint is what they promise."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from zeroconv.lab.models import CONTROLS, WEIGHTS
from zeroconv.lab.render import render
from zeroconv.lab.scene import random_scene

from .test_workflows import OWN, of_class, read_api

if TYPE_CHECKING:
    from zeroconv.devtools.comfyui import HostServer

SIDE = 128  # pixels of the embedded model's pictures


def with_the_lab(graph: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same graph with the embedded model and its controls in place of files that are not here, small and short."""
    given = {
        "ckpt_name": lambda _: None,
        "control_net_name": lambda name: (
            f"lab_{'depth' if 'depth' in name else 'pose' if 'pose' in name else 'canny'}.safetensors"
        ),
        "annotator": lambda name: {"depth_anything": "intensity", "human_pose": "threshold"}.get(name, name),
        "text": lambda _: "",
        "width": lambda _: SIDE,
        "height": lambda _: SIDE,
        "largest_size": lambda _: SIDE,
        "steps": lambda _: 2,
    }
    typed = "SetUnionControlNetType"  # refuses what is no Union
    instead = {(i, 0): node["inputs"]["control_net"] for i, node in graph.items() if node["class_type"] == typed}
    (pictures,) = [i for i, node in graph.items() if node["class_type"] in ("LoadImage", "GetVideoComponents")]
    instead[pictures, 0] = ["small", 0]
    scaled = {"image": [pictures, 0], "upscale_method": "area", "width": SIDE, "height": SIDE, "crop": "disabled"}
    stand_in = {"small": {"class_type": "ImageScale", "inputs": scaled}}
    for i, node in graph.items():
        inputs = {
            key: instead.get(tuple(value), value)
            if isinstance(value, list)
            else given.get(key, lambda same: same)(value)
            for key, value in node["inputs"].items()
        }
        if node["class_type"] == "CheckpointLoaderSimple":
            node, inputs = {**node, "class_type": "LoadLabModel"}, {}
        stand_in[i] = {**node, "inputs": inputs}
    return {i: node for i, node in stand_in.items() if node["class_type"] != typed}


@pytest.mark.host
@pytest.mark.weights
@pytest.mark.parametrize(("name", "side"), [*zip(OWN, (SIDE, SIDE, SIDE, 2 * SIDE, None, SIDE), strict=True)])
def test_own_workflows_run_to_their_end(name: str, side: int | None, host_server: HostServer):
    run = host_server.run(with_the_lab(read_api(name)))
    (saved,) = [i for i, node in read_api(name).items() if node["class_type"] in ("SaveImage", "SaveVideo")]
    (file,) = run.outputs[saved]["images"]
    if side is None:
        assert file["filename"].endswith(".mp4")
    else:
        with Image.open(io.BytesIO(host_server.images(run)[saved][0])) as picture:
            assert picture.size == (side, side)


Paint = Callable[[str], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def paint(host_server: HostServer) -> Paint:
    """Runs a workflow of the lab, once; gives its pictures (H,W,3) in 0..1 by the title of the node that shows them."""

    @cache
    def run(name: str) -> dict[str, np.ndarray]:
        graph = read_api(name)
        files = [WEIGHTS / f"{part}.safetensors" for part in ("autoencoder", "text_encoder", "unet")]
        files += [CONTROLS / loader["inputs"]["control_net_name"] for loader in of_class(graph, "LoadControlNet")]
        missing = [str(file.relative_to(WEIGHTS)) for file in files if not file.is_file()]
        if missing:
            pytest.skip(f"the embedded model lacks {', '.join(missing)}: `python dev.py lab train` makes them")
        shown = host_server.images(host_server.run(graph))
        opened = {graph[i]["_meta"]["title"]: Image.open(io.BytesIO(image)) for i, (image,) in shown.items()}
        return {title: np.asarray(image.convert("RGB"), np.float32) / 255 for title, image in opened.items()}

    return run


@pytest.mark.host
@pytest.mark.weights
@pytest.mark.parametrize(
    ("name", "titles"),
    [
        ("canny", {"the picture", "canny hint", "with canny"}),
        ("compare", {"depth hint", "pose hint", "without control", "with depth", "with pose", "with both"}),
        ("depth_pose", {"depth hint", "pose hint", "with both"}),
        ("dosing", {"depth hint", "pose hint", "without dosing", "with dosing"}),
        ("make_control", {"without control", "with the new control"}),
    ],
)
def test_lab_workflows_paint(name: str, titles: set[str], paint: Paint):
    pictures = paint(name)
    painted = {title for title, picture in pictures.items() if picture.shape == (128, 128, 3)}
    assert painted == titles
    for title, picture in pictures.items():
        assert picture.std() > 0.05, title  # not one flat colour


@pytest.mark.host
@pytest.mark.weights
def test_each_control_changes_the_picture(paint: Paint):
    pictures = paint("compare")
    without, *controlled = [pictures[title] for title in ("without control", "with depth", "with pose", "with both")]
    for picture in controlled:
        assert np.abs(picture - without).mean() > 0.03
    for a, b in combinations(controlled, 2):
        assert np.abs(a - b).max() > 0.1


@pytest.mark.host
@pytest.mark.weights
def test_a_stack_paints_what_two_applies_paint(paint: Paint):
    np.testing.assert_allclose(paint("depth_pose")["with both"], paint("compare")["with both"], atol=2 / 255)


@pytest.mark.host
@pytest.mark.weights
def test_dosing_is_shown_beside_the_pictures(paint: Paint):
    pictures = paint("dosing")
    bars = pictures["Control Block Weights for pose"]
    assert bars.shape == (156, 512, 3)  # one row: the twelve weights are for one size of model
    without, dosed = (pictures[f"what acted, {how}"] for how in ("without dosing", "with dosing"))
    assert without.shape == dosed.shape  # two controls and their sum, 20 steps each
    assert without.shape[0] > 3 * 20 * 20

    def empty(heat_map: np.ndarray) -> float:
        return float(np.all(np.abs(heat_map * 255 - (0x2A, 0x2D, 0x33)) < 1, axis=2).mean())  # the colour of nothing

    assert empty(without) < 0.01
    assert empty(dosed) > 0.15


@pytest.mark.host
@pytest.mark.weights
def test_dosing_paints_one_person_in_the_pose_and_the_things_where_depth_has_them(paint: Paint):
    pictures = paint("dosing")
    scenes = [scene["inputs"] for scene in of_class(read_api("dosing"), "LabScene")]
    things, figure = (
        render(random_scene(scene["seed"], solids=scene["solids"], figure=scene["figure"]), 128).image
        for scene in scenes
    )
    person, ball = red(figure), red(things)  # the figure of one scene, and the ball in front of the other
    assert overlap(red(pictures["without dosing"]), person) < 0.3
    assert overlap(red(pictures["with dosing"]), person) > 0.5
    for picture in (pictures["without dosing"], pictures["with dosing"]):
        assert overlap(blue(picture), ball) > 0.5  # it is blue in the prompt
    assert overlap(blue(figure), ball) == 0


def red(picture: np.ndarray) -> np.ndarray:
    """Where a picture (H,W,3) in 0..1 is red."""
    return (picture[..., 0] > 0.5) & (picture[..., 1:] < 0.35).all(axis=2)


def blue(picture: np.ndarray) -> np.ndarray:
    """Where a picture (H,W,3) in 0..1 is blue; the sky is not."""
    return (picture[..., 2] > 0.5) & (picture[..., 0] < 0.3) & (picture[..., 1] < 0.5)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """The common part of two regions over all of them, 0 to 1."""
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.host
@pytest.mark.weights
def test_a_new_control_changes_no_pixel(paint: Paint):
    pictures = paint("make_control")
    np.testing.assert_array_equal(pictures["with the new control"], pictures["without control"])


@pytest.mark.host
@pytest.mark.weights
def test_train_control_trains_and_applies_what_it_trained(host_server: HostServer):
    graph = read_api("train_control")
    (trainer,) = of_class(graph, "TrainControlNet")
    assert trainer["inputs"]["model"] == [
        next(i for i, node in graph.items() if node["class_type"] == "LoadLabModel"),
        0,
    ]
    (apply,) = of_class(graph, "ApplyControl")
    assert graph[apply["inputs"]["control_net"][0]] is trainer  # straight from the training
    (scenes,) = of_class(graph, "LabScenes")
    scenes["inputs"].update(count=12, name="few")  # the same graph, in seconds
    trainer["inputs"].update(name="few", steps=2, batch_size=2, sample_every=1)
    (data,) = of_class(graph, "MakeControlDataset")
    data["inputs"].update(name="few")
    shown = host_server.images(host_server.run(graph))
    titles = {graph[i]["_meta"]["title"]: pictures for i, pictures in shown.items()}
    assert {"loss and fidelity", "held-out pictures", "depth hint", "with the control trained here"} <= set(titles)
    with Image.open(io.BytesIO(titles["with the control trained here"][0])) as picture:
        assert picture.size == (128, 128)
    listed = host_server.get("/object_info/LoadControlNet")["LoadControlNet"]["input"]["required"]["control_net_name"]
    assert any(name.replace("\\", "/") == "zeroconv/few.safetensors" for name in listed[1]["options"])
