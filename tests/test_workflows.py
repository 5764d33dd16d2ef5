"""The shipped workflows: what a user opens, their API twins, their pictures, and what a real host knows of them."""

from __future__ import annotations

import json
import re
import urllib.request
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from zeroconv.lab.dataset import HELD_OUT
from zeroconv.lab.models import CONTROLS

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
    "6_edit_pose_sd15",
)  # with the user's model and pictures; by their names they come first
NAMES = (*OWN, *LAB)
NOTES = {"MarkdownNote"}  # live in the front end alone
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


@pytest.mark.parametrize("name", OWN[2:])
def test_a_photograph_of_any_size_is_made_small_enough_to_be_encoded(name: str):
    graph = read_api(name)
    (picture,) = [i for i, node in graph.items() if node["class_type"] in ("LoadImage", "GetVideoComponents")]
    readers = [node for node in graph.values() if [picture, 0] in node["inputs"].values()]
    assert [node["class_type"] for node in readers] == ["ImageScaleToMaxDimension"]
    assert readers[0]["inputs"]["largest_size"] == 768


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
