"""What the page asks the server for between runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...controlnet_core.errors import ZeroConvError

if TYPE_CHECKING:
    from aiohttp import web


def answer(name: str, made: Callable[..., Any]) -> None:
    """Let the page POST inputs to /zeroconv/`name`, a JSON object, and get what `made` gives for them as JSON.

    What is wrong with the inputs is an answer, too: {"error": the text of the ZeroConvError}.
    """
    server: Any = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:  # the pack is loaded without a server
        return
    from aiohttp import web

    @server.routes.post(f"/zeroconv/{name}")
    async def _answered(request: web.Request) -> web.Response:
        try:
            return web.json_response(made(**await request.json()))
        except ZeroConvError as error:
            return web.json_response({"error": str(error)})
        except (AttributeError, LookupError, TypeError, ValueError):  # not what the page sends
            raise web.HTTPBadRequest from None
