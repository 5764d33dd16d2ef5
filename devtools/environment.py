"""The developers' environment: a venv in `.dev/env` with exactly the packages of requirements-dev.lock."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import DEV, ROOT, DevError

ENV = DEV / "env"
LOCK = ROOT / "requirements-dev.lock"
STAMP = ENV / "complete.txt"

TORCHVISION_HOOK = '''\
"""Lets torchvision be imported although its compiled operators do not fit this build of torch (a CPU build, say).

torchvision registers Python-side kernels for nms and qnms on import and fails where nothing has declared the two. This
declares them when torchvision is first imported; calling them still fails, and nothing here calls them.
"""

import sys


class DeclareOperators:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(cls)
            from torch import library as operators

            cls.declared = operators.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                cls.declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, DeclareOperators)
'''


def enter(script: Path, arguments: list[str]) -> None:
    """Return if this process runs in the environment; otherwise run `script` again in it and end with its exit code.

    The environment is made or mended first. Where the variable ZEROCONV_PYTHON names an interpreter (of a GPU machine
    that has its own torch, say), that one is used as it is.
    """
    chosen = os.environ.get("ZEROCONV_PYTHON")
    if chosen:
        python = _executable_of(chosen)
        inside = Path(sys.executable) == python
    else:
        python = ready()
        inside = Path(sys.prefix).resolve() == ENV.resolve()
    if inside:
        return
    command = [str(python), str(script), *arguments]
    if os.name == "posix":
        sys.stdout.flush()
        os.execv(command[0], command)  # one process, so that signals meant for the command reach it
    child = subprocess.Popen(command)
    while True:
        try:
            sys.exit(child.wait())
        except KeyboardInterrupt:
            continue  # Ctrl-C reached the child too: let it stop its server first


def ready() -> Path:
    """The environment's interpreter, after making the environment if it is missing, half made or out of date."""
    stamp = _stamp()
    if STAMP.is_file() and STAMP.read_text(encoding="utf-8") == stamp and _python().is_file():
        return _python()
    print(f"making the environment in {ENV} (once; some minutes, and about 2 GB of disk)", flush=True)
    if ENV.exists():
        shutil.rmtree(ENV)  # a half-made or outdated one: what is in it is not known
    base = getattr(sys, "_base_executable", None) or sys.executable  # of this interpreter, also when it is a venv's
    _run([base, "-m", "venv", str(ENV)], "on Debian and Ubuntu, `apt install python3-venv` may be missing")

    torch, others = _split_lock()
    pip = [str(_python()), "-m", "pip", "install", "--disable-pip-version-check"]
    retry = "check the network and run the same command again"
    print("installing torch", flush=True)
    _run([*pip, torch], retry)
    print("installing everything else", flush=True)
    rest = ENV / "rest.txt"
    rest.write_text("\n".join(others) + "\n", encoding="utf-8")
    _run([*pip, "--quiet", "--no-deps", "-r", str(rest)], retry)

    if subprocess.run([str(_python()), "-c", "import torchvision"], capture_output=True, check=False).returncode:
        _install_torchvision_hook()
        _run([str(_python()), "-c", "import torchvision"], f"torchvision does not fit this torch: see {LOCK.name}")
    STAMP.write_text(stamp, encoding="utf-8")
    return _python()


def _split_lock() -> tuple[str, list[str]]:
    """The lock's torch line, which is installed with its dependencies, and the other lines, which are complete."""
    lines = [line.split("#")[0].strip() for line in LOCK.read_text(encoding="utf-8").splitlines()]
    (torch,) = [line for line in lines if line.startswith("torch==")]
    return torch, [line for line in lines if line and line != torch]


def _stamp() -> str:
    """What the environment depends on: if this text changes, it is made anew."""
    recipe = LOCK.read_bytes() + TORCHVISION_HOOK.encode()
    return f"{hashlib.sha256(recipe).hexdigest()} python {sys.version_info.major}.{sys.version_info.minor}\n"


def _python() -> Path:
    return ENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _install_torchvision_hook() -> None:
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([str(_python()), "-c", query], capture_output=True, text=True, check=True).stdout.strip()
    # A .pth line rather than sitecustomize.py: some systems have a sitecustomize of their own, which comes first.
    (Path(found) / "zeroconv_torchvision_hook.py").write_text(TORCHVISION_HOOK, encoding="utf-8")
    (Path(found) / "zeroconv_torchvision_hook.pth").write_text("import zeroconv_torchvision_hook\n", encoding="utf-8")


def _executable_of(python: str) -> Path:
    """The real path of an interpreter that may be named by a word, a shim or a link."""
    try:
        query = "import sys; print(sys.executable)"
        done = subprocess.run([python, "-c", query], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise DevError(f"ZEROCONV_PYTHON is {python!r}, which does not run: {error}") from error
    return Path(done.stdout.strip())


def _run(command: list[str], advice: str) -> None:
    code = subprocess.run(command, check=False).returncode
    if code:
        raise DevError(f"`{' '.join(command)}` ended with exit code {code}: {advice}")
