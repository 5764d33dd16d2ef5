"""The languages: every text of every node has its row in the table, every row its text, and the files are theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from zeroconv.devtools import locales
from zeroconv.devtools.locales import FOLDER, LANGUAGES, Table

if TYPE_CHECKING:
    from zeroconv.devtools.comfyui import HostServer

SPECIAL = set("{}@|")
"""Characters by which the front end puts in other things than what is written."""
ROWS = [*(row for rows in (locales.read().names, locales.read().texts) for row in rows.items())]


@pytest.mark.host
def test_table_and_nodes_have_the_same_texts_and_the_files_are_written_from_them(host_server: HostServer):
    table = locales.read()
    written = locales.files(locales.described(host_server), table)
    assert (table.missing, table.left) == (set(), set()), "change locales/table.json and run: python dev.py locales"
    on_disk = {f"{file.parent.name}/{file.name}": file.read_text(encoding="utf-8") for file in FOLDER.glob("*/*.json")}
    assert on_disk == written, "run: python dev.py locales"


@pytest.mark.host
def test_the_host_serves_them(host_server: HostServer):
    served = host_server.get("/i18n")
    assert set(served) == {"en", *LANGUAGES}
    assert served["de"]["nodeDefs"]["ApplyControl"]["display_name"] == "ControlNet anwenden (ZeroConv)"
    assert served["fr"]["nodeCategories"]["apply"] == "appliquer"


def test_each_row_has_each_language():
    assert len(ROWS) > 300
    for english, row in ROWS:
        assert sorted(row) == sorted(LANGUAGES), english
        assert all(said.strip() == said and said for said in row.values()), english
        assert not SPECIAL & set(english + "".join(row.values())), english
        assert not any(said == english for said in row.values()) or len(english.split()) < 3, english


def test_what_must_stay_as_it_is_written_is_in_every_language():
    """Numbers, file names and the values that a list offers: a reader looks for them on the screen."""
    kept = ("extra_model_paths.yaml", "*.jsonl", "batch_size * accumulation", '"0.5: 0.3 ease"', "cfg", "ldm", "0.999")
    for english, row in ROWS:
        for word in kept:
            if word in english:
                assert all(word in said for said in row.values()), english


def test_the_table_knows_what_it_lacks_and_what_nobody_asks_for():
    table = Table({"low": {"de": "unten"}, "old": {"de": "alt"}}, {"Yes.": {"de": "Ja."}})
    assert table.name("canny_low", "de") == "canny unten"
    assert table.text("low: canny (5 MB).\nYes.", "de") == "unten: canny (5 MB).\nJa."
    assert table.text("No.", "de") == "No."
    assert (table.missing, table.left) == ({"No."}, {"old"})
