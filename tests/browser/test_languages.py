"""A page in another language: names, inputs and categories are in it, and the prompt that it sends is the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import FrontEnd

pytestmark = [pytest.mark.browser, pytest.mark.host]

SWITCH = "async (language) => { await app.extensionManager.setting.set('Comfy.Locale', language); }"
ADD = """() => {
    app.graph.clear();
    for (const kind of ['ApplyControl', 'Annotate']) app.graph.add(LiteGraph.createNode(kind));
    return app.graph._nodes.map(node => [node.title, ...node.inputs.map(input => input.label ?? input.localized_name)]);
}"""
SENT = "async () => Object.values((await app.graphToPrompt()).output).map(node => node.inputs)"


def test_a_page_in_german(front_end: FrontEnd):
    front_end.run(ADD)
    english = front_end.run(SENT)
    front_end.run(SWITCH, "de")
    try:
        front_end.page.reload()
        front_end.page.wait_for_function(
            "() => window.app?.extensionManager && window.LiteGraph?.registered_node_types.Annotate"
        )
        apply, annotate = front_end.run(ADD)
        assert apply[0] == "ControlNet anwenden (ZeroConv)"
        assert {"Modell", "ControlNet", "Bild", "Maske"} <= set(apply)
        assert annotate[0].startswith("ControlNet-Preprocessor: Tiefe, Pose")
        assert {"Preprocessor", "canny untere Schwelle"} <= set(annotate)
        assert front_end.run(SENT) == english
    finally:
        front_end.run(SWITCH, "en")
    assert front_end.errors == []
