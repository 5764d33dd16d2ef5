"""One control of each kind for the tiny SDXL model, applied by our nodes or by the host's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graphs import Scene
from torch import Tensor

from ..test_interop import made

if TYPE_CHECKING:
    from hosting import Host

KINDS = ("controlnet", "foreign", "union", "lora", "adapter", "lllite", "lite")
NATIVE = ("controlnet", "lora")  # kinds of which the host's loader makes one of the same tiny file
WAYS = ("ApplyControl", "ApplyControlToPrompt")


def ours(host: Host, kind: str) -> Any:
    """A CONTROL_NET of this kind; "foreign" comes from the host's loader, for our nodes to wrap."""
    if kind in ("controlnet", "foreign"):
        return host.load("sdxl_depth", native=kind == "foreign")
    return made(host, kind)


def native(host: Host, kind: str) -> Any:
    """The same network from the host's loader."""
    if kind == "controlnet":
        return host.load("sdxl_depth", native=True)
    ours(host, kind)  # writes the file
    return host.call("ControlNetLoader", control_net_name=f"sdxl_kind_{kind}.safetensors")[0]


def apply(host: Host, way: str, scene: Scene, control: Any, image: Tensor, **options: Any) -> Scene:
    """The scene under this control by one of our nodes, or by the host's "ControlNetApplyAdvanced"."""
    if way == "ApplyControl":
        (model,) = host.call(way, model=scene.model, control_net=control, image=image, **options)
        return replace(scene, model=model)
    prompts = {"positive": scene.positive, "negative": scene.negative}
    positive, negative = host.call(way, **prompts, control_net=control, image=image, **options)
    return replace(scene, positive=positive, negative=negative)
