"""The pages for developers: their tables name what is there, their links lead somewhere, their example runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from zeroconv import controlnet_core

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = (*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def links(page: Path) -> list[str]:
    """Where the links of a page lead, pictures included."""
    return re.findall(r"\]\(([^)\s]+)\)", text_of(page))


def anchors(page: Path) -> set[str]:
    """What a code host makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def resolves(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    return target.is_relative_to(ROOT) and target.exists() and (not anchor or anchor in anchors(target))


def rows(page: Path) -> list[tuple[str, str, list[str]]]:
    """The idea, the file and the names of each row of the tables that have these columns."""
    found = []
    for table in re.findall(r"^\| idea.*\| file \| name \|\n\|[-|]+\n((?:\|.*\n)+)", text_of(page), re.MULTILINE):
        for row in table.splitlines():
            idea, file, names = (cell.strip() for cell in row.strip("|").split("|"))
            (link,) = re.findall(r"\]\(([^)]+)\)", file)
            found.append((idea, link, re.findall(r"`([^`]+)`", names)))
    return found


def defined(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """The names that a module's body defines, those of a class as Class.name; what it imports is not among them."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from defined(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from (prefix + name.id for name in ast.walk(target) if isinstance(name, ast.Name))


def names_of(file: Path) -> set[str]:
    return set(defined(ast.parse(text_of(file)).body))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path):
    found = [link for link in links(page) if not link.startswith(("http://", "https://"))]
    assert len(found) > 5
    assert not [link for link in found if not resolves(page, link)]


@pytest.mark.parametrize("link", ["nowhere.md", "architecture.md#no-such-heading", "../../outside.md"])
def test_a_link_that_leads_nowhere_is_found(link: str):
    assert resolves(ARCHITECTURE, "architecture.md#the-paper-in-the-code")
    assert not resolves(ARCHITECTURE, link)


def test_the_table_of_the_papers_ideas_is_long_enough_to_be_one():
    found = rows(ARCHITECTURE)
    assert len(found) >= 30
    assert all(names for _, _, names in found)
    ideas = " ".join(idea for idea, _, _ in found).lower()
    assert all(word in ideas for word in ("zero convolution", "loss", "transfer", "guidance", "lite", "convergence"))


@pytest.mark.parametrize(("idea", "file", "names"), rows(ARCHITECTURE), ids=[row[0] for row in rows(ARCHITECTURE)])
def test_each_idea_is_where_the_table_says(idea: str, file: str, names: list[str]):
    there = names_of((ARCHITECTURE.parent / file).resolve())
    assert not [name for name in names if name not in there]


def test_names_that_a_file_only_imports_or_uses_do_not_count():
    there = names_of(ROOT / "controlnet_core" / "networks" / "controlnet.py")
    assert {"ControlNet", "ControlNet.forward", "CONNECTIONS", "ControlBranch.kind"} <= there
    assert not {"Residuals", "UNetConfig", "forward", "convolution"} & there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_in_prose_are_there(page: Path):
    """NEW, NAME and NodeId stand for what a reader adds."""
    named = re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)`", text_of(page))
    rooms = (ROOT, ROOT / "controlnet_core")
    made = {name for name in named if re.search(r"NEW|NAME|NodeId", name)}
    assert not [name for name in named if name not in made and not any((room / name).exists() for room in rooms)]


def test_the_picture_of_the_rooms_names_files_that_are_there():
    picture = text_of(ARCHITECTURE).split("```")[1]
    files = set(re.findall(r"\w+\.py", picture))
    assert len(files) >= 12
    parts = ("controlnet_core", "annotators", "nodes")
    there = {file.name for part in parts for file in (ROOT / part).rglob("*.py")}
    assert files <= there
    assert max(map(len, picture.splitlines())) <= 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_ascii(page: Path):
    assert page.read_bytes().isascii()


# -- the core as a library --------------------------------------------------------------------------------------------


def test_the_example_of_the_core_runs_without_the_pack():
    """In the docstring, as a program does that has the pack's folder and no ComfyUI."""
    code = "import doctest, controlnet_core as core; failed, tried = doctest.testmod(core); print(failed, tried)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    failed, tried = map(int, done.stdout.split()[-2:])
    assert failed == 0, done.stdout
    assert tried >= 15


def test_the_core_names_what_it_imports_and_nothing_else():
    tree = ast.parse(text_of(ROOT / "controlnet_core" / "__init__.py"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))  # when they are asked for, not before
    imported = [alias.name for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(imported) == sorted(controlnet_core.__all__)
    assert all(hasattr(controlnet_core, name) for name in controlnet_core.__all__)
    assert len(imported) <= 20
