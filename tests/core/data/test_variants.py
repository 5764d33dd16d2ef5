"""More to learn from one picture: parts of it, and its caption's tags in other orders."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from zeroconv.controlnet_core.data.caching import LARGEST_ZOOM, crops
from zeroconv.controlnet_core.data.captions import forms
from zeroconv.controlnet_core.data.dataset import Dataset, DatasetError
from zeroconv.controlnet_core.data.pictures import Crop
from zeroconv.controlnet_core.data.sources import Item
from zeroconv.controlnet_core.data.writer import CachingOptions

from .toy import SMALL, array, as_tensor, cache, context_of, latents_of

TAGS = "one girl, red hair, a hat, smiling, at the sea"


# -- captions ----------------------------------------------------------------------------------------------------------


def test_the_first_form_is_the_caption_and_the_others_its_tags_in_other_orders():
    found = forms(TAGS, "a.png", 6, dropout=0.0, keep=1)
    assert found[0] == TAGS and len(found) == 6
    assert len(set(found)) > 3
    for form in found:
        assert sorted(form.split(", ")) == sorted(TAGS.split(", "))
        assert form.startswith("one girl, ")
    assert forms(TAGS, "a.png", 6, 0.0, 1) == found
    assert forms(TAGS, "b.png", 6, 0.0, 1)[1:] != found[1:]


def test_tags_are_left_out_as_often_as_is_asked_for_and_the_kept_ones_never():
    counts = Counter(tag for form in forms(TAGS, "a", 2001, dropout=0.25, keep=2)[1:] for tag in form.split(", "))
    assert counts["one girl"] == counts["red hair"] == 2000
    assert all(1400 < counts[tag] < 1600 for tag in ("a hat", "smiling", "at the sea"))


@pytest.mark.parametrize("prompt", ["", "a girl at the sea"])
def test_a_caption_without_tags_is_itself(prompt: str):
    assert forms(prompt, "a", 3, dropout=0.5, keep=1) == (prompt,) * 3


# -- crops -------------------------------------------------------------------------------------------------------------


def test_crops_lie_in_the_picture_and_are_of_one_size():
    centre = Crop((300, 200), (128, 64))
    found = crops(centre, "a.png", 20)
    assert found[0] == centre and found == crops(centre, "a.png", 20)
    assert len(set(found)) == 20
    for crop in found:
        height, width, top, left, *size = crop.sizes
        assert (height, width, *size) == (200, 300, 64, 128)
        assert 0 <= top <= round(200 * crop.scale) - 64 and 0 <= left <= round(300 * crop.scale) - 128
        assert 1 <= crop.scale / centre.scale <= LARGEST_ZOOM


def test_hints_follow_their_crops(tmp_path: Path):
    """A picture that is its own hint has crops that are their own hints."""
    picture = array(3, 24, 32).repeat(16, axis=0).repeat(16, axis=1)
    cache(tmp_path, [Item("a", picture, "", picture)], options=replace(SMALL, crops=4, mirror=True))
    dataset = Dataset.open(tmp_path)
    assert dataset.names[:4] == ("a", "a (mirrored)", "a (crop 1)", "a (crop 1) (mirrored)")
    assert len(dataset) == 8
    found = [dataset.read([i]) for i in range(8)]
    for one, mirrored in zip(found[::2], found[1::2]):
        assert torch.equal(one.hints.flip(-1), mirrored.hints)
    for own in found[::2]:  # of their own hint they differ by how it is averaged alone
        apart = [(own.latents - latents_of(other.hints)).abs().mean().item() for other in found[::2]]
        ours, *others = sorted(apart)
        assert (own.latents - latents_of(own.hints)).abs().mean().item() == ours < 0.4 * min(others)
    assert not torch.equal(found[0].hints, found[2].hints)


# -- the dataset -------------------------------------------------------------------------------------------------------


def test_each_form_of_a_caption_is_an_item_and_pictures_are_cached_once(tmp_path: Path):
    options = replace(SMALL, caption_variants=3, tag_dropout=0.0)
    given = [Item(f"{i}", array(i), TAGS, array(10 + i)) for i in range(8)]
    last = cache(tmp_path, given, options=options)
    dataset = Dataset.open(tmp_path)
    assert last.done == 8 and len(dataset) == 24
    assert dataset.names[:3] == ("0", "0 (caption 1)", "0 (caption 2)")
    for index, form in enumerate(forms(TAGS, "0", 3, 0.0, 1)):
        batch = dataset.read([index])
        assert torch.equal(batch.context, context_of(form)[None].half().float())
        torch.testing.assert_close(batch.latents, latents_of(as_tensor(array(0))), rtol=0, atol=1e-6)
    watched, learnt = dataset.split(2, seed=0)
    assert all(dataset.places[index].plain for index in watched)
    assert len(learnt) == 18  # no form of the two


def test_a_dataset_keeps_to_its_variants_and_older_ones_have_one(tmp_path: Path):
    given = [Item("a", array(1), TAGS, array(2))]
    cache(tmp_path / "new", given, options=replace(SMALL, caption_variants=2))
    for changed in ({"caption_variants": 1}, {"tag_dropout": 0.5}, {"crops": 2}):
        with pytest.raises(DatasetError, match=r"was made with (caption variants|tag dropout|crops) "):
            cache(tmp_path / "new", given, options=replace(SMALL, **{"caption_variants": 2, **changed}))
    cache(tmp_path / "old", given)
    path = tmp_path / "old" / "manifest.json"
    found = json.loads(path.read_text())
    found["options"] = {
        key: value for key, value in found["options"].items() if key not in ("crops", "caption_variants")
    }
    for entry in found["shards"][0]["entries"]:
        del entry["crop"]
    path.write_text(json.dumps(found))
    assert cache(tmp_path / "old", [*given, Item("b", array(3), TAGS, array(4))]).before == 1
    assert len(Dataset.open(tmp_path / "old")) == 2
    with pytest.raises(DatasetError, match="was made with crops 1, found 2"):
        cache(tmp_path / "old", given, options=replace(SMALL, crops=2))


def test_a_manifest_of_more_captions_than_there_are_is_told(tmp_path: Path):
    cache(tmp_path, [Item("a", array(1), TAGS, array(2))])
    path = tmp_path / "manifest.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "options": {**found["options"], "caption_variants": 2}}))
    with pytest.raises(DatasetError, match="row 0 has no caption 1"):
        Dataset.open(tmp_path).read([1])
    path.write_text(json.dumps({**found, "options": {**found["options"], "caption_variants": 10**9}}))
    with pytest.raises(DatasetError, match=r"manifest.json is damaged"):
        Dataset.open(tmp_path)


# -- how much it will be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [SMALL, replace(SMALL, crops=2, mirror=True, caption_variants=2)])
def test_the_room_is_told_before_it_is_taken(tmp_path: Path, options: CachingOptions):
    given = [Item(f"{i}", array(i), TAGS, array(10 + i)) for i in range(6)]
    last = cache(tmp_path, given, options=options)
    found = sum(path.stat().st_size for path in tmp_path.glob("shard-*"))
    texts = len(Dataset.open(tmp_path).prompts) * 8 * 6 * 2
    assert 0.9 * last.bytes < found + texts < 1.1 * last.bytes + 2000  # headers


def test_a_disk_without_room_is_refused_before_anything_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from zeroconv.controlnet_core.data import caching

    from .toy import Encoders

    monkeypatch.setattr(caching.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5000}))
    encoders = Encoders()
    with pytest.raises(DatasetError, match=r"needs 0.0 MiB or more for 2 pictures, and its disk has 0.0 MiB: choose a"):
        cache(tmp_path, [Item(f"{i}", array(i), "", array(10 + i)) for i in range(2)], encoders)
    assert encoders.pictures == 1  # the probe
    assert not list(tmp_path.glob("shard-*"))


def test_what_is_given_stays_as_it_is(tmp_path: Path):
    picture = array(1)
    before = picture.copy()
    cache(tmp_path, [Item("a", picture, TAGS, picture)], options=replace(SMALL, crops=3, mirror=True))
    assert np.array_equal(picture, before)
