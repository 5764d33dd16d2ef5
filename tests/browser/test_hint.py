"""The hint on the nodes that apply it: shown after a run, in the room that there was, with what the widgets mean."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .test_browser import RUN

if TYPE_CHECKING:
    from .conftest import FrontEnd

pytestmark = [pytest.mark.browser, pytest.mark.host, pytest.mark.weights]

ROOT = Path(__file__).resolve().parent.parent.parent
LOAD = """async ([workflow, seed]) => {
    await app.loadGraphData(workflow);
    const widget = (type, name) =>
        app.graph._nodes.find(node => node.type === type).widgets.find(widget => widget.name === name);
    widget('KSampler', 'steps').value = 1;
    widget('LabScene', 'seed').value = seed; // the server keeps what it has, and shows nothing of it again
}"""
NODE = "title => app.graph._nodes.find(node => node.title.startsWith(title))"
BOX = f"(title => ({NODE})(title).widgets.find(widget => widget.name === 'zeroconv_hint').element)"
SEEN = f"title => {BOX}(title).isConnected && {BOX}(title).getBoundingClientRect().height > 20"
SAYS = f"title => {BOX}(title).textContent.trim()"
SHOWS = f"title => {BOX}(title).querySelector('img').naturalWidth"
SIZE = f"title => [...({NODE})(title).size]"
# Nodes 2.0 finds the sizes of its nodes in the frames after it has drawn them.
SETTLED = """async () => {
    const sizes = () => JSON.stringify(app.graph._nodes.map(node => [...node.size]));
    for (let before = null; before !== sizes();) {
        before = sizes();
        await new Promise(resolve => setTimeout(resolve, 1000));
    }
}"""
SET = f"""([title, name, value]) => {{
    const widget = ({NODE})(title).widgets.find(widget => widget.name === name);
    widget.value = value;
    widget.callback?.(value);
}}"""
# The grey of a point of the shown hint, in shares of it.
PIXEL = f"""([title, x, y]) => {{
    const image = {BOX}(title).querySelector('img');
    const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
    const context = canvas.getContext('2d');
    context.drawImage(image, 0, 0);
    return context.getImageData(x * canvas.width, y * canvas.height, 1, 1).data[0];
}}"""
SEEDS = count(2_000_000)
DEPTH, POSE, APPLY = "Stack Controls: depth", "Stack Controls: pose", "Apply"


@pytest.fixture
def page(empty: FrontEnd) -> FrontEnd:
    """The workflow of depth and pose, with one step."""
    workflow = json.loads((ROOT / "workflows" / "depth_pose.json").read_text(encoding="utf-8"))
    empty.run(LOAD, [workflow, next(SEEDS)])
    empty.page.wait_for_function(SEEN, arg=DEPTH, timeout=30_000)
    empty.run(SETTLED)
    return empty


def run(page: FrontEnd) -> dict[str, Any]:
    """Run; what the nodes say then."""
    assert page.run(RUN) == []
    page.page.wait_for_function(SHOWS, arg=POSE, timeout=30_000)
    page.page.wait_for_timeout(300)
    return {title: page.run(SAYS, title) for title in (DEPTH, POSE, APPLY)}


def test_hints_are_shown_where_they_are_stacked_and_nothing_grows(page: FrontEnd):
    assert page.run(SAYS, DEPTH) == "After a run: the hint as the control sees it."
    assert not page.run(SHOWS, DEPTH)
    before = [page.run(SIZE, title) for title in (DEPTH, POSE, APPLY)]
    said = run(page)
    whole = "128x128. A picture of another shape gets its middle.\nActs all the time: in every block."
    assert said == {
        DEPTH: whole, POSE: whole, APPLY: "The hints of a stack are shown where they are stacked."
    }  # fmt: skip
    assert [page.run(SHOWS, title) for title in (DEPTH, POSE)] == [128, 128]
    assert page.run(PIXEL, [DEPTH, 0.5, 0.99]) > 200  # the floor before our feet
    assert page.run(PIXEL, [POSE, 0.02, 0.02]) == 0
    assert [page.run(SIZE, title) for title in (DEPTH, POSE, APPLY)] == before


def test_what_the_widgets_say_is_shown_and_nothing_of_it_is_saved(page: FrontEnd):
    run(page)
    for name, value in (("end", 0.5), ("guidance", "cond_only"), ("resize", "pad")):
        page.run(SET, [DEPTH, name, value])
    page.run(SET, [POSE, "strength", 0])
    said = run(page)
    assert said[DEPTH] == (
        "128x128. A picture of another shape gets all of it, with black borders.\n"
        "Acts from 0 % to 50 % of sampling: in every block, for the prompt alone, not the negative one."
    )
    assert said[POSE].endswith("Never acts: its strength, its mask or its schedule is 0.")
    assert "zeroconv_hint" not in json.dumps(page.run("() => app.graph.serialize()"))
    assert "zeroconv_hint" not in json.dumps(page.run("async () => (await app.graphToPrompt()).output"))
