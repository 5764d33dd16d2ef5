"""What importing the pack costs: no image library and no network library comes with it, only with what needs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {
    "cv2", "skimage", "scipy", "transformers", "kornia", "controlnet_aux", "huggingface_hub", "diffusers",
    "matplotlib", "sklearn", "torchvision", "timm",
}  # fmt: skip
MOST = 20
"""Modules that are neither the pack's nor already the host's; on ComfyUI 0.3.75 there is none beside the pack's 72."""

LATE = {
    "controlnet_core.training.loop", "controlnet_core.training.checkpoint", "nodes.host.training",
    "nodes.host.watching", "annotators.networks.depth", "annotators.networks.people",
}  # fmt: skip
"""Files of ours that nobody needs before a node runs: ComfyUI starts without them."""
OWN = 145
"""Modules of ours at the start, packages among them; each is a file to find, read and run."""

COUNT = f"""
LATE = {sorted(LATE)}
"""
COUNT += """
import importlib.util, json, sys
def load(name, folder):
    spec = importlib.util.spec_from_file_location(
        name, folder + "/__init__.py", submodule_search_locations=[folder]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
def said(before, name):
    new = sorted({one.partition(".")[0] for one in set(sys.modules) - before} - {name})
    print(json.dumps({
        "foreign": [one for one in new if one not in sys.stdlib_module_names],
        "count": len([one for one in set(sys.modules) - before if one.partition(".")[0] != name]),
        "own": len([one for one in sys.modules if one.partition(".")[0] == name]),
        "late": [one for one in LATE if f"{name}.{one}" in sys.modules],
    }))
"""

HOSTED = """
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, COMFY)
import comfy.options
comfy.options.enable_args_parsing()
import asyncio, folder_paths, nodes, comfy_extras.nodes_custom_sampler
folder_paths.set_input_directory(INPUT)  # where the pack puts its examples
from comfy_api.latest import ComfyExtension
# The host has some of them loaded. Here the pack finds none, and whoever asks for one is told off.
for name in [name for name in sys.modules if name.partition(".")[0] in HEAVY]:
    del sys.modules[name]
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise AssertionError(f"{name} is imported with the pack")
sys.meta_path.insert(0, Guard())
before = set(sys.modules)
async def collect():
    extension = await load("zeroconv", ROOT).comfy_entrypoint()
    return await extension.get_node_list()
for node in asyncio.run(collect()):
    node.GET_SCHEMA()
    node.INPUT_TYPES()
said(before, "zeroconv")
"""


def count(code: str, **names: object) -> dict:
    """What `code` says in an interpreter of its own."""
    given = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    done = subprocess.run([sys.executable, "-c", COUNT + given + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("part", ["", "annotators"])
def test_the_root_and_the_list_of_annotators_take_the_standard_library_alone(part: str):
    found = count("before = set(sys.modules); load('loaded', FOLDER); said(before, 'loaded')", FOLDER=str(ROOT / part))
    assert found["foreign"] == []
    assert found["own"] == 1  # and no second file of the pack


def test_the_guard_would_notice(tmp_path: Path):
    (tmp_path / "__init__.py").write_text("import numpy, colorsys\n", encoding="utf-8")
    found = count("before = set(sys.modules); load('loaded', FOLDER); said(before, 'loaded')", FOLDER=str(tmp_path))
    assert found["foreign"] == ["numpy"]
    assert found["count"] > 20


@pytest.mark.host
def test_listing_the_nodes_imports_nothing_heavy(comfy_path: Path, tmp_path: Path):
    found = count(HOSTED, COMFY=str(comfy_path), ROOT=str(ROOT), HEAVY=HEAVY, INPUT=str(tmp_path))
    assert found["own"] >= 40  # the pack was there
    assert not HEAVY & set(found["foreign"])
    assert found["count"] <= MOST, found
    assert found["late"] == []
    assert found["own"] <= OWN
