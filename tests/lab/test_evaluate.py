"""The lab's evaluation: IoU worked out by hand, sampling with controls, the table and its bounds, the commands."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from zeroconv.controlnet_core.networks.controlnet import ControlNet, copy_encoder
from zeroconv.controlnet_core.networks.unet import UNet
from zeroconv.lab import commands, evaluate, models, pipeline
from zeroconv.lab.autoencoder import Autoencoder
from zeroconv.lab.evaluate import BOUNDS, SETTINGS, Scores, held_out, iou, judge, verdicts
from zeroconv.lab.models import UNET
from zeroconv.lab.pipeline import LabModel, PipelineError, scene_noise
from zeroconv.lab.render import render
from zeroconv.lab.scene import random_scene
from zeroconv.lab.segmenter import Segmenter
from zeroconv.lab.text_encoder import TextEncoder
from zeroconv.lab.vocabulary import UnknownWord

TINY = replace(UNET, model_channels=32, channel_mult=(1, 1, 1, 1), head_dim=32)
PROMPTS = ["a red person on sand ground", "a blue cube on snow ground"]


@pytest.fixture
def model() -> LabModel:
    """Random weights; the controls are copies of the UNet's encoder with fresh zero convolutions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(TINY)
        controls = {name: ControlNet(TINY) for name in ("depth", "pose")}
        for control in controls.values():
            copy_encoder(control, unet.state_dict())
        return LabModel(Autoencoder(8, 8), TextEncoder(), unet, controls)


@pytest.fixture
def hints() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {name: torch.rand(2, 3, 64, 64, generator=draw) for name in ("depth", "pose")}


def grown(control: ControlNet, seed: int = 5) -> None:
    """Zero convolutions that are no longer zero."""
    draw = torch.Generator().manual_seed(seed)
    for part in (control.input_hint_block[-1], control.zero_convs, control.middle_block_out):
        for parameter in part.parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)


# The measure


def test_iou_of_figure_and_solids_by_hand():
    exact = torch.tensor([[[1, 1, 0, 0], [2, 2, 2, 0]], [[0, 0, 0, 0], [2, 0, 0, 0]]])
    found = torch.tensor([[[1, 0, 0, 0], [2, 2, 0, 2]], [[1, 0, 0, 0], [0, 0, 0, 0]]])
    kept = found.clone()
    # First: figure 1 of 2; solids share 2, either 4. Second: no figure to be found; the solid is missed.
    torch.testing.assert_close(iou(found, exact), torch.tensor([[0.5, 0.5], [torch.nan, 0.0]]), equal_nan=True)
    assert torch.equal(found, kept)
    assert torch.equal(iou(exact[:1], exact[:1]), torch.ones(1, 2))


def test_every_kind_of_solid_counts_as_solid():
    exact = torch.tensor([[[2, 3], [4, 5]]])
    found = torch.tensor([[[2, 2], [2, 0]]])
    torch.testing.assert_close(iou(found, exact)[0, 1], torch.tensor(0.75))


class Painted(nn.Module):
    """A judge that reads the class from the brightness: 0 ground, 0.5 figure, 1 solid."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        return -(x[:, :1] - torch.tensor([0, 0.5, 1]).view(1, 3, 1, 1)).abs()


def test_judge_compares_in_batches():
    exact = torch.randint(3, (5, 16, 16), generator=torch.Generator().manual_seed(0))
    pictures = (exact / 2)[:, None].repeat(1, 3, 1, 1)
    pictures[4] = 0
    painted = Painted()
    scores = judge(painted, pictures, exact, batch=2)  # type: ignore[arg-type]
    assert painted.batches == [2, 2, 1]
    assert torch.equal(scores, torch.tensor([[1.0, 1.0]] * 4 + [[0.0, 0.0]]))


def test_held_out_scenes_are_those_of_their_seeds():
    scenes = held_out(2)
    assert scenes.seeds == [1_000_000, 1_000_001]
    assert scenes.images.shape == (2, 3, 128, 128) and scenes.segments.shape == (2, 128, 128)
    assert set(scenes.hints) == {"canny", "depth", "pose"}
    exact = render(random_scene(1_000_001))
    np.testing.assert_allclose(scenes.images[1].permute(1, 2, 0), exact.image, atol=0.5 / 255 + 1e-6)
    np.testing.assert_array_equal(scenes.segments[1], exact.segments.clip(max=2))
    assert scenes.segments.max() == 2
    assert " person" in scenes.prompts[0]


# The model without a host


def test_fresh_zero_convolutions_change_no_bit(model: LabModel, hints: dict[str, Tensor]):
    noise = scene_noise([1, 2], 64)
    without = model.sample(PROMPTS, noise, steps=3)
    assert without.shape == (2, 3, 64, 64)
    assert 0 <= without.min() and without.max() <= 1 and without.std() > 0
    assert torch.equal(model.sample(PROMPTS, noise, hints, steps=3), without)
    grown(model.controls["depth"])
    assert (model.sample(PROMPTS, noise, hints, steps=3) - without).abs().max() > 0.01


def test_strength_zero_runs_no_control(model: LabModel, hints: dict[str, Tensor]):
    grown(model.controls["depth"])
    calls = []
    model.controls["depth"].register_forward_hook(lambda *_: calls.append(1))
    noise = scene_noise([1, 2], 64)
    without = model.sample(PROMPTS, noise, steps=2)
    assert torch.equal(model.sample(PROMPTS, noise, {"depth": hints["depth"]}, steps=2, strength=0.0), without)
    assert not calls


def test_a_hint_is_encoded_once_and_both_halves_run_together(model: LabModel, hints: dict[str, Tensor]):
    encoded, sizes = [], []
    depth = model.controls["depth"]
    depth.input_hint_block[0].register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    depth.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    model.unet.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    noise = scene_noise([1, 2], 64)
    model.sample(PROMPTS, noise, {"depth": hints["depth"]}, steps=4)
    assert encoded == [2]
    assert sizes == [4] * 8  # control and UNet, four steps, cond and uncond of two pictures
    sizes.clear()
    model.sample(PROMPTS, noise, {"depth": hints["depth"]}, steps=4, guidance_scale=1.0)
    assert sizes == [2] * 8


def test_several_controls_add(model: LabModel, hints: dict[str, Tensor], tolerance: dict):
    grown(model.controls["depth"])
    model.controls["pose"].load_state_dict(model.controls["depth"].state_dict())
    noise = scene_noise([1, 2], 64)
    twice = model.sample(PROMPTS, noise, {"depth": hints["depth"], "pose": hints["depth"]}, steps=3, strength=0.5)
    once = model.sample(PROMPTS, noise, {"depth": hints["depth"]}, steps=3, strength=1.0)
    torch.testing.assert_close(twice, once, **tolerance[torch.float32])
    half = model.sample(PROMPTS, noise, {"depth": hints["depth"]}, steps=3, strength=0.5)
    assert (half - once).abs().max() > 0.01


def test_guidance_is_between_and_beyond_its_halves(model: LabModel):
    """At scale 1 the prompt alone counts, at 0 the empty prompt alone."""
    noise = scene_noise([1, 2], 64)
    plain, empty = (model.sample(words, noise, steps=1, guidance_scale=1.0) for words in (PROMPTS, ["", ""]))
    assert (plain - empty).abs().max() > 1e-4
    torch.testing.assert_close(model.sample(PROMPTS, noise, steps=1, guidance_scale=0.0), empty, atol=1e-5, rtol=0)


def test_noise_of_a_scene_does_not_depend_on_its_batch():
    noise = scene_noise([4, 5, 6])
    assert noise.shape == (3, 4, 16, 16)
    assert torch.equal(noise[1:2], scene_noise([5]))
    assert not torch.equal(noise[0], noise[1])


def test_what_does_not_fit_is_refused(model: LabModel, hints: dict[str, Tensor]):
    noise = scene_noise([1, 2], 64)
    with pytest.raises(PipelineError, match="found 1 prompts and noise for 2 pictures: give each a prompt"):
        model.sample(PROMPTS[:1], noise)
    with pytest.raises(PipelineError, match="there is no control 'canny'; loaded: depth, pose"):
        model.sample(PROMPTS, noise, {"canny": hints["depth"]})
    with pytest.raises(PipelineError, match=r"depth hint has shape \(2, 3, 64, 56\); .* \(2, 3, 64, 64\): resize"):
        model.sample(PROMPTS, noise, {"depth": hints["depth"][..., :56]})
    with pytest.raises(UnknownWord, match="the lab has no word 'cat'"):
        model.sample(["a cat", "a cat"], noise)


def test_a_missing_file_says_what_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models, "WEIGHTS", tmp_path)
    with pytest.raises(models.MissingWeights, match=r"autoencoder\.safetensors is missing; `python dev.py lab train`"):
        LabModel.load()


# The report


def test_other_uses_the_next_scenes_hints_and_its_own_segments(model: LabModel, monkeypatch: pytest.MonkeyPatch):
    scenes = held_out(3)
    asked: list[dict[str, Tensor]] = []

    def sample(self: LabModel, prompts: list[str], noise: Tensor, hints: dict[str, Tensor], *_: object) -> Tensor:
        assert prompts == scenes.prompts and len(noise) == 3
        asked.append(hints)
        return torch.zeros(3, 3, 128, 128)

    monkeypatch.setattr(LabModel, "sample", sample)
    report = evaluate.evaluate(model, Segmenter(8), scenes, ["none", "other", "depth+pose"], batch=4)
    assert list(report.rows) == ["renders", "reconstructions", "none", "other", "depth+pose"]
    none, other, own = asked
    assert none == {}
    for name in ("depth", "pose"):
        assert torch.equal(own[name], scenes.hints[name])
        assert torch.equal(other[name], scenes.hints[name][[1, 2, 0]])
    assert report.sheet(rows=2).size == (6 * 132 + 4, 18 + 2 * 132 + 4)  # render, two hints, three settings


def test_table_and_verdicts_say_what_is_reached():
    good = Scores(0.97, 0.96, 1.0)
    rows = {"renders": good, "depth": good, "pose": Scores(0.74, 0.5, 2.0), "none": Scores(0.3, 0.5, 2.0)}
    assert [reached for reached, _ in verdicts(rows)] == [True, True, True, False, True]
    assert [line for _, line in verdicts(rows)][2:4] == [
        "depth, mean: 0.965 >= 0.90  reached",
        "pose, figure: 0.740 >= 0.86  MISSED",
    ]
    assert verdicts({"none": Scores(0.3, 0.51, 2.0)}) == [(False, "none, mean: 0.405 <= 0.40  MISSED")]
    assert verdicts({"depth": Scores(float("nan"), 0.9, 1.0)})[0][0] is False
    assert {bound.row for bound in BOUNDS} <= {"renders", *SETTINGS}
    table = evaluate.Report(held_out(0 + 1), rows, {}).table().splitlines()
    assert table[0].split() == ["mean", "IoU", "figure", "solids", "mean", "seconds"]
    assert table[1].split() == ["renders", "0.970", "0.960", "0.965", "1.0"]


# The commands


@pytest.fixture
def random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: LabModel) -> None:
    """Files of tiny random networks in the place of the shipped ones."""
    monkeypatch.setattr(models, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(pipeline, "Autoencoder", partial(Autoencoder, 8, 8))
    monkeypatch.setattr(pipeline, "UNET", TINY)
    parts = {"autoencoder": model.autoencoder, "text_encoder": model.text_encoder, "unet": model.unet}
    parts |= {models.control_name(name): control for name, control in model.controls.items()}
    for name, part in {**parts, "segmenter": Segmenter()}.items():
        models.save_weights(part, name)


def test_evaluate_command_ends_with_1_when_a_bound_is_missed(
    random_weights: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sheet = tmp_path / "new" / "sheet.png"
    arguments = ["evaluate", "--scenes", "2", "--steps", "1", "--settings", "none", "depth", "--output", str(sheet)]
    assert commands.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "2 held-out scenes (seeds 1000000 to 1000001), 1 DDIM steps, guidance scale 3" in printed
    assert "renders, figure: " in printed and "MISSED" in printed
    assert "\nnone, mean: " in printed and "\npose" not in printed
    assert Image.open(sheet).size == (4 * 132 + 4, 18 + 2 * 132 + 4)  # render, depth hint, none, depth
    assert commands.main(["evaluate", "--scenes", "1"]) == 1
    assert "--scenes is 1; with fewer than 2 there are no other scene's hints" in capsys.readouterr().err


def test_score_prints_a_line_for_each_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(commands, "load_weights", lambda *_: Painted())
    segments = render(random_scene(7, 2)).segments.clip(max=2)
    right, figure_only = segments * 127, np.where(segments == 1, 127, 0)
    for name, pixels in (("right", right), ("figure", figure_only), ("black", 0 * right)):
        large = pixels.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
        Image.fromarray(large).save(tmp_path / f"{name}.png")
    pictures = [f"{label}={tmp_path / file}.png" for label, file in (
        ("depth and pose", "right"), ("pose", "figure"), ("without control", "black"), ("depth hint", "black"),
    )]  # fmt: skip
    scene = json.dumps({"seed": 7, "size": 256, "figure": True, "solids": 2})
    assert commands.main(["score", "--scene", scene, *pictures]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split() for line in lines] == [
        ["IoU", "with", "the", "scene", "figure", "solids"],
        ["depth", "and", "pose", "1.00", "1.00", "follows"],
        ["pose", "1.00", "0.00", "only", "the", "figure"],
        ["without", "control", "0.00", "0.00", "does", "not", "follow"],
    ]


def test_score_says_which_file_it_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(commands, "load_weights", lambda *_: Painted())
    Image.new("RGB", (64, 32)).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("no picture")
    answers = {"wide": "64x32; the lab's pictures are square", "text": "is no picture", "gone": "is no picture"}
    for name, answer in answers.items():
        assert commands.main(["score", "--scene", '{"seed": 1}', f"a={tmp_path / name}.png"]) == 1
        assert answer in capsys.readouterr().err
    assert commands.main(["score", "--scene", '{"seed": ["3", 0]}', "a=b.png"]) == 1
    assert "the scene's seed is ['3', 0]; it must be a whole number" in capsys.readouterr().err


def test_meaning_of_scores():
    nan = float("nan")
    assert commands.meaning(0.6, 0.6) == "follows"
    assert commands.meaning(0.59, 0.59) == "does not follow"
    assert commands.meaning(0.2, 0.9) == "only the solids"
    assert commands.meaning(nan, 0.9) == "follows"
    assert commands.meaning(nan, 0.1) == commands.meaning(nan, nan) == "does not follow"


def test_scene_command_draws_a_scene_and_its_hints(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert commands.main(["scene", "3", "--output", str(tmp_path / "a" / "b.png")]) == 0
    assert Image.open(tmp_path / "a" / "b.png").size == (4 * 132 + 4, 18 + 132 + 4)
    assert " ground\n" in capsys.readouterr().out
    assert commands.main(["scene", "-1"]) == 1
    assert "seed is -1; it must be 0 or more" in capsys.readouterr().err
