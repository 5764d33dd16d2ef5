"""A page of the real front end in Chromium, on the host that the whole test run shares."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from zeroconv.devtools.comfyui import HostServer

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
READY = """() => window.app?.graph && window.LiteGraph && Object.keys(LiteGraph.registered_node_types).length > 50
    && app.extensionManager"""
SECONDS = 180  # a cold front end on two busy cores

EMPTY = """async (vue) => {
    await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue);
    app.graph.clear();
    // Nodes 2.0 would go on showing the last node of the same id.
    while (document.querySelector('[data-node-id]')) await new Promise(resolve => setTimeout(resolve, 50));
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [0, 0];
}"""


@dataclass
class FrontEnd:
    """The loaded page, and what went wrong in it so far."""

    page: Page
    errors: list[str] = field(default_factory=list)

    def run(self, script: str, argument: Any = None) -> Any:
        """What the JavaScript function `script` gives for `argument`."""
        return self.page.evaluate(script, argument)


@contextmanager
def opened(server: HostServer, height: int = 900) -> Iterator[FrontEnd]:
    """The server's page in a browser with a window of 1600 pixels by `height`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is on the PATH")
    server.post("/api/settings", {"Comfy.TutorialCompleted": True})
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=FLAGS)
        page = browser.new_page(viewport={"width": 1600, "height": height})
        page.set_default_timeout(SECONDS * 1000)
        front_end = FrontEnd(page)
        page.on("pageerror", lambda error: front_end.errors.append(f"error in the page: {error}"))
        page.on("console", lambda message: _hear(front_end, message.text))
        page.on("response", lambda response: _see(front_end, response.status, response.url))
        page.goto(server.url)
        page.wait_for_function(READY)
        yield front_end
        browser.close()


# Not for the whole session: while Playwright lives, this thread has an event loop, and asyncio.run fails in the rest.
@pytest.fixture(scope="module")
def front_end(host_server: HostServer) -> Iterator[FrontEnd]:
    with opened(host_server) as page:
        yield page


@pytest.fixture(scope="session")
def newer_host_server(comfy_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostServer]:
    """The same ComfyUI under the front end in the folder that ZEROCONV_FRONT_END names: `static` of its package."""
    from zeroconv.devtools.comfyui import HostServer

    if "ZEROCONV_FRONT_END" not in os.environ:
        pytest.skip("needs a newer front end: ZEROCONV_FRONT_END names the folder `static` of comfyui-frontend-package")
    arguments = ("--front-end-root", os.environ["ZEROCONV_FRONT_END"])
    with HostServer(tmp_path_factory.mktemp("newer"), comfy_path, arguments=arguments) as server:
        yield server


@pytest.fixture(scope="module", params=["host_server", "newer_host_server"])
def each_front_end(request: pytest.FixtureRequest) -> Iterator[FrontEnd]:
    """ComfyUI's own front end, then the newer one."""
    with opened(request.getfixturevalue(request.param)) as page:
        yield page


@pytest.fixture(params=[False, True], ids=["canvas", "nodes2"])
def empty(request: pytest.FixtureRequest, each_front_end: FrontEnd) -> Iterator[FrontEnd]:
    """An empty graph, drawn in one of the front end's two ways, in which nothing goes wrong."""
    each_front_end.run(EMPTY, request.param)
    yield each_front_end
    each_front_end.run(EMPTY, False)
    assert each_front_end.errors == []


def _hear(front_end: FrontEnd, text: str) -> None:
    if "Error loading extension" in text:
        front_end.errors.append(text)


def _see(front_end: FrontEnd, status: int, url: str) -> None:
    # A help page is looked for in the user's language first.
    if status >= 400 and "/extensions/zeroconv/" in url and "/docs/" not in url:
        front_end.errors.append(f"{status}: {url}")
