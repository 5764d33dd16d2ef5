"""Caching encodes each thing once, goes on where it was stopped, and loses no batch to one bad picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from zeroconv.controlnet_core.data import manifest, writer
from zeroconv.controlnet_core.data.caching import make
from zeroconv.controlnet_core.data.captions import PromptError
from zeroconv.controlnet_core.data.dataset import Dataset, DatasetError
from zeroconv.controlnet_core.data.pictures import PictureError
from zeroconv.controlnet_core.data.sources import Item
from zeroconv.controlnet_core.files.saving import SaveError

from .toy import PROMPTS, SMALL, Encoders, array, as_tensor, cache, items, latents_of, save

PROBE = 1  # pictures that a run encodes to know its VAE again


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def by_name(folder: Path) -> dict[str, tuple]:
    """What the dataset holds of each item."""
    dataset = Dataset.open(folder)
    found = {}
    for index, name in enumerate(dataset.names):
        batch = dataset.read([index])
        found[name] = (batch.latents, batch.hints, batch.context, dataset.prompts[batch.prompts.item()])
    return found


def assert_holds(folder: Path, expected: list[Item]) -> None:
    """The dataset holds these items, each with its own numbers, and no others."""
    found = by_name(folder)
    assert sorted(found) == sorted(item.name for item in expected)
    for item in expected:
        latents, hints, _, prompt = found[item.name]
        torch.testing.assert_close(latents, latents_of(as_tensor(item.picture)), rtol=0, atol=1e-6)
        assert torch.equal(hints, as_tensor(item.hint))
        assert prompt == item.prompt


# -- once -------------------------------------------------------------------------------------------------------------


def test_each_picture_and_each_prompt_is_encoded_once(tmp_path: Path):
    encoders = Encoders()
    last = cache(tmp_path, items(10), encoders)
    assert encoders.prompts == dict.fromkeys(PROMPTS, 1)
    assert encoders.pictures == 10 + PROBE
    assert (last.step, last.steps, last.done, last.before, last.unused) == (12, 12, 10, 0, 0)
    assert last.enlarged == 0 and last.skipped == ()
    assert_holds(tmp_path, items(10))


def test_progress_counts_every_step(tmp_path: Path):
    encoders = Encoders()
    run = make(tmp_path, items(5), encoders.encode_pictures, encoders.encode_prompt, None, SMALL)
    # two prompts beside the empty one, then batches of two of the 3 and 2 pictures of a size
    assert [(each.step, each.done) for each in run] == [(0, 0), (1, 0), (2, 0), (4, 2), (5, 3), (7, 5)]


def test_a_second_run_encodes_nothing_and_writes_no_shard(tmp_path: Path):
    cache(tmp_path, items(10))
    before, encoders = files(tmp_path), Encoders()
    last = cache(tmp_path, items(10), encoders)
    assert (encoders.pictures, encoders.prompts) == (PROBE, {"": 1})
    assert (last.done, last.before, last.steps) == (10, 10, 0)
    assert files(tmp_path) == before


def test_only_pictures_that_were_added_are_encoded(tmp_path: Path):
    cache(tmp_path, items(6))
    before, encoders = files(tmp_path), Encoders()
    last = cache(tmp_path, items(10), encoders)
    assert encoders.pictures == 4 + PROBE
    assert (last.done, last.before) == (10, 6)
    assert_holds(tmp_path, items(10))
    # what was there keeps its place, so that a run of training that knows items by number is not led astray
    assert Dataset.open(tmp_path).names[:6] == tuple(
        entry["name"] for shard in json.loads(before["manifest.json"])["shards"] for entry in shard["entries"]
    )
    assert all(files(tmp_path)[name] == data for name, data in before.items() if name != "manifest.json")


def test_a_picture_that_was_changed_is_encoded_again(tmp_path: Path):
    given = items(6)
    cache(tmp_path, given)
    given[2] = replace(given[2], picture=array(77))
    given[3] = replace(given[3], prompt="another")
    encoders = Encoders()
    last = cache(tmp_path, given, encoders)
    assert encoders.pictures == 2 + PROBE
    assert encoders.prompts == {"": 1, "another": 1}
    assert (last.done, last.before, last.unused) == (6, 4, 2)
    assert_holds(tmp_path, given)


def test_files_are_known_again_by_size_and_time(tmp_path: Path):
    path = save(tmp_path / "a.png", array(1))
    given = [Item("a", path, "", path)]
    cache(tmp_path / "cached", given)
    encoders = Encoders()
    cache(tmp_path / "cached", given, encoders)
    assert encoders.pictures == PROBE
    os.utime(path, ns=(1, 1))
    cache(tmp_path / "cached", given, encoders)
    assert encoders.pictures == 1 + 2 * PROBE


def test_pictures_that_are_gone_are_put_aside_and_come_back_for_nothing(tmp_path: Path):
    cache(tmp_path, items(6))
    last = cache(tmp_path, items(6)[:4])
    assert (last.done, last.unused) == (4, 2)
    assert_holds(tmp_path, items(6)[:4])
    encoders = Encoders()
    assert cache(tmp_path, items(6), encoders).unused == 0
    assert encoders.pictures == PROBE
    assert_holds(tmp_path, items(6))


# -- stopped ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", range(7))
def test_a_run_that_was_stopped_is_gone_on_with(tmp_path: Path, stop: int):
    first, second = Encoders(), Encoders()
    run = make(tmp_path, items(5), first.encode_pictures, first.encode_prompt, None, SMALL)
    for _ in range(stop):
        next(run)
    run.close()
    last = cache(tmp_path, items(5), second)
    # the probe and the empty prompt are encoded by each run, and nothing else twice
    runs = 2 if stop else 1
    assert first.pictures + second.pictures == 5 + runs * PROBE
    assert first.prompts + second.prompts == {**dict.fromkeys(PROMPTS, 1), "": runs}
    assert last.done == 5
    assert_holds(tmp_path, items(5))


def test_what_was_encoded_is_kept_when_an_encoder_raises(tmp_path: Path):
    encoders = Encoders()

    def full(pictures: torch.Tensor) -> torch.Tensor:
        if encoders.pictures > 3:
            raise MemoryError("out of memory")
        return encoders.encode_pictures(pictures)

    with pytest.raises(MemoryError, match="out of memory"):
        list(make(tmp_path, items(8), full, encoders.encode_prompt, None, SMALL))
    encoders = Encoders()
    assert cache(tmp_path, items(8), encoders).before == 4
    assert encoders.pictures == 4 + PROBE
    assert_holds(tmp_path, items(8))


@pytest.mark.parametrize("call", range(5))
def test_a_process_that_dies_between_two_writes_loses_a_shard_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
):
    """Dead before or after each rename: nothing runs after it, not even what clears up."""
    renames = 0
    rename = Path.replace

    class Dead(BaseException):
        pass

    def dying(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames >= call + 2:
            raise Dead
        return rename(self, target)

    monkeypatch.setattr(writer, "SHARD_ITEMS", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(Dead):
            cache(tmp_path, items(6))
    assert any(path.suffix == ".tmp" for path in tmp_path.iterdir())
    encoders = Encoders()
    last = cache(tmp_path, items(6), encoders)
    assert not any(path.suffix == ".tmp" for path in tmp_path.iterdir())
    assert last.done == 6
    assert encoders.pictures == 6 - last.before + PROBE
    assert_holds(tmp_path, items(6))


def test_killed_processes_leave_what_can_be_gone_on_with(tmp_path: Path):
    """kill -9 at any moment, again and again, ends in the whole dataset."""
    here = Path(__file__).resolve()
    code = (
        f"import runpy, sys; runpy.run_path({str(here.parents[3] / 'dev.py')!r}); "
        f"sys.path.insert(0, {str(here.parent)!r}); import toy; from pathlib import Path; "
        "from zeroconv.controlnet_core.data import writer; writer.SHARD_ITEMS = 2; "
        "encoders = toy.Encoders(); folder = Path(sys.argv[1]); "
        "toy.cache(folder, toy.items(60), encoders)"
    )
    kept = []
    for shards in (3,):
        with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) as process:
            while process.poll() is None and len(list(tmp_path.glob("shard-*"))) < shards:
                time.sleep(0.01)
            process.kill()
        assert process.returncode != 0
        found = manifest.read_manifest(tmp_path)
        kept.append(0 if found is None else sum(len(shard.entries) for shard in found.shards))
    assert kept == sorted(kept)
    assert 0 < kept[-1] < 60
    assert cache(tmp_path, items(60)).before == kept[-1]
    assert_holds(tmp_path, items(60))


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["shard-00000.safetensors", "shard-00001.safetensors", "prompts-00000.safetensors"])
@pytest.mark.parametrize("how", ["shortened", "missing"])
def test_a_damaged_file_is_made_again_and_the_rest_kept(tmp_path: Path, file: str, how: str):
    cache(tmp_path, items(6))
    path = tmp_path / file
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    encoders = Encoders()
    last = cache(tmp_path, items(6), encoders)
    assert encoders.pictures == PROBE + (3 if file.startswith("shard") else 0)
    assert sum(encoders.prompts.values()) <= 4
    assert last.done == 6
    assert_holds(tmp_path, items(6))


def test_a_shard_that_no_manifest_names_is_written_over(tmp_path: Path):
    (tmp_path / "shard-00000.safetensors").write_bytes(b"half a shard")
    (tmp_path / ".shard-00000.safetensors.abc.tmp").write_bytes(b"half a file")
    (tmp_path / ".mine.tmp").touch()
    cache(tmp_path, items(2))
    assert_holds(tmp_path, items(2))
    assert not (tmp_path / ".shard-00000.safetensors.abc.tmp").exists()
    assert (tmp_path / ".mine.tmp").exists()


# -- shards -----------------------------------------------------------------------------------------------------------


def test_a_shard_holds_one_size_and_as_much_as_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 3 * (64 * 64 * 3 + 4 * 64 * 4 + 8))  # three items of 64x64
    cache(tmp_path, items(10))
    shards = [load_file(path) for path in sorted(tmp_path.glob("shard-*"))]
    assert [tuple(shard["hints"].shape) for shard in shards] == [
        (3, 3, 64, 64), (2, 3, 64, 64), (4, 3, 48, 80), (1, 3, 48, 80)
    ]  # fmt: skip
    for shard in shards:
        assert {name: tensor.dtype for name, tensor in shard.items()} == {
            "latents": torch.float32,
            "hints": torch.uint8,
            "prompts": torch.int64,
        }
    assert_holds(tmp_path, items(10))


@pytest.mark.parametrize(("limit", "value"), [("SHARD_BYTES", 2 * 4 * 8 * 2), ("FILE_PROMPTS", 2)])
def test_many_prompts_become_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int):
    monkeypatch.setattr(writer, limit, value)
    given = [replace(item, prompt=f"prompt {i}") for i, item in enumerate(items(9))]
    cache(tmp_path, given)
    assert len(list(tmp_path.glob("prompts-*"))) == 1 + 5  # the empty prompt, and nine others
    assert_holds(tmp_path, given)
    dataset = Dataset.open(tmp_path)
    batch = next(iter(dataset.buckets.values()))
    together = dataset.read(batch)
    for row, index in enumerate(batch):
        assert torch.equal(together.context[row], dataset.read([index]).context[0])


# -- bad items --------------------------------------------------------------------------------------------------------


def test_bad_pictures_are_told_by_name_and_cost_nobody_else_anything(tmp_path: Path):
    whole = save(tmp_path / "whole.png", array(1)).read_bytes()
    for name, data in {"half.png": whole[: len(whole) * 2 // 3], "text.png": b"hello"}.items():
        (tmp_path / name).write_bytes(data)
    hint = array(5)
    bad = [
        Item("half.png", tmp_path / "half.png", "", hint),
        Item("text.png", tmp_path / "text.png", "", hint),
        Item("gone.png", tmp_path / "gone.png", "", hint),
        Item("wide hint", array(1), "", array(2, 64, 128)),
        Item("no hint", array(1)),
    ]
    good = items(4, [(64, 64)])
    mixed = [good[0], *bad[:2], good[1], *bad[2:], *good[2:]]
    last = cache(tmp_path / "cached", mixed)
    assert last.done == 4
    reasons = {skipped.name: skipped.reason for skipped in last.skipped}
    assert set(reasons) == {item.name for item in bad}
    assert "half.png cannot be read as a picture" in reasons["half.png"]
    assert "text.png cannot be read as a picture" in reasons["text.png"]
    assert reasons["gone.png"] == "cannot be read (No such file or directory)"
    assert "its hint is 128x64, the picture 64x64" in reasons["wide hint"]
    assert reasons["no hint"] == "it has no hint: choose an annotator, or give one"
    assert_holds(tmp_path / "cached", good)


def test_a_picture_of_which_the_vae_makes_no_numbers_is_told(tmp_path: Path):
    encoders, given = Encoders(), items(4, [(64, 64)])
    white = np.full((64, 64, 3), 255, np.uint8)
    given[1] = replace(given[1], picture=white)

    def encode(pictures: torch.Tensor) -> torch.Tensor:
        latents = encoders.encode_pictures(pictures)
        latents[pictures.amin((1, 2, 3)) == 1] = float("nan")
        return latents

    *_, last = make(tmp_path, given, encode, encoders.encode_prompt, None, SMALL)
    assert [str(skipped) for skipped in last.skipped] == ["1.png: the VAE made numbers of it that are not finite"]
    assert_holds(tmp_path, [given[0], *given[2:]])


def test_a_caption_that_the_text_encoder_does_not_take_is_told_and_costs_its_pictures_alone(tmp_path: Path):
    class Strict(Encoders):
        def encode_prompt(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor | None]:
            if "dragon" in prompt:
                raise PromptError("there is no such word")
            return super().encode_prompt(prompt)

    strict, given = Strict(), items(4)
    given[1] = replace(given[1], prompt="a dragon " * 20)
    *_, last = make(tmp_path, given, strict.encode_pictures, strict.encode_prompt, None, SMALL)
    assert [str(each) for each in last.skipped] == [
        f"1.png: its caption {('a dragon ' * 20)[:40] + '...'!r} cannot be used: there is no such word"
    ]
    assert last.done == 3 and last.step == last.steps
    assert sorted(Dataset.open(tmp_path).names) == ["0.png", "2.png", "3.png"]
    with pytest.raises(DatasetError, match="none of 1 items could be used: 1.png: its caption 'a dragon"):
        cache(tmp_path / "none", given[1:2], strict)
    with pytest.raises(PromptError, match="there is no such word"):  # of the user's own prompts none is left out
        list(make(tmp_path, given, strict.encode_pictures, strict.encode_prompt, None, SMALL, ["a dragon"]))


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path):
    with pytest.raises(DatasetError, match="none of 3 items could be used: a0: it has no hint.*a2: it has no hint"):
        cache(tmp_path, [Item(f"a{i}", array(i)) for i in range(3)])


def test_two_items_of_one_name_are_refused(tmp_path: Path):
    with pytest.raises(DatasetError, match="two items are called 0.png"):
        cache(tmp_path, [*items(1), *items(1)])


# -- hints and mirror images ------------------------------------------------------------------------------------------


def darker(picture: np.ndarray) -> np.ndarray:
    """An annotator that tells left from right: the left half becomes black."""
    assert picture.dtype == np.float32 and 0 <= picture.min() and picture.max() <= 1
    hint = picture * 0.5
    hint[:, : picture.shape[1] // 2] = 0
    return hint


def test_an_annotator_makes_the_hints_of_what_is_cached(tmp_path: Path):
    given = [Item("a", array(1), ""), Item("b", array(2), "", array(3, 8, 64))]  # which needs no hint that fits
    cache(tmp_path, given, annotate=darker, options=replace(SMALL, hints="darker"))
    for name, (_, hints, *_) in by_name(tmp_path).items():
        picture = array(1 if name == "a" else 2).astype(np.float32) / 255
        assert np.array_equal(
            hints[0].numpy(), np.rint(darker(picture) * 255).transpose(2, 0, 1).astype(np.float32) / 255
        )


def test_a_picture_that_the_annotator_cannot_read_is_told(tmp_path: Path):
    def picky(picture: np.ndarray) -> np.ndarray:
        if picture.mean() > 0.9:
            raise PictureError("canny: nothing to see")
        return picture

    white = Item("white", np.full((64, 64, 3), 255, np.uint8))
    last = cache(tmp_path, [*items(2), white], annotate=picky)
    assert [str(skipped) for skipped in last.skipped] == ["white: canny: nothing to see"]
    assert last.done == 2


def test_mirror_images_are_items_of_their_own(tmp_path: Path):
    given = items(3, [(64, 64)])
    last = cache(tmp_path, given, options=replace(SMALL, mirror=True))
    assert last.done == 3
    found = by_name(tmp_path)
    assert len(found) == 6
    for item in given:
        mirrored = replace(item, picture=item.picture[:, ::-1], hint=item.hint[:, ::-1])
        for name, expected in ((item.name, item), (f"{item.name} (mirrored)", mirrored)):
            latents, hints, _, prompt = found[name]
            torch.testing.assert_close(latents, latents_of(as_tensor(expected.picture)), rtol=0, atol=1e-6)
            assert torch.equal(hints, as_tensor(expected.hint))
            assert prompt == item.prompt


def test_the_mirror_image_is_annotated_itself(tmp_path: Path):
    cache(tmp_path, [Item("a", array(1))], annotate=darker, options=replace(SMALL, mirror=True))
    for _, hints, *_ in by_name(tmp_path).values():
        assert not hints[..., :32].any()
        assert hints[..., 32:].any()


def test_small_pictures_are_counted(tmp_path: Path):
    given = [*items(3, [(32, 32)]), replace(items(1)[0], name="large")]
    assert cache(tmp_path, given).enlarged == 3


# -- the same dataset -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resolution": 128}, "resolution 64, found 128"),
        ({"mirror": True}, "mirror False, found True"),
        ({"hints": "canny"}, "hints given, found canny"),
    ],
)
def test_other_options_are_refused(tmp_path: Path, options: dict, said: str):
    cache(tmp_path, items(2))
    before = files(tmp_path)
    with pytest.raises(DatasetError, match=f"was made with {said}: choose another name for the new dataset"):
        cache(tmp_path, items(2), options=replace(SMALL, **options))
    assert files(tmp_path) == before
    cache(tmp_path, items(3), options=replace(SMALL, batch_size=1))  # which changes no number


def test_other_encoders_are_refused(tmp_path: Path):
    cache(tmp_path, items(2))
    with pytest.raises(DatasetError, match="was made with another VAE: one dataset holds what one encoder makes"):
        cache(tmp_path, items(3), Encoders(factor=1.1))
    encoders = Encoders()
    with pytest.raises(DatasetError, match="was made with another text encoder"):
        list(make(tmp_path, items(3), encoders.encode_pictures, lambda _: (torch.ones(4, 8), None), None, SMALL))
    with pytest.raises(DatasetError, match="context channels 8, found 16"):
        list(make(tmp_path, items(3), encoders.encode_pictures, lambda _: (torch.ones(4, 16), None), None, SMALL))
    with pytest.raises(DatasetError, match="pooled channels 0, found 8"):
        cache(tmp_path, items(3), Encoders(pooled=True))
    cache(tmp_path, items(3), Encoders(factor=1.001))  # as another device would have it


def test_a_vae_of_another_kind_is_told(tmp_path: Path):
    encoders = Encoders()
    flux = lambda pictures: torch.zeros(len(pictures), 16, *(side // 8 for side in pictures.shape[2:]))  # noqa: E731
    with pytest.raises(DatasetError, match="makes latents 16x8x8 of pictures 3x64x64, expected 4x8x8: connect the VAE"):
        list(make(tmp_path, items(3), flux, encoders.encode_prompt, None, SMALL))


def test_a_full_disk_is_told_and_leaves_a_dataset_that_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache(tmp_path, items(4))

    def full(path: Path, *_: object) -> None:
        raise SaveError(f"{path.name} cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write", full)
        with pytest.raises(SaveError, match="No space left"):
            cache(tmp_path, items(8))
    assert_holds(tmp_path, items(4))
    cache(tmp_path, items(8))
    assert_holds(tmp_path, items(8))


def test_items_stay_as_they_are(tmp_path: Path):
    given, before = items(3), items(3)
    cache(tmp_path, given, options=replace(SMALL, mirror=True))
    for item, same in zip(given, before):
        assert np.array_equal(item.picture, same.picture)
        assert np.array_equal(item.hint, same.hint)


def test_hints_made_ahead_in_threads_are_the_same(tmp_path: Path):
    """While the encoder works on a batch the hints of the next one are made; a picture without one is named."""
    seen, enough = [], threading.Event()

    def annotate(picture: np.ndarray) -> np.ndarray:
        seen.append(threading.current_thread() is threading.main_thread())
        if len(seen) > SMALL.batch_size:
            enough.set()
        if (picture[0, 0] == 1).all():
            raise PictureError("nothing is to be seen in it")
        return 1 - picture

    class Slow(Encoders):
        def encode_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
            assert len(pictures) == PROBE or enough.wait(60), "the encoder works alone"
            return super().encode_pictures(pictures)

    white = array(9)
    white[0, 0] = 255
    given = [*items(6), Item("white.png", white)]
    slow = Slow()
    *_, last = make(tmp_path / "ahead", given, slow.encode_pictures, slow.encode_prompt, annotate, SMALL, (), True)
    assert not any(seen)
    assert [str(each) for each in last.skipped] == ["white.png: nothing is to be seen in it"]
    cache(tmp_path / "here", given, annotate=annotate)
    assert any(seen)
    ahead, here = by_name(tmp_path / "ahead"), by_name(tmp_path / "here")
    assert ahead.keys() == here.keys() and all(torch.equal(ahead[name][1], here[name][1]) for name in here)
