"""The shipped workflows: what a user opens, their API twins, their pictures, and what a real host makes of them."""

from __future__ import annotations

import io
import json
import re
import urllib.request
from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from zeroconv.lab.dataset import HELD_OUT
from zeroconv.lab.models import CONTROLS, WEIGHTS
from zeroconv.lab.render import render
from zeroconv.lab.scene import random_scene

if TYPE_CHECKING:
    from zeroconv.devtools.comfyui import HostServer

WORKFLOWS = Path(__file__).resolve().parent.parent / "workflows"
LAB = (
    "canny",
    "compare",
    "depth_pose",
    "dosing",
    "make_control",
    "train_control",
)  # run on a fresh install, with nothing downloaded
OWN = (
    "1_photo_depth_pose_sd15",
    "2_photo_depth_pose_sdxl_union",
    "3_inpaint_sd15",
    "4_tile_upscale_sd15",
    "5_video_frames_sd15",
)  # with the user's model and pictures; by their names they come first
NAMES = (*OWN, *LAB)
NOTES = {"MarkdownNote"}  # live in the front end alone
SIDE = 128  # pixels of the embedded model's pictures
GAP = 80  # pixels; nodes of the newer front end are larger than the canvas draws them
TITLE = 30  # height of a node's title, which lies above its position
USERS_FILES = {"ckpt_name", "control_net_name"}  # choices that depend on what lies in a user's folders
HUB = r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/([\w.-]+)"  # whence a note's files come


def read(name: str) -> dict[str, Any]:
    """A workflow as the front end reads it."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def read_api(name: str) -> dict[str, dict[str, Any]]:
    """Its twin: nodes by id, as the server reads them."""
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def of_class(graph: dict[str, dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The nodes of an API graph of this class, in the order of their ids."""
    return [graph[i] for i in sorted(graph, key=int) if graph[i]["class_type"] == kind]


def box(node: dict[str, Any]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a node with its title, which is all there is of a folded one."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + (0 if node["flags"].get("collapsed") else height)


def test_every_workflow_has_its_twin_and_its_picture():
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == sorted(NAMES)
    assert sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json")) == sorted(NAMES)
    assert sorted(path.stem for path in WORKFLOWS.glob("*.jpg")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_thumbnails_are_small_square_jpegs(name: str):
    path = WORKFLOWS / f"{name}.jpg"
    with Image.open(path) as picture:
        assert picture.format == "JPEG"
        assert picture.size == (512, 512)
    assert path.stat().st_size < 60_000


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_is_the_same_graph(name: str):
    workflow, api = read(name), read_api(name)
    nodes = {str(node["id"]): node for node in workflow["nodes"] if node["type"] not in NOTES}
    assert {i: node["type"] for i, node in nodes.items()} == {i: node["class_type"] for i, node in api.items()}
    titles = {i: node["title"] for i, node in nodes.items() if "title" in node}
    assert titles == {i: api[i]["_meta"]["title"] for i in titles}

    drawn = {
        (str(target), nodes[str(target)]["inputs"][slot]["name"]): [str(source), output]
        for _, source, output, target, slot, _ in workflow["links"]
    }
    linked = {
        (i, key): value for i, node in api.items() for key, value in node["inputs"].items() if isinstance(value, list)
    }
    assert drawn == linked


@pytest.mark.parametrize("name", NAMES)
def test_nodes_keep_their_distance(name: str):
    close = [
        (a["id"], b["id"])
        for a, b in combinations(read(name)["nodes"], 2)
        if max(box(b)[0] - box(a)[2], box(a)[0] - box(b)[2], box(b)[1] - box(a)[3], box(a)[1] - box(b)[3]) < GAP
    ]
    assert close == []


@pytest.mark.parametrize("name", NAMES)
def test_every_node_lies_in_one_titled_group_and_a_note_explains(name: str):
    workflow = read(name)
    groups = {group["title"]: group["bounding"] for group in workflow["groups"]}
    assert len(groups) == len(workflow["groups"]) >= 4
    assert all(re.match(r"\d+[a-d]?\. [A-Z]", title) for title in groups)
    for node in workflow["nodes"]:
        left, top, right, bottom = box(node)
        around = [
            title
            for title, (x, y, width, height) in groups.items()
            if x <= left and y <= top and right <= x + width and bottom <= y + height
        ]
        assert len(around) == (0 if node["type"] in NOTES else 1), (node["id"], node["type"], around)
    (note,) = [node for node in workflow["nodes"] if node["type"] in NOTES]
    assert note["title"]
    assert len(note["widgets_values"][0].split(". ")) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_links_run_from_left_to_right(name: str):
    workflow = read(name)
    at = {node["id"]: node for node in workflow["nodes"]}
    for number, source, _, target, _, _ in workflow["links"]:
        if at[source]["type"] != at[target]["type"]:  # the stack's entries stand one below the other
            assert at[source]["pos"][0] < at[target]["pos"][0], number


@pytest.mark.parametrize("path", sorted(WORKFLOWS.rglob("*.json")), ids=lambda path: path.name)
def test_nothing_of_the_machine_it_was_made_on(path: Path):
    text = re.sub(HUB, "", path.read_text(encoding="utf-8"))
    assert not re.search(r"https?:|[A-Z]:\\\\|/(home|root|Users|tmp|work)/", text)
    assert text.isascii()


@pytest.mark.parametrize("name", LAB)
def test_lab_workflows_start_from_a_scene_that_was_not_trained_on(name: str):
    graph = read_api(name)
    scenes = of_class(graph, "LabScene")
    assert scenes
    for scene in scenes:
        assert scene["inputs"]["seed"] >= HELD_OUT
        assert not any(isinstance(value, list) for value in scene["inputs"].values())
    (prompt,) = [node for node in of_class(graph, "CLIPTextEncode") if node["inputs"]["text"] != ""]
    assert graph[prompt["inputs"]["text"][0]] in scenes
    assert not of_class(graph, "CheckpointLoaderSimple")
    assert not of_class(graph, "LoadImage")
    for loader in of_class(graph, "LoadControlNet"):
        assert re.fullmatch(r"lab_(depth|pose|canny)\.safetensors", loader["inputs"]["control_net_name"])


@pytest.mark.parametrize("name", OWN)
def test_own_workflows_start_from_a_file_that_ships_and_link_the_others(name: str):
    graph = read_api(name)
    (picture,) = [node for node in graph.values() if node["class_type"] in ("LoadImage", "LoadVideo")]
    (file,) = [value for value in picture["inputs"].values() if isinstance(value, str)]
    assert (WORKFLOWS / "input" / file).is_file()
    needed = {
        node["inputs"][key]
        for node in graph.values()
        for key in ("ckpt_name", "control_net_name")
        if key in node["inputs"]
    }
    (note,) = [node for node in read(name)["nodes"] if node["type"] in NOTES]
    assert set(re.findall(HUB, note["widgets_values"][0])) == needed


def test_the_users_own_come_first():
    assert sorted(NAMES)[: len(OWN)] == list(OWN)


@pytest.mark.parametrize("name", ["depth_pose", "1_photo_depth_pose_sd15"])
def test_two_hints_meet_in_one_stack_and_one_apply(name: str):
    graph = read_api(name)
    (apply,) = of_class(graph, "ApplyControl")
    last = graph[apply["inputs"]["stack"][0]]
    first = graph[last["inputs"]["stack"][0]]
    assert last["class_type"] == first["class_type"] == "StackControls"
    assert "stack" not in first["inputs"]
    assert "control_net" not in apply["inputs"]
    loaders = [graph[entry["inputs"]["control_net"][0]]["inputs"]["control_net_name"] for entry in (first, last)]
    assert "depth" in loaders[0] and "pose" in loaders[1]


def test_compare_differs_in_its_controls_alone():
    graph = read_api("compare")
    saved = [node["_meta"]["title"] for node in of_class(graph, "SaveImage")]
    assert saved == ["depth hint", "pose hint", "without control", "with depth", "with pose", "with both"]
    samplers = of_class(graph, "KSampler")
    assert len(samplers) == 4
    models = [sampler["inputs"].pop("model") for sampler in samplers]
    assert all(sampler["inputs"] == samplers[0]["inputs"] for sampler in samplers)

    def controls(model: list[Any]) -> list[str]:
        node = graph[model[0]]
        if node["class_type"] == "LoadLabModel":
            return []
        loader = graph[node["inputs"]["control_net"][0]]
        return [*controls(node["inputs"]["model"]), loader["inputs"]["control_net_name"]]

    depth, pose = "lab_depth.safetensors", "lab_pose.safetensors"
    assert [controls(model) for model in models] == [[], [depth], [pose], [depth, pose]]


def test_dosing_differs_in_its_dosing_alone():
    graph = read_api("dosing")
    samplers = of_class(graph, "KSampler")
    models = [sampler["inputs"].pop("model") for sampler in samplers]
    assert samplers[0]["inputs"] == samplers[1]["inputs"]
    applied = [graph[model[0]] for model in models]
    poses = [graph[apply["inputs"]["stack"][0]]["inputs"] for apply in applied]
    depths = [graph[pose.pop("stack")[0]]["inputs"] for pose in poses]
    schedule, weights = depths[1].pop("schedule"), poses[1].pop("block_weights")
    assert depths[0] == depths[1]
    assert poses[0] == poses[1]
    assert graph[schedule[0]]["class_type"] == "ControlSchedule"
    assert graph[weights[0]]["class_type"] == "ControlBlockWeights"
    scenes = [graph[dose["image"][0]]["inputs"]["seed"] for dose in (depths[0], poses[0])]
    assert scenes[0] != scenes[1]  # the two hints disagree

    for apply, report in zip(applied, of_class(graph, "ControlReport")):
        recorder = apply["inputs"]["model"][0]
        assert graph[recorder]["class_type"] == "RecordControl"
        assert report["inputs"]["record"] == [recorder, 1]
        sampler = graph[report["inputs"]["latent"][0]]["inputs"]
        assert sampler is samplers[applied.index(apply)]["inputs"]


def test_sdxl_union_tells_one_file_two_types():
    graph = read_api("2_photo_depth_pose_sdxl_union")
    (loader,) = [i for i, node in graph.items() if node["class_type"] == "LoadControlNet"]
    assert graph[loader]["inputs"]["control_type"] == "auto"
    (apply,) = of_class(graph, "ApplyControl")
    assert "control_net" not in apply["inputs"]
    last = graph[apply["inputs"]["stack"][0]]["inputs"]
    first = graph[last["stack"][0]]["inputs"]
    typed = [graph[entry["control_net"][0]] for entry in (first, last)]
    assert [node["class_type"] for node in typed] == ["SetUnionControlNetType"] * 2
    assert [node["inputs"] for node in typed] == [
        {"type": "depth", "control_net": [loader, 0]},
        {"type": "openpose", "control_net": [loader, 0]},
    ]
    for key in ("guidance", "resize"):  # alike, so that they are fused
        assert first[key] == last[key]
    (latent,) = of_class(graph, "EmptyLatentImage")
    assert (latent["inputs"]["width"], latent["inputs"]["height"]) == (1024, 1024)


@pytest.mark.host
@pytest.mark.parametrize("name", NAMES)
def test_the_host_knows_every_node_input_and_choice(name: str, host_server: HostServer):
    known, graph = host_server.get("/object_info"), read_api(name)
    for i, node in graph.items():
        where = f"{i} {node['class_type']}"
        described = known[node["class_type"]]["input"]
        required = set(described.get("required", {}))
        assert required <= set(node["inputs"]) <= required | set(described.get("optional", {})), where
        for key, value in node["inputs"].items():
            kind, *options = {**described.get("required", {}), **described.get("optional", {})}[key]
            limits = options[0] if options else {}
            if isinstance(value, list):
                given = known[graph[value[0]]["class_type"]]["output"][value[1]]
                assert kind in ("*", given), f"{where}: {key}"
                continue
            choices = kind if isinstance(kind, list) else limits.get("options") if kind == "COMBO" else None
            if choices is None:
                assert limits.get("min", value) <= value <= limits.get("max", value), f"{where}: {key}"
            elif key not in USERS_FILES or (CONTROLS / str(value)).is_file():
                assert value in choices, f"{where}: {key}"  # the examples that the pack put into the input folder, too


@pytest.mark.host
def test_the_template_browser_shows_them_with_their_pictures(host_server: HostServer):
    assert sorted(host_server.get("/api/workflow_templates")["zeroconv"]) == sorted(NAMES)
    for name in NAMES:
        assert host_server.get(f"/api/workflow_templates/zeroconv/{name}.json") == read(name)
        url = f"{host_server.url}/api/workflow_templates/zeroconv/{name}.jpg"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=60) as answer:
            assert answer.headers["Content-Type"] == "image/jpeg"
            assert answer.read() == (WORKFLOWS / f"{name}.jpg").read_bytes()


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
@pytest.mark.parametrize(("name", "side"), [*zip(OWN, (SIDE, SIDE, SIDE, 2 * SIDE, None))])
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
