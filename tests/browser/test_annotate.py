"""Annotate on the canvas: it shows the chosen annotator's parameters, and hiding the others changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from zeroconv.annotators import ANNOTATORS

if TYPE_CHECKING:
    from .conftest import FrontEnd

pytestmark = [pytest.mark.browser, pytest.mark.host]

ROOT = Path(__file__).resolve().parent.parent.parent
ALL = {f"{annotator.name}_{p.name}" for annotator in ANNOTATORS for p in annotator.parameters}

ADD = """() => {
    app.graph.clear();
    const node = LiteGraph.createNode('Annotate');
    app.graph.add(node);
    node.pos = [300, 200];
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [0, 0];
    app.canvas.setDirty(true, true);
}"""
CHOOSE = """(name) => {
    const [node] = app.graph._nodes;
    const widget = node.widgets.find(widget => widget.name === 'annotator');
    widget.value = name;
    widget.callback(name);
}"""
SHOWN = """() => app.graph._nodes[0].widgets
    .filter(widget => app.graph._nodes[0].isWidgetVisible(widget)).map(widget => widget.name)"""
HEIGHT = "() => [app.graph._nodes[0].size[1], app.graph._nodes[0].computeSize()[1]]"
PROMPT = "async () => (await app.graphToPrompt()).output"
SAVE = "() => app.graph.serialize()"
ROWS = "() => [...document.querySelectorAll('.lg-node-widget')].filter(row => row.offsetHeight > 0).length"
LOAD = "async (workflow) => { await app.loadGraphData(workflow); }"


def own(annotator: str) -> set[str]:
    """The widgets of this annotator."""
    (entry,) = (entry for entry in ANNOTATORS if entry.name == annotator)
    return {f"{annotator}_{p.name}" for p in entry.parameters}


def screenshot(front_end: FrontEnd, path: Path) -> np.ndarray:
    front_end.page.wait_for_timeout(500)  # a few frames
    front_end.page.screenshot(path=path)
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)


@pytest.mark.parametrize("annotator", [annotator.name for annotator in ANNOTATORS])
def test_only_the_chosen_annotators_parameters_are_shown(front_end: FrontEnd, annotator: str):
    front_end.run(ADD)
    front_end.run(CHOOSE, annotator)
    shown = set(front_end.run(SHOWN))
    assert shown & ALL == own(annotator)
    assert {"annotator", "resolution"} <= shown
    height, needed = front_end.run(HEIGHT)
    assert height == needed  # no empty rows, and none that are cut off
    assert front_end.errors == []


def test_the_canvas_draws_fewer_rows_for_fewer_parameters(front_end: FrontEnd, tmp_path: Path):
    front_end.run(ADD)
    front_end.run(CHOOSE, "canny")  # two parameters
    two = screenshot(front_end, tmp_path / "canny.png")
    front_end.run(CHOOSE, "inpaint")  # one
    one = screenshot(front_end, tmp_path / "inpaint.png")
    rows = np.abs(two - one).sum(axis=(1, 2)).nonzero()[0]
    assert len(rows) > 20  # what the node has lost is drawn no more


def test_hidden_parameters_keep_their_values_and_are_sent(front_end: FrontEnd):
    front_end.run(ADD)
    (before,) = front_end.run(PROMPT).values()
    front_end.run("() => { app.graph._nodes[0].widgets.find(w => w.name === 'canny_low').value = 33; }")
    front_end.run(CHOOSE, "inpaint")
    (sent,) = front_end.run(PROMPT).values()
    assert set(sent["inputs"]) >= ALL | {"annotator", "resolution"}
    assert list(before["inputs"]) == list(sent["inputs"])
    assert sent["inputs"]["canny_low"] == 33
    assert sent["inputs"]["annotator"] == "inpaint"


def test_a_saved_workflow_comes_back_as_it_was(front_end: FrontEnd):
    front_end.run(ADD)
    front_end.run(CHOOSE, "inpaint")
    front_end.run("() => app.graph._nodes[0].setSize([500, 700])")
    front_end.run("() => { app.graph._nodes[0].widgets.find(w => w.name === 'canny_high').value = 222; }")
    saved, prompt = front_end.run(SAVE), front_end.run(PROMPT)
    front_end.run(ADD)
    front_end.run(LOAD, saved)
    assert set(front_end.run(SHOWN)) & ALL == own("inpaint")
    assert front_end.run(PROMPT) == prompt
    again = front_end.run(SAVE)["nodes"][0]
    assert (again["size"], again["widgets_values"]) == (saved["nodes"][0]["size"], saved["nodes"][0]["widgets_values"])


def test_a_shipped_workflow_shows_its_annotators_parameters(front_end: FrontEnd):
    front_end.run(LOAD, json.loads((ROOT / "workflows" / "canny.json").read_text(encoding="utf-8")))
    shown = front_end.run(
        "() => { const node = app.graph._nodes.find(node => node.type === 'Annotate');"
        " return node.widgets.filter(widget => node.isWidgetVisible(widget)).map(widget => widget.name); }"
    )
    assert set(shown) & ALL == own("canny")
    assert front_end.errors == []


def test_a_parameter_that_a_link_sets_stays_in_sight(front_end: FrontEnd):
    front_end.run(ADD)
    front_end.run(
        "() => { const [node] = app.graph._nodes; const number = LiteGraph.createNode('PrimitiveFloat');"
        " app.graph.add(number); number.connect(0, node, node.inputs.findIndex(i => i.name === 'canny_low')); }"
    )
    front_end.run(CHOOSE, "inpaint")
    assert set(front_end.run(SHOWN)) & ALL == own("inpaint") | {"canny_low"}
    front_end.run(
        "() => { const [node] = app.graph._nodes;"
        " node.disconnectInput(node.inputs.findIndex(i => i.name === 'canny_low')); }"
    )
    assert set(front_end.run(SHOWN)) & ALL == own("inpaint")


def test_nothing_is_hidden_when_a_link_chooses_the_annotator(front_end: FrontEnd):
    front_end.run(ADD)
    front_end.run(
        "() => { const [node] = app.graph._nodes; const text = LiteGraph.createNode('PrimitiveString');"
        " app.graph.add(text);"
        " node.inputs.find(i => i.name === 'annotator').link = 99;"
        " node.onConnectionsChange(1, 0, true); }"
    )
    assert set(front_end.run(SHOWN)) & ALL == ALL
    front_end.run(ADD)


def test_nodes_2_show_the_chosen_annotators_parameters(front_end: FrontEnd):
    front_end.run(ADD)
    switch = "async (on) => { await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on); }"
    front_end.run(switch, True)
    try:
        for annotator in ("inpaint", "canny", "human_pose"):
            front_end.run(CHOOSE, annotator)
            front_end.page.wait_for_function(f"({ROWS})() === {2 + len(own(annotator))}", timeout=30_000)
            assert front_end.run("() => app.graph._nodes.length") == 1
    finally:
        front_end.run(switch, False)
    assert front_end.errors == []
