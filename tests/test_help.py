"""The help pages: one for each node, true to its inputs and outputs, and served where the front end looks."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from zeroconv.devtools.comfyui import HostServer

DOCS = Path(__file__).resolve().parent.parent / "web" / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_say_what_a_node_takes_gives_and_is_good_for(page: Path):
    text = page.read_text(encoding="utf-8")
    assert re.match(r"# \w+", text)
    assert re.search(r"^## Outputs?$", text, re.MULTILINE)
    assert re.search(r"^## Example$", text, re.MULTILINE)
    assert "## Inputs" in text or "It has no inputs." in text
    assert "](" not in text  # no links: a page must be whole without the net


@pytest.mark.host
def test_every_node_has_its_page_and_every_page_its_node(host_server: HostServer):
    nodes = _nodes(host_server)
    assert sorted(nodes) == [page.stem for page in PAGES]
    for node in nodes:
        # where the front end looks when there is no page for the user's language
        url = f"{host_server.url}/extensions/zeroconv/docs/{node}.md"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=60) as answer:
            assert answer.read() == (DOCS / f"{node}.md").read_bytes()


@pytest.mark.host
def test_pages_list_each_input_with_its_default_and_each_output(host_server: HostServer):
    for node, described in _nodes(host_server).items():
        text = (DOCS / f"{node}.md").read_text(encoding="utf-8")
        inputs = {**described["input"].get("required", {}), **described["input"].get("optional", {})}
        rows = [row.split("|")[1:3] for row in re.findall(r"^\| `.*$", text, re.MULTILINE)]
        # a row may be about two inputs: "`start`, `end` | 0.0, 1.0"
        defaults = {
            name: said for names, values in rows for name, said in zip(re.findall(r"`(\w+)`", names), values.split(","))
        }
        assert set(defaults) == set(inputs), node
        for name, (_, *options) in inputs.items():
            default = options[0].get("default") if options else None
            if isinstance(default, str):
                assert defaults[name].strip() == default, f"{node}: {name}"
            elif isinstance(default, (int, float)) and not isinstance(default, bool):
                assert float(defaults[name].split()[0]) == pytest.approx(default, rel=1e-3), f"{node}: {name}"
        for output in described["output_name"]:
            assert f"`{output}`" in text.partition("## Output")[2], f"{node}: {output}"


def _nodes(host_server: HostServer) -> dict[str, dict]:
    """The host's description of the pack's nodes by their ids."""
    known = host_server.get("/object_info")
    return {name: node for name, node in known.items() if node["python_module"].endswith("zeroconv")}
