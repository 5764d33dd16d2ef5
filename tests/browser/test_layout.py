"""Every workflow can be read as it opens, on a screen of 1600 x 1000, in both ways in which the front end draws nodes.

ZEROCONV_FRONT_END names the folder of a second front end (`static` in the package comfyui-frontend-package), for which
all of it is done once more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .conftest import opened
from .test_browser import RUN, UNKNOWN

if TYPE_CHECKING:
    from .conftest import FrontEnd

pytestmark = [pytest.mark.browser, pytest.mark.host]

ROOT = Path(__file__).resolve().parent.parent.parent
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
SHORT = ("canny", "compare", "depth_pose", "dosing", "make_control")  # run in seconds, with no file of the user's
READABLE = 0.6  # below this zoom the canvas draws no text

WIDE = ("compare", "dosing")  # too many columns for a page that leaves a quarter of the screen empty around them

LOAD = """async ([workflow, vue, from = {}]) => {
    await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue);
    await app.extensionManager.setting.set('Comfy.Minimap.Visible', false);
    await app.loadGraphData(workflow, true, true, null, from);
    document.querySelectorAll('.p-toast').forEach(toast => toast.remove());
}"""
# What newer front ends say of files that the user has still to get; it lies over the canvas until it is closed.
CLOSE = "() => document.querySelector('[data-testid=error-overlay-dismiss]')?.click()"
BACK = """async () => {
    await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false);
    await app.extensionManager.setting.set('Comfy.Minimap.Visible', true);
}"""
DRAWN = """(vue) => !vue
    || document.querySelectorAll('[data-node-id]').length === app.graph._nodes.length"""
# Boxes as they are on the screen, in pixels of the page: the canvas draws the ones, the page lays out the others.
BOXES = """(vue) => {
    const {scale, offset} = app.canvas.ds, {left, top} = app.canvas.canvas.getBoundingClientRect();
    return app.graph._nodes.map(node => {
        const [x, y, width, height] = node.boundingRect;
        let box = [(x + offset[0]) * scale + left, (y + offset[1]) * scale + top, width * scale, height * scale];
        if (vue) {
            const {x, y, width, height} = document.querySelector(`[data-node-id="${node.id}"]`).getBoundingClientRect();
            box = [x, y, width, height];
        }
        // Nodes 2.0 before front end 1.34 draw an empty body below a folded node.
        if (node.flags.collapsed) box[3] = LiteGraph.NODE_TITLE_HEIGHT * scale;
        return {name: `${node.id} ${node.title}`, box};
    });
}"""
# What lies over a point of the canvas, if it is neither the canvas nor a node.
OVER = """([x, y]) => {
    const element = document.elementFromPoint(x, y);
    const ours = '#graph-canvas, [data-node-id], .dom-widget, [data-testid="transform-pane"]';
    return element?.closest(ours) ? null : element?.outerHTML.slice(0, 200) ?? 'nothing: it is off the screen';
}"""


@pytest.fixture(scope="module", params=["host_server", "newer_host_server"])
def screen(request: pytest.FixtureRequest) -> Iterator[FrontEnd]:
    """Each front end on a screen of 1600 x 1000."""
    with opened(request.getfixturevalue(request.param), height=1000) as page:
        yield page
        page.run(BACK)  # the server keeps settings, for other pages too


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the screenshots are left."""
    return tmp_path_factory.mktemp("screens")


def load(screen: FrontEnd, name: str, vue: bool, **source: str) -> None:
    screen.run(LOAD, [json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8")), vue, source])
    screen.page.wait_for_function(DRAWN, arg=vue)
    screen.page.wait_for_timeout(500)  # sizes settle in a few frames
    screen.run(CLOSE)


def leave(screen: FrontEnd, file: Path) -> None:
    version = screen.run("() => window.__COMFYUI_FRONTEND_VERSION__")
    screen.page.screenshot(path=file.with_name(f"{file.name}_{version}.png"))


def overlaps(nodes: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The pairs of nodes that cover each other, by a pixel or more."""

    def meet(a: list[float], b: list[float]) -> bool:
        return all(a[i] + a[i + 2] > b[i] + 1 and b[i] + b[i + 2] > a[i] + 1 for i in (0, 1))

    return [(a["name"], b["name"]) for a, b in combinations(nodes, 2) if meet(a["box"], b["box"])]


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_can_be_read_as_it_opens(name: str, vue: bool, screen: FrontEnd, pictures: Path):
    load(screen, name, vue)
    leave(screen, pictures / f"{name}_{'nodes2' if vue else 'canvas'}")
    assert screen.run("() => app.canvas.ds.scale") >= READABLE
    nodes = screen.run(BOXES, vue)
    assert overlaps(nodes) == []
    for node in nodes:
        x, y, width, height = node["box"]
        for corner in (
            (x + 4, y + 4),
            (x + width - 4, y + 4),
            (x + 4, y + height - 4),
            (x + width - 4, y + height - 4),
        ):
            assert screen.run(OVER, corner) is None, node
    assert set(screen.run(UNKNOWN)) <= {"CheckpointLoaderSimple", "LoadControlNet"}  # files that the note links
    assert screen.errors == []


@pytest.mark.parametrize("name", [name for name in WORKFLOWS if name not in WIDE])
def test_a_workflow_can_be_read_as_the_template_browser_opens_it(name: str, screen: FrontEnd):
    load(screen, name, vue=False, openSource="template")  # newer front ends choose the view themselves
    assert screen.run("() => app.canvas.ds.scale") >= READABLE


@pytest.mark.weights
@pytest.mark.parametrize("name", SHORT)
def test_no_node_grows_over_another_when_it_has_run(name: str, screen: FrontEnd, pictures: Path):
    load(screen, name, vue=False)
    assert screen.run(RUN) == []
    for vue in (False, True):
        screen.run("(vue) => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)", vue)
        screen.page.wait_for_function(DRAWN, arg=vue)
        screen.page.wait_for_timeout(1500)  # the pictures come
        leave(screen, pictures / f"{name}_run_{'nodes2' if vue else 'canvas'}")
        assert overlaps(screen.run(BOXES, vue)) == []
    assert screen.errors == []
