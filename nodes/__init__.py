"""ComfyUI's side of the pack. This list is all of the nodes."""

from __future__ import annotations

from .annotate import Annotate
from .apply import ApplyControl, ApplyControlToPrompt, StackControls
from .compare import CompareImages
from .dataset import LabScenes, MakeControlDataset
from .dosing import ControlBlockWeights, ControlSchedule
from .found import findable
from .gate import gated
from .inspect import InspectControl
from .lab import LabScene, LoadLabModel
from .load import LoadControlNet
from .measure import MeasureControl
from .pose import EditPose
from .record import ControlReport, RecordControl
from .save import NewControlNet, SaveControlNet
from .train import TrainControlNet, TrainingOptions

NODES = [
    findable(gated(node))
    for node in (
        LoadControlNet,
        Annotate,
        EditPose,
        ApplyControl,
        ApplyControlToPrompt,
        StackControls,
        ControlSchedule,
        ControlBlockWeights,
        RecordControl,
        ControlReport,
        MeasureControl,
        CompareImages,
        InspectControl,
        NewControlNet,
        SaveControlNet,
        LoadLabModel,
        LabScene,
        LabScenes,
        MakeControlDataset,
        TrainControlNet,
        TrainingOptions,
    )
]
