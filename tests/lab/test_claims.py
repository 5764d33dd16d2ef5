"""The paper's claims: the trainings behind them, what is measured by hand, and where the results go."""

from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from zeroconv.controlnet_core.networks.controlnet import ControlNet
from zeroconv.controlnet_core.networks.lite import ControlNetLite
from zeroconv.controlnet_core.networks.residuals import Residuals
from zeroconv.lab import commands, dataset
from zeroconv.lab.autoencoder import Autoencoder
from zeroconv.lab.claims import ablation, composition, convergence, cost, data_size, guidance, runs, transfer
from zeroconv.lab.claims import claim as claims
from zeroconv.lab.claims.catalogue import CLAIMS
from zeroconv.lab.claims.claim import Claim, Findings, Work, published, table
from zeroconv.lab.dataset import HELD_OUT
from zeroconv.lab.evaluate import held_out
from zeroconv.lab.models import UNET, WEIGHTS
from zeroconv.lab.pipeline import LabModel, scene_noise
from zeroconv.lab.scene import describe, random_scene
from zeroconv.lab.text_encoder import TextEncoder
from zeroconv.lab.vocabulary import tokenize

TINY = replace(UNET, model_channels=32, channel_mult=(1, 1, 1, 1), head_dim=32)

needs_weights = pytest.mark.skipif(
    not (WEIGHTS / "unet.safetensors").is_file(), reason="not trained yet; `python dev.py lab train` makes the weights"
)


# The trainings


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four scenes, two of them held out for watching, two steps of two pictures."""
    monkeypatch.setattr(dataset, "SHARD", 2)
    monkeypatch.setattr(runs, "SCENES", 4)
    monkeypatch.setattr(runs, "WATCHED", 2)
    small = replace(runs.OPTIONS, steps=2, batch_size=2, save_every=1, sample_every=1, held_out=2, sample_steps=1)
    monkeypatch.setattr(runs, "OPTIONS", small)
    runs.watched.cache_clear()
    yield
    runs.watched.cache_clear()


@needs_weights
def test_runs_differ_in_what_they_say_and_are_measured_on_the_held_out_scenes(tmp_path: Path, few: None):
    work = Work(tmp_path)
    for name in ("gaussian", "lite"):
        assert not runs.finished(work, name, 1)
        runs.run(work, name, 1)
        assert runs.finished(work, name, 1)
        steps, scores = runs.curve(work, name, 1)
        assert steps == [0, 1, 2] and all(0 <= score <= 1 for score in scores)
        assert [step for step, _ in zip(*runs.losses(work, name, 1), strict=True)] == [1, 2]
        for step in steps:
            found = runs.samples(work, name, 1, step)
            assert found is not None and found.shape == (2, 128, 128, 3)
    assert runs.samples(work, "gaussian", 1, 7) is None
    assert type(runs.control(work, "gaussian", 1)) is ControlNet
    assert type(runs.control(work, "lite", 1)) is ControlNetLite
    # At step 0 a Gaussian control disturbs the base, and ControlNet-lite's zero convolutions do not.
    before = [runs.samples(work, name, 1, 0) for name in ("gaussian", "lite")]
    assert np.abs(before[0] - before[1]).mean() > 0.01

    written = {path: path.stat().st_mtime_ns for path in work.path("runs").rglob("*") if path.is_file()}
    runs.run(work, "gaussian", 1)  # finished: nothing happens
    assert {path: path.stat().st_mtime_ns for path in work.path("runs").rglob("*") if path.is_file()} == written


@needs_weights
def test_scenes_are_learnt_as_they_are_before_their_mirror_images(tmp_path: Path, few: None):
    scenes = runs.dataset(Work(tmp_path))
    watched, learnt = scenes.split(2, seed=0)
    assert [scenes.names[i] for i in watched] == [f"scene {HELD_OUT}", f"scene {HELD_OUT + 1}"]
    own = [f"scene {i}" for i in range(4)]
    assert [scenes.names[i] for i in learnt] == [*own, *(f"{name} (mirrored)" for name in own)]
    assert replace(scenes, pictures=3).split(1, seed=5) == (watched[:1], learnt[:3])

    exact = held_out(2)
    batch = scenes.read(watched)
    assert torch.allclose(batch.hints, exact.hints["depth"], atol=1e-6)
    assert [scenes.prompts[i] for i in batch.prompts.tolist()] == exact.prompts
    assert torch.equal(scenes.read(learnt[4:6]).hints, scenes.read(learnt[:2]).hints.flip(3))
    # The score of what was encoded is that of reconstructions, far above chance.
    assert runs.score(batch.latents, batch) > 0.8


def test_words_are_the_prompt_of_the_tokens():
    for seed in range(20):
        prompt = describe(random_scene(seed))
        assert runs.words(tokenize(prompt)) == prompt


# What is measured


class Spy(nn.Module):
    """A UNet that keeps the residuals of its calls, and predicts nothing."""

    def __init__(self):
        super().__init__()
        self.config = TINY
        self.weight = nn.Parameter(torch.zeros(1))
        self.residuals: list[Tensor] = []

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, *, residuals: Residuals) -> Tensor:
        self.residuals = [tensor for tensor in (*residuals.skips, residuals.middle) if tensor is not None]
        return torch.zeros_like(x)


def test_guidance_ways_hand_the_control_to_the_halves_that_they_say():
    torch.manual_seed(0)
    control = ControlNet(TINY)
    for part in (control.zero_convs, control.middle_block_out):
        for parameter in part.parameters():
            nn.init.normal_(parameter)

    spy = Spy()
    model = LabModel(Autoencoder(8, 8), TextEncoder(), spy, {"depth": control})  # type: ignore[arg-type]
    found = {}
    for way in ("both", "cond_only", "cfg_resolution"):
        model.sample([""], scene_noise([1], 128), {"depth": torch.full((1, 3, 128, 128), 0.5)}, 1, guidance=way)
        found[way] = spy.residuals
    for i, (both, cond, weighted) in enumerate(zip(*found.values(), strict=True)):
        assert both.shape[0] == cond.shape[0] == weighted.shape[0] == 2
        assert torch.allclose(both[0], both[1], atol=1e-3)  # the empty prompt on both
        assert both.abs().max() > 0.1
        for half in (cond, weighted):
            assert half[1].abs().max() == 0
        assert torch.allclose(cond[0], both[0], atol=1e-3)
        times = 16 / both.shape[2]
        assert times == (1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8, 8)[i]
        assert torch.allclose(weighted[0], times * cond[0], atol=1e-2)


def test_looks_by_hand():
    grey = torch.full((1, 3, 4, 4), 0.5)
    assert guidance.looks(grey) == pytest.approx((0, 0, 0), abs=1e-6)
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 1
    saturation, contrast, clipped = guidance.looks(red)
    assert (saturation, clipped) == (1, 1) and contrast == pytest.approx(0, abs=1e-6)
    halves = torch.full((1, 3, 2, 2), 0.25)
    halves[..., 0] = 0.75
    assert guidance.looks(halves)[1] == pytest.approx(torch.tensor([0.25, 0.75, 0.25, 0.75]).std().item())


def test_days_become_nights_and_days_again():
    pictures = torch.rand(2, 3, 8, 8)
    nights = transfer.night(pictures)
    assert nights.amax((0, 2, 3)).tolist() <= [0.45, 0.6, 1.0]
    assert torch.allclose(transfer.day(nights), pictures, atol=1e-5)
    assert transfer.distance(pictures, pictures) == 0
    assert transfer.distance(torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)) == 1


def test_depth_without_the_figure_is_that_of_the_solids():
    scenes = held_out(2)
    alone = composition.solids_alone(scenes.seeds)
    assert alone.shape == (2, 3, 128, 128)
    change = (alone - scenes.hints["depth"]).abs().amax(1)
    solid = scenes.segments == 2
    figure = scenes.segments == 1
    assert change[figure].mean() > 0.1 > change[solid].mean()


def test_steps_shown_are_those_around_the_mark():
    steps = list(range(0, 500, 25))
    assert convergence.around(steps, 200) == [0, 125, 150, 175, 200, 225, 250, 475]
    assert convergence.around(steps, 0) == [0, 25, 50, 475]
    assert convergence.around(steps, None) == [0, 75, 150, 250, 325, 400, 475]


def test_mean_loss_takes_the_steps_near():
    assert convergence.mean_loss([1, 2, 3, 4], [1.0, 2.0, 6.0, 50.0], 2, reach=1) == 3
    assert convergence.mean_loss([1, 2, 3, 4], [1.0, 2.0, 6.0, 50.0], 0, reach=2) == 1.5


def test_cost_counts_both_sides():
    size = cost.Size(TINY, batch=1, latent=16, precision="fp32")
    found = {}
    for side in cost.SIDES:
        step, model = cost.step_of(side, size)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        found[side] = cost.facts(step, model)
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        if side == "ControlNet":
            assert changed and not any(name.startswith("unet.") for name in changed)
        else:
            assert len(changed) > 0.9 * len(before)
    (trained, held, macs), (trained_control, held_control, macs_control) = found.values()
    assert trained == held and trained_control == held_control - held
    assert 0.3 * trained < trained_control < 0.9 * trained
    assert 0 < macs < 2 * macs_control


def test_cost_answers_until_nobody_asks():
    ours, theirs = Pipe()
    size = cost.Size(TINY, batch=1, latent=16, precision="bf16")
    side = Thread(target=cost._serve, args=(theirs, "ControlNet", size, torch.get_num_threads()))
    side.start()
    trained, held, macs = cost._ask(ours, "facts")
    assert 10_000 < trained < held and macs > 10_000
    assert 0 < cost._ask(ours, "steps") < 60
    assert cost._ask(ours, "memory") >= 0
    ours.close()
    side.join(10)
    assert not side.is_alive()


# Where it goes


def test_tables_go_to_their_places():
    text = "a\n<!-- claim one -->\nold\n<!-- end -->\nb\n<!-- claim two -->\n<!-- end -->\n"
    assert published(text, {"one": "new"}) == text.replace("old", "new")
    assert "<!-- claim two -->\n| x |\n<!-- end -->" in published(text, {"two": "| x |"})
    with pytest.raises(ValueError, match="0 places for the claim three: expected one <!-- claim three -->"):
        published(text, {"three": ""})


def test_readme_has_a_place_for_every_claim():
    text = commands.README.read_text(encoding="utf-8")
    assert published(text, {claim.name: "x" for claim in CLAIMS}) != text


def test_what_seeds_gave_is_told_with_its_spread():
    assert claims.spread([0.5, 0.75, 0.7]) == "0.65 (0.50 to 0.75)"
    assert claims.spread([0.5], 3) == "0.500"


@needs_weights
def test_trainings_from_all_seeds_stand_side_by_side(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "SEEDS", (0, 1))
    monkeypatch.setattr(ablation, "VARIANTS", ("zero",))
    monkeypatch.setattr(ablation, "SCENES", 2)
    monkeypatch.setattr(data_size, "SIZES", ("zero",))
    work = Work(tmp_path)
    for seed in runs.SEEDS:
        runs.run(work, "zero", seed)
    first, second = (runs.losses(work, "zero", seed)[1] for seed in runs.SEEDS)
    assert first != second

    found = {name: one.measure(work) for name, one in (("all", ablation), ("size", data_size), ("jump", convergence))}
    rows = found["all"].table.splitlines()
    assert len(rows) == 2 + 3 * 2 and rows[2].count("(") == 0 and rows[5].count(" to ") == 4
    assert set(found["all"].pictures) == {"ablation", "ablation_curves"}
    assert "| none, none |" in found["size"].table
    scores = [runs.curve(work, "zero", seed)[1][2] for seed in runs.SEEDS]
    assert f"| 2 | {' | '.join(f'{score:.3f}' for score in scores)} |" in found["jump"].table


def test_table():
    assert table(["a", "b"], [["x", 0.126], ["y", None]]) == "| a | b |\n| --- | ---: |\n| x | 0.13 |\n| y | - |"


def test_command_measures_what_is_left_and_publishes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    calls: list[str] = []

    def measure(work: Work) -> Findings:
        calls.append("measure")
        noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
        return Findings("| number |", {"noise": Image.fromarray(noise)})

    monkeypatch.setattr(commands, "CLAIMS", (Claim("one", "it is so", ("zero",), measure),))
    done: list[tuple[str, int]] = []
    monkeypatch.setattr(runs, "run", lambda work, name, seed: done.append((name, seed)))
    monkeypatch.setattr(runs, "finished", lambda work, name, seed: (name, seed) in done)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- claim one -->\n<!-- end -->\n", encoding="utf-8")
    (tmp_path / "claims").mkdir()
    monkeypatch.setattr(commands, "README", readme)
    place = ["--work", str(tmp_path)]

    assert commands.main(["claims", "--list", *place]) == 0
    left = "one: left to train: zero (seed 0), zero (seed 1), zero (seed 2)\nthe paper: it is so"
    assert left in capsys.readouterr().out and not done
    assert commands.main(["claims", "--seeds", "2", *place]) == 0 and not calls
    assert "one: left to train: zero (seed 0), zero (seed 1)\n" in capsys.readouterr().out
    assert commands.main(["claims", *place]) == 0
    assert commands.main(["claims", "one", *place]) == 0
    assert done == [("zero", 2), *(("zero", seed) for seed in (0, 1, 2))] and calls == ["measure"]
    printed = capsys.readouterr().out
    assert "| number |" in printed and str(tmp_path / "claims" / "findings" / "noise.jpg") in printed
    assert commands.main(["claims", "--again", *place]) == 0 and len(calls) == 2
    assert commands.main(["claims", "--publish", *place]) == 0 and len(calls) == 2
    assert readme.read_text(encoding="utf-8") == "<!-- claim one -->\n| number |\n<!-- end -->\n"
    assert 0 < (tmp_path / "claims" / "noise.jpg").stat().st_size <= claims.LARGEST
    assert commands.main(["claims", "two", *place]) == 1
    assert "there is no claim 'two'; the claims are: one" in capsys.readouterr().err
