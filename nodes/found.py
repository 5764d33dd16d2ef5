"""What people type when they look for a node, and what newer pages fold away until it is asked for."""

from __future__ import annotations

from inspect import signature
from typing import Any, TypeVar

from comfy_api.latest import io

Node = TypeVar("Node", bound=type)

WORDS: dict[str, tuple[str, ...]] = {
    "LoadControlNet": (
        *("controlnet", "controlnet loader", "load controlnet model", "control lora", "control-lora", "t2i adapter"),
        *("t2i-adapter", "t2iadapter", "union", "promax", "lllite", "controlllite", "inpaint controlnet"),
    ),
    "Annotate": (
        *("annotate", "annotator", "preprocessor", "controlnet preprocessor", "aux", "detector", "hint", "hint image"),
        *("control image", "openpose", "dwpose", "pose", "canny", "edge", "edge detection", "soft edge", "softedge"),
        *("hed", "teed", "pidinet", "lineart", "line art", "scribble", "sketch", "mlsd", "lines", "depth", "depth map"),
        *(
            "depth anything",
            "midas",
            "zoe",
            "normal",
            "normal map",
            "bae",
            "segmentation",
            "segment",
            "seg",
            "oneformer",
            *("moge", "marigold", "anyline", "manga"),
        ),
        *("sam", "tile", "blur", "inpaint", "lama", "shuffle", "color", "grayscale", "luminance", "threshold"),
    ),
    "EditPose": ("pose editor", "openpose editor", "edit openpose", "keypoints", "skeleton", "stick figure", "poser"),
    "ApplyControl": ("controlnet", "apply controlnet", "control", "strength", "t2i adapter", "control lora"),
    "ApplyControlToPrompt": ("apply controlnet", "apply controlnet advanced", "regional", "tiled", "upscale"),
    "StackControls": ("controlnet stack", "stack", "multi controlnet", "cr multi-controlnet stack"),
    "ControlSchedule": ("controlnet schedule", "strength schedule", "keyframe", "timestep keyframe", "curve", "fade"),
    "ControlBlockWeights": ("soft weights", "controlnet weights", "block weights", "layer weights", "guess mode"),
    "RecordControl": ("debug controlnet", "controlnet report"),
    "ControlReport": ("debug controlnet", "controlnet report", "heat map"),
    "MeasureControl": ("compare", "score", "evaluate", "metric", "fidelity"),
    "CompareImages": ("compare", "before after", "slider", "image compare", "side by side"),
    "InspectControl": ("controlnet info", "model info", "metadata"),
    "NewControlNet": ("create controlnet", "init controlnet", "zero convolution"),
    "SaveControlNet": ("convert controlnet", "export controlnet", "transfer controlnet", "extract controlnet"),
    "LoadLabModel": ("demo model", "test model", "tiny model"),
    "LabScene": ("demo", "example image", "test image"),
    "LabScenes": ("example dataset", "fill50k"),
    "MakeControlDataset": ("dataset", "controlnet dataset", "training data", "captions", "train"),
    "TrainControlNet": ("train", "training", "controlnet training", "finetune", "fine-tune"),
    "TrainingOptions": ("train options", "training options", "optimizer", "hyperparameters"),
}
"""By node id, for pages of ComfyUI that know search aliases; web/search.js has entries for those that look at names."""


FOLDED: dict[str, tuple[str, ...]] = {
    "LoadControlNet": ("weight_dtype",),
    **dict.fromkeys(("ApplyControl", "ApplyControlToPrompt", "StackControls"), ("unit", "guidance", "resize", "reuse")),
    "ControlSchedule": ("per_image",),
    "MakeControlDataset": ("annotator_resolution", "mirror"),
    "NewControlNet": ("hint_channels", "hint_encoder"),
    "SaveControlNet": ("layout", "dtype"),
    "TrainControlNet": ("accumulation", "warmup", "schedule", "held_out", "save_every", "fidelity"),
}
"""Inputs that newer pages keep behind "advanced", by node id: seen first is what every picture asks for."""

FOLDS = "advanced" in signature(io.Int.Input).parameters
"""Whether the host has such inputs; a page of an older one may hide them with no way to get them back."""


def findable(node: Node) -> Node:
    """`node`, whose description for the page has its words, on hosts too whose schema has no place for them."""

    def described(cls: Any) -> dict[str, Any]:
        info = super(node, cls).GET_NODE_INFO_V1()  # type: ignore[misc]
        for group in ("required", "optional"):
            for name, (_, options) in info["input"].get(group, {}).items():
                if FOLDS and name in FOLDED.get(info["name"], ()):
                    options["advanced"] = True
        return {**info, "search_aliases": list(WORDS[info["name"]])}

    node.GET_NODE_INFO_V1 = classmethod(described)  # type: ignore[attr-defined]
    return node
