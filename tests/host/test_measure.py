"""`MeasureControl` on a real host: what follows its hint scores higher, and the node says what it compared."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
import torch
from graphs import picture
from skimage import data

if TYPE_CHECKING:
    from hosting import Host

from zeroconv import annotators
from zeroconv.annotators import measure
from zeroconv.annotators.compare import compare
from zeroconv.lab.models import CONTROLS, WEIGHTS

CANNY = {"annotator": "canny", "tolerance": 2}


def hint_of(host: Host, image: torch.Tensor, **parameters: Any) -> torch.Tensor:
    return host.call("Annotate", image=image, annotator="canny", resolution=0, **parameters)[0]


def scene(host: Host, seed: int) -> dict[str, Any]:
    names = ("image", "depth", "pose", "canny", "pose_keypoints", "prompt")
    return dict(zip(names, host.call("LabScene", seed=seed)))


def test_the_same_picture_scores_one_and_another_less(host: Host):
    image, other = scene(host, 5)["image"], scene(host, 6)["image"]
    hint = hint_of(host, image)
    score, report, overlay = host.call("MeasureControl", image=image, hint=hint, **CANNY)
    assert score == 1
    assert report.startswith("canny: score 1.000 of 1\nedge F1 1.000, precision 1.000, recall 1.000\nby chance: 0.")
    assert report.splitlines()[3:] == ["annotated with: canny at 128x128, low 100.0, high 200.0, backend cv2"]
    assert overlay.shape == (1, 128, 128, 3)
    less, report, _ = host.call("MeasureControl", image=other, hint=hint, **CANNY)
    assert less < 0.7
    assert f"score {less:.3f}" in report


def test_a_batch_is_scored_picture_by_picture(host: Host):
    images = torch.cat([scene(host, seed)["image"] for seed in (5, 6)])
    hint = hint_of(host, images[:1])
    before = images.clone(), hint.clone()
    score, report, overlay = host.call("MeasureControl", image=images, hint=hint, **CANNY)
    alone = [host.call("MeasureControl", image=image[None], hint=hint, **CANNY)[0] for image in images]
    assert score == pytest.approx(np.mean(alone))
    assert alone[0] == 1 > alone[1]
    assert overlay.shape == (2, 128, 128, 3)
    assert [line.partition(":")[0] for line in report.splitlines()] == [
        *("canny", "picture 1", "picture 2", "by chance", "annotated with")
    ]
    assert torch.equal(images, before[0]) and torch.equal(hint, before[1])


def test_the_score_is_the_cores_at_the_hints_size(host: Host):
    image = picture(3, height=96, width=96)
    hint = hint_of(host, picture(4))
    score, *_ = host.call("MeasureControl", image=image, hint=hint, **CANNY)
    from zeroconv.annotators.canny import canny
    from zeroconv.annotators.images import resized

    large = resized(image[0].numpy(), 128, 128)
    assert score == compare("canny", large, canny(large), hint[0].numpy(), 2).score


def test_of_a_hint_with_another_aspect_the_middle_counts(host: Host):
    image = scene(host, 5)["image"]
    hint = torch.zeros(1, 128, 256, 3)
    hint[:, :, 64:192] = hint_of(host, image)
    score, report, overlay = host.call("MeasureControl", image=image, hint=hint, **CANNY)
    assert score == 1
    assert "of the hint its middle, 128x128" in report
    assert overlay.shape == (1, 128, 128, 3)


def test_a_hint_of_the_result_that_is_given_is_taken(host: Host):
    image = scene(host, 5)["image"]
    hint = hint_of(host, image, canny_low=20, canny_high=60)
    plain, *_ = host.call("MeasureControl", image=image, hint=hint, **CANNY)
    given, *_ = host.call("MeasureControl", image=image, hint=hint, result_hint=hint, **CANNY)
    assert plain < 0.95
    assert given == 1


def photograph(name: str) -> torch.Tensor:
    """One of scikit-image's, squeezed to 384x512."""
    picture = cv2.resize(getattr(data, name)(), (512, 384), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(picture / np.float32(255))[None]


def chance_in(report: str) -> float:
    (line,) = [line for line in report.splitlines() if line.startswith("by chance: ")]
    return float(line.removeprefix("by chance: ").partition(",")[0])


def test_the_result_is_annotated_with_the_parameters_that_are_set(host: Host):
    """A photograph against its own hint of other thresholds; with the same ones nothing is missing."""
    image, own = photograph("coffee"), {"canny_low": 50.0, "canny_high": 100.0}
    hint = hint_of(host, image, **own)
    other, report, _ = host.call("MeasureControl", image=image, hint=hint, **CANNY)
    assert 0.6 < other < 0.9 and "low 100.0, high 200.0" in report
    same, report, _ = host.call("MeasureControl", image=image, hint=hint, **CANNY, **own)
    assert same == 1 and report.endswith("annotated with: canny at 512x384, low 50.0, high 100.0, backend cv2")
    _, report, _ = host.call("MeasureControl", image=image, hint=hint, result_hint=hint, **CANNY)
    assert report.endswith("annotated with: nothing, what was given was taken")


@pytest.mark.parametrize("name", ["chelsea", "coffee", "rocket"])
def test_what_chance_gives_is_about_what_another_photograph_scores(host: Host, name: str):
    hint = hint_of(host, photograph(name))
    for other in {"chelsea", "coffee", "rocket", "astronaut"} - {name}:
        score, report, _ = host.call("MeasureControl", image=photograph(other), hint=hint, **CANNY)
        assert score == pytest.approx(chance_in(report), abs=0.15)
    score, report, _ = host.call("MeasureControl", image=photograph(name), hint=hint, **CANNY)
    assert score == 1 and chance_in(report) < 0.5


def test_a_pose_is_measured_by_its_joints(host: Host):
    made = scene(host, 5)
    inputs = {"image": made["image"], "hint": made["pose"], "annotator": "human_pose"}
    keypoints, other = made["pose_keypoints"], scene(host, 11)["pose_keypoints"]
    score, report, overlay = host.call("MeasureControl", **inputs, pose_keypoints=keypoints, result_keypoints=keypoints)
    assert score == 1
    assert "pose OKS 1.000, PCK 1.000, 1 people for 1" in report and chance_in(report) < 0.3
    assert overlay.shape == (1, 128, 128, 3)
    less, *_ = host.call("MeasureControl", **inputs, pose_keypoints=keypoints, result_keypoints=other)
    assert less < 0.5
    with pytest.raises(Exception, match="a pose is measured by its joints, and there are none: connect pose_keypoints"):
        host.call("MeasureControl", **inputs, result_keypoints=keypoints)
    with pytest.raises(Exception, match="there are none: connect result_keypoints with the result_hint"):
        host.call("MeasureControl", **inputs, result_hint=made["pose"], pose_keypoints=keypoints)


@dataclass
class Finder:
    """A stand-in for a network that finds one person: where the picture is brightest."""

    calls: int = 0


def test_the_annotators_networks_come_from_the_host(host: Host, monkeypatch: pytest.MonkeyPatch):
    from zeroconv.annotators.pose import human_pose
    from zeroconv.nodes.host import annotators as host_annotators

    asked = []
    finder = Finder()

    def networks(names: Any, node_id: Any) -> list[Any]:
        asked.append(tuple(names))
        return [finder] * len(names)

    @wraps(human_pose)
    def find(*given: Any, **parameters: Any) -> tuple[np.ndarray, dict[str, Any]]:
        given[0].calls += 1
        return given[-1], made["pose_keypoints"][0]

    made = scene(host, 5)
    monkeypatch.setattr(host_annotators, "networks", networks)
    (record,) = (entry for entry in annotators.ANNOTATORS if entry.name == "human_pose")
    fake = replace(record, function=find)
    monkeypatch.setattr(sys.modules["zeroconv.nodes.measure"], "ANNOTATORS", (fake,))
    images = made["image"].repeat(3, 1, 1, 1)
    score, *_ = host.call(
        "MeasureControl", image=images, hint=made["pose"], annotator="human_pose", pose_keypoints=made["pose_keypoints"]
    )
    assert score == 1
    assert asked == [record.networks]  # once for the batch
    assert finder.calls == 3


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({"image": torch.zeros(0, 64, 64, 3)}, "found 0 images and 1 hints: connect at least one of each"),
        ({"hint": torch.zeros(2, 64, 64, 3)}, "3 images came with 2 hints: connect one for all or one for each"),
        ({"image": torch.full((1, 64, 64, 3), torch.nan)}, "numbers that are not finite"),
    ],
)
def test_what_cannot_be_measured_is_said(host: Host, inputs: dict[str, torch.Tensor], text: str):
    given = {"image": torch.rand(3, 64, 64, 3), "hint": torch.zeros(1, 64, 64, 3), **inputs}
    with pytest.raises(Exception, match=text):
        host.call("MeasureControl", **given, **CANNY)


def test_only_annotators_with_a_score_are_offered(host: Host):
    offered = host.ours["MeasureControl"].INPUT_TYPES()["required"]["annotator"][1]["options"]
    assert "canny" in offered
    assert not set(offered) & set(measure.UNMEASURED)
    assert [measure.kind_of(name) for name in offered]


@pytest.mark.weights
@pytest.mark.skipif(
    not ((WEIGHTS / "unet.safetensors").is_file() and (CONTROLS / "lab_canny.safetensors").is_file()),
    reason="the embedded model's weights are not in lab/weights",
)
def test_a_controlled_result_follows_its_hint_and_an_uncontrolled_one_does_not(host: Host):
    from safetensors.torch import load_file

    host.write("lab_canny", load_file(CONTROLS / "lab_canny.safetensors"))
    model, clip, vae = host.call("LoadLabModel")
    (control,) = host.call("LoadControlNet", control_net_name="lab_canny.safetensors")
    scores: dict[str, list[float]] = {"with": [], "without": []}
    for seed in (1000002, 1000003):
        made = scene(host, seed)
        (controlled,) = host.call("ApplyControl", model=model, control_net=control, image=made["canny"])
        (positive,) = host.call("CLIPTextEncode", clip=clip, text=made["prompt"])
        (negative,) = host.call("CLIPTextEncode", clip=clip, text="")
        for name, used in (("with", controlled), ("without", model)):
            (latent,) = host.call(
                "KSampler",
                model=used,
                positive=positive,
                negative=negative,
                latent_image={"samples": torch.zeros(1, 4, 16, 16)},
                seed=1,
                steps=12,
                cfg=3.0,
                sampler_name="euler",
                scheduler="normal",
                denoise=1.0,
            )
            (result,) = host.call("VAEDecode", samples=latent, vae=vae)
            score, *_ = host.call("MeasureControl", image=result, hint=made["canny"], annotator="canny", tolerance=1)
            scores[name].append(score)
    # measured: 0.65 and 0.56 with the control, 0.33 and 0.36 without
    assert min(scores["with"]) > 0.5
    assert max(scores["without"]) < 0.42


def test_keypoints_that_came_with_the_hint_do_not_matter_for_edges(host: Host):
    """Annotate gives them with every hint, and so they are wired: none, or those of another annotator."""
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(3))
    hint, nobody = host.call("Annotate", image=image, annotator="canny", resolution=0)
    frame = {"people": [], "canvas_width": 64, "canvas_height": 64}
    for keypoints in (None, nobody, [frame], [frame, frame, frame]):
        wired = {} if keypoints is None else {"pose_keypoints": keypoints, "result_keypoints": keypoints}
        score, *_ = host.call("MeasureControl", image=image, hint=hint, annotator="canny", **wired)
        assert score == 1.0
