"""What README and the pages that it leads to list is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zeroconv.annotators import ANNOTATORS
from zeroconv.annotators.networks import NETWORKS
from zeroconv.controlnet_core.files.kinds import KINDS

ROOT = Path(__file__).resolve().parent.parent
README, ANNOTATORS_PAGE, CONTROLS_PAGE = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/annotators.md", "docs/controls.md")
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_number_of_annotators_is_said():
    said = f"with {len(ANNOTATORS)} annotators;"
    assert said in README and said in ANNOTATORS_PAGE


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_each_networks_weights_licence_and_use_are_listed(network):
    users = ", ".join(f"`{annotator.name}`" for annotator in ANNOTATORS if network.name in annotator.networks)
    size = max(1, round(sum(file.size for file in network.files) / 1e6))
    row = (
        f"| {network.files[-1].repository}: {network.files[-1].name} | {users} | {size} MB | {network.licence} | "
        f"{'yes' if network.commercial else 'no'} |"
    )
    assert row in ANNOTATORS_PAGE
    assert network.commercial, "no default weights whose licence forbids commercial use"


def test_each_picture_is_there():
    pictures = [
        page.parent / picture
        for page in PAGES
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert len(pictures) >= 8
    for picture in pictures:
        assert picture.is_file(), picture


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_test_that_is_named_is_there(page: Path):
    for name in re.findall(r"`(?:tests/\w+/)*(test_\w+\.py)`", page.read_text(encoding="utf-8")):
        assert list((ROOT / "tests").rglob(name)), name


def test_a_newcomer_reads_no_more_than_this():
    assert len(README.split()) <= 900


def test_each_page_is_led_to():
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in README, page.name


@pytest.mark.parametrize("kind", ["ControlNet Union", "Control-LoRA", "T2I-Adapter", "ControlLLLite", "difference"])
def test_each_kind_of_control_has_its_row(kind: str):
    assert any(kind.split()[-1] in form.name for record in KINDS for form in record.formats)
    assert re.search(rf"^\| [^|]*{kind}", CONTROLS_PAGE, re.MULTILINE)


def test_the_lists_of_commands_are_dev_pys():
    commands = re.findall(r"^    python dev\.py (\w+)", (ROOT / "dev.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"demo", "test", "serve", "lab", "hints", "bench", "fuzz", "locales", "marks", "setup"} == set(commands)
