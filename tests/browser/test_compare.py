"""Compare Images under the mouse: to its left one picture, to its right the other."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from .test_browser import RUN

if TYPE_CHECKING:
    from .conftest import FrontEnd

pytestmark = [pytest.mark.browser, pytest.mark.host]

ADD = """() => {
    const lab = LiteGraph.createNode('LabScene'), compare = LiteGraph.createNode('CompareImages');
    lab.pos = [120, 120];
    compare.pos = [500, 120];
    for (const node of [lab, compare]) app.graph.add(node);
    lab.connect(0, compare, 0);
    lab.connect(1, compare, 1);
}"""
BOX = """app.graph._nodes.find(node => node.type === 'CompareImages')
    .widgets.find(widget => widget.name === 'zeroconv_compare').element"""
SEEN = f"() => {BOX}.isConnected && {BOX}.getBoundingClientRect().height > 100"
SHOWN = f"() => [...{BOX}.querySelectorAll('img')].every(image => image.naturalWidth === 128)"
PLACE = f"() => {{ const {{x, y, width, height}} = {BOX}.getBoundingClientRect(); return [x, y, width, height]; }}"


@pytest.fixture
def page(empty: FrontEnd) -> FrontEnd:
    """The front end with a scene and its depth in Compare Images."""
    empty.run(ADD)
    empty.page.wait_for_function(SEEN, timeout=30_000)
    return empty


def test_the_mouse_moves_the_line_between_the_pictures(page: FrontEnd):
    assert page.run(RUN) == []
    page.page.wait_for_function(SHOWN, timeout=30_000)
    x, y, width, height = page.run(PLACE)
    for share in (0.3, 0.7):
        page.page.mouse.move(x + share * width, y + height / 2)
        page.page.wait_for_timeout(200)
        shot = page.page.screenshot(clip={"x": x, "y": y, "width": width, "height": height})
        seen = np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)
        side = min(width, height)  # of the square pictures, in the middle of the node
        line, left, right = (round(at) for at in (share * width, (width - side) / 2, (width + side) / 2))
        rows = slice(round(height / 2 - 0.4 * side), round(height / 2 + 0.4 * side))
        coloured = (np.ptp(seen[rows], axis=2) > 12).mean(axis=0)
        assert coloured[left + 4 : line - 4].min() > 0.2  # the scene
        assert coloured[line + 4 : right - 4].max() == 0  # its depth is grey
