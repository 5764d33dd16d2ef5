"""Networks that several of these tests read, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """RT-DETR and ViTPose, small and random, saved as they are published: config.json and model.safetensors."""
    from . import pretrained_tiny as tiny

    detector, estimator = tmp_path_factory.mktemp("detector"), tmp_path_factory.mktemp("estimator")
    tiny.person_detector(detector)
    tiny.pose_estimator(estimator)
    return detector, estimator


@pytest.fixture(scope="session")
def detector(folders: tuple[Path, Path]) -> Any:
    from zeroconv.annotators.networks.people import build_detector

    from . import pretrained_tiny as tiny

    return build_detector(*tiny.files(folders[0]))


@pytest.fixture(scope="session")
def estimator(folders: tuple[Path, Path]) -> Any:
    from zeroconv.annotators.networks.people import build_estimator

    from . import pretrained_tiny as tiny

    return build_estimator(*tiny.files(folders[1]))
