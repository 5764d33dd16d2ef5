"""A real ComfyUI in this process with tiny random models; every test here is marked `host`.

It runs on the CPU; ZEROCONV_HOST_ARGS names other flags of the host (test_cuda.py sets it). With
ZEROCONV_HOST_DEVICE=second it runs on tests/second_device.py, where a CPU shows which test mixes devices.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # so that tests find hosting.py whatever the import mode

if TYPE_CHECKING:
    from hosting import Host


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("host")


@pytest.fixture(scope="session")
def host(comfy_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The host, with `controlnet` pointing at an empty folder of this test run."""
    if str(comfy_path) not in sys.path:
        sys.path.insert(0, str(comfy_path))  # first, so that `nodes` is the host's

    import comfy.options
    import torch

    comfy.options.enable_args_parsing()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py", *os.environ.get("ZEROCONV_HOST_ARGS", "--cpu").split()])
        import comfy.cli_args  # reads the command line, before the host asks torch for a device
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32 on a GPU too

    from hosting import Host

    from .second_host import believed

    with believed() if os.environ.get("ZEROCONV_HOST_DEVICE") == "second" else nullcontext():
        yield Host(tmp_path_factory.mktemp("controlnet"))


@pytest.fixture(autouse=True)
def _no_cancel_left_over(request: pytest.FixtureRequest):
    yield
    if "host" in request.fixturenames:
        import comfy.model_management

        comfy.model_management.interrupt_current_processing(False)
