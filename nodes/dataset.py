"""`MakeControlDataset` and `LabScenes`: what a control is trained on, encoded once, and something to begin with."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui

from ..controlnet_core.data.writer import CachingOptions
from ..lab.dataset import HELD_OUT
from ..lab.folder import HINTS
from .annotate import listed
from .host import dataset

ControlDataset = io.Custom("CONTROL_DATASET")

AT_ONCE = 8 * 512**2
"""Pixels of the pictures that are read and encoded together."""


class MakeControlDataset(io.ComfyNode):
    """Encodes pictures, captions and hints for training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MakeControlDataset",
            display_name="Make Control Dataset (ZeroConv)",
            category="ZeroConv/training",
            description="Pictures, captions and hints as training takes them, encoded once and kept on disk. What is "
            "there already is not encoded again: add pictures and run it again.",
            inputs=[
                io.String.Input(
                    "name",
                    default="my_dataset",
                    tooltip="The dataset's folder, below zeroconv/datasets of the output folder, or a whole path "
                    "below it or below a folder that extra_model_paths.yaml names control_datasets.",
                ),
                io.Vae.Input("vae", tooltip="Of the model that will be trained on."),
                io.Clip.Input("clip", tooltip="Of the model that will be trained on, with its LoRAs."),
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="A folder of pictures, as a whole path or below the input folder: with captions beside "
                    "them, with a list (*.jsonl, metadata.csv), or as fill50k. Empty where images are connected.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="One line for each of images; or one line for all pictures that have no caption.",
                ),
                io.Combo.Input(
                    "annotator",
                    options=[dataset.GIVEN, *listed(dataset.MAKERS)],
                    default=dataset.GIVEN,
                    tooltip="given: the folder's own hints, or hints. Else what makes a hint of every picture, with "
                    "its defaults; for others make them with ControlNet Preprocessor.",
                ),
                io.Int.Input(
                    "annotator_resolution",
                    default=0,
                    min=0,
                    max=8192,
                    step=8,
                    tooltip="Short side of the pictures that the annotator looks at; 0: the size that is trained on.",
                ),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip="Pictures become about as large as a square of this side, in their own shape. SD1.x 512, "
                    "SDXL 1024, the lab model 128.",
                ),
                io.Boolean.Input(
                    "mirror",
                    default=False,
                    tooltip="Adds the mirror image of each picture. Not for captions that say left and right.",
                ),
                io.Image.Input("images", optional=True, tooltip="Pictures of the canvas, beside or instead of folder."),
                io.Image.Input("hints", optional=True, tooltip="Of images, one of each; annotator is given."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="For models whose latents are scaled in a way of their own, such as Playground 2.5.",
                ),
                io.Int.Input(
                    "crops",
                    default=CachingOptions.crops,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="Parts of each picture that are trained on: 1 is its centre; more are slightly enlarged.",
                ),
                io.Int.Input(
                    "caption_variants",
                    default=CachingOptions.caption_variants,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="Forms of each caption: 1 is itself; more shuffle its tags, which commas part.",
                ),
                io.Float.Input(
                    "tag_dropout",
                    default=CachingOptions.tag_dropout,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Share of the tags that are left out of such a form.",
                ),
                io.Int.Input(
                    "keep_tags",
                    default=CachingOptions.keep_tags,
                    min=0,
                    max=1000,
                    optional=True,
                    tooltip="Tags that stay in front of such a form.",
                ),
            ],
            outputs=[ControlDataset.Output(display_name="dataset"), io.String.Output(display_name="report")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, name: str | None = None, folder: str | None = None, **_: Any) -> str:
        """Runs again when a picture in the folder changes, or when the dataset is gone."""
        return dataset.state_of(name, folder)

    @classmethod
    def execute(
        cls,
        name: str,
        vae: Any,
        clip: Any,
        folder: str,
        captions: str,
        annotator: str,
        annotator_resolution: int,
        resolution: int,
        mirror: bool,
        images: torch.Tensor | None = None,
        hints: torch.Tensor | None = None,
        model: Any = None,
        crops: int = CachingOptions.crops,
        caption_variants: int = CachingOptions.caption_variants,
        tag_dropout: float = CachingOptions.tag_dropout,
        keep_tags: int = CachingOptions.keep_tags,
    ) -> io.NodeOutput:
        options = CachingOptions(
            resolution=resolution,
            mirror=mirror,
            hints=annotator,
            hint_resolution=0 if annotator == dataset.GIVEN else annotator_resolution,
            batch_size=min(64, max(1, AT_ONCE // resolution**2)),
            crops=crops,
            caption_variants=caption_variants,
            tag_dropout=tag_dropout,
            keep_tags=keep_tags,
        )
        pictures = dataset.Pictures(folder, images, captions, hints)
        made, report = dataset.make(name, vae, clip, pictures, options, model, cls.hidden.unique_id)
        return io.NodeOutput(made, report, ui=ui.PreviewText(report))


class LabScenes(io.ComfyNode):
    """Renders a folder of lab scenes to train on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LabScenes",
            display_name="Lab Scenes (ZeroConv)",
            category="ZeroConv/lab",
            description="A folder of rendered scenes with their hints and prompts, to train the lab model on.",
            inputs=[
                io.Int.Input("count", default=1000, min=1, max=HELD_OUT, tooltip="A thousand take half a minute."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=HELD_OUT - 1,
                    control_after_generate=False,  # the page would draw another one after each run
                    tooltip="Of the first scene; the next has the next seed.",
                ),
                io.Combo.Input("hint", options=list(HINTS), default="depth"),
                io.String.Input(
                    "name",
                    default="scenes",
                    tooltip="The folder, below zeroconv/scenes of the output folder, or a whole path below it "
                    "or below a folder that extra_model_paths.yaml names control_datasets. Scenes that are "
                    "there are not rendered again.",
                ),
            ],
            outputs=[io.String.Output(display_name="folder")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str | None = None, **_: Any) -> bool:
        """Runs again when the folder is gone."""
        return name is not None and dataset.has_scenes(name)

    @classmethod
    def execute(cls, count: int, seed: int, hint: str, name: str) -> io.NodeOutput:
        return io.NodeOutput(str(dataset.render_scenes(name, count, seed, hint, cls.hidden.unique_id)))
