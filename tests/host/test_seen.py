"""What Apply and Stack show of a hint: the picture, dark where it is masked; when and where control acts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from graphs import prompt

from zeroconv.controlnet_core.dosing.block_weights import BlockWeights
from zeroconv.controlnet_core.dosing.schedule import CURVES, Schedule

if TYPE_CHECKING:
    from hosting import Host


@pytest.fixture(autouse=True)
def _pictures_go_to(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))


DEFAULTS = {"strength": 1.0, "start": 0.0, "end": 1.0, "unit": "percent", "guidance": "both", "resize": "crop"}


def ran(host: Host, node: str = "StackControls", **inputs: Any) -> dict[str, Any]:
    """What the node tells the page."""
    prompts = {"positive": prompt(1), "negative": prompt(2)} if node == "ApplyControlToPrompt" else {}
    with torch.inference_mode():
        (told,) = host.ours[node].execute(**{**prompts, **DEFAULTS, **inputs}).ui["hint"]
    return told


def picture(told: dict[str, Any]) -> np.ndarray:
    import folder_paths
    from PIL import Image

    (file,) = told["pictures"]
    assert file["type"] == "temp"
    path = Path(folder_paths.get_temp_directory()) / file["subfolder"] / file["filename"]
    assert path.stat().st_size < 300_000
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("node", ["StackControls", "ApplyControlToPrompt"])
def test_a_hint_is_shown_at_its_own_shape(host: Host, node: str):
    image = torch.zeros(2, 512, 1024, 3)
    image[0, :256, :512, 0] = 1
    told = ran(host, node, control_net=host.load("sd15_depth"), image=image)
    seen = picture(told)
    assert seen.shape == (128, 256, 3)
    assert (seen[:62, :126] == (255, 0, 0)).all()
    assert not seen[66:].any()
    assert told["says"] == (
        "1024x512, the first of 2. A picture of another shape gets its middle.\nActs all the time: in every block."
    )


@pytest.mark.parametrize(
    ("pixel", "shown"),
    [((0.5,), (128, 128, 128)), ((1.0, 0.5, 0.0, 0.5), (128, 64, 0)), ((9.0, -1.0, 0.0), (255, 0, 0))],
)
def test_a_hint_is_shown_as_a_network_of_three_channels_takes_it(host: Host, pixel: tuple, shown: tuple):
    image = torch.tensor(pixel).expand(1, 64, 64, len(pixel))
    seen = picture(ran(host, control_net=host.load("sd15_depth"), image=image))
    assert seen.shape == (64, 64, 3)
    assert np.abs(seen.astype(int) - shown).max() <= 1


def test_a_hint_is_dark_where_its_mask_lets_nothing_act(host: Host):
    """A mask of another shape is cut as the hint will be: of a wide one the middle counts."""
    mask = torch.zeros(1, 32, 64)
    mask[..., :32] = 1
    told = ran(host, control_net=host.load("sd15_depth"), image=torch.ones(1, 64, 64, 3), mask=mask)
    seen = picture(told)
    assert (seen[:, :30] == 255).all()
    assert (seen[:, 34:] == 51).all()
    assert "not where it is dark here" in told["says"]
    stretched = picture(
        ran(
            host,
            control_net=host.load("sd15_depth"),
            image=torch.ones(1, 64, 64, 3),
            mask=mask[..., 16:],
            resize="stretch",
        )
    )
    assert (stretched[:, :20] == 255).all()
    assert (stretched[:, 23:] == 51).all()


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"end": 0.6}, "Acts from 0 % to 60 % of sampling: in every block."),
        ({"start": 2, "end": 5, "unit": "step"}, "Acts from step 2 until before step 5: in every block."),
        ({"start": 2, "end": -1, "unit": "step"}, "Acts from step 2 on: in every block."),
        ({"schedule": Schedule(CURVES["bell"])}, "Acts all the time, by its schedule: in every block."),
        ({"guidance": "cond_only"}, "Acts all the time: in every block, for the prompt alone, not the negative one."),
        ({"strength": 0.0}, "Never acts: its strength, its mask or its schedule is 0."),
        ({"mask": torch.zeros(1, 8, 8)}, "Never acts: its strength, its mask or its schedule is 0."),
        ({"block_weights": BlockWeights("middle only")}, "Acts all the time: in the middle block alone."),
        (
            {"block_weights": BlockWeights("custom", skips=(0, 1, 2), middle=0.0)},
            "Acts all the time: in 2 of 3 blocks, not in the middle one.",
        ),
        ({"resize": "pad"}, "64x64. A picture of another shape gets all of it, with black borders."),
    ],
)
def test_it_is_said_when_and_where_control_acts(host: Host, inputs: dict[str, Any], says: str):
    told = ran(host, control_net=host.load("sd15_depth"), image=torch.ones(1, 64, 64, 3), **inputs)
    assert says in told["says"].splitlines()
    assert "residual" not in told["says"]


def test_a_stack_alone_is_shown_where_it_is_stacked(host: Host):
    told = ran(host, "ApplyControlToPrompt", stack=[(host.load("sd15_depth"), torch.ones(1, 64, 64, 3), 1.0, 0.0, 1.0)])
    assert told == {"pictures": [], "says": "The hints of a stack are shown where they are stacked."}


def test_a_full_disk_takes_the_picture_alone(host: Host, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    told = ran(host, control_net=host.load("sd15_depth"), image=torch.ones(1, 64, 64, 3))
    assert told["pictures"] == []
    assert told["says"].endswith("in every block.")
