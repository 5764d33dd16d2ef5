"""What the page asks the server between runs: the curve of a schedule, or what is wrong with it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from zeroconv.controlnet_core.dosing.schedule import Schedule, parse

if TYPE_CHECKING:
    from zeroconv.devtools.comfyui import HostServer

FADE = {"curve": "fade out", "keyframes": "", "unit": "window", "per_image": ""}


def asked(server: HostServer, inputs: Any) -> Any:
    return server.post("/api/zeroconv/schedule", inputs)


def test_a_curve(host_server: HostServer):
    text = "0: 1 ease, 0.5: 0.25 hold, 0.75: 2"
    told = asked(host_server, {"curve": "custom", "keyframes": text, "unit": "percent", "per_image": "1 0.5"})
    schedule = Schedule(parse(text), "percent")
    assert told["keyframes"] == [[each.position, each.value, each.interpolation] for each in schedule.keyframes]
    assert all(value == schedule.at(position) for position, value in told["points"])
    assert (told["top"], told["per_image"]) == (2, [1.0, 0.5])


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({**FADE, "unit": "step"}, 'the curve "fade out" runs from 0 to 1'),
        ({**FADE, "curve": "custom"}, "the keyframes are empty"),
        ({**FADE, "per_image": "\ud800"}, 'found "\\ud800"'),
        ({**FADE, "curve": "custom", "keyframes": "0: 1\n" * 10**5}, "the keyframes have 500000 characters"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(host_server: HostServer, inputs: dict[str, str], says: str):
    (error,) = asked(host_server, inputs).values()
    assert says in error


@pytest.mark.parametrize("inputs", [{}, [], {**FADE, "curve": "no such"}, {**FADE, "keyframes": 5, "curve": "custom"}])
def test_what_no_page_sends_is_a_bad_request_and_the_server_goes_on(host_server: HostServer, inputs: Any):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(
        f"{host_server.url}/zeroconv/schedule", json.dumps(inputs).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError, match="400"):
        opener.open(request, timeout=60)
    assert asked(host_server, FADE)["keyframes"] == [[0, 1, "linear"], [1, 0, "linear"]]
