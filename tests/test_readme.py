"""What README lists is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zeroconv.annotators import ANNOTATORS
from zeroconv.annotators.networks import NETWORKS
from zeroconv.controlnet_core.files.kinds import KINDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_number_of_annotators_is_said():
    assert f"with {len(ANNOTATORS)} annotators;" in README


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_each_networks_weights_licence_and_use_are_listed(network):
    users = ", ".join(f"`{annotator.name}`" for annotator in ANNOTATORS if network.name in annotator.networks)
    size = round(sum(file.size for file in network.files) / 1e6)
    row = (
        f"| {network.files[-1].repository}: {network.files[-1].name} | {users} | {size} MB | {network.licence} | "
        f"{'yes' if network.commercial else 'no'} |"
    )
    assert row in README
    assert network.commercial, "no default weights whose licence forbids commercial use"


def test_each_picture_is_there():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert len(pictures) >= 8
    for picture in pictures:
        assert (ROOT / picture).is_file(), picture


def test_each_test_that_is_named_is_there():
    for name in re.findall(r"`(?:tests/\w+/)?(test_\w+\.py)`", README):
        assert list((ROOT / "tests").rglob(name)), name


@pytest.mark.parametrize("kind", ["ControlNet Union", "Control-LoRA", "T2I-Adapter", "ControlLLLite", "difference"])
def test_each_kind_of_control_has_its_row(kind: str):
    assert any(kind.split()[-1] in form.name for record in KINDS for form in record.formats)
    assert re.search(rf"^\| [^|]*{kind}", README, re.MULTILINE)


def test_the_lists_of_commands_are_dev_pys():
    commands = re.findall(r"^    python dev\.py (\w+)", (ROOT / "dev.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"demo", "test", "serve", "lab", "hints", "bench", "fuzz", "setup"} == set(commands)
