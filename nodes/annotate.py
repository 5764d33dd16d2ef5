"""`Annotate`: a picture becomes a hint."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..annotators import ANNOTATORS, GROUPS, PARAMETERS, Annotator, Parameter
from ..annotators.cache import HintCache
from ..annotators.images import AnnotatorError, fit_mask
from ..annotators.keypoints import read_frames
from ..annotators.networks import NETWORKS
from ..annotators.pipeline import covering, draw
from .host import annotators as host_annotators
from .host import given
from .host.progress import steps

log = logging.getLogger(__name__)

PoseKeypoint = io.Custom("POSE_KEYPOINT")

PIXEL_PERFECT = -1
"""As `resolution`: that of the latent."""
LATENT_CELL = 8
"""Pixels of a side that one of a Stable Diffusion latent stands for."""
AT_ONCE = 8 * 512**2
"""Pixels of the pictures that a network looks at together."""

HINTS = HintCache(512 << 20)
"""The node runs again when any of its widgets changes or one frame of many; what the change does not touch is kept."""


class Annotate(io.ComfyNode):
    """Makes a hint with the annotator of the user's choice."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Annotate",
            display_name="ControlNet Preprocessor: depth, pose, canny ... (ZeroConv)",
            category="ZeroConv/preprocess",
            description="Makes a hint, the picture that a ControlNet follows: depth, pose, edges, lines, normals, "
            "segments and more, each by a preprocessor (annotator) of its own.",
            inputs=[
                io.Image.Input("image"),
                io.Combo.Input("annotator", options=listed(), tooltip=groups()),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=PIXEL_PERFECT,
                    max=8192,
                    tooltip="Short side of the hint in pixels; 0 keeps the image's own size, and -1 covers the latent.",
                ),
                *(widget(annotator, parameter) for annotator, parameter in PARAMETERS),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The hint is kept where this is white, black elsewhere; inpaint: white is painted anew, or "
                    "filled; mask_sam2: a dot on what to mark.",
                ),
                PoseKeypoint.Input(
                    "pose_keypoints", optional=True, tooltip="The people that pose draws; all others hand it on."
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="What is sampled: the hint becomes as large where resolution is -1.",
                ),
            ],
            outputs=[io.Image.Output(display_name="hint"), PoseKeypoint.Output(display_name="pose_keypoints")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        image: torch.Tensor,
        annotator: str,
        resolution: int,
        mask: torch.Tensor | None = None,
        pose_keypoints: Any = None,
        latent: dict[str, Any] | None = None,
        **parameters: Any,
    ) -> io.NodeOutput:
        (chosen,) = (entry for entry in ANNOTATORS if entry.name == annotator)
        own = own_parameters(chosen, parameters)
        if image.numel() == 0:
            raise AnnotatorError(f"image is an empty batch of shape {tuple(image.shape)}: connect at least one picture")
        if resolution == PIXEL_PERFECT:
            resolution = as_large(image, latent)
        networks = cache(lambda: host_annotators.networks(chosen.networks, cls.hidden.unique_id))
        masks = each(given.mask(mask), len(image), "masks")
        frames = (
            each(given.people(read_frames(pose_keypoints)), len(image), "frames of pose_keypoints")
            if chosen.reads_pose
            else [None] * len(image)
        )
        masks = [None if mask is None else mask[0].float().cpu().numpy() for mask in masks]
        together = max(1, AT_ONCE // image[0, :, :, 0].numel()) if chosen.batched else 1
        pictures, found, run = image.float().cpu().numpy(), [], object()

        def seen() -> Iterator[np.ndarray]:
            for first in steps(range(0, len(image), together), cls.hidden.unique_id):
                part = slice(first, first + together)
                also: dict[str, Any] = {"masks": masks[part], "frames": frames[part], "parameters": own, "run": run}
                for one, frame in HINTS.see(chosen, pictures[part], resolution, networks=networks, **also):
                    found.extend([] if frame is None else [frame])
                    yield one

        hints: torch.Tensor | None = None
        for i, (hint, area) in enumerate(zip(draw(chosen, seen(), own), masks)):
            if area is not None and not chosen.reads_mask:
                hint = hint * fit_mask(area, *hint.shape[:2])[:, :, None]
            # All of a video twice would be more than there is room for: each hint goes to its place.
            hints = torch.empty(len(image), *hint.shape) if hints is None else hints
            hints[i] = torch.from_numpy(hint)
        assert hints is not None
        if empty := [i for i, frame in enumerate(found) if not frame["people"]]:
            log.warning(
                "%s found nobody in picture %s: the hint is black; lower its thresholds, or draw people with Edit Pose",
                annotator,
                ", ".join(str(i + 1) for i in empty),
            )
        # What marks the masked pixels need not be a colour: the picture that is shown is clamped, the hint is not.
        shown = hints.clamp(0, 1) if chosen.reads_mask else hints
        return io.NodeOutput(hints, found or pose_keypoints or [], ui=ui.PreviewImage(shown, cls=cls))


def listed(of: Collection[str] | None = None) -> list[str]:
    """The names of all annotators, or of those of `of`, group by group."""
    return [name for names in GROUPS.values() for name in names if of is None or name in of]


def groups(of: Collection[str] | None = None) -> str:
    """The same for people: each group with its annotators, and how much those with a network download."""
    sizes = {network.name: sum(file.size for file in network.files) / 1e6 for network in NETWORKS}
    needed = {annotator.name: sum(sizes.get(name, 0) for name in annotator.networks) for annotator in ANNOTATORS}
    lines = []
    for group, names in GROUPS.items():
        shown = [name for name in names if of is None or name in of]
        marked = [f"{name} ({max(1, round(needed[name]))} MB)" if needed.get(name) else name for name in shown]
        lines += [f"{group}: {', '.join(marked)}."] if shown else []
    return "\n".join([*lines, "MB: downloaded when it runs for the first time."])


def as_large(image: torch.Tensor, latent: dict[str, Any] | None) -> int:
    """The resolution at which images (B,H,W,C) cover the latent. Raises AnnotatorError where there is none."""
    if latent is None:
        raise AnnotatorError(
            "resolution is -1, the latent's size, and found no latent: connect the one that is sampled"
        )
    height, width = (side * LATENT_CELL for side in latent["samples"].shape[-2:])
    return covering(tuple(image.shape[1:3]), (height, width))


def widget(annotator: Annotator, parameter: Parameter) -> Any:
    """The widget of one parameter. Optional: a workflow that was saved before an annotator came stays valid."""
    name, default = f"{annotator.name}_{parameter.name}", parameter.default
    said: dict[str, Any] = {"default": default, "optional": True, "tooltip": parameter.tooltip}
    if isinstance(default, bool):
        return io.Boolean.Input(name, **said)
    if isinstance(default, str):
        return io.Combo.Input(name, options=list(parameter.choices), **said)
    if isinstance(default, int):
        low, high, step = (int(number) for number in (parameter.minimum, parameter.maximum, parameter.step))
        return io.Int.Input(name, min=low, max=high, step=step, **said)
    return io.Float.Input(name, min=parameter.minimum, max=parameter.maximum, step=parameter.step, **said)


def own_parameters(annotator: Annotator, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a node's widgets that are the annotator's, by their own names; defaults for what is not there."""
    return {p.name: given.get(f"{annotator.name}_{p.name}", p.default) for p in annotator.parameters}


def each(found: Any, count: int, what: str) -> list[Any]:
    """One of `found` for each picture: there is one for all, or as many; `None` for each when there is none."""
    if found is None:
        return [None] * count
    if len(found) not in (1, count):
        raise AnnotatorError(f"{count} images came with {len(found)} {what}: connect one for all or one for each")
    return [found[i % len(found)] for i in range(count)]
