"""Networks that transformers has, of local files: a config.json and one of weights. Nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .images import AnnotatorError
from .learned import read_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)

UNUSED = ("criterion.", "neck.fusion_stage.layers.0.residual_layer1.")
"""Weights that a file may lack: those of a training loss, and of a fusion layer's part that has nothing to fuse."""
RUNNING = ("running_mean", "running_var")


def build(make: type[Model], settings: type[PretrainedConfig], config: Path, weights: Path) -> Model:
    """The network `make`, described by a config.json and filled from *.safetensors or *.bin: eval, fp32, CPU.

    The file must hold every weight that the network reads. Keys beyond those are left out: published files have some
    of what their training needed. Raises AnnotatorError for a config of another kind of network, for a file that is no
    weights, and for missing or wrongly shaped weights, which it names.
    """
    try:
        said = json.loads(config.read_text(encoding="utf-8"))
        kind = said.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise AnnotatorError(f"{config} cannot be read as a config.json: delete it, so that it is fetched") from error
    if kind != settings.model_type:
        raise AnnotatorError(f"{config} describes a network of type {kind}; expected {settings.model_type}")
    network = make(settings.from_dict(said))
    filled = read_weights(weights)
    try:
        missing, _ = network.load_state_dict(filled, strict=False, assign=True)
    except RuntimeError as error:
        raise AnnotatorError(f"{weights} does not fit {config}: {' '.join(str(error).split())[:300]}") from error
    # Tables that a network computes when it is made are no weights, although some versions save them.
    read = {name for name, _ in network.named_parameters()}
    needed = [key for key in missing if (key in read or key.endswith(RUNNING)) and not key.startswith(UNUSED)]
    if needed:
        raise AnnotatorError(
            f"{weights} lacks {len(needed)} weights of {make.__name__}, {needed[0]} among them: put the published file "
            "in its place, or delete it so that it is fetched"
        )
    return network.float().requires_grad_(False).eval()
