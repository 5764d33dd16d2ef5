"""The languages of the pages: `locales/`, written from the nodes' own descriptions and one table of translations.

The table has what is said in English, word for word, and the same in every other language: a text that is changed in
the code is missing in it until its row is changed, too. Front ends show English where a file has nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..annotators import PARAMETERS
from . import DEV, ROOT, DevError
from .comfyui import HostServer

FOLDER = ROOT / "locales"
LANGUAGES = ("zh", "ja", "ko", "de", "fr", "es")
PACK = " (ZeroConv)"
"""At the end of every node's name, in all languages."""

OWNERS = {f"{annotator.name}_{parameter.name}": (annotator.name, parameter.name) for annotator, parameter in PARAMETERS}
"""The annotator and the parameter that an input is named for."""


@dataclass
class Table:
    """Rows of `names` (inputs, outputs, groups, categories) and `texts`: English, then each language's own."""

    names: Mapping[str, Mapping[str, str]]
    texts: Mapping[str, Mapping[str, str]]
    asked: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)

    @property
    def left(self) -> set[str]:
        """What is in the table, and nothing asked for it."""
        return {*self.names, *self.texts} - self.asked

    def name(self, word: str, language: str) -> str:
        """A name in a language; that of an annotator's parameter has the annotator's own before it."""
        annotator, parameter = OWNERS.get(word, ("", word))
        return f"{annotator} {self._row(self.names, parameter, language)}".strip()

    def text(self, text: str, language: str) -> str:
        """A text in a language; of several lines, each by itself, or the word that it begins with."""
        if "\n" not in text:
            return self._row(self.texts, text, language)
        lines = []
        for line in text.split("\n"):
            word, _, rest = line.partition(": ")
            known = word in self.names
            lines.append(f"{self.name(word, language)}: {rest}" if known else self.text(line, language))
        return "\n".join(lines)

    def _row(self, rows: Mapping[str, Mapping[str, str]], english: str, language: str) -> str:
        self.asked.add(english)
        if language in rows.get(english, {}):
            return rows[english][language]
        self.missing.add(english)
        return english


def read() -> Table:
    """The table as it is on disk."""
    return Table(**json.loads((FOLDER / "table.json").read_text(encoding="utf-8")))


def files(nodes: Mapping[str, Mapping[str, Any]], table: Table) -> dict[str, str]:
    """What is to be in each file of `locales/`, for nodes as the host describes them at /object_info."""
    written = {"en/nodeDefs.json": _json({name: _node(node) for name, node in nodes.items()})}
    words = sorted({word for node in nodes.values() for word in node["category"].split("/")[1:]})
    for language in LANGUAGES:
        told = {name: _node(node, table, language) for name, node in nodes.items()}
        written[f"{language}/nodeDefs.json"] = _json(told)
        categories = {word: table.name(word, language) for word in words}
        written[f"{language}/main.json"] = _json({"nodeCategories": categories})
    return written


def _node(node: Mapping[str, Any], table: Table | None = None, language: str = "en") -> dict[str, Any]:
    def name(word: str) -> str:
        return word if table is None else table.name(word, language)

    def text(english: str) -> str:
        return english if table is None else table.text(english, language)

    inputs = {}
    for part in ("required", "optional"):
        for word, (_, *options) in node["input"].get(part, {}).items():
            said = options[0].get("tooltip") if options else None
            inputs[word] = {"name": name(word), **({"tooltip": text(said)} if said else {})}
    return {
        "display_name": text(node["display_name"].removesuffix(PACK)) + PACK,
        "description": text(node["description"]),
        "inputs": inputs,
        "outputs": {str(i): {"name": name(word)} for i, word in enumerate(node["output_name"])},
    }


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def described(host: HostServer) -> dict[str, dict[str, Any]]:
    """The host's description of the pack's nodes by their ids."""
    return {name: node for name, node in host.get("/object_info").items() if node["python_module"].endswith("zeroconv")}


def main(arguments: list[str]) -> int:
    """Write the files; raises DevError with what the table lacks, and what is in it for nothing."""
    argparse.ArgumentParser(prog="dev.py locales", description=__doc__).parse_args(arguments)
    table = read()
    with HostServer(DEV / "locales") as host:
        written = files(described(host), table)
    for name, content in written.items():
        (FOLDER / name).parent.mkdir(exist_ok=True)
        (FOLDER / name).write_text(content, encoding="utf-8")
    wrong = [f"missing: {text}" for text in sorted(table.missing)] + [
        f"left over: {text}" for text in sorted(table.left)
    ]
    if wrong:
        raise DevError("locales/table.json is not that of the nodes:\n  " + "\n  ".join(wrong))
    print(f"{len(written)} files in {FOLDER}")
    return 0
