"""web/text.js: a node that hands a text to the page shows it, and neither prompt nor workflow keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import FrontEnd

pytestmark = [pytest.mark.browser, pytest.mark.host, pytest.mark.weights]

WORKFLOW = Path(__file__).resolve().parent.parent.parent / "workflows" / "make_control.json"
TEXT = "(type) => app.graph._nodes.find(node => node.type === type).widgets?.find(w => w.name === 'zeroconv_text')"


def test_reports_are_shown_on_their_nodes(front_end: FrontEnd):
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    front_end.run("async (workflow) => { await app.loadGraphData(workflow); }", workflow)
    before = front_end.run("async () => (await app.graphToPrompt()).output")
    front_end.run("async () => { await app.queuePrompt(0); }")
    for node, words in (("InspectControl", "family: SD1.x"), ("SaveControlNet", "zeroconv/my_control")):
        front_end.page.wait_for_function(f"(type) => ({TEXT})(type)?.element.value", arg=node)
        assert words in front_end.run(f"(type) => ({TEXT})(type).element.value", node)
    assert front_end.run("async () => (await app.graphToPrompt()).output") == before
    assert "zeroconv_text" not in json.dumps(front_end.run("() => app.graph.serialize()"))
    assert front_end.errors == []
