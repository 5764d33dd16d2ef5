"""Somebody double-clicks the canvas and types a word: a node of ours that fits is among the first three."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import FrontEnd

pytestmark = [pytest.mark.browser, pytest.mark.host]

PREPROCESSOR = {"ControlNet Preprocessor: depth, pose, canny ... (ZeroConv)"}
CONTROL = {"Apply ControlNet (ZeroConv)", "Load ControlNet (ZeroConv)"}
TYPED = {
    **dict.fromkeys(("openpose", "depth", "canny", "edge", "hed", "lineart", "preprocessor", "hint"), PREPROCESSOR),
    **dict.fromkeys(("scribble", "pose", "normal", "segmentation", "mlsd", "tile", "inpaint"), PREPROCESSOR),
    **dict.fromkeys(("controlnet", "t2i adapter", "control lora"), CONTROL),
    "train": {"Train ControlNet (ZeroConv)"},
    "dataset": {"Make Control Dataset (ZeroConv)"},
}
"""What may be typed, and the nodes that are then to be found, all of them."""

ITEMS = ".p-autocomplete-option, [data-testid=result-item]"
"""What a search lists, in front ends of 2025 and in newer ones."""
FIRST = f"""() => [...document.querySelectorAll('{ITEMS}')].slice(0, 3)
    .map(item => item.innerText.trim().split('\\n')[0].trim())"""
EMPTY = "() => app.graph.clear()"  # a double click on a node is none on the canvas
OVER = ".p-dialog-mask, [data-testid=dialog-overlay]"
"""What lies over the canvas while there is a dialog, and takes its clicks."""
NAMES = """({word, gives, limit}) => {
    const search = app.extensionManager._p._s.get('nodeDef').nodeSearchService;
    const filters = gives ? [{filterDef: search.outputTypeFilter, value: gives}] : [];
    return search.searchNode(word, filters, {limit: limit ?? 64}).map(definition => definition.name);
}"""
SECONDS = 20


@pytest.mark.parametrize("word", TYPED)
def test_a_word_finds_the_node(word: str, each_front_end: FrontEnd):
    page = each_front_end.page
    each_front_end.run(EMPTY)
    page.mouse.dblclick(800, 600)
    page.locator("input:focus").wait_for(timeout=SECONDS * 1000)
    page.keyboard.type(word)
    found = f"(wanted) => {{ const first = ({FIRST})(); return wanted.every(name => first.includes(name)); }}"
    with suppress(Exception):  # what is listed instead says more than that it took too long
        page.wait_for_function(found, arg=sorted(TYPED[word]), timeout=SECONDS * 1000)
    first = each_front_end.run(FIRST)
    page.keyboard.press("Escape")
    page.locator(OVER).wait_for(state="detached", timeout=SECONDS * 1000)
    assert set(first) >= TYPED[word], first
    assert each_front_end.errors == []


def test_a_search_loses_nothing_and_keeps_its_first_its_filters_and_its_limit(each_front_end: FrontEnd):
    found = each_front_end.run(NAMES, {"word": "canny"})
    assert found[:2] == ["Canny", "Annotate"]  # the host's own node of that name comes first
    tiles = each_front_end.run(NAMES, {"word": "tile"})
    assert {"Annotate", "VAEDecodeTiled", "VAEEncodeTiled"} <= set(tiles)
    assert len(set(tiles)) == len(tiles)
    assert "Annotate" not in each_front_end.run(NAMES, {"word": "canny", "gives": "MODEL"})
    assert len(each_front_end.run(NAMES, {"word": "controlnet", "limit": 3})) == 3
    assert not {"Annotate", "ApplyControl"} & set(each_front_end.run(NAMES, {"word": "upscale model"}))
