"""A model hub on the loopback: as much of the Hugging Face hub's protocol as a download speaks, and its accidents."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LoopbackHub:
    """Serves `files` ('owner/repository/name' to bytes): the facts itself, the bytes from a store, another server."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut_after: int | None = None  # so many bytes of a file, then the line is dead, now and later
        self.garbled = False  # the store gives other bytes than the hub has promised
        self.sent = 0  # bytes of files that went out
        self.ranges: list[str | None] = []  # the Range of each request for bytes
        self.seen_tokens: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def log_message(self, format: str, *args: object) -> None:
                """Tests need no log."""

        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        self.url, self.store = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            server.daemon_threads = True
            Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        if "Authorization" in request.headers:
            self.seen_tokens.append(request.headers["Authorization"])
        stored = request.path.startswith("/store/")
        key = request.path.removeprefix("/store/" if stored else "/").replace("/resolve/main", "")
        key = key.replace(f"/resolve/{COMMIT}", "")
        data = self.files.get(key)
        if data is None:
            request.send_response(404)
            request.send_header("X-Error-Code", "EntryNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()
        elif not stored:  # as for every file in large file storage: who and how large here, the bytes elsewhere
            request.send_response(302)
            request.send_header("Location", f"{self.store}/store/{key}")
            request.send_header("X-Repo-Commit", COMMIT)
            request.send_header("X-Linked-Size", str(len(data)))
            request.send_header("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"')
            request.send_header("Content-Length", "0")
            request.end_headers()
        else:
            self._send(request, data[::-1] if self.garbled else data, body)

    def _send(self, request: BaseHTTPRequestHandler, data: bytes, body: bool) -> None:
        asked = request.headers.get("Range")
        start = 0 if asked is None else int(asked.removeprefix("bytes=").split("-")[0])
        if body:
            self.ranges.append(asked)
        left = None if self.cut_after is None else max(0, self.cut_after - self.sent)
        if left == 0:
            request.close_connection = True
            return
        request.send_response(200 if asked is None else 206)
        request.send_header("Content-Length", str(len(data) - start))
        if asked is not None:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        if body:
            piece = data[start:][:left]
            request.wfile.write(piece)
            request.wfile.flush()
            self.sent += len(piece)
            request.close_connection = left is not None


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A running hub; while it runs, huggingface_hub in this process knows no other, and does not wait to try again."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    hub = LoopbackHub()
    with pytest.MonkeyPatch.context() as patch:
        for module in (constants, file_download):
            template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            patch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is on its way when the line breaks is lost
        impatient = SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
        for module in (file_download, _http):  # both wait before they try again
            patch.setattr(module, "time", impatient)
        set_offline(patch, False)
        try:
            yield hub
        finally:
            hub.close()
    set_offline(None, None)


def set_offline(patch: pytest.MonkeyPatch | None, value: bool | None) -> None:
    """HF_HUB_OFFLINE as huggingface_hub has read it at its import; its connections are made anew."""
    import huggingface_hub.utils as utils
    from huggingface_hub import constants

    if patch is not None:
        patch.setattr(constants, "HF_HUB_OFFLINE", value)
    (getattr(utils, "reset_sessions", None) or utils.close_session)()  # type: ignore[attr-defined]  # its name before and since version 1
