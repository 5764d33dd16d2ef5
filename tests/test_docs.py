"""The pages of docs/ and the core's own example: links lead somewhere, and what is named is there."""

from __future__ import annotations

import ast
import doctest
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]


def links(page: Path) -> list[str]:
    """What a page links to, without what lies on other servers."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    return [link for link in found if not link.startswith(("http://", "https://"))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    assert links(page)
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path.replace("\\_", "_")).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{target.name} has no heading {anchor}"


def rows() -> list[tuple[str, str, list[str]]]:
    """The rows of the table of the paper's ideas: the idea, the file, the names."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.split("| idea of the paper | file | name |")[1].split("\n\n")[0]
    found = []
    for line in table.strip().splitlines()[1:]:
        idea, file, names = (cell.strip() for cell in line.strip("|").split("|"))
        (link,) = re.findall(r"\]\(\.\./([^)]+)\)", file)
        found.append((idea, link, re.findall(r"`([^`]+)`", names)))
    return found


def defined(tree: ast.AST, name: str) -> bool:
    """Whether a module defines a name, or a class in it the name behind the dot: a method or a field."""
    outer, _, inner = name.partition(".")
    for node in ast.iter_child_nodes(tree):
        names = [getattr(node, "name", "")]
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        if outer in names and (not inner or defined(node, inner)):
            return True
    return False


@pytest.mark.parametrize(("idea", "file", "names"), rows())
def test_each_idea_is_where_the_table_says(idea: str, file: str, names: list[str]):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert names, idea
    assert all(defined(tree, name) for name in names), f"{idea}: {names} in {file}"


def test_the_table_is_read():
    ideas = " ".join(idea for idea, _, _ in rows()).lower()
    assert len(rows()) >= 20
    assert all(word in ideas for word in ("zero convolution", "loss", "transfer", "guidance", "lite", "convergence"))
    tree = ast.parse("class A:\n    x: int = 1\n    def f(self): ...\nB = 2")
    assert [defined(tree, name) for name in ("A.x", "A.f", "B", "A.y", "C", "B.x")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


def test_the_example_of_the_core_runs():
    import torch

    from zeroconv import controlnet_core

    # As somebody imports it who uses the core alone.
    sys.modules["controlnet_core"] = controlnet_core
    enabled = torch.is_grad_enabled()
    try:
        result = doctest.testmod(controlnet_core)
    finally:
        torch.set_grad_enabled(enabled)
        del sys.modules["controlnet_core"]
    assert result.attempted > 10
    assert result.failed == 0


def test_the_core_names_what_it_gives():
    from zeroconv import controlnet_core

    assert all(hasattr(controlnet_core, name) for name in controlnet_core.__all__)
    assert len(controlnet_core.__all__) <= 20
