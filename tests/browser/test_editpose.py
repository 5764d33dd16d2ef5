"""Edit Pose under the mouse: joints move, people come, go and are mirrored, and so do the prompt and the picture."""

from __future__ import annotations

import io
import json
import re
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from zeroconv.annotators.pose import LIMBS, draw_pose

from .conftest import EMPTY
from .test_browser import RUN

if TYPE_CHECKING:
    from .conftest import FrontEnd

pytestmark = [pytest.mark.browser, pytest.mark.host]

ADD = """(scene) => {
    const edit = LiteGraph.createNode('EditPose'), shown = LiteGraph.createNode('PreviewImage');
    edit.pos = [500, 120];
    shown.pos = [1050, 120];
    for (const node of [edit, shown]) app.graph.add(node);
    edit.connect(0, shown, 0);
    if (scene) {
        const lab = LiteGraph.createNode('LabScene');
        lab.pos = [120, 120];
        app.graph.add(lab);
        lab.widgets.find(widget => widget.name === 'seed').value = 5;
        lab.widgets.find(widget => widget.name === 'control_after_generate').value = 'fixed';
        lab.connect(0, edit, edit.findInputSlot('image'));
        lab.connect(4, edit, edit.findInputSlot('pose_keypoints'));
    }
}"""
NODE = "app.graph._nodes.find(node => node.type === 'EditPose')"
BOX = f"{NODE}.widgets.find(widget => widget.name === 'zeroconv_pose').element"
SEEN = f"() => {BOX}.isConnected && {BOX}.querySelector('canvas').getBoundingClientRect().height > 100"
TEXT = (
    "async () => Object.values((await app.graphToPrompt()).output).find(n => n.class_type === 'EditPose').inputs.pose"
)
OUTPUT = "(type) => app.nodeOutputs[app.graph._nodes.find(node => node.type === type).id]"
# Where on the screen a point of a canvas of such a size is drawn.
SCREEN = f"""([x, y, canvasWidth, canvasHeight]) => {{
    const {{left, top, width, height}} = {BOX}.querySelector('canvas').getBoundingClientRect();
    const zoom = Math.min(width / canvasWidth, height / canvasHeight);
    return [left + width / 2 + (x - canvasWidth / 2) * zoom, top + height / 2 + (y - canvasHeight / 2) * zoom, zoom];
}}"""
PIXEL = f"""([x, y, canvasWidth, canvasHeight]) => {{
    const canvas = {BOX}.querySelector('canvas');
    const at = [x / canvasWidth * canvas.width, y / canvasHeight * canvas.height];
    return [...canvas.getContext('2d').getImageData(...at, 1, 1).data].slice(0, 3);
}}"""
WRIST = 4


@pytest.fixture
def page(empty: FrontEnd) -> FrontEnd:
    """The front end with a scene, its people and Edit Pose."""
    empty.run(ADD, True)
    empty.page.wait_for_function(SEEN)
    return empty


def pose(page: FrontEnd) -> dict[str, Any]:
    """The frame that would be sent."""
    return json.loads(page.run(TEXT))


def body(frame: dict[str, Any], who: int = 0) -> np.ndarray:
    return np.array(frame["people"][who]["pose_keypoints_2d"]).reshape(18, 3)


def press(page: FrontEnd, name: str) -> None:
    page.page.locator(".zeroconv-pose button", has_text=re.compile(f"^{name}$")).click()


def drag(page: FrontEnd, frame: dict[str, Any], start: np.ndarray, by: tuple[int, int]) -> None:
    """Drag what is at a point of the frame by so many pixels of its canvas."""
    x, y, zoom = page.run(SCREEN, [*map(float, start[:2]), frame["canvas_width"], frame["canvas_height"]])
    page.page.mouse.move(x, y)
    page.page.mouse.down()
    page.page.mouse.move(x + by[0] * zoom, y + by[1] * zoom, steps=5)
    page.page.mouse.up()


def run(page: FrontEnd) -> dict[str, Any]:
    """Run the graph; the frame that Edit Pose then told the page."""
    assert page.run(RUN) == []
    page.page.wait_for_function(f"() => ({OUTPUT})('EditPose')?.pose && ({OUTPUT})('PreviewImage')?.images")
    return page.run(OUTPUT, "EditPose")["pose"][0]["frames"][0]


def hint(page: FrontEnd) -> np.ndarray:
    """The picture that the last run gave."""
    (file,) = page.run(OUTPUT, "PreviewImage")["images"]
    url = f"{page.page.url.rstrip('/')}/view?{urllib.parse.urlencode(file)}"
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=60) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))


def test_a_joint_follows_the_mouse_into_the_prompt_and_the_picture(page: FrontEnd):
    assert page.run(TEXT) == ""
    frame = run(page)
    before, found = hint(page), body(frame)
    assert before.any() and found[WRIST, 2] == 1
    drag(page, frame, found[WRIST], (12, -9))
    moved = body(pose(page))
    np.testing.assert_allclose(moved[WRIST, :2], found[WRIST, :2] + (12, -9), atol=0.6)  # of a pixel of 128
    others = np.arange(18) != WRIST
    np.testing.assert_allclose(moved[others], found[others], atol=1e-4)
    run(page)
    after = hint(page)
    assert (after != before).any()
    np.testing.assert_allclose(after, 255 * draw_pose([moved], 128, 128), atol=1)
    shown = "(text) => [...document.querySelectorAll('textarea')].some(area => area.value === text)"
    page.page.wait_for_function(shown, arg=page.run(TEXT))
    press(page, "undo")
    assert page.run(TEXT) == ""


def test_people_come_and_go_and_are_mirrored(page: FrontEnd):
    frame = run(page)
    press(page, "add")
    added = body(pose(page), 1)
    assert len(pose(page)["people"]) == 2 and (added[:, 2] == 1).all()
    drag(page, frame, added[WRIST], (-6, -20))
    put = body(pose(page), 1)
    press(page, "mirror")
    mirrored = body(pose(page), 1)
    twice = put[:, 0].min() + put[:, 0].max()
    np.testing.assert_allclose(mirrored[7], (twice - put[WRIST, 0], put[WRIST, 1], 1), atol=0.11)
    np.testing.assert_allclose(mirrored[WRIST], (twice - put[7, 0], put[7, 1], 1), atol=0.11)
    press(page, "remove")
    np.testing.assert_allclose(body(pose(page)), body(frame), atol=1e-4)
    assert len(pose(page)["people"]) == 1
    for _ in range(4):
        press(page, "undo")
    assert page.run(TEXT) == ""


def test_a_person_moves_as_a_whole_and_a_joint_goes_and_comes(page: FrontEnd):
    frame = run(page)
    found = body(frame)
    page.page.keyboard.down("Shift")
    drag(page, frame, found[WRIST], (5, 4))
    page.page.keyboard.up("Shift")
    moved = body(pose(page))
    seen = found[:, 2] > 0
    np.testing.assert_allclose(moved[seen, :2] - found[seen, :2], np.broadcast_to((5, 4), (seen.sum(), 2)), atol=0.6)
    x, y, _ = page.run(SCREEN, [*moved[WRIST, :2], 128, 128])
    page.page.mouse.dblclick(x, y)
    assert body(pose(page))[WRIST].tolist() == [0, 0, 0]
    x, y, _ = page.run(SCREEN, [4, 4, 128, 128])
    page.page.mouse.dblclick(x, y)
    body_now = body(pose(page))
    came = (body_now[:, 2] > 0) & (np.where(np.arange(18) == WRIST, 0, moved[:, 2]) == 0)
    assert came.sum() == 1
    np.testing.assert_allclose(body_now[came], [[4, 4, 1]], atol=0.6)


def test_the_people_are_drawn_over_the_picture(page: FrontEnd):
    run(page)
    page.page.wait_for_function(f"() => ({PIXEL})([2, 2, 128, 128]).some(value => value > 0)")  # a wall of the scene
    frame = run(page)
    joint = body(frame)[WRIST]
    red, green, blue = page.run(PIXEL, [*map(float, joint[:2]), 128, 128])
    assert (red, green, blue) == (170, 255, 0)  # the colour of joint 4


def test_a_file_is_loaded_and_saved(page: FrontEnd, tmp_path: Path):
    """One of CMU's, 25 joints and no canvas, which Python reads; edited it is one of 18 with a canvas."""
    joints = np.random.default_rng(3).uniform(20, 108, (25, 2)).round(1)
    numbers = np.concatenate([joints, np.ones((25, 1))], axis=1).reshape(-1).tolist()
    file = tmp_path / "cmu.json"
    file.write_text(json.dumps({"version": 1.3, "people": [{"pose_keypoints_2d": numbers}]}), encoding="utf-8")
    with page.page.expect_file_chooser() as chooser:
        press(page, "load")
    chooser.value.set_files(file)
    page.page.wait_for_function(f"() => {NODE}.widgets.find(widget => widget.name === 'pose').value")
    assert page.run(TEXT) == file.read_text(encoding="utf-8")
    press(page, "add")  # not before it is known who is there
    assert page.run(TEXT) == file.read_text(encoding="utf-8")
    frame = run(page)
    press(page, "add")
    assert [len(one["pose_keypoints_2d"]) for one in pose(page)["people"]] == [54, 54]
    assert (pose(page)["canvas_width"], pose(page)["canvas_height"]) == (128, 128)
    np.testing.assert_allclose(body(pose(page)), body(frame), atol=1e-4)
    with page.page.expect_download() as download:
        press(page, "save")
    assert json.loads(Path(download.value.path()).read_text(encoding="utf-8")) == pose(page)


def test_the_workflow_keeps_the_text_and_nothing_else(page: FrontEnd):
    press(page, "add")
    assert page.run(TEXT) == ""  # not before it is known who is connected
    run(page)
    press(page, "add")
    text = page.run(TEXT)
    saved = page.run("() => app.graph.serialize()")
    (node,) = (node for node in saved["nodes"] if node["type"] == "EditPose")
    assert node["widgets_values"] == [text]
    assert "zeroconv_pose" not in json.dumps(saved)
    page.run("async (workflow) => { await app.loadGraphData(workflow); }", saved)
    page.page.wait_for_function(SEEN)
    assert page.run(TEXT) == text
    neck = body(pose(page))[1]
    canvas = pose(page)["canvas_width"], pose(page)["canvas_height"]
    assert page.run(PIXEL, [*map(float, neck[:2]), *canvas]) == [255, 85, 0]


def test_what_is_typed_is_drawn(each_front_end: FrontEnd):
    each_front_end.run(EMPTY, False)
    each_front_end.run(ADD, False)
    each_front_end.page.wait_for_function(SEEN)
    nose = {"pose_keypoints_2d": [30.0, 20.0, 1.0] + 51 * [0.0]}
    text = json.dumps({"people": [nose], "canvas_width": 64, "canvas_height": 96})
    each_front_end.page.locator("textarea").first.fill(text)
    assert each_front_end.run(PIXEL, [30, 20, 64, 96]) == [255, 0, 0]
    assert each_front_end.run(TEXT) == text
    assert each_front_end.errors == []


def test_the_page_draws_the_limbs_of_the_hint():
    source = (Path(__file__).resolve().parents[2] / "web" / "editpose.js").read_text(encoding="utf-8")
    (limbs,) = re.findall(r"const LIMBS = (\[.*?\]);", source, re.DOTALL)
    assert tuple(map(tuple, json.loads(re.sub(r",\s*\]$", "]", limbs)))) == LIMBS
