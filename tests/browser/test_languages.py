"""A page in another language: names, inputs and categories are in it, and the prompt that it sends is the same.

Front end 1.58 shows the words of packs in its own languages, which lack German. 1.32 lays its own words over a pack's,
so that it shows only those in a language that it has none in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import FrontEnd

pytestmark = [pytest.mark.browser, pytest.mark.host]

LOCALES = Path(__file__).resolve().parents[2] / "locales"
LANGUAGES = ("de", "es", "fr", "ja", "ko", "zh")
SHOWN = {"1.32": {"de"}, "1.58": {"es", "fr", "ja", "ko", "zh"}}
"""By the front end's version."""

SWITCH = "async (language) => { await app.extensionManager.setting.set('Comfy.Locale', language); }"
READY = "() => window.app?.extensionManager && window.LiteGraph?.registered_node_types.Annotate"
ADD = """() => {
    app.graph.clear();
    for (const kind of ['ApplyControl', 'Annotate']) app.graph.add(LiteGraph.createNode(kind));
    return app.graph._nodes.map(node => [node.title, ...node.inputs.map(input => input.label ?? input.localized_name)]);
}"""
SENT = "async () => Object.values((await app.graphToPrompt()).output).map(node => node.inputs)"


def test_every_language_is_tried():
    assert {path.name for path in LOCALES.iterdir() if path.is_dir()} == {"en", *LANGUAGES}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_page_in_this_language(language: str, each_front_end: FrontEnd):
    version = each_front_end.run("() => window.__COMFYUI_FRONTEND_VERSION__")
    if language not in SHOWN[version.rpartition(".")[0]]:
        pytest.skip(f"front end {version} does not show a pack's words in it")
    each_front_end.run(ADD)
    english = each_front_end.run(SENT)
    each_front_end.run(SWITCH, language)
    try:
        each_front_end.page.reload()
        each_front_end.page.wait_for_function(READY)
        table = json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))
        for node, words in zip(each_front_end.run(ADD), (table["ApplyControl"], table["Annotate"]), strict=True):
            assert node[0] == words["display_name"]
            assert set(node[1:]) == {given["name"] for given in words["inputs"].values()}
        assert each_front_end.run(SENT) == english
    finally:
        each_front_end.run(SWITCH, "en")
    assert each_front_end.errors == []
