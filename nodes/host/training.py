"""A control trained on the host's MODEL: from its objects to the core's training, and from there to a CONTROL_NET."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_sampling
import folder_paths
import torch
from einops import rearrange
from torch import Tensor

from ...controlnet_core.data.dataset import Batch, Dataset
from ...controlnet_core.data.manifest import DatasetError
from ...controlnet_core.data.writer import SAME_ENCODER, probe_picture, relative_error
from ...controlnet_core.diffusion import alphas_cumprod
from ...controlnet_core.errors import ZeroConvError
from ...controlnet_core.files import saving
from ...controlnet_core.files.loading import read_weights
from ...controlnet_core.files.lock import locked
from ...controlnet_core.files.writing import replacing
from ...controlnet_core.networks.unet import UNetConfig
from ...controlnet_core.training import checkpoint, loop
from ...controlnet_core.training.distributed import Process
from ...controlnet_core.training.fidelity import structure
from ...controlnet_core.training.log import OPTIONS
from ...controlnet_core.training.memory import Examples, fitted
from ...controlnet_core.training.options import OptionsError, TrainingOptions
from ...controlnet_core.training.writer import BEST, CHECKPOINTS, newest_control
from . import files
from .dataset import PLACE, encoders, folder_of
from .models import ModelError, unet_config
from .networks import NetworkControl
from .progress import say
from .save import free_path, name_parts, users_folder
from .watching import Decoder, Watch, annotated, newest_plot, newest_sheet, summary
from .weights import loaded_control, unet_weights

log = logging.getLogger(__name__)

PUBLISHED = "published.json"
"""In a run's folder: which files in the host's folders are this run's."""


MOST_PROMPTS = 16
"""Of a user's own prompts, those that are sampled: a sheet stays one that can be looked at."""

NEXT = (
    "next: connect control_net to Apply ControlNet, or press r and pick it in Load ControlNet; raise steps to train on"
)


@dataclass(frozen=True)
class Trained:
    """A trained control, and its file as LoadControlNet lists it.

    `plot` and `samples` are IMAGEs (1,H,W,3) of the losses and of the held-out pictures; `says` is a summary in words.
    """

    control: NetworkControl
    name: str
    plot: Tensor
    samples: Tensor
    says: str


def train(
    model: Any,
    clip: Any,
    vae: Any,
    dataset: Dataset,
    name: str,
    options: TrainingOptions,
    fidelity: str = "structure",
    node_id: str | None = None,
    control_net: Any = None,
    validation: Dataset | None = None,
) -> Trained:
    """Train a control for the host's MODEL in the folder `name` below the output folder's `zeroconv/training`.

    A run of this name that was stopped goes on, and one that has made `options.steps` is given as it is. A new one
    begins with the CONTROL_NET `control_net`, if there is one. Prompts and hints of `validation` are sampled, too. What
    the model predicts is read from it: `options.prediction` is not looked at. `fidelity` scores samples by "structure",
    or with the "annotator" that made the dataset's hints. Raises ModelError, DatasetError, SaveError, OptionsError,
    BaseMismatch, LogError and loop.TrainingStopped; on these and on Cancel all that was trained is kept in the folder,
    and its control is published.
    """
    parts, folder = place_of(name)
    config = trainable(model)
    alphas, prediction = noise_schedule(model)
    options = replace(options, prediction=prediction)
    for given in (dataset, *([] if validation is None else [validation])):
        check_dataset(given, model, clip, vae)
    check_score(folder, fidelity)
    decoder = Decoder(vae, model.model.latent_format)
    score = structure if fidelity == "structure" else annotated(dataset, decoder, node_id)
    begin = None if control_net is None else loaded_control(control_net).control

    comfy.model_management.unload_all_models()
    process, fits = Process(device=comfy.model_management.get_torch_device()), ""
    with locked(folder), torch.inference_mode(False), torch.enable_grad():
        base = unet_weights(model)
        own = [] if validation is None else own_prompts(validation)
        prompts = [batch for _, batch in own]
        done = finished(folder, options, {"base": checkpoint.fingerprint(base), "data": dataset.fingerprint})
        if not done:
            saved = checkpoint.options_of(folder / CHECKPOINTS)
            options, fits = fitted(options, config, Examples.of(dataset, len(own)), process, saved)
            if fits:
                log.info(fits)
        steps = loop.train(options, base, config, alphas, dataset, folder, score, process, begin, prompts)
        del base, begin  # the training lets go of them, too, once it has its own
        facts = {**options.as_dict(), "fidelity": fidelity}
        watching = Watch(folder, facts, dataset, options, decoder, node_id, own)
        if not done:
            try:
                # Closing the steps keeps what was trained, whatever ends them.
                with watching as watch, closing(steps):
                    for progress in steps:
                        watch.see(progress)
            except BaseException:
                hand_out(folder, parts, node_id)
                raise
    comfy.model_management.soft_empty_cache()

    published = publish(folder / "control.safetensors", users_folder(), parts)
    says = [*([fits] if fits else []), *watching.notes, summary(folder), f"saved {published}"]
    if options.unlock_decoder:
        unet = publish(folder / "unet.safetensors", models_folder(), parts)
        says.append(f"saved {unet}, the model with its trained decoder, for Load Diffusion Model")
    says += publish_best(folder, parts)
    says.append(NEXT)
    return Trained(files.load(published), published, newest_plot(folder), newest_sheet(folder), "\n".join(says))


# -- what can be trained on --------------------------------------------------------------------------------------------


def trainable(model: Any) -> UNetConfig:
    """The configuration of the MODEL's UNet; raises ModelError for one that no control can be trained on."""
    config = unet_config(model.model, "what is trained here", None)
    if config.in_channels != config.out_channels:
        raise ModelError(
            f"the model takes {config.in_channels} channels, expected {config.out_channels}: it is made for inpainting "
            "or editing. Train on the model that it was made from; the control works on both"
        )
    return config


@torch.inference_mode(False)
def noise_schedule(model: Any) -> tuple[Tensor, str]:
    """The MODEL's signal power at its 1000 timesteps, and what it predicts, "eps" or "v"; nodes on it count.

    Raises ModelError for a model that is trained in another way.
    """
    sampling = model.get_model_object("model_sampling")
    kinds = comfy.model_sampling
    predictions = {
        kinds.EPS.calculate_denoised: "eps",
        kinds.V_PREDICTION.calculate_denoised: "v",
    }
    kind = type(sampling)
    prediction = predictions.get(kind.calculate_denoised)
    discrete = getattr(kind, "timestep", None) is kinds.ModelSamplingDiscrete.timestep
    if prediction is None or not discrete:
        known = ", ".join(base.__name__ for base in kind.__bases__)
        raise ModelError(
            f"the model is sampled by {known}: training knows models of 1000 timesteps that predict the noise or the "
            "velocity (SD1.x, SD2.x, SDXL). Connect such a model, without a sampling node for distilled ones"
        )
    alphas = 1 / (sampling.sigmas.cpu().double() ** 2 + 1)
    usual = alphas_cumprod()
    # The host keeps sigmas in fp32. Where they are SD's, its numbers to the last bit: those of a training elsewhere.
    same = alphas.shape == usual.shape and torch.allclose(alphas, usual.double(), rtol=1e-5)
    return (usual if same else alphas.float()), prediction


def check_dataset(dataset: Dataset, model: Any, clip: Any, vae: Any) -> None:
    """Raise DatasetError where the dataset was made with other encoders than these, or for another kind of model."""
    encode_pictures, encode_prompt = encoders(vae, clip, model)
    with torch.inference_mode(False):  # the dataset keeps it, and training reads it
        context, _ = dataset.empty_prompt
    picture = rearrange(torch.from_numpy(probe_picture()).float() / 255, "b h w c -> b c h w")
    found = {
        "clip": (encode_prompt("")[0], context),
        "vae": (encode_pictures(picture).flatten(), torch.tensor(dataset.manifest.probe)),
    }
    for name, (ours, theirs) in found.items():
        if ours.shape != theirs.shape or relative_error(ours, theirs) > SAME_ENCODER:
            raise DatasetError(
                f"{dataset.folder} was made with another {name} than the one that is connected: connect the one that "
                "it was made with, or make a dataset with this one"
            )


def own_prompts(validation: Dataset) -> list[tuple[str, Batch]]:
    """The first `MOST_PROMPTS` pictures of a dataset, each a batch of its own, with its prompt."""
    plain = [index for index, place in enumerate(validation.places) if place.plain][:MOST_PROMPTS]
    batches = [validation.read([index]) for index in plain]
    return [(validation.prompts[int(batch.prompts)], batch) for batch in batches]


def check_score(folder: Path, fidelity: str) -> None:
    """Raise OptionsError where the run in `folder` has been scored otherwise: its curve would jump for nothing."""
    if not checkpoint.files(folder / "checkpoints"):
        return
    try:
        before = json.loads((folder / OPTIONS).read_text(encoding="utf-8")).get("fidelity", fidelity)
    except (OSError, ValueError, AttributeError):  # there is none, or a full disk left a part of it
        return
    if before != fidelity:
        raise OptionsError(
            f"this run is scored by fidelity {before}, found {fidelity}: give the same again, or train under another "
            "name"
        )


# -- runs that are finished, and their files ---------------------------------------------------------------------------


def finished(folder: Path, options: TrainingOptions, facts: Mapping[str, str]) -> bool:
    """Whether the run in `folder` has come to `options.steps`, and its control is there.

    Raises OptionsError where it is another run than the options ask for.
    """
    saved = checkpoint.newest(folder / "checkpoints")
    results = ["control.safetensors", *(["unet.safetensors"] if options.unlock_decoder else [])]
    if saved is None or saved.step < options.steps or not all((folder / name).is_file() for name in results):
        return False
    checkpoint.check(saved, options, dict(facts))
    _, metadata = read_weights(folder / "control.safetensors")
    return metadata.get("trained_steps") == str(saved.step)


def place_of(name: str) -> tuple[tuple[str, ...], Path]:
    """The parts of a control's name below `zeroconv`, and the run's folder; raises SaveError for names that are none.

    `zeroconv/` in front of a name is where it goes anyway, and is not put there twice; a run that an earlier version
    of the pack began so is found where it is.
    """
    parts = name_parts(name)
    folder = folder_of("/".join(parts), "training")
    bare = parts[1:] if parts[0] == PLACE and len(parts) > 1 else parts
    return bare, folder if folder.is_dir() else folder_of("/".join(bare), "training")


def hand_out(folder: Path, parts: tuple[str, ...], node_id: str | None) -> None:
    """Publish the control of a run that was stopped, as far as it has come, and say so."""
    try:
        found = newest_control(folder)
        if found is None or _steps(found) <= _steps(folder / "control.safetensors"):
            return  # what is published is at least as far
        published = publish(found, users_folder(), parts, folder / "control.safetensors")
        unet = found.parent / "unet" / found.name
        if unet.is_file():
            publish(unet, models_folder(), parts, folder / "unet.safetensors")
    except (ZeroConvError, OSError, ValueError) as error:  # what stopped the run is said, and it is more
        log.warning("the control of %s could not be put into the controlnet folder: %s", folder, error)
        return
    said = f"stopped: {published} is the control so far. Queue again to train on, or with fewer steps to be given it"
    log.info("%s", said)
    say(said, node_id)


def publish_best(folder: Path, parts: tuple[str, ...]) -> list[str]:
    """Publish the control with the highest fidelity where it is not the last one; gives what to say of it."""
    if not (folder / BEST).is_file():
        return []
    best = _steps(folder / BEST)
    if best == _steps(folder / "control.safetensors"):
        return []
    *folders, name = parts
    published = publish(folder / BEST, users_folder(), (*folders, f"{name}-best"))
    return [f"fidelity was highest at step {best}: saved {published} too"]


def _steps(control: Path) -> int:
    """After how many steps a run's control was written; 0 where there is none."""
    return int(read_weights(control)[1].get("trained_steps", "0")) if control.is_file() else 0


def publish(file: Path, folder: Path, parts: tuple[str, ...], stands_for: Path | None = None) -> str:
    """Copy a run's file into a folder of the host's models, and give its name there.

    A file that this run put there before is replaced, unless somebody has changed it since: nothing else is. What is
    there already is not copied again. `stands_for` is the file in the run's folder that will take its place there.
    """
    stands_for = stands_for or file
    record = stands_for.parent / PUBLISHED
    known: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    before = known.get(stands_for.name)
    path = free_path(folder, (PLACE, *parts))
    if before is not None:
        ours = Path(before["path"])
        if ours.is_relative_to(folder) and (not ours.exists() or _stamp(ours) == before["stamp"]):
            path = ours
        if path.exists() and before["source"] == _stamp(file):
            return str(path.relative_to(folder))
    try:
        saving.write(path, *read_weights(file))
    except saving.SaveError:
        if not path.exists():
            raise
        path = free_path(folder, (PLACE, *parts))  # Windows replaces no file that is in use, as one loaded here is
        saving.write(path, *read_weights(file))
    known[stands_for.name] = {"path": str(path), "stamp": _stamp(path), "source": _stamp(file)}
    with replacing(record) as temporary:
        temporary.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8", newline="\n")
    return str(path.relative_to(folder))


def _stamp(path: Path) -> list[int]:
    """What changes when a file is written."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def models_folder() -> Path:
    """The folder that Load Diffusion Model reads."""
    found = [Path(folder) for folder in folder_paths.get_folder_paths("diffusion_models")]
    return next((folder for folder in found if folder.name == "diffusion_models"), found[0])
