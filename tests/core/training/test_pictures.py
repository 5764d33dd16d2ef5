"""A dataset that grew, shrank or was touched: the run goes on, says what changed, and watches the same pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zeroconv.controlnet_core.data.caching import CachingOptions, make
from zeroconv.controlnet_core.data.dataset import Batch, Dataset
from zeroconv.controlnet_core.data.sources import Item
from zeroconv.controlnet_core.training import checkpoint, pictures
from zeroconv.controlnet_core.training.step import Steps

from .tiny import encode_picture, encode_prompt, fit, losses, quick


def dataset(
    folder: Path, numbers: Sequence[int], touched: Sequence[int] = (), tall: Sequence[int] = (), **options: Any
) -> Dataset:
    """Square pictures, in `folder`; a dataset that is there is brought to these."""
    items = []
    for i in numbers:
        shape = (6, 3) if i in tall else (4, 4)
        squares = np.random.default_rng(i + 100 * (i in touched)).integers(0, 256, (*shape, 3), dtype=np.uint8)
        picture = squares.repeat(8, axis=0).repeat(8, axis=1)
        items.append(Item(f"{i}.png", picture, "squares", picture))
    list(make(folder, items, encode_picture, encode_prompt, None, CachingOptions(resolution=32, **options)))
    return Dataset.open(folder)


def held(folder: Path) -> list[str]:
    saved = checkpoint.newest(folder / "checkpoints")
    assert saved is not None
    return saved.facts["pictures"]


@pytest.mark.parametrize(
    ("numbers", "touched", "said"),
    [
        (range(14), (), "pictures: 2 added"),
        (range(10), (), "pictures: 2 taken away"),
        (range(12), (3, 5), "pictures: 2 changed"),
        (range(1, 15), (3,), "pictures: 3 added, 1 taken away, 1 changed"),
    ],
)
def test_the_run_goes_on_and_says_what_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, numbers: Sequence[int], touched: Sequence[int], said: str
):
    data = dataset(tmp_path / "data", range(12))
    before = fit(quick(steps=3), data, tmp_path / "run")
    other = dataset(tmp_path / "data", numbers, touched)
    after = fit(quick(steps=5), other, tmp_path / "run")
    assert [progress.step for progress in before + after] == [0, 1, 2, 3, 4, 5]
    note = f"the dataset has changed since step 3 ({said}): training goes on with the {len(other)} that are there"
    assert after[-1].notes == (note,)
    assert note in caplog.text
    caplog.clear()
    assert fit(quick(steps=6), other, tmp_path / "run")[-1].notes == ()
    assert "has changed" not in caplog.text


def test_what_changed_is_said_until_a_checkpoint_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fit(quick(steps=3), dataset(tmp_path / "data", range(12)), tmp_path / "run")
    bigger = dataset(tmp_path / "data", range(14))

    def killed(*_: Any) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(Steps, "take", killed)
    with pytest.raises(RuntimeError, match="killed"):
        fit(quick(steps=5), bigger, tmp_path / "run")
    monkeypatch.undo()
    (note,) = fit(quick(steps=5), bigger, tmp_path / "run")[-1].notes
    assert "pictures: 2 added" in note
    assert fit(quick(steps=6), bigger, tmp_path / "run")[-1].notes == ()


def test_the_same_pictures_are_watched_and_none_of_them_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = dataset(tmp_path / "data", range(12))
    options = quick(steps=2, held_out=3, sample_every=2, sample_steps=1)
    fit(options, data, tmp_path / "run")
    watched = held(tmp_path / "run")
    assert len(watched) == 3
    bigger = dataset(tmp_path / "data", range(20))
    names, _ = pictures.split(bigger, options, None)
    assert pictures.names(bigger, names) != watched  # a new run would watch others
    seen: list[list[str]] = []
    read = Dataset.read

    def spy(self: Dataset, indices: Any) -> Batch:
        seen.append(pictures.names(self, indices))
        return read(self, indices)

    monkeypatch.setattr(Dataset, "read", spy)
    found = fit(quick(held_out=3, sample_every=12, sample_steps=1, steps=12, batch_size=4), bigger, tmp_path / "run")
    assert held(tmp_path / "run") == watched
    assert pictures.names(bigger, found[-1].held) == watched
    learned = {name for names in seen if names != watched for name in names}
    assert learned == {f"{i}.png" for i in range(20)} - set(watched)


def test_of_those_that_are_watched_some_may_go(tmp_path: Path):
    options = quick(held_out=3, sample_every=2)
    fit(options, dataset(tmp_path / "data", range(12)), tmp_path / "run")
    one, two, three = held(tmp_path / "run")
    number = int(one.removesuffix(".png"))
    rest = [i for i in range(12) if i != number]
    smaller = dataset(tmp_path / "data", rest, tall=[int(two.removesuffix(".png"))])
    found = fit(quick(steps=6, held_out=3, sample_every=2), smaller, tmp_path / "run")
    # one is gone; of the other two, which have different sizes now, those of one size can be sampled together
    assert held(tmp_path / "run") in ([two], [three])
    assert found[-1].samples is not None and len(found[-1].samples) == 1
    none = dataset(tmp_path / "data", [i for i in rest if f"{i}.png" not in (two, three)])
    fit(quick(steps=8, held_out=3, sample_every=2), none, tmp_path / "run")
    assert len(held(tmp_path / "run")) == 2  # a quarter of nine


def test_a_run_of_before_the_pictures_were_written_down(tmp_path: Path):
    fit(quick(steps=2), dataset(tmp_path / "data", range(12)), tmp_path / "run")
    (tmp_path / "run" / "pictures.json").write_text("half of")
    found = fit(quick(steps=3), dataset(tmp_path / "data", range(13)), tmp_path / "run")
    assert "it is not known how" in found[-1].notes[0]


def test_the_optimizer_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    from zeroconv.controlnet_core.training import optimizer

    data = dataset(tmp_path / "data", range(12))
    fit(quick(steps=2), data, tmp_path / "run")
    monkeypatch.setattr(
        optimizer,
        "make",
        lambda options, control, *_: torch.optim.SGD(
            [{"params": [*control.parameters()], "lr": 1e-3, "initial_lr": 1e-3}]
        ),
    )
    found = fit(quick(steps=4, optimizer="adamw8bit"), data, tmp_path / "run")
    assert [progress.step for progress in found] == [3, 4]
    assert found[0].notes == ("the optimizer was adamw and is adamw8bit: what it has seen begins anew",)
    assert losses(fit(quick(steps=5, optimizer="adamw8bit"), data, tmp_path / "run"))


@pytest.mark.parametrize("options", [{"crops": 2}, {"caption_variants": 2}, {"mirror": True}])
def test_pictures_of_several_items_are_watched_again(tmp_path: Path, options: dict[str, Any]):
    data = dataset(tmp_path / "data", range(8), **options)
    whole = losses(fit(quick(steps=4), data, tmp_path / "whole"))
    before = losses(fit(quick(steps=2), data, tmp_path / "run"))
    found = fit(quick(steps=4), data, tmp_path / "run")
    assert (before + losses(found), found[-1].notes) == (whole, ())


def test_options_that_change_what_is_trained_are_told(tmp_path: Path):
    data = dataset(tmp_path / "data", range(8))
    fit(quick(steps=2), data, tmp_path / "run")
    (note,) = fit(quick(steps=3, batch_size=1), data, tmp_path / "run")[-1].notes
    assert note == "batch_size was 2 and is 1: what is trained from now on differs by that"
