"""What is seen of TrainControlNet: its scores, sheets and plot, live while it runs, and what it says at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from zeroconv.annotators.compare import compare

from .small_training import SIZE, Run, assert_bits, cached, dataset, encoders, losses, model, output, run

if TYPE_CHECKING:
    from hosting import Host

__all__ = ["dataset", "encoders", "model", "output", "run"]  # fixtures: pytest finds them here


# -- scores, sheets and plot -------------------------------------------------------------------------------------------


def test_the_annotator_scores_samples_by_their_own_hints(
    run: Run, encoders: dict[str, Any], output: Path, tmp_path: Path
):
    from zeroconv.annotators.canny import canny

    made = cached(tmp_path / "made", **encoders, hints="canny")
    run(dataset=made, fidelity="annotator", steps=2)
    held, _ = made.split(2, 0)
    hints = made.read(held).hints.movedim(1, -1).numpy()
    first = load_file(output / "mine" / "samples" / "first.safetensors")["latents"]
    pictures = encoders["vae"].decode(first / 0.18215).clamp(0, 1).numpy()
    expected = np.mean([compare("canny", p, canny(p), hint).score for p, hint in zip(pictures, hints)])
    rows = (output / "mine" / "fidelity.csv").read_text(encoding="utf-8").splitlines()
    assert float(rows[1].split(",")[1]) == pytest.approx(expected)


def test_given_hints_have_no_annotator(run: Run, output: Path):
    with pytest.raises(Exception, match="found hints given: choose fidelity structure"):
        run(fidelity="annotator")
    assert not output.exists()


def test_the_node_shows_plot_and_samples_while_it_runs(run: Run, monkeypatch: pytest.MonkeyPatch):
    import comfy.utils

    from zeroconv.nodes.host import watching

    shown: list[tuple[int, int, Any]] = []
    said: list[str] = []

    def hook(value: int, total: int, preview: Any, **_: Any) -> None:
        shown.append((value, total, preview))

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    monkeypatch.setattr(watching, "say", lambda text, _: said.append(text))
    run(name="shown")
    bars = [(value, total) for value, total, _ in shown if total == 4]
    assert bars == [(step, 4) for step in range(5)]
    previews = [preview for _, total, preview in shown if total == 4 and preview is not None]
    assert len(previews) >= 3  # at each measurement
    kind, drawn, _ = previews[-1]
    assert kind == "JPEG"
    assert drawn.width <= 1280
    assert said[-1].startswith("step 4/4 | loss ")


def test_prompts_of_ones_own_stand_below_the_held_out_pictures(
    run: Run, encoders: dict[str, Any], output: Path, tmp_path: Path
):
    own = cached(tmp_path / "own", **encoders, count=2)
    *_, plain, _ = run(name="plain", steps=2)
    run(steps=2)
    *_, sheet, _ = run(steps=4, validation=own)  # connected later: what was before training is not known of them
    assert losses(output / "plain") == losses(output / "mine")[:2]
    assert sheet.shape[2] == plain.shape[2]
    assert sheet.shape[1] - plain.shape[1] == 2 * (SIZE + 4)
    left, top = plain.shape[2] - 4 * (SIZE + 4), plain.shape[1] - 4
    rows = sheet[0, top : top + SIZE, left:]
    hint, drawn, before, now = (rows[:, i * (SIZE + 4) : i * (SIZE + 4) + SIZE] for i in range(4))
    torch.testing.assert_close(hint, own.read([0]).hints[0].movedim(0, -1), rtol=0, atol=0.5 / 255 + 1e-6)
    assert not before.any() and drawn.any() and now.any()
    *_, sheet, _ = run(name="from the beginning", validation=own)
    assert sheet[0, top : top + SIZE, left + 2 * (SIZE + 4) :][:, :SIZE].any()


def test_without_samples_there_is_a_plot_alone(run: Run, output: Path):
    _, plot, samples, _ = run(sample_every=0, steps=1)
    assert plot.shape[1] > 200
    assert samples.shape == (1, 64, 64, 3)
    assert not samples.any()
    assert not (output / "mine" / "samples").exists()
    _, _, samples, _ = run(sample_every=2, steps=2)  # turned on later
    assert samples.shape[1] > 2 * SIZE


# -- what it says at the end -------------------------------------------------------------------------------------------


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the node says at the end of each training."""
    from zeroconv.nodes.host import training

    said: list[str] = []
    train = training.train

    def heard(*given: Any) -> Any:
        found = train(*given)
        said.append(found.says)
        return found

    monkeypatch.setattr(training, "train", heard)  # the node imports it when it runs
    return said


def test_the_best_control_is_listed_where_it_is_not_the_last(
    run: Run, host: Host, texts: list[str], monkeypatch: pytest.MonkeyPatch, output: Path
):
    from zeroconv.nodes.host import training

    scores = iter([0.1, 0.9, 0.2])
    monkeypatch.setattr(training, "structure", lambda *_: next(scores))
    run()
    file = host.folder / "zeroconv" / "mine-best.safetensors"
    assert_bits(load_file(file), load_file(output / "mine" / "control-best.safetensors"))
    assert f"fidelity was highest at step 2: saved {Path('zeroconv/mine-best.safetensors')} too" in texts[0]
    assert texts[0].splitlines()[-1].startswith("next: connect control_net to Apply ControlNet")


def test_a_dataset_that_grew_is_told_of(
    run: Run, encoders: dict[str, Any], texts: list[str], tmp_path: Path, output: Path
):
    run(dataset=cached(tmp_path / "grown", **encoders, count=8), steps=2)
    _, _, samples, _ = run(dataset=cached(tmp_path / "grown", **encoders), steps=4)
    assert len(losses(output / "mine")) == 4
    assert samples.shape[2] > 4 * SIZE  # the pictures that are watched are the same, with their samples before training
    assert "has changed" not in texts[0]
    assert texts[1].startswith("the dataset has changed since step 2 (pictures: 1 added): training goes on with the 9")
