"""What goes wrong in a node leaves with a text that the host can log."""

from __future__ import annotations

import traceback
from typing import Any

import pytest

from zeroconv.controlnet_core.errors import ZeroConvError
from zeroconv.controlnet_core.limits import TEXT

NAME = "lat\udce9.safetensors"


def node(error: Exception, cause: Exception | None = None) -> Any:
    from zeroconv.nodes.gate import gated

    class Node:
        @classmethod
        def execute(cls, given: int) -> int:
            if cause is None:
                raise error
            try:
                raise cause
            except type(cause):
                raise error  # noqa: B904 - as an error in an error handler is

    return gated(Node)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (LookupError(NAME), None),
        (RuntimeError(NAME), None),
        (ZeroConvError(NAME), RuntimeError(NAME)),
        (KeyError("found"), RuntimeError(NAME)),
        (RuntimeError("x" * 10**6), None),
        (RuntimeError("bell \a"), None),
    ],
)
@pytest.mark.usefixtures("host")
def test_all_that_the_host_logs_of_an_error_can_be_printed(error: Exception, cause: Exception | None):
    with pytest.raises(ZeroConvError) as caught:
        node(error, cause).execute(1)
    logged = f"{caught.value}\n{''.join(traceback.format_exception(caught.value))}"
    logged.encode("utf-8")
    assert all(character.isprintable() or character == "\n" for character in logged)
    assert len(str(caught.value)) <= TEXT
    assert "execute" in logged  # where it came from


@pytest.mark.usefixtures("host")
def test_an_error_that_can_be_printed_stays_what_it_is():
    error = KeyError("found\nhere")
    with pytest.raises(KeyError) as caught:
        node(error, ValueError("before")).execute(1)
    assert caught.value is error and isinstance(error.__context__, ValueError)


def test_a_node_keeps_its_inputs_and_its_result(host: Any):
    import inspect

    assert list(inspect.signature(host.ours["InspectControl"].execute).parameters) == ["control_net", "model"]
    assert all(hasattr(node.execute.__func__, "__wrapped__") for node in host.ours.values())
