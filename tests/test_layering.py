"""The import directions of the house, read from the source with `ast` and tried out with the host blocked."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("controlnet_core", "annotators", "lab", "nodes")
FOREIGN_TO_CORE = {"annotators", "lab", "nodes", "benchmarks", "devtools", "tests"}
HOST_MODULES = {
    "comfy", "comfy_api", "comfy_api_nodes", "comfy_config", "comfy_execution", "comfy_extras", "comfyui_version",
    "cuda_malloc", "execution", "folder_paths", "latent_preview", "main", "node_helpers", "nodes", "protocol", "server",
    "app", "api_server", "middleware", "utils",
}  # fmt: skip


def sources(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py"))


def imports(file: Path, text: str | None = None) -> list[str]:
    """What a file imports, anywhere in it: "torch.nn" for foreign modules, ".annotators.canny" for the pack's own."""
    tree = ast.parse(file.read_text(encoding="utf-8") if text is None else text)
    package = file.relative_to(ROOT).parts[:-1]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(node.module or "")
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1]
            assert node.level <= len(package) + 1, f"{file}:{node.lineno} imports from above the pack"
            named = [node.module] if node.module else [alias.name for alias in node.names]
            found += ["." + ".".join([*above, name]) for name in named]
    return found


def wrong_imports(file: Path, text: str | None = None) -> list[str]:
    """The imports of a file of the pack that its place does not allow."""
    part, in_host = file.relative_to(ROOT).parts[0], file.relative_to(ROOT).parts[:2] == ("nodes", "host")
    allowed = {
        "controlnet_core": {"controlnet_core"},
        "annotators": {"annotators"},
        "lab": {"lab", "controlnet_core", "annotators"},
        "nodes": {"nodes", "controlnet_core", "annotators", "lab"},
    }[part]
    wrong = []
    for name in imports(file, text):
        if name.startswith("."):
            if name[1:].split(".")[0] not in allowed:
                wrong.append(name)
        elif name.split(".")[0] in {"zeroconv", *PARTS}:
            wrong.append(name)  # the pack's own, by an absolute name: `nodes` would be ComfyUI's
        elif name.split(".")[0] in HOST_MODULES and not in_host:
            node_api = name == "comfy_api.latest" or name.startswith("comfy_api.latest.")
            if not (part == "nodes" and node_api):
                wrong.append(name)
    return wrong


@pytest.mark.parametrize("part", PARTS)
def test_import_directions(part: str):
    files = sources(part)
    assert files, f"{part} has no Python files"
    wrong = {str(file.relative_to(ROOT)): found for file in files if (found := wrong_imports(file))}
    assert not wrong


@pytest.mark.parametrize(
    ("file", "line", "wrong"),
    [
        ("controlnet_core/x.py", "import comfy.ops", ["comfy.ops"]),
        ("controlnet_core/x.py", "from ..annotators import canny", [".annotators"]),
        ("controlnet_core/training/x.py", "def f():\n    from ...nodes.host import adapter", [".nodes.host"]),
        ("controlnet_core/training/x.py", "from ..unet import UNet", []),
        ("annotators/x.py", "from .. import controlnet_core", [".controlnet_core"]),
        ("annotators/x.py", "import cv2", []),
        ("lab/x.py", "from ..controlnet_core import unet", []),
        ("lab/x.py", "from ..nodes import lab", [".nodes"]),
        ("nodes/x.py", "from comfy_api.latest import io, ui", []),
        ("nodes/x.py", "import folder_paths", ["folder_paths"]),
        ("nodes/x.py", "from nodes import MAX_RESOLUTION", ["nodes"]),
        ("nodes/x.py", "from zeroconv.lab import world", ["zeroconv.lab"]),
        ("nodes/x.py", "from ..devtools import demo", [".devtools"]),
        ("nodes/host/x.py", "import comfy.controlnet\nimport folder_paths", []),
        ("nodes/host/x.py", "from controlnet_core import unet", ["controlnet_core"]),
    ],
)
def test_the_rules_themselves(file: str, line: str, wrong: list[str]):
    assert wrong_imports(ROOT / file, line) == wrong


def test_the_core_looks_beside_itself_in_one_command_alone():
    """`python -m controlnet_core.data` makes hints by the annotators, and takes the lab's encoders, where they are."""
    beside = {file.name for file in sources("controlnet_core") if 'import_module(f"...' in file.read_text("utf-8")}
    assert beside == {"__main__.py"}
    assert "import_module" not in (ROOT / "controlnet_core" / "training" / "__main__.py").read_text("utf-8")


# -- the rooms of the core --------------------------------------------------------------------------------------------

GROUND = {"keys", "diffusion", "errors", "limits"}
"""Files that every room may stand on, and that stand on one another alone."""

ROOMS = {
    "networks": set(),
    "files": {"networks"},
    "dosing": {"networks"},
    "data": {"files", "networks"},
    "training": {"data", "files", "networks"},
}
"""Which rooms of the core may import which; each may import itself and the ground."""


def core_imports(text_of: dict[str, str] | None = None) -> dict[str, set[str]]:
    """Each file of the core, such as "files.loading", with the files of the core that it imports."""
    files = {
        ".".join(file.relative_to(ROOT / "controlnet_core").with_suffix("").parts): file
        for file in sources("controlnet_core")
    }
    files = {name.removesuffix(".__init__"): file for name, file in files.items() if name != "__init__"}
    found: dict[str, set[str]] = {}
    for name, file in files.items():
        found[name] = set()
        tree = ast.parse((text_of or {}).get(name) or file.read_text(encoding="utf-8"))
        package = file.relative_to(ROOT).parts[:-1]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *(node.module or "").split(".")]).strip(".")
                base = base.removeprefix("controlnet_core").strip(".")
                named = {".".join(filter(None, (base, alias.name))) for alias in node.names}
                found[name] |= {each for each in named if each in files} or ({base} & files.keys())
    return found


def wrong_rooms(found: dict[str, set[str]]) -> list[str]:
    """The imports between files of the core that its rooms do not allow, "a -> b" each."""

    def room(name: str) -> str:
        return name.split(".")[0]

    wrong = []
    for name, imported in found.items():
        for other in imported:
            ours, theirs = room(name), room(other)
            if ours == theirs or theirs in GROUND:
                continue
            if ours in GROUND or theirs not in ROOMS[ours]:
                wrong.append(f"{name} -> {other}")
    return wrong


def circle(found: dict[str, set[str]]) -> list[str]:
    """A circle of files that import one another, if there is one."""
    left = dict(found)
    while left:
        ends = [name for name, imported in left.items() if not imported & left.keys()]
        if not ends:
            return sorted(left)
        for name in ends:
            del left[name]
    return []


def test_rooms_of_the_core():
    found = core_imports()
    rooms = {name.split(".")[0] for name in found}
    assert rooms == ROOMS.keys() | GROUND
    assert not wrong_rooms(found)
    assert not circle(found)
    assert sum(map(len, found.values())) > 60  # it has read them


def test_the_rules_of_the_rooms_themselves():
    up = core_imports({"networks.unet": "from ..files import loading", "keys": "from .networks.unet import UNet"})
    assert sorted(wrong_rooms(up)) == ["keys -> networks.unet", "networks.unet -> files.loading"]
    assert {"networks.unet", "files.loading", "keys"} <= set(circle(up))
    inside = core_imports({"dosing.window": "from .strength import Strength"})
    assert not wrong_rooms(inside)
    assert {"dosing.window", "dosing.schedule", "dosing.strength"} <= set(circle(inside))


LOADER = f"""
import importlib.abc, runpy, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"blocked: {{name}}")

blocked = set()
sys.meta_path.insert(0, Block())
load = lambda: runpy.run_path({str(ROOT / "dev.py")!r})
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", LOADER + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("part", ["controlnet_core", "annotators"])
def test_core_and_annotators_import_without_host_and_each_other(part: str):
    """Every module of both imports with ComfyUI and the rest of the pack blocked."""
    modules = [
        ".".join(("zeroconv", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for file in sources(part)
        if file.name != "__main__.py"
    ]
    run(f"""
blocked |= {HOST_MODULES!r}
load()
import importlib
for module in {modules!r}:
    importlib.import_module(module)
others = [name for name in sys.modules if name.startswith("zeroconv.") and name.split(".")[1] != {part!r}]
assert not others, others
""")


def test_blocking_the_host_blocks():
    with pytest.raises(AssertionError, match="blocked: comfy"):
        run("blocked |= {'comfy'}\nimport comfy.ops")


def test_root_imports_nothing_heavy():
    """ComfyUI imports the root of every pack at its start: ours must cost it nothing."""
    heavy = {"torch", "cv2", "numpy", "PIL", "skimage", "scipy", "einops", "safetensors", "comfy_api"}
    loaded = run(f"load()\nprint(sorted({heavy!r} & set(sys.modules)))")
    assert loaded.strip() == "[]"


def test_root_is_not_on_the_path():
    assert ROOT not in [Path(entry or ".").resolve() for entry in sys.path]
    out = run("import os\nos.chdir(" + repr(str(ROOT)) + ")\nload()\nprint('controlnet_core' in sys.modules)\n"
              "import importlib.util\nprint(importlib.util.find_spec('controlnet_core'))")  # fmt: skip
    assert out.split() == ["False", "None"]


def test_the_pack_is_loaded_once():
    root = ROOT / "__init__.py"
    loaded = [name for name, module in list(sys.modules.items()) if getattr(module, "__file__", None) == str(root)]
    assert loaded == ["zeroconv"]


def test_source_is_readable_on_every_system():
    """Windows consoles and old tools read source as cp1252; keep to ASCII."""
    offending = [
        str(file.relative_to(ROOT))
        for part in (*PARTS, "devtools", "benchmarks", "tests")
        for file in sources(part)
        if not file.read_bytes().isascii()
    ]
    assert not offending
