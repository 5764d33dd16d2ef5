"""ComfyUI's side of the pack. This list is all of the nodes."""

from __future__ import annotations

from .annotate import Annotate
from .apply import ApplyControl, ApplyControlToPrompt, StackControls
from .inspect import InspectControl
from .lab import LabScene, LoadLabModel
from .load import LoadControlNet

NODES = [
    LoadControlNet,
    Annotate,
    ApplyControl,
    ApplyControlToPrompt,
    StackControls,
    InspectControl,
    LoadLabModel,
    LabScene,
]
