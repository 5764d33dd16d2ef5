"""What Apply and Stack show of a hint once they have run: how it will be seen, and when and where control acts."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from comfy_api.latest import io, ui
from torch import Tensor

from ..controlnet_core.dosing.block_weights import BlockWeights
from ..controlnet_core.dosing.strength import Strength
from ..controlnet_core.dosing.window import Window
from .host import given, stack
from .host.resize import Resize, resize

LONG = 256
"""Of the shown picture's sides, in pixels."""
MASKED = 0.2
"""What is left of the light where a mask lets nothing act."""

FITS: dict[Resize, str] = {
    "crop": "its middle",
    "stretch": "all of it, distorted",
    "pad": "all of it, with black borders",
}
BLOCKS = {
    "even": "in every block",
    "soft": "in every block, the shallow ones less",
    "middle only": "in the middle block alone",
    "deep half": "in the deep half of the blocks (layout)",
    "shallow half": "in the shallow half of the blocks (detail)",
}


def stacked() -> dict[str, Any]:
    """The UI output of a node without a control of its own."""
    return {"hint": [{"pictures": [], "says": "The hints of a stack are shown where they are stacked."}]}


def shown(node: type[io.ComfyNode], entry: stack.Entry) -> dict[str, Any]:
    """The UI output of a node whose own control is `entry`, for web/hint.js.

    The picture has the hint's own shape: how large the picture is that will be sampled, nobody knows yet.
    """
    control, image, *_ = entry
    if image.ndim != 4 or not image.numel():  # refused when it is applied
        return {}
    try:
        pictures = ui.PreviewImage(picture(image, control.dosing.mask, control.resize), cls=node).as_dict()["images"]
    except (OSError, given.GivenError):  # a full disk, a mask that no part is left of: no reason not to go on
        pictures = []
    return {"hint": [{"pictures": pictures, "says": says(image, control.dosing, control.resize, control.one_sided)}]}


def picture(image: Tensor, mask: Tensor | None, how: Resize) -> Tensor:
    """The first hint of `image` (B,H,W,C) as an IMAGE (1,h,w,3) of at most LONG pixels a side, dark where `mask` is.

    A grey hint is in its three channels, and a transparent one lies on black.
    """
    apart = max(1, max(image.shape[1:3]) // (2 * LONG))  # of a large one not every pixel is looked at
    hint = image[:1, ::apart, ::apart].movedim(-1, 1).float().nan_to_num().clamp(0, 1)
    hint = hint[:, :3] * hint[:, 3:] if hint.shape[1] == 4 else hint[:, [0, 1, 2] if hint.shape[1] > 2 else [0, 0, 0]]
    scale = min(1.0, LONG / max(hint.shape[2:]))
    height, width = (max(1, round(side * scale)) for side in hint.shape[2:])
    small = F.interpolate(hint, (height, width), mode="area")
    if mask is not None:
        small = small * (MASKED + (1 - MASKED) * resize(mask[:1].to(small), height, width, how, smooth=True))
    return small.movedim(1, -1)


def says(image: Tensor, strength: Strength, how: Resize, one_sided: bool) -> str:
    """In a user's words: what the network sees of the hint, and when and where the control acts."""
    count, height, width = image.shape[:3]
    first = f"{width}x{height}" + (f", the first of {count}" if count > 1 else "")
    lines = [f"{first}. A picture of another shape gets {FITS[how]}."]
    if strength.off:
        return "\n".join([*lines, "Never acts: its strength, its mask or its schedule is 0."])
    places = [_blocks(strength.block_weights)]
    if strength.mask is not None:
        places.append("not where it is dark here")
    if one_sided:
        places.append("for the prompt alone, not the negative one")
    curve = "" if strength.schedule is None else ", by its schedule"
    return "\n".join([*lines, f"Acts {_when(strength.window)}{curve}: {', '.join(places)}."])


def _when(window: Window) -> str:
    if window.everything:
        return "all the time"
    if window.unit == "percent":
        return f"from {100 * window.start:g} % to {100 * window.end:g} % of sampling"
    return f"from step {window.start:g} " + ("on" if window.end == -1 else f"until before step {window.end:g}")


def _blocks(weights: BlockWeights | None) -> str:
    if weights is None:
        return BLOCKS["even"]
    if weights.preset != "custom":
        return BLOCKS[weights.preset] + ("" if weights.middle else ", not in the middle one")
    acting = sum(weight > 0 for weight in weights.skips)
    return f"in {acting} of {len(weights.skips)} blocks, {'and' if weights.middle else 'not in'} the middle one"
