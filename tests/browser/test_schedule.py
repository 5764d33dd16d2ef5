"""Control Schedule under the mouse: the page draws Python's curve, points move, and so does the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from zeroconv.controlnet_core.dosing.schedule import CURVES, Schedule, parse

from .test_browser import RUN

if TYPE_CHECKING:
    from .conftest import FrontEnd

pytestmark = [pytest.mark.browser, pytest.mark.host]

ADD = """() => {
    const node = LiteGraph.createNode('ControlSchedule');
    node.pos = [500, 120];
    app.graph.add(node);
}"""
NODE = "app.graph._nodes.find(node => node.type === 'ControlSchedule')"
BOX = f"{NODE}.widgets.find(widget => widget.name === 'zeroconv_curve').element"
SEEN = f"() => {BOX}.isConnected && {BOX}.querySelector('svg')?.getBoundingClientRect().height > 100"
SENT = """async () => Object.values((await app.graphToPrompt()).output)
    .find(node => node.class_type === 'ControlSchedule').inputs"""
SET = f"""([name, value]) => {{
    const widget = {NODE}.widgets.find(widget => widget.name === name);
    widget.value = value;
    widget.callback(value);
}}"""
# The line and the points as they are drawn, in shares of the paper: that is where the grid is.
DRAWN = f"""() => {{
    const svg = {BOX}.querySelector('svg');
    const paper = svg.querySelector('.grid').getBBox();
    const share = (x, y) => [(x - paper.x) / paper.width, 1 - (y - paper.y) / paper.height];
    const line = svg.querySelector('.line').getAttribute('d').slice(1).split('L').map(point => point.split(','));
    return {{
        line: line.map(([x, y]) => share(x, y)),
        points: [...svg.querySelectorAll('circle')].map(dot => share(dot.cx.baseVal.value, dot.cy.baseVal.value)),
        words: [...svg.querySelectorAll('text')].map(text => text.textContent),
    }};
}}"""
# Where on the screen a share of the paper is.
SCREEN = f"""([across, up]) => {{
    const {{left, bottom, width, height}} = {BOX}.querySelector('.grid').getBoundingClientRect();
    return [left + across * width, bottom - up * height];
}}"""
SAYS = f"() => {BOX}.querySelector('p')?.textContent"


@pytest.fixture
def page(empty: FrontEnd) -> FrontEnd:
    """The front end with one Control Schedule."""
    empty.run(ADD)
    empty.page.wait_for_function(SEEN)
    return empty


def set_to(page: FrontEnd, **values: str) -> None:
    for name, value in values.items():
        page.run(SET, [name, value])


def wait_for_points(page: FrontEnd, *points: tuple[float, float]) -> dict[str, Any]:
    """What is drawn once the points lie there, in shares of the paper, and the line goes through them."""
    near = f"""(points) => {{
        const svg = {BOX}.querySelector('svg');
        const drawn = svg && ({DRAWN})();
        const near = ([x, y], [a, b]) => Math.hypot(x - a, y - b) < 0.005;
        return drawn?.points.length === points.length && points.every((point, i) =>
            near(drawn.points[i], point) && drawn.line.some(at => near(at, point)));
    }}"""
    page.page.wait_for_function(near, arg=points, timeout=20_000)
    return page.run(DRAWN)


def drag(page: FrontEnd, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Drag from one share of the paper to another."""
    page.page.mouse.move(*page.run(SCREEN, start))
    page.page.mouse.down()
    page.page.mouse.move(*page.run(SCREEN, end), steps=6)
    page.page.mouse.up()


def same(line: list[list[float]], schedule: Schedule, right: float = 1.0, top: float = 1.0) -> bool:
    """Whether a drawn line has the schedule's values all along, and goes from end to end."""
    assert line[0][0] == pytest.approx(0, abs=1e-6)
    assert line[-1][0] == pytest.approx(1, abs=1e-6)
    assert len(line) > 200
    jumps = [keyframe.position for keyframe in schedule.keyframes]
    for across, up in line:
        # The page draws hundredths of a pixel; beside a jump either value is right.
        if min(abs(across * right - jump) for jump in jumps) > 1e-4 * right:
            assert up * top == pytest.approx(schedule.at(across * right), abs=1e-3 * top)
    return True


@pytest.mark.parametrize("name", CURVES)
def test_each_named_curve_is_pythons(page: FrontEnd, name: str):
    set_to(page, curve=name)
    points = [(keyframe.position, keyframe.value) for keyframe in CURVES[name]]
    drawn = wait_for_points(page, *points)
    assert same(drawn["line"], Schedule(CURVES[name]))
    assert "part of the control's window" in drawn["words"]


def test_a_text_is_drawn_and_so_are_the_other_widgets(page: FrontEnd):
    text = "0: 1 hold\n4: 2 ease\n9: 0.5"
    set_to(page, per_image="1, 0.25", curve="custom", keyframes=text, unit="step")
    drawn = wait_for_points(page, (0, 0.5), (4 / 12, 1), (9 / 12, 0.25))
    assert same(drawn["line"], Schedule(parse(text), "step"), right=12, top=2)
    assert {"step", "12", "2", "pictures: 1, 0.25"} <= set(drawn["words"])
    set_to(page, keyframes="0: much")
    page.page.wait_for_function(f'() => ({SAYS})()?.includes(\'such as "0.5: 0.3 ease"; found "0: much"\')')
    set_to(page, curve="bell")
    page.page.wait_for_function(f"() => ({SAYS})()?.startsWith('the curve \"bell\" runs from 0 to 1 and unit is step')")
    drag(page, (0.5, 0.5), (0.6, 0.6)) if page.run(SEEN) else None
    assert page.run(SENT)["curve"] == "bell"


def test_a_point_of_a_named_curve_follows_the_mouse_into_the_prompt(page: FrontEnd):
    assert page.run(SENT)["curve"] == "fade out"
    wait_for_points(page, (0, 1), (1, 0))
    drag(page, (1, 0), (0.6, 0.25))
    text = "0: 1\n0.6: 0.25"
    assert page.run(SENT) == {"curve": "custom", "keyframes": text, "unit": "window", "per_image": ""}
    assert same(wait_for_points(page, (0, 1), (0.6, 0.25))["line"], Schedule(parse(text)))
    typed = "(text) => [...document.querySelectorAll('textarea')].some(area => area.value === text)"
    page.page.wait_for_function(typed, arg=text)
    drag(page, (0, 1), (0.9, 0.5))  # not beyond its neighbour
    assert page.run(SENT)["keyframes"] == "0.59: 0.5\n0.6: 0.25"


def test_points_come_and_go_and_words_stay(page: FrontEnd):
    set_to(page, curve="bell")
    wait_for_points(page, (0, 0), (0.5, 1), (1, 0))
    page.page.mouse.dblclick(*page.run(SCREEN, (0.75, 0.8)))
    *around, put = (parse(page.run(SENT)["keyframes"])[i] for i in (0, 1, 3, 2))
    assert tuple(around) == CURVES["bell"]
    # The browser tells of a double click in whole pixels.
    assert (put.position, put.value) == (pytest.approx(0.75, abs=0.015), pytest.approx(0.8, abs=0.015))
    assert put.interpolation == "ease"
    new = (put.position, put.value)
    wait_for_points(page, (0, 0), (0.5, 1), new, (1, 0))
    page.page.mouse.dblclick(*page.run(SCREEN, (0.5, 1)))
    assert page.run(SENT)["keyframes"] == f"0: 0 ease\n{put.position}: {put.value} ease\n1: 0"
    wait_for_points(page, (0, 0), new, (1, 0))


def test_steps_are_dragged_one_by_one(page: FrontEnd):
    set_to(page, curve="custom", keyframes="0: 1\n8: 0", unit="step")
    wait_for_points(page, (0, 1), (0.8, 0))
    drag(page, (0.8, 0), (0.93, 0.5))
    assert page.run(SENT)["keyframes"] == "0: 1\n9: 0.5"
    wait_for_points(page, (0, 1), (9 / 12, 0.5))  # and there is room to go on


def test_the_workflow_keeps_the_values_and_nothing_else(page: FrontEnd):
    wait_for_points(page, (0, 1), (1, 0))
    drag(page, (0, 1), (0.2, 0.75))
    sent = page.run(SENT)
    saved = page.run("() => app.graph.serialize()")
    assert saved["nodes"][0]["widgets_values"] == ["custom", "0.2: 0.75\n1: 0", "window", ""]
    page.run("async (workflow) => { await app.loadGraphData(workflow); }", saved)
    page.page.wait_for_function(SEEN)
    wait_for_points(page, (0.2, 0.75), (1, 0))
    assert page.run(SENT) == sent


def test_what_a_link_gives_is_drawn_after_a_run(page: FrontEnd):
    page.run(f"""() => {{
        const text = LiteGraph.createNode('PrimitiveStringMultiline');
        text.pos = [60, 120];
        app.graph.add(text);
        text.widgets[0].value = '0: 0.5\\n0.5: 1';
        text.connect(0, {NODE}, {NODE}.findInputSlot('keyframes'));
    }}""")
    set_to(page, curve="custom")
    page.page.wait_for_function(f"() => ({SAYS})() === 'Run once: then the curve can be seen.'")
    assert page.run(RUN) == []
    drawn = wait_for_points(page, (0, 0.5), (0.5, 1))
    assert same(drawn["line"], Schedule(parse("0: 0.5, 0.5: 1")))
    drag(page, (0.5, 1), (0.7, 0.2))
    assert page.run(SENT)["keyframes"] == ["2", 0]
