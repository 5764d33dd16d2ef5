"""Somebody double-clicks the canvas and types a word: a node of ours that fits is among the first three."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from zeroconv.annotators import ANNOTATORS

if TYPE_CHECKING:
    from .conftest import FrontEnd

pytestmark = [pytest.mark.browser, pytest.mark.host]

PREPROCESSOR = "ControlNet Preprocessor: depth, pose, canny ... (ZeroConv)"
LOADER = "Load ControlNet (ZeroConv)"
TYPED = {
    "openpose": "OpenPose pose hint (ZeroConv)",
    "pose": "OpenPose pose hint (ZeroConv)",
    "depth": "Depth map hint (ZeroConv)",
    "canny": "Canny edge hint (ZeroConv)",
    "edge": "Canny edge hint (ZeroConv)",
    "hed": "HED soft edge hint (ZeroConv)",
    "lineart": "Lineart hint (ZeroConv)",
    "scribble": "Scribble hint (ZeroConv)",
    "normal": "Normal map hint (ZeroConv)",
    "segmentation": "Segmentation hint (ZeroConv)",
    "mlsd": "M-LSD (mlsd) lines hint (ZeroConv)",
    "tile": "Tile hint (ZeroConv)",
    "inpaint": "Inpaint hint (ZeroConv)",
    "hint": "Tile hint (ZeroConv)",
    "preprocessor": PREPROCESSOR,
    "controlnet": "ControlNet",
    "t2i adapter": "T2I-Adapter (ZeroConv)",
    "control lora": "Control-LoRA (ZeroConv)",
    "train": "Train ControlNet (ZeroConv)",
    "dataset": "Make Control Dataset (ZeroConv)",
}
"""What may be typed, and an entry that is then to be found."""

ITEMS = ".p-autocomplete-option, [data-testid=result-item]"
"""What a search lists, in front ends of 2025 and in newer ones."""
FIRST = f"""() => [...document.querySelectorAll('{ITEMS}')].slice(0, 3)
    .map(item => item.innerText.trim().split('\\n')[0].trim())"""
EMPTY = "() => app.graph.clear()"  # a double click on a node is none on the canvas
OVER = ".p-dialog-mask, [data-testid=dialog-overlay]"
"""What lies over the canvas while there is a dialog, and takes its clicks."""
LAST = """() => {
    const node = app.graph._nodes.at(-1), chosen = node?.widgets.find(widget => widget.name === 'annotator');
    return node && {type: node.serialize().type, sent: node.comfyClass, title: node.title, annotator: chosen?.value,
        described: node.constructor.nodeData.name, rows: node.widgets.filter(w => !w.hidden).map(w => w.name)};
}"""
SECONDS = 60


def type_word(front_end: FrontEnd, word: str) -> list[str]:
    """The first three that a double click and this word list."""
    page = front_end.page
    front_end.run(EMPTY)
    for _ in range(SECONDS // 6):  # on a busy machine two clicks may lie too far apart to be a double click
        page.mouse.dblclick(800, 600)
        with suppress(Exception):
            page.locator("input:focus").wait_for(timeout=6000)
            break
    page.keyboard.type(word)
    with suppress(Exception):  # what is listed instead says more than that it took too long
        page.wait_for_function(f"(wanted) => ({FIRST})().includes(wanted)", arg=TYPED[word], timeout=SECONDS * 1000)
    return front_end.run(FIRST)


@pytest.mark.parametrize("word", TYPED)
def test_a_word_finds_the_node(word: str, each_front_end: FrontEnd):
    first = type_word(each_front_end, word)
    each_front_end.page.keyboard.press("Escape")
    each_front_end.page.locator(OVER).wait_for(state="detached", timeout=SECONDS * 1000)
    assert TYPED[word] in first
    assert each_front_end.errors == []


SENT = "() => app.graphToPrompt().then(({output}) => Object.values(output).map(node => node.class_type))"


@pytest.mark.parametrize(
    ("word", "node", "annotator"),
    [("lineart", "Annotate", "lineart_realistic"), ("t2i adapter", "LoadControlNet", None)],
)
def test_an_entry_puts_down_the_packs_node(word: str, node: str, annotator: str | None, each_front_end: FrontEnd):
    page = each_front_end.page
    type_word(each_front_end, word)
    page.locator(ITEMS).filter(has_text=TYPED[word]).first.click()
    page.wait_for_function("() => app.graph._nodes.length === 1")
    page.mouse.click(800, 500)  # newer front ends wait for a place to put it down
    put = each_front_end.run(LAST)
    assert (put["type"], put["sent"], put["described"], put["annotator"]) == (node, node, node, annotator)
    assert put["title"] in (PREPROCESSOR, LOADER)
    assert not [name for name in put["rows"] if name.startswith("canny_")]  # another annotator's parameters
    assert each_front_end.run(SENT) == [node]
    assert each_front_end.errors == []


def test_the_entries_are_annotators():
    """What web/search.js names, Annotate offers."""
    source = (Path(__file__).resolve().parents[2] / "web" / "search.js").read_text(encoding="utf-8")
    named = re.findall(r'^  "[^"]+": "(\w+)",$', source, re.MULTILINE)
    assert len(named) == 11 and set(named) <= {annotator.name for annotator in ANNOTATORS}
