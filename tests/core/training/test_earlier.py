"""What earlier versions of the pack have left can be read: datasets, checkpoints, controls and logs.

`earlier/<version>.tar.xz` was made by that version's own code: a dataset of 8 pictures of 16 x 16, and of each kind a
run of two steps on the base of `BASE`, with every tensor of its checkpoint and its control filled with one number, so
that it packs well. A version that changes one of these formats adds its own.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

from zeroconv.controlnet_core.data.dataset import Dataset
from zeroconv.controlnet_core.diffusion import alphas_cumprod
from zeroconv.controlnet_core.files.loading import load_control, read_weights
from zeroconv.controlnet_core.networks.unet import UNet, UNetConfig
from zeroconv.controlnet_core.training import checkpoint
from zeroconv.controlnet_core.training.log import Log
from zeroconv.controlnet_core.training.loop import train
from zeroconv.controlnet_core.training.options import TrainingOptions

from .tiny import equal

VERSIONS = sorted((Path(__file__).parent / "earlier").glob("*.tar.xz"))
CONFIG = UNetConfig(model_channels=32, channel_mult=(1,), num_res_blocks=1, transformer_depth=(1,), context_dim=8)
KINDS = {"controlnet": "ControlNet", "control_lora": "Control-LoRA", "lite": "ControlNet-lite"}


def base() -> dict[str, torch.Tensor]:
    """The same for each version of torch."""
    return {key: torch.full(like.shape, 0.01) for key, like in UNet(CONFIG, device="meta").state_dict().items()}


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name.removesuffix(".tar.xz"))
def left(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What that version left, unpacked."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def test_there_is_one():
    assert VERSIONS


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on(left: Path, kind: str):
    run, data = left / kind, Dataset.open(left / "data")
    saved = checkpoint.newest(run / "checkpoints")
    assert saved is not None
    assert saved.step == 2
    options = TrainingOptions(**{**saved.facts["options"], "steps": 3, "sample_every": 3})
    measured = saved.facts["measured"]
    del saved
    log = Log.open(run, 2)
    assert [step for step, _ in log.losses] == [1, 2]
    for progress in train(options, base(), CONFIG, alphas_cumprod(), data, run):
        log.add(progress)
    log.close()
    assert progress.step == 3
    assert progress.loss is not None and progress.loss > 0
    again = checkpoint.newest(run / "checkpoints")
    assert again is not None
    assert again.facts["measured"][:3] == measured
    assert progress.notes == ()


@pytest.mark.parametrize("kind", KINDS)
def test_a_control_and_a_checkpoint_are_loaded(left: Path, kind: str):
    file, saved = (left / kind / name for name in ("control.safetensors", "checkpoints/step-00000002.safetensors"))
    weights, metadata = read_weights(file)
    control = load_control(weights, metadata).control
    # Of a width that was never published a file has to say its heads, which the checkpoints of 0.1.0 did not.
    from_checkpoint = load_control(read_weights(saved)[0], metadata).control
    assert control.kind == KINDS[kind]
    assert equal(control.state_dict(), from_checkpoint.state_dict())
    options = TrainingOptions(
        steps=1, batch_size=2, precision="fp32", kind=kind, rank=1, held_out=0, hint_encoder="paper"
    )
    data = Dataset.open(left / "data")
    assert len(list(train(options, base(), CONFIG, alphas_cumprod(), data, left / "new", begin=control))) == 2
