"""Every error of the pack has a text that any log can print, of bounded length."""

from __future__ import annotations

import importlib
import io
import pkgutil

import pytest

from zeroconv import controlnet_core, lab
from zeroconv.controlnet_core.errors import ZeroConvError, printable
from zeroconv.controlnet_core.files.loading import LoadError
from zeroconv.controlnet_core.limits import TEXT
from zeroconv.controlnet_core.training.log import LogError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("depth.safetensors: fine", "depth.safetensors: fine"),
        ("caf\u00e9 \u65e5\u672c", "caf\u00e9 \u65e5\u672c"),
        (b"lat\xe9.safetensors".decode("utf-8", "surrogateescape"), r"lat\udce9.safetensors"),
        ("\ud800", r"\ud800"),
        ("two\nlines\x00\x1b[31m", r"two\nlines\x00\x1b[31m"),
        ("turned \u202e round", r"turned \u202e round"),
        ("", ""),
    ],
)
def test_what_cannot_be_printed_is_written_out(text: str, shown: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stderr", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert printable(text) == shown
    assert str(ZeroConvError(text)) == shown


def test_what_this_output_cannot_print_is_written_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stderr", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert printable("caf\u00e9 \u65e5") == "caf\u00e9 \\u65e5"


@pytest.mark.parametrize("letter", ["x", "\ud800", "\U0010ffff"])
def test_a_long_text_keeps_its_beginning_and_its_end(letter: str):
    said = str(LoadError(f"a.safetensors: {letter * 10**6}: download it again"))
    assert len(said) <= TEXT
    assert said.startswith("a.safetensors: ") and said.endswith(": download it again")


def test_all_errors_of_the_core_and_the_lab_are_of_one_class():
    found = {}
    for package in (controlnet_core, lab):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.endswith("__main__"):
                loaded = importlib.import_module(module.name)
                found |= {
                    f"{module.name}.{name}": value
                    for name, value in vars(loaded).items()
                    if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == module.name
                }
    assert len(found) >= 25
    assert [name for name, error in found.items() if not issubclass(error, ZeroConvError)] == []
    assert all(issubclass(error, ValueError) for error in found.values())
    assert issubclass(LogError, RuntimeError)
