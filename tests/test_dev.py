"""dev.py and devtools: the environment's recipe, the copy of the pack, and a real server that runs graphs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from zeroconv.devtools import DevError, comfyui, demo, environment
from zeroconv.devtools.comfyui import HostError, HostServer

ROOT = Path(__file__).resolve().parent.parent

BLUE = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 48, "batch_size": 2, "color": 255}},
    "2": {
        "class_type": "SaveImage",
        "inputs": {"images": ["1", 0], "filename_prefix": "blue"},
        "_meta": {"title": "Two blue pictures"},
    },
}


def dev(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "dev.py"), *arguments], capture_output=True, text=True, check=False
    )


# -- the command line --------------------------------------------------------------------------------------------------


def test_without_a_command_it_lists_them():
    done = dev()
    assert done.returncode == 2
    for command in ("demo", "test", "serve", "lab", "bench", "setup"):
        assert f"python dev.py {command}" in done.stdout
    assert dev("--help").returncode == 0


def test_a_wrong_interpreter_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ZEROCONV_PYTHON", "no-such-python")
    done = dev("setup")
    assert done.returncode == 1
    assert "ZEROCONV_PYTHON is 'no-such-python', which does not run" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_given_interpreter_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ZEROCONV_PYTHON", sys.executable)
    assert dev("setup").stdout.strip() == f"ready: {sys.executable}"


def test_bench_lists_what_there_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ZEROCONV_PYTHON", sys.executable)
    done = dev("bench", "no_such_benchmark")
    assert done.returncode == 2
    assert "bench needs one of these names:" in done.stdout


# -- the environment ---------------------------------------------------------------------------------------------------


def test_every_package_is_pinned_once_for_each_python():
    torch, others = environment._split_lock()
    assert torch == "torch==2.13.0"
    assert "torchvision==0.28.0" in others
    seen = []
    for line in others:
        pinned = re.fullmatch(r"([a-z0-9-]+)==[0-9][0-9a-z.]*( ; .+)?", line)
        assert pinned, line
        seen.append((pinned[1], pinned[2]))
    assert len(seen) == len(set(seen))


def test_lock_and_requirements_agree_with_the_project():
    names = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert names == ["matplotlib", "opencv-python", "scikit-image"]
    assert 'dependencies = ["matplotlib", "opencv-python", "scikit-image"]' in (ROOT / "pyproject.toml").read_text()


@pytest.fixture
def fake_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`ready()` with its commands recorded instead of run; the list of them."""
    commands: list[list[str]] = []

    def run(command: list[str], advice: str = "", **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if "venv" in command:
            environment._python().parent.mkdir(parents=True)
            environment._python().touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(environment, "ENV", tmp_path / "env")
    monkeypatch.setattr(environment, "STAMP", tmp_path / "env" / "complete.txt")
    monkeypatch.setattr(environment, "_run", run)
    monkeypatch.setattr(environment.subprocess, "run", run)
    return commands


def test_environment_is_made_once(fake_environment: list[list[str]]):
    python = environment.ready()
    made = [" ".join(command) for command in fake_environment]
    assert len(made) == 4
    assert made[0].endswith(f"-m venv {environment.ENV}")
    assert made[1].endswith("pip install --disable-pip-version-check torch==2.13.0")
    assert "--no-deps -r" in made[2]
    assert made[3].endswith("import torchvision")
    assert environment.ready() == python
    assert len(fake_environment) == 4


@pytest.mark.parametrize("damage", ["interrupted", "old lock", "interpreter gone"])
def test_environment_is_made_anew(fake_environment: list[list[str]], damage: str):
    environment.ready()
    leftover = environment.ENV / "leftover"
    leftover.touch()
    if damage == "interrupted":
        environment.STAMP.unlink()
    elif damage == "old lock":
        environment.STAMP.write_text("of another lock")
    else:
        environment._python().unlink()
    environment.ready()
    assert len(fake_environment) == 8
    assert not leftover.exists()


def test_torchvision_works_in_this_environment():
    """Importing it is not a matter of course: see TORCHVISION_HOOK."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    import torch

    assert functional.resize(torch.zeros(1, 3, 8, 8), [4, 6]).shape == (1, 3, 4, 6)


# -- finding a ComfyUI and giving it the pack --------------------------------------------------------------------------


def test_a_wrong_comfyui_path_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(DevError, match="which has no main.py: name ComfyUI's own folder, or unset it"):
        comfyui.find()


def test_comfyui_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert comfyui.find() == tmp_path.resolve()


def test_the_comfyui_around_this_folder_comes_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    (tmp_path / "main.py").touch()
    monkeypatch.setattr(comfyui, "ROOT", tmp_path / "custom_nodes" / "anything")
    assert comfyui.find() == tmp_path


@pytest.mark.parametrize("git", [True, False])
def test_the_copy_is_the_pack_without_what_git_ignores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, git: bool):
    if not git:
        monkeypatch.setattr(comfyui.shutil, "which", lambda _: None)
    stale = tmp_path / comfyui.PACK / "stale.py"
    stale.parent.mkdir()
    stale.touch()
    copy = comfyui.copy_pack(tmp_path)
    assert (copy / "__init__.py").read_bytes() == (ROOT / "__init__.py").read_bytes()
    assert (copy / "controlnet_core").is_dir()
    assert not stale.exists()
    for left_out in (".git", ".dev", "output"):
        assert not (copy / left_out).exists()
    files = [file for file in copy.rglob("*") if not file.is_dir()]
    assert not [file for file in files if file.is_symlink() or file.suffix == ".pyc"]


def test_models_of_a_users_comfyui_stay_readable(tmp_path: Path):
    (tmp_path / "ComfyUI" / "models" / "checkpoints").mkdir(parents=True)
    (tmp_path / "base").mkdir()
    server = HostServer(tmp_path / "base", tmp_path / "ComfyUI", port=1)
    written = json.loads(server._model_paths().read_text())
    assert written == {"comfyui": {"base_path": str(tmp_path / "ComfyUI" / "models"), "checkpoints": "checkpoints"}}


# -- a real server -----------------------------------------------------------------------------------------------------


@pytest.mark.host
def test_server_runs_a_graph(host_server: HostServer):
    heard = []
    run = host_server.run(BLUE, lambda *step: heard.append(step))
    assert heard == [("EmptyImage", 0, 0), ("Two blue pictures", 0, 0)]
    (pictures,) = host_server.images(run).values()
    assert [picture[:8] for picture in pictures] == [b"\x89PNG\r\n\x1a\n"] * 2
    assert host_server.get(f"/history/{run.prompt_id}")[run.prompt_id]["status"]["status_str"] == "success"


@pytest.mark.host
def test_server_says_why_it_refuses_a_graph(host_server: HostServer):
    wrong = {**BLUE, "1": {**BLUE["1"], "inputs": {**BLUE["1"]["inputs"], "width": -64}}}
    with pytest.raises(HostError, match=r"EmptyImage \(1\): Value -64 smaller than min of 1: width") as refused:
        host_server.run(wrong)
    assert refused.value.details["node_errors"]["1"]["class_type"] == "EmptyImage"


@pytest.mark.host
def test_server_says_which_node_failed(host_server: HostServer):
    outside = {**BLUE, "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "../../x"}}}
    with pytest.raises(HostError, match="SaveImage failed: .*outside the output folder is not allowed"):
        host_server.run(outside)
    assert host_server.run(BLUE).outputs  # and goes on


@pytest.mark.host
def test_server_runs_two_clients_at_once(host_server: HostServer):
    runs = []
    threads = [threading.Thread(target=lambda: runs.append(host_server.run(BLUE))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len({run.prompt_id for run in runs}) == 2


@pytest.mark.host
def test_server_leaves_comfyui_untouched_and_has_the_pack(host_server: HostServer, comfy_path: Path):
    assert (host_server.base / "custom_nodes" / comfyui.PACK / "__init__.py").is_file()
    assert not (comfy_path / "custom_nodes" / comfyui.PACK).exists()
    assert not list((host_server.base / "custom_nodes").rglob("*.pyc"))
    assert (host_server.base / "user" / "comfyui.db").is_file()


@pytest.mark.host
def test_a_server_that_cannot_start_shows_its_log(comfy_path: Path, tmp_path: Path):
    server = HostServer(tmp_path, comfy_path, arguments=("--no-such-option",))
    with pytest.raises(HostError, match="(?s)ended with code 2:.*unrecognized arguments: --no-such-option"):
        server.start()
    server.stop()  # harmless


@pytest.mark.host
def test_stop_ends_the_process(comfy_path: Path, tmp_path: Path):
    server = HostServer(tmp_path, comfy_path)
    server.start()
    process = server._process
    assert process is not None
    server.stop()
    assert process.poll() is not None
    with pytest.raises(OSError, match="refused"):
        server.get("/system_stats")


# -- the contact sheet -------------------------------------------------------------------------------------------------


def test_contact_sheet_places_every_picture(tmp_path: Path):
    from PIL import Image

    colours = {"depth hint": (255, 0, 0), "pose hint": (0, 255, 0), "no control": (0, 0, 255), "both": (9, 9, 9)}
    for label, colour in colours.items():
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{label}.png")
    sheet = demo.contact_sheet({label: tmp_path / f"{label}.png" for label in colours})
    assert sheet.size == (3 * 256 + 4 * 12, 2 * (256 + 28) + 3 * 12)
    for index, colour in enumerate(colours.values()):
        centre = (12 + (index % 3) * 268 + 128, 12 + (index // 3) * 296 + 128)
        assert sheet.getpixel(centre) == colour
    label_strip = sheet.crop((12, 12 + 256, 12 + 256, 12 + 256 + 28)).convert("L")
    assert label_strip.getextrema() == (0, 255)  # black text on white
