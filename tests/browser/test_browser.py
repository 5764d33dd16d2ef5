"""The pack in the real front end: it loads without an error, and the workflows mean there what their twins say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from zeroconv.devtools.comfyui import HostServer

    from .conftest import FrontEnd

pytestmark = [pytest.mark.browser, pytest.mark.host]

ROOT = Path(__file__).resolve().parent.parent.parent
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))

LOAD = "async (workflow) => { await app.loadGraphData(workflow); }"
# The host's Load Video sends its player, too, once that is there.
PROMPT = """async () => {
    const {output} = await app.graphToPrompt();
    for (const node of Object.values(output)) delete node.inputs['video-preview'];
    return output;
}"""
UNKNOWN = """() => app.graph._nodes.filter(node => !(node.type in LiteGraph.registered_node_types) || node.has_errors)
    .map(node => node.type)"""
RUN = """async () => {
    const errors = [];
    const end = new Promise(resolve => {
        app.api.addEventListener('execution_success', resolve, {once: true});
        for (const failure of ['execution_error', 'execution_interrupted'])
            app.api.addEventListener(failure, event => { errors.push(event.detail); resolve(); }, {once: true});
    });
    await app.queuePrompt(0);
    if (Object.keys(app.lastNodeErrors ?? {}).length) return [app.lastNodeErrors];
    await end;
    return errors;
}"""
SHOWN = """(titles) => titles.every(title =>
    app.graph._nodes.find(node => node.title === title)?.imgs?.every(image => image.naturalWidth))"""
PICTURES = """() => Object.fromEntries(app.graph._nodes.filter(node => node.imgs?.length)
    .map(node => [node.title, [node.imgs[0].naturalWidth, node.imgs[0].naturalHeight]]))"""
CALM = "() => !document.querySelector('.p-dialog')"  # no dialog about something missing


def test_the_page_loads_without_an_error(front_end: FrontEnd):
    assert front_end.errors == []


def test_every_node_is_registered(front_end: FrontEnd, host_server: HostServer):
    described = host_server.get("/object_info")
    ours = [name for name, node in described.items() if node["python_module"].endswith("zeroconv")]
    assert len(ours) >= 8
    assert front_end.run("(names) => names.filter(name => !(name in LiteGraph.registered_node_types))", ours) == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_loads_and_becomes_its_twin(path: Path, front_end: FrontEnd):
    front_end.run(LOAD, json.loads(path.read_text(encoding="utf-8")))
    assert front_end.run(UNKNOWN) == []
    assert front_end.run(CALM)
    twin = json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8"))
    assert front_end.run(PROMPT) == twin
    assert front_end.errors == []


@pytest.mark.weights
@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        (
            "dosing",
            {
                "Control Block Weights for pose": [512, 156],
                "depth hint": [128, 128],
                "pose hint": [128, 128],
                "without dosing": [128, 128],
                "with dosing": [128, 128],
                "what acted, without dosing": [720, 1398],
                "what acted, with dosing": [720, 1398],
            },
        ),
        ("make_control", {"without control": [128, 128], "with the new control": [128, 128]}),
    ],
)
def test_a_workflow_runs_to_its_end_and_nodes_show_their_pictures(
    name: str, pictures: dict[str, list[int]], front_end: FrontEnd
):
    front_end.run(LOAD, json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8")))
    front_end.page.wait_for_timeout(500)
    assert front_end.run(RUN) == []
    front_end.page.wait_for_function(SHOWN, arg=sorted(pictures))
    assert front_end.run(PICTURES) == pictures
    assert front_end.errors == []


def test_the_first_workflow_can_be_seen(front_end: FrontEnd, tmp_path: Path):
    workflow = json.loads((ROOT / "workflows" / "depth_pose.json").read_text(encoding="utf-8"))
    front_end.run(LOAD, workflow)
    front_end.page.wait_for_timeout(1000)  # a few frames
    front_end.page.screenshot(path=tmp_path / "depth_pose.png")
    pixels = np.asarray(Image.open(tmp_path / "depth_pose.png").convert("RGB"), dtype=np.float32)
    assert pixels.shape == (900, 1600, 3)
    on_canvas = pixels[150:850, 100:1500]
    assert on_canvas.std() > 5  # groups, nodes and links, not one dark plane


def test_a_node_shows_its_help_page(front_end: FrontEnd):
    front_end.run(LOAD, json.loads((ROOT / "workflows" / "depth_pose.json").read_text(encoding="utf-8")))
    front_end.run("() => app.canvas.selectNode(app.graph._nodes.find(node => node.type === 'ApplyControl'))")
    front_end.page.get_by_test_id("info-button").click()
    first_words = (ROOT / "web" / "docs" / "ApplyControl.md").read_text(encoding="utf-8").splitlines()[2].split(",")[0]
    front_end.page.get_by_text(first_words).wait_for()
    assert front_end.errors == []
