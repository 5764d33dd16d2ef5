"""`python -m controlnet_core.training`: a TOML file in, a control and its log out, and one sentence when it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from zeroconv.controlnet_core.files import saving
from zeroconv.controlnet_core.files.loading import read_weights
from zeroconv.controlnet_core.training import __main__ as command
from zeroconv.controlnet_core.training import checkpoint, config
from zeroconv.controlnet_core.training.config import ConfigError
from zeroconv.controlnet_core.training.options import OptionsError, TrainingOptions

from ..small import small_vae
from .tiny import dataset, fit, left_alike, quick, write_config

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the dataset lies, in `data`."""
    folder = tmp_path_factory.mktemp("data")
    dataset(folder / "data")
    return folder


def rows(file: Path) -> list[list[str]]:
    """A CSV file's rows below its header."""
    return [line.split(",") for line in file.read_text().splitlines()[1:]]


def losses(run: Path) -> list[tuple[str, ...]]:
    """Step, loss, smoothed loss, learning rate and gradient norm of each step; the time apart."""
    return [tuple(row[:5]) for row in rows(run / "losses.csv")]


# -- the file ---------------------------------------------------------------------------------------------------------


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


WHOLE = 'output = "out"\n[model]\nbase = "b.safetensors"\n[data]\ndataset = "d"\n'


def test_a_file_is_read_and_its_paths_are_its_own(tmp_path: Path):
    text = WHOLE.replace('"b.safetensors"', '"../b.safetensors"\nprediction = "v"') + "[training]\nsteps = 7\n"
    found = config.read(written(tmp_path / "x.toml", text), {"steps": 9, "rank": 3})
    assert found.output == tmp_path / "out"
    assert found.base == tmp_path / "../b.safetensors"
    assert found.dataset == tmp_path / "d"
    assert found.options == TrainingOptions(steps=9, rank=3, prediction="v")
    assert config.read(written(tmp_path / "x.toml", WHOLE), {}).options == TrainingOptions()
    text = WHOLE.replace("[data]", 'loras = ["l.safetensors"]\nvae = "v"\n[data]')
    found = config.read(written(tmp_path / "x.toml", text), {})
    assert (found.loras, found.vae) == ((tmp_path / "l.safetensors",), tmp_path / "v")


def test_whole_paths_stay(tmp_path: Path):
    text = WHOLE.replace('"d"', f"'{tmp_path / 'elsewhere'}'")
    assert config.read(written(tmp_path / "x.toml", text), {}).dataset == tmp_path / "elsewhere"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (WHOLE + "[training]\nlearnin_rate = 1", r"learnin_rate in \[training\] is not known: did you mean learning_r"),
        (WHOLE + "[training]\nprediction = 'v'", r"not known: did you mean prediction in \[model\]"),
        (WHOLE + "[training]\noutput = 'v'", r"output in \[training\] is not known: did you mean output at the top"),
        (WHOLE + "[trainig]\n", r"trainig at the top, before the first section is not known: did you mean training"),
        (WHOLE.replace("dataset", "xyz"), r"xyz in \[data\] is not known: it can be dataset"),
        (WHOLE.replace('output = "out"', ""), "lacks output at the top"),
        (WHOLE.replace('base = "b.safetensors"', ""), r"lacks base in \[model\]: --defaults prints a whole file"),
        (WHOLE.replace('"d"', "3"), r"has no path as dataset in \[data\]"),
        ("output = ", "x.toml is no TOML file"),
        ('output = "C:\\models"', "is no TOML file .*: write paths with / or in single quotes"),
        ("data = 3", r"data is 3: expected a section \[data\]"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, said: str):
    with pytest.raises(ConfigError, match=said):
        config.read(written(tmp_path / "x.toml", text), {})


def test_wrong_values_are_the_options_own_errors(tmp_path: Path):
    with pytest.raises(OptionsError, match="steps is 0: expected 1 or more"):
        config.read(written(tmp_path / "x.toml", WHOLE + "[training]\nsteps = 0"), {})


def test_python_3_10_without_tomli_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("tomllib", "tomli"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="Python before 3.11 reads no TOML by itself: run `pip install tomli`"):
        config.read(written(tmp_path / "x.toml", WHOLE), {})


def test_trackers_are_a_list_of_names(tmp_path: Path):
    assert config.read(written(tmp_path / "x.toml", WHOLE), {}).trackers == ()
    named = config.read(written(tmp_path / "x.toml", 'trackers = ["wandb", "mlflow"]\n' + WHOLE), {})
    assert named.trackers == ("wandb", "mlflow")
    with pytest.raises(ConfigError, match=r"trackers is 'wandb': expected a list of names such as \[\"wandb\"\]"):
        config.read(written(tmp_path / "x.toml", 'trackers = "wandb"\n' + WHOLE), {})


def test_the_defaults_are_a_file_of_all_options(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert command.main(["--defaults"]) == 0
    text = capsys.readouterr().out
    assert config.read(written(tmp_path / "x.toml", text), {}).options == TrainingOptions()
    assert all(f"\n{name} = " in text for name in TrainingOptions().as_dict())
    assert all("  # " in line for line in text.splitlines() if " = " in line)


def test_every_option_is_a_flag(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')} " in text for name in TrainingOptions().as_dict())


# -- a run ------------------------------------------------------------------------------------------------------------


def test_a_whole_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    file = write_config(tmp_path, folder / "data", steps=6, sample_every=3, save_every=4)
    assert command.main([str(file), "--learning-rate", "0.002", "--gradient-checkpointing"]) == 0
    run = tmp_path / "run"
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("step 0/6 | fidelity ")
    assert said[-2].startswith("step 6/6 | loss ")
    assert said[-1] == f"done: {run / 'control.safetensors'}"

    options = quick(steps=6, sample_every=3, save_every=4, learning_rate=0.002, gradient_checkpointing=True)
    expected = fit(options, dataset(folder / "data"), tmp_path / "by_hand")
    assert [row[:2] for row in losses(run)] == [(str(p.step), repr(p.loss)) for p in expected[1:]]
    assert [row[:2] for row in rows(run / "fidelity.csv")] == [
        [str(p.step), repr(p.fidelity)] for p in expected if p.fidelity is not None
    ]
    assert left_alike(run, tmp_path / "by_hand")

    assert sorted(path.name for path in (run / "samples").iterdir()) == [
        f"step-0000000{step}.png" for step in (0, 3, 6)
    ]
    with Image.open(run / "samples" / "step-00000006.png") as sheet:
        assert sheet.size == (2 * 32, 3 * 32)  # two held-out pictures; hint, picture and sample below each other
    with Image.open(run / "plot.png") as plot:
        assert plot.size[0] > plot.size[1] > 100
    assert json.loads((run / "options.json").read_text())["learning_rate"] == 0.002
    assert [path.name for path in checkpoint.files(run / "checkpoints")] == [
        "step-00000004.safetensors",
        "step-00000006.safetensors",
    ]


def test_a_finished_run_is_done_at_once_and_more_steps_go_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    file = str(write_config(tmp_path, folder / "data"))
    assert command.main([file]) == 0
    before = losses(tmp_path / "run")
    assert command.main([file]) == 0
    assert losses(tmp_path / "run") == before
    assert command.main([file, "--steps", "6"]) == 0
    assert losses(tmp_path / "run")[:4] == before
    assert [row[0] for row in losses(tmp_path / "run")] == ["1", "2", "3", "4", "5", "6"]
    assert capsys.readouterr().out.count("done: ") == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_step_and_the_same_command_goes_on(
    folder: Path, tmp_path: Path, number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    file = str(write_config(tmp_path, folder / "data", steps=6, save_every=100))
    whole = tmp_path / "whole"
    whole.mkdir()
    assert command.main([str(write_config(whole, folder / "data", steps=6, save_every=100))]) == 0
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    seeing = command.Watch.see

    def see(self: Any, progress: Any) -> None:
        seeing(self, progress)
        if progress.step == 2:
            signal.raise_signal(number)

    monkeypatch.setattr(command.Watch, "see", see)
    assert command.main([file]) == code
    assert "stopped after step 2 of 6: the same command goes on from there" in capsys.readouterr().out
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert checkpoint.files(tmp_path / "run" / "checkpoints")[0].name == "step-00000002.safetensors"
    assert not (tmp_path / "run" / "control.safetensors").exists()
    assert read_weights(tmp_path / "run" / "controls" / "step-00000002.safetensors")[1]["trained_steps"] == "2"
    monkeypatch.undo()
    assert command.main([file]) == 0
    assert losses(tmp_path / "run") == losses(whole / "run")


def test_a_second_signal_stops_at_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def see(self: Any, progress: Any) -> None:
        if progress.step == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("went on")

    monkeypatch.setattr(command.Watch, "see", see)
    assert command.main([str(write_config(tmp_path, folder / "data"))]) == 130


def test_among_many_processes_the_signal_that_a_launcher_repeats_is_one():
    with command.Stop(alone=False) as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        ({}, ["--steps", "0"], "steps is 0: expected 1 or more"),
        ({"dataset = '": "dataset = 'nowhere'\n#"}, [], "nowhere holds no dataset (no manifest.json)"),
        ({'"base.safetensors"': '"none.safetensors"'}, [], "there is no such file: give the path of the base model's"),
        ({'"base.safetensors"': '"config.toml"'}, [], "config.toml: this is neither a safetensors file nor"),
        ({'"base.safetensors"': '"half.safetensors"'}, [], "the file is truncated"),
        ({"steps =": "stepps ="}, [], "did you mean steps in [training]?"),
    ],
)
def test_errors_are_one_sentence(
    folder: Path, tmp_path: Path, change: dict[str, str], arguments: list[str], said: str, capsys: pytest.CaptureFixture
):
    file = write_config(tmp_path, folder / "data")
    weights = (tmp_path / "base.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(weights[: len(weights) // 2])
    text = file.read_text()
    for before, after in change.items():
        assert before in text
        text = text.replace(before, after)
    file.write_text(text)
    assert command.main([str(file), *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run" / "losses.csv").exists()


def test_paths_are_flags_and_underscores_are_dashes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a file at all, and with one whose paths are replaced; flags are relative to the working folder."""
    write_config(tmp_path, folder / "data")
    monkeypatch.chdir(tmp_path)
    flags = ["--base", "base.safetensors", "--dataset", str(folder / "data"), "--output", "my_run"]
    quickly = ["--steps", "2", "--batch_size", "2", "--held_out=2", "--sample_every", "0", "--precision", "fp32"]
    assert command.main([*flags, *quickly]) == 0
    assert json.loads((tmp_path / "my_run" / "options.json").read_text())["batch_size"] == 2
    assert command.main([str(tmp_path / "config.toml"), "--output", "other", "--steps", "2"]) == 0
    assert (tmp_path / "other" / "control.safetensors").is_file() and not (tmp_path / "run").exists()


def test_what_the_base_predicts_is_read_from_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
):
    """Unless the file says it; and zero terminal SNR leaves no noise to tell."""
    file = write_config(tmp_path, folder / "data", steps=1)
    weights, metadata = read_weights(tmp_path / "base.safetensors")
    marks = {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}
    saving.write(tmp_path / "base.safetensors", {**weights, **marks}, metadata)
    options = tmp_path / "run" / "options.json"
    with caplog.at_level("INFO"):
        assert command.main([str(file)]) == 0
    assert "base.safetensors predicts v: its key v_pred, and ztsnr: zero terminal SNR" in caplog.text
    assert json.loads(options.read_text())["prediction"] == "v"
    assert command.main([str(file), "--prediction", "eps"]) == 1
    assert "base.safetensors has zero terminal SNR, where no noise can be told: choose prediction v" in (
        capsys.readouterr().err
    )


def test_samples_are_shown_by_a_vae_that_is_given(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    torch.manual_seed(0)
    vae = small_vae()
    vae.save_pretrained(tmp_path / "vae")
    file = str(write_config(tmp_path, folder / "data", steps=1, sample_every=1))
    assert command.main([file, "--vae", str(tmp_path / "vae")]) == 0
    data = dataset(folder / "data")
    held = data.read(data.split(2, TrainingOptions().seed)[0])
    with torch.no_grad():
        expected = (vae.decode(held.latents / 0.5).sample / 2 + 0.5).clamp(0, 1)
    with Image.open(tmp_path / "run" / "samples" / "step-00000001.png") as sheet:
        shown = torch.from_numpy(np.asarray(sheet)[32:64].copy()).float() / 255
    torch.testing.assert_close(shown, torch.cat(list(expected.movedim(1, -1)), dim=1), rtol=0, atol=0.5 / 255 + 1e-4)
    assert command.main([file, "--vae", str(tmp_path / "none")]) == 1
    assert "none: there is no such file: give a checkpoint, or a folder in diffusers' layout" in capsys.readouterr().err


def test_where_memory_does_not_suffice_for_the_vae_small_colours_are_shown(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    asked = []

    def full(latents: torch.Tensor) -> torch.Tensor:
        asked.append(latents.shape)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(command, "decoder", lambda *_: full)
    file = str(write_config(tmp_path, folder / "data", steps=2, sample_every=1))
    assert command.main([file, "--vae", "any"]) == 0
    assert command.main([file, "--output", str(tmp_path / "without")]) == 0
    assert len(asked) == 1
    assert caplog.text.count("out of memory for the VAE: samples are shown in the small colours") == 1
    sheets = [tmp_path / run / "samples" / "step-00000002.png" for run in ("run", "without")]
    assert sheets[0].read_bytes() == sheets[1].read_bytes()


@pytest.mark.parametrize("part", ["samples", "plot.png", "options.json"])
def test_a_picture_that_cannot_be_written_is_one_sentence_and_keeps_the_steps(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, part: str
):
    file = str(write_config(tmp_path, folder / "data", steps=4, sample_every=2, save_every=4))
    assert command.main([file, "--steps", "1"]) == 0
    there = tmp_path / "run" / part
    is_folder = there.is_dir()
    there.rename(tmp_path / "away")
    there.write_text("in the way") if is_folder else there.mkdir()
    assert command.main([file]) == 1
    said = capsys.readouterr().err
    assert "the log in" in said and "cannot be written" in said and "Make room there" in said
    assert max((tmp_path / "run" / "checkpoints").iterdir()).name == "step-00000002.safetensors"


def test_no_file_and_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert command.main([]) == 1
    assert "no file was given: --defaults prints one to begin with" in capsys.readouterr().err
    assert command.main([str(tmp_path / "none.toml")]) == 1
    assert "none.toml cannot be read" in capsys.readouterr().err


def test_from_a_terminal_in_the_folder_of_the_pack(folder: Path, tmp_path: Path):
    """As users call it: a module of the top-level package `controlnet_core`."""
    file = write_config(tmp_path, folder / "data", steps=2)
    here = [sys.executable, "-m", "controlnet_core.training", str(file)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(here, cwd=ROOT, capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stderr
    assert "done: " in done.stdout
    assert "Warning" not in done.stderr
    assert read_weights(tmp_path / "run" / "control.safetensors")[1]["trained_steps"] == "2"
