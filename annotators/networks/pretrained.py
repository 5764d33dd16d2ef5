"""Networks that transformers has, of local files: a config.json and one of weights. Nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..images import AnnotatorError
from .learned import read_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)

UNUSED = ("criterion.", "neck.fusion_stage.layers.0.residual_layer1.", ".swin.layernorm.")
"""Parts of the names of weights that a file may lack: those of a training loss, of a fusion layer's part that has
nothing to fuse, and of the norm after the last stage of a Swin that only gives its stages (transformers 5 makes it)."""
TABLES = ("running_mean", "running_var", ".weight", ".bias", "shared_image_embedding.positional_embedding")
"""Ends of the names of tables, no parameters, that a file must have all the same: those of normalisations, and SAM 2's
random frequencies."""
TWICE = ("class_embed.", "bbox_embed.")
"""Weights of RT-DETR that are also called so behind "model.decoder.", the one name that transformers 5 has for them."""
DTYPES = ("dtype", "torch_dtype")


def classes(network: str, settings: str, since: str) -> tuple[Any, Any]:
    """The classes of these names, which transformers has `since` a version of its own. Raises AnnotatorError."""
    import transformers

    if not hasattr(transformers, network):
        family = settings.removesuffix("Config")
        raise AnnotatorError(
            f"transformers {transformers.__version__} has no {family}: update it with "
            f"`python -m pip install --upgrade transformers`; {since} and newer have it"
        )
    return getattr(transformers, network), getattr(transformers, settings)


def build(
    make: type[Model], settings: type[PretrainedConfig], config: Path, weights: Path, also: tuple[str, ...] = ()
) -> Model:
    """The network `make`, described by a config.json and filled from *.safetensors or *.bin: eval, fp32, CPU.

    The config may be that of `also` another type of network, which has this one as a part. The file must hold every
    weight that the network reads. Keys beyond those are left out: published files have some of what their training
    needed. Raises AnnotatorError for a config of another kind of network, for a file that is no weights, and for
    missing or wrongly shaped weights, which it names.
    """
    try:
        # Made in fp32, whatever precision the config names for the network or for a part of it.
        said = json.loads(config.read_text(encoding="utf-8"), object_hook=_without_dtypes)
        kind = said.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise AnnotatorError(f"{config} cannot be read as a config.json: delete it, so that it is fetched") from error
    if kind not in (settings.model_type, *also):
        raise AnnotatorError(f"{config} describes a network of type {kind}; expected {settings.model_type}")
    described = settings.from_dict({**said, "model_type": settings.model_type})
    described.dtype = torch.float32
    filled = {f"model.decoder.{key}" if key.startswith(TWICE) else key: w for key, w in read_weights(weights).items()}
    try:
        # Not `load_state_dict`: since transformers 5 modules have other names than their published weights, and only
        # this translates them. Without a name of a repository it asks no hub.
        with _quietly():
            loaded: Any = make.from_pretrained(
                None,
                config=described,
                state_dict=filled,
                ignore_mismatched_sizes=True,  # which names them; we refuse them ourselves
                output_loading_info=True,
            )
    except RuntimeError as error:
        raise AnnotatorError(f"{weights} does not fit {config}: {' '.join(str(error).split())[:300]}") from error
    network, info = loaded
    if info["mismatched_keys"]:
        names = ", ".join(sorted(map(str, info["mismatched_keys"])))[:300]
        raise AnnotatorError(f"{weights} does not fit {config}: these weights have another shape: {names}")
    # A weight may have several names, of which a file needs one. Tables that a network computes when it is made are
    # no weights, although some versions save them.
    missing = set(info["missing_keys"])
    here = {id(weight) for name, weight in network.named_parameters(remove_duplicate=False) if name not in missing}
    needed = [name for name, weight in network.named_parameters() if id(weight) not in here]
    needed += [name for name, _ in network.named_buffers() if name in missing and name.endswith(TABLES)]
    needed = [name for name in needed if not any(part in name for part in UNUSED)]
    if needed:
        raise AnnotatorError(
            f"{weights} lacks {len(needed)} weights of {make.__name__}, {needed[0]} among them: put the published file "
            "in its place, or delete it so that it is fetched"
        )
    return network.float().requires_grad_(False).eval()


def _without_dtypes(part: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in part.items() if key not in DTYPES}


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bar and its report of the weights, which `build` judges itself."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
