"""The same graphs on a GPU, in a host of its own: a process can hold only one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

HERE = Path(__file__).parent

# The host's flags, and how far two right answers may be apart in that precision after four steps of sampling.
WAYS_TO_RUN = {
    "fp32": ("--force-fp32", "1e-3"),
    "fp16": ("--force-fp16", "2e-2"),
    "bf16": ("--bf16-unet", "1e-1"),
    "low VRAM": ("--novram --force-fp32", "1e-3"),
}

TESTS = [
    *("test_parity.py", "test_dosing_off.py", "test_integrity.py", "test_formulas.py", "test_guiders.py"),
    *("test_union.py", "test_control_lora.py", "test_t2i_adapter.py", "test_lllite.py", "test_annotators.py"),
    "test_annotate.py",
]


@pytest.mark.parametrize("precision", WAYS_TO_RUN)
@pytest.mark.parametrize("tests", TESTS)
def test_on_cuda(comfy_path: Path, tests: str, precision: str):
    flags, tolerance = WAYS_TO_RUN[precision]
    environment = {"ZEROCONV_HOST_ARGS": flags, "ZEROCONV_HOST_TOLERANCE": tolerance, "COMFYUI_PATH": str(comfy_path)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / tests), "-q", "-k", "not weight_dtype"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
