"""`MeasureControl`: how faithfully a result follows its hint."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..annotators import ANNOTATORS, PARAMETERS, pipeline
from ..annotators.compare import (
    TOLERANCE,
    chance,
    chance_of_people,
    compare,
    compare_people,
    cut_bodies,
    read_bodies,
)
from ..annotators.images import AnnotatorError, resized, to_picture
from ..annotators.keypoints import read_frames
from ..annotators.measure import SCORES, centre_like, kind_of
from .annotate import PoseKeypoint, each, listed, own_parameters, widget
from .host import annotators as host_annotators
from .host import given
from .host.progress import steps

_NO_JOINTS = "a pose is measured by its joints, and there are none: connect {}"


class MeasureControl(io.ComfyNode):
    """Makes the hint of a result and scores it against the hint that the result was made with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        measured = {name for names in SCORES.values() for name in names}
        return io.Schema(
            node_id="MeasureControl",
            display_name="Measure Control (ZeroConv)",
            category="ZeroConv/inspect",
            description="How faithfully a result follows its hint: annotates the result again and compares the two.",
            inputs=[
                io.Image.Input("image", tooltip="The result: what was sampled with the control."),
                io.Image.Input("hint", tooltip="The hint that the control was given."),
                io.Combo.Input(
                    "annotator",
                    options=listed(measured),
                    tooltip="What made the hint; the result is annotated with it, as set below.",
                ),
                io.Int.Input(
                    "tolerance",
                    default=TOLERANCE,
                    min=0,
                    max=64,
                    tooltip="For edges: how many pixels of the hint one may be off and still count.",
                ),
                io.Image.Input(
                    "result_hint",
                    optional=True,
                    tooltip="The result's hint, where you annotated it yourself, with other settings or another node.",
                ),
                PoseKeypoint.Input("pose_keypoints", optional=True, tooltip="For poses: those of the hint."),
                PoseKeypoint.Input(
                    "result_keypoints", optional=True, tooltip="For poses: those of the result, where you have them."
                ),
                # The last of all, for they grow.
                *(
                    widget(annotator, parameter)
                    for annotator, parameter in PARAMETERS
                    if annotator.name in measured and parameter.name in annotator.own(annotator.function, {})
                ),
            ],
            outputs=[
                io.Float.Output(display_name="score"),
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="overlay"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        image: torch.Tensor,
        hint: torch.Tensor,
        annotator: str,
        tolerance: int,
        result_hint: torch.Tensor | None = None,
        pose_keypoints: Any = None,
        result_keypoints: Any = None,
        **parameters: Any,
    ) -> io.NodeOutput:
        if len(image) == 0 or len(hint) == 0:
            raise AnnotatorError(f"found {len(image)} images and {len(hint)} hints: connect at least one of each")
        for name, pictures in {"image": image, "hint": hint, "result_hint": result_hint}.items():
            given.picture(pictures, name)
        posed = kind_of(annotator) == "pose"
        # Annotate gives keypoints with every hint; only people are compared by them.
        pose_keypoints, result_keypoints = (
            given.people(read_frames(found)) or None if posed else None for found in (pose_keypoints, result_keypoints)
        )
        if posed and pose_keypoints is None:
            raise AnnotatorError(_NO_JOINTS.format("pose_keypoints, those of the hint"))
        (chosen,) = (entry for entry in ANNOTATORS if entry.name == annotator)
        own = own_parameters(chosen, parameters)
        networks = cache(lambda: host_annotators.networks(chosen.networks, cls.hidden.unique_id))
        hints = each(hint, len(image), "hints")
        made = each(result_hint, len(image), "result_hints")
        wanted = each(pose_keypoints, len(image), "frames of pose_keypoints")
        found = each(result_keypoints, len(image), "frames of result_keypoints")
        compared, by_chance, cropped, used = [], [], "", "annotated with: nothing, what was given was taken"
        for i, original in enumerate(steps(image, cls.hidden.unique_id)):
            whole = to_picture(_array(hints[i]))
            rows, columns = centre_like(*whole.shape[:2], *original.shape[:2])
            target = whole[rows, columns]
            height, width = target.shape[:2]
            if target.shape != whole.shape:
                cropped = f"; of the hint its middle, {width}x{height}, for the result has another aspect"
            picture = resized(to_picture(_array(original)), height, width)
            result, frame = picture, found[i]
            if made[i] is not None:
                result = resized(to_picture(_array(made[i])), height, width)
            elif frame is None:
                result, frame = pipeline.annotate(chosen, picture, networks=networks, parameters=own)
                used = f"annotated with: {annotator} at {width}x{height}"
                used += "".join(f", {name} {value}" for name, value in own.items())
            if not posed:
                compared.append(compare(annotator, picture, result, target, tolerance))
                by_chance.append(chance(annotator, result, target, tolerance))
            elif frame is None:
                raise AnnotatorError(_NO_JOINTS.format("result_keypoints with the result_hint"))
            else:
                bodies = cut_bodies(read_bodies(wanted[i], *whole.shape[:2]), rows, columns)
                people = read_bodies(frame, height, width)
                compared.append(compare_people(picture, people, bodies))
                by_chance.append(chance_of_people(people, bodies, height, width))
        score = float(np.mean([one.score for one in compared]))
        lines = [f"{annotator}: score {score:.3f} of 1{cropped}"]
        lines += [(f"picture {i}: " if len(compared) > 1 else "") + one.says for i, one in enumerate(compared, 1)]
        lines += [
            f"by chance: {np.mean(by_chance):.3f}, what the results score when they are moved by half a side",
            used,
        ]
        text = "\n".join(lines)
        pictures = torch.from_numpy(np.stack([one.overlay for one in compared]))
        shown = {**ui.PreviewImage(pictures, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}
        return io.NodeOutput(score, text, pictures, ui=shown)


def _array(picture: torch.Tensor) -> np.ndarray:
    return picture.float().cpu().numpy()
