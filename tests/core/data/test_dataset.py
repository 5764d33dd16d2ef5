"""A cached dataset gives what was put in, in an order that a seed decides, and says which of its files is damaged."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from zeroconv.controlnet_core.data.dataset import Batch, Batches, Dataset, DatasetError, stack_contexts
from zeroconv.controlnet_core.data.sources import Item

from .toy import PROMPTS, SMALL, Encoders, array, as_tensor, cache, context_of, items, latents_of


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Ten items, five of each of two sizes."""
    folder = tmp_path_factory.mktemp("dataset")
    cache(folder, items(10))
    return Dataset.open(folder)


# -- reading ----------------------------------------------------------------------------------------------------------


def test_what_was_put_in_comes_out(dataset: Dataset):
    given = {item.name: item for item in items(10)}
    assert sorted(dataset.names) == sorted(given)
    for index, name in enumerate(dataset.names):
        batch, item = dataset.read([index]), given[name]
        torch.testing.assert_close(batch.latents, latents_of(as_tensor(item.picture)), rtol=0, atol=1e-6)
        assert torch.equal(batch.hints, as_tensor(item.hint))
        assert torch.equal(batch.context, context_of(item.prompt)[None].half().float())
        assert dataset.prompts[batch.prompts.item()] == item.prompt
        assert dataset.bucket_of(index) == item.picture.shape[:2]
        assert batch.pooled is None and batch.sizes is None


def test_a_batch_is_its_items_in_the_order_asked_for(dataset: Dataset):
    (size, bucket), *_ = dataset.buckets.items()
    chosen = [bucket[3], bucket[0], bucket[3], bucket[1]]
    batch = dataset.read(chosen)
    assert batch.latents.shape == (4, 4, size[0] // 8, size[1] // 8)
    assert batch.hints.shape == (4, 3, *size)
    assert {tensor.dtype for tensor in (batch.latents, batch.hints, batch.context)} == {torch.float32}
    for row, index in enumerate(chosen):
        alone = dataset.read([index])
        for name in ("latents", "hints", "prompts"):
            assert torch.equal(getattr(batch, name)[row], getattr(alone, name)[0])
        times = batch.context.shape[1] // alone.context.shape[1]
        assert torch.equal(batch.context[row], alone.context[0].repeat(times, 1))


def test_items_of_two_sizes_are_no_batch(dataset: Dataset):
    (_, one), (_, other) = dataset.buckets.items()
    with pytest.raises(DatasetError, match=r"items of one size, found \[\(48, 80\), \(64, 64\)\]"):
        dataset.read([one[0], other[0]])


def test_the_empty_prompt_is_always_there(tmp_path: Path):
    cache(tmp_path, [replace(item, prompt="a cat") for item in items(2)])
    dataset = Dataset.open(tmp_path)
    assert dataset.prompts == ("", "a cat")
    context, pooled = dataset.empty_prompt
    assert torch.equal(context, context_of("").half().float())
    assert pooled is None


def test_sdxl_items_come_with_pooled_text_and_sizes(tmp_path: Path):
    tall = Item("tall.png", array(1, 288, 128), PROMPTS[1], array(2, 288, 128))
    cache(tmp_path, [tall], Encoders(pooled=True), replace(SMALL, resolution=128))
    dataset = Dataset.open(tmp_path)
    batch = dataset.read([0])
    assert dataset.bucket_of(0) == (192, 80)
    assert torch.equal(batch.pooled, context_of(PROMPTS[1]).mean(0)[None].half().float())
    # 288x128 becomes 192x85.3, of which 2.7 pixels go on either side
    assert batch.sizes.tolist() == [[288, 128, 0, 3, 192, 80]]
    assert torch.equal(dataset.empty_prompt[1], context_of("").mean(0).half().float())


def test_grey_hints_take_a_third_of_the_room_and_are_read_as_three_channels(tmp_path: Path):
    grey = np.repeat(array(5)[:, :, :1], 3, axis=2)
    cache(tmp_path, [Item("a", array(1), "", grey)])
    assert load_file(tmp_path / "shard-00000.safetensors")["hints"].shape == (1, 1, 64, 64)
    hints = Dataset.open(tmp_path).read([0]).hints
    assert torch.equal(hints, as_tensor(grey))
    hints.zero_()  # a tensor of its own, not three views of one channel


def test_contexts_of_different_length_are_repeated_to_a_common_one():
    short, long = torch.randn(4, 8), torch.randn(6, 8)
    stacked = stack_contexts([short, long], torch.randn(1, 8))
    assert stacked.shape == (2, 12, 8)
    assert torch.equal(stacked[0], torch.cat([short, short, short]))
    assert torch.equal(stacked[1], torch.cat([long, long]))
    query = torch.randn(1, 5, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(attend(query, stacked[:1], stacked[:1]), attend(query, short[None], short[None]))


def test_contexts_that_would_become_very_long_are_continued_with_the_empty_prompt():
    empty = torch.randn(77, 8)
    contexts = [torch.randn(77 * chunks, 8) for chunks in (2, 4, 6, 7)]
    stacked = stack_contexts(contexts, empty)
    assert stacked.shape == (4, 7 * 77, 8)
    for context, row in zip(contexts, stacked):
        assert torch.equal(row, torch.cat([context, *[empty] * (7 - len(context) // 77)]))


def test_reading_leaves_no_file_mapped_and_does_not_read_all(dataset: Dataset):
    """Windows cannot delete a file that is mapped; and a shard may be larger than the memory."""
    dataset.read([0])
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not list what is mapped")
    assert str(dataset.folder) not in maps.read_text()


def test_a_dataset_cannot_be_changed(dataset: Dataset):
    with pytest.raises(FrozenInstanceError):
        dataset.folder = Path()


def test_the_fingerprint_knows_items_and_prompts(tmp_path: Path, dataset: Dataset):
    cache(tmp_path / "same", items(10))
    cache(tmp_path / "fewer", items(9))
    cache(tmp_path / "said", [replace(item, prompt="a cat") for item in items(10)])
    same, fewer, said = (Dataset.open(tmp_path / name).fingerprint for name in ("same", "fewer", "said"))
    assert same == dataset.fingerprint == Dataset.open(dataset.folder).fingerprint
    assert len({same, fewer, said}) == 3


# -- previews ---------------------------------------------------------------------------------------------------------


def test_previews_are_the_pictures_made_small(dataset: Dataset):
    given = {item.name: item for item in items(10)}
    batch = dataset.read([0])
    picture = as_tensor(given[dataset.names[0]].picture)
    expected = torch.nn.functional.avg_pool2d(picture, 8)
    assert dataset.preview(batch.latents).shape == (1, 3, *batch.latents.shape[2:])
    assert (dataset.preview(batch.latents) - expected).abs().max() < 1e-3
    assert (dataset.preview(-batch.latents) - expected).abs().max() > 0.2
    assert 0 <= dataset.preview(100 * batch.latents).min() and dataset.preview(100 * batch.latents).max() <= 1


def test_previews_of_pictures_of_one_colour_are_finite(tmp_path: Path):
    flat = np.full((64, 64, 3), 77, np.uint8)
    cache(tmp_path, [Item("flat", flat, "", flat)])
    dataset = Dataset.open(tmp_path)
    found = dataset.preview(dataset.read([0]).latents)
    torch.testing.assert_close(found, torch.full_like(found, 77 / 255), rtol=0, atol=1e-3)


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    cache(tmp_path, items(4))
    return tmp_path


@pytest.mark.parametrize("file", ["shard-00001.safetensors", "prompts-00000.safetensors"])
def test_a_missing_or_shortened_file_is_named(broken: Path, file: str):
    path = broken / file
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(DatasetError, match=f"{file} has {len(whole) - 10} bytes instead of {len(whole)}"):
        Dataset.open(broken)
    path.unlink()
    with pytest.raises(DatasetError, match=f"{file} is missing.*make the dataset again into the same folder"):
        Dataset.open(broken)


def test_a_header_that_is_no_header_is_named(broken: Path):
    path = broken / "shard-00000.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(DatasetError, match=r"shard-00000.safetensors cannot be read"):
        Dataset.open(broken)


def test_a_file_that_goes_while_it_is_used_is_named(broken: Path):
    dataset = Dataset.open(broken)
    (broken / "shard-00000.safetensors").unlink()
    with pytest.raises(DatasetError, match=r"shard-00000.safetensors is missing"):
        dataset.read([0])


def read_all(folder: Path) -> list[Batch]:
    dataset = Dataset.open(folder)
    return [dataset.read([index]) for index in range(len(dataset))]


def test_a_bit_that_flips_is_found_before_it_is_read_and_mended(broken: Path):
    """In any file, in its header or in its numbers; making the dataset again makes that file anew."""
    before, batches = Dataset.open(broken), read_all(broken)
    for path in sorted(broken.glob("*.safetensors")):
        whole = path.read_bytes()
        for place in (9, len(whole) - 3):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            with pytest.raises(DatasetError, match=f"{path.name} (cannot be read|has changed since it was written)"):
                read_all(broken)
        cache(broken, items(4))
        again = Dataset.open(broken)
        for index, batch in enumerate(batches):
            found = again.read([again.names.index(before.names[index])])
            assert torch.equal(found.latents, batch.latents) and torch.equal(found.context, batch.context)


def test_a_file_that_shrinks_while_it_is_used_ends_nothing_but_the_training(broken: Path):
    dataset = Dataset.open(broken)
    dataset.read([0])
    os.truncate(broken / "shard-00000.safetensors", 600)
    with pytest.raises(DatasetError, match=r"is damaged: shard-00000.safetensors cannot be read"):
        dataset.read([0])


def test_a_dataset_without_checksums_is_read(broken: Path):
    found = json.loads((broken / "manifest.json").read_text())
    for part in (*found["shards"], *found["prompts"]):
        del part["checksum"]
    (broken / "manifest.json").write_text(json.dumps({**found, "version": 1}))
    assert len(Dataset.open(broken).read([0]).latents) == 1


WRONG: dict[str, Any] = {
    "options": [5, {"pooled_channels": "x"}, {}],
    "probe": [5, ["x"]],
    "moments": [5, [5]],
    "prompts": [5, [5], [{}], [{"file": "../a", "bytes": 1, "prompts": []}], [{"file": 5, "bytes": 1, "prompts": [1]}]],
    "shards": [{"a": 1}, [5], [{"file": "a"}], [{"file": "a", "bytes": "1", "height": 8, "width": 8, "entries": []}]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_manifest_of_another_shape_is_told(broken: Path, name: str, value: Any):
    found = json.loads((broken / "manifest.json").read_text())
    (broken / "manifest.json").write_text(json.dumps({**found, name: value}))
    with pytest.raises(
        DatasetError, match=r"manifest.json is damaged .*: delete the folder and make the dataset again"
    ):
        Dataset.open(broken)


def test_a_folder_without_dataset_says_what_makes_one(tmp_path: Path):
    with pytest.raises(
        DatasetError, match=r"holds no dataset \(no manifest.json\): make one with Make Control Dataset"
    ):
        Dataset.open(tmp_path)


@pytest.mark.parametrize("text", ["[1]", '{"format": "zeroconv dataset", "version": 3}', '{"format": "other"}'])
def test_a_manifest_of_something_else_is_told(broken: Path, text: str):
    (broken / "manifest.json").write_text(text)
    with pytest.raises(DatasetError, match=r"manifest.json says .*, expected \('zeroconv dataset', 2\)"):
        Dataset.open(broken)


def test_a_manifest_too_deep_to_be_read_is_told(broken: Path):
    (broken / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DatasetError, match="manifest.json cannot be read"):
        Dataset.open(broken)


def test_a_prompt_that_the_manifest_does_not_have_is_told(broken: Path):
    found = json.loads((broken / "manifest.json").read_text())
    found["prompts"] = [{**found["prompts"][0], "prompts": [""]}]
    (broken / "manifest.json").write_text(json.dumps(found))
    with pytest.raises(DatasetError, match=r"prompt \d+ of a shard is in none of its files"):
        read_all(broken)


def test_half_a_manifest_is_told(broken: Path):
    text = (broken / "manifest.json").read_text()
    (broken / "manifest.json").write_text(text[:100])
    with pytest.raises(DatasetError, match="manifest.json cannot be read"):
        Dataset.open(broken)


def test_a_manifest_without_items_is_told(broken: Path):
    found = json.loads((broken / "manifest.json").read_text())
    (broken / "manifest.json").write_text(json.dumps({**found, "shards": []}))
    with pytest.raises(DatasetError, match="without items"):
        Dataset.open(broken)


# -- the order of batches ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Seven items of one size, two of another."""
    folder = tmp_path_factory.mktemp("uneven")
    cache(folder, [*items(7, [(64, 64)]), *(replace(item, name=f"wide {item.name}") for item in items(2, [(48, 80)]))])
    return Dataset.open(folder)


def test_every_item_comes_as_often_as_every_other_and_sizes_never_mix(uneven: Dataset):
    """Nine items in batches of two: four epochs are 18 batches, of which 14 of the seven and 4 of the two."""
    batches = Batches(uneven, range(9), 2, seed=3)
    found = [batches[k] for k in range(18)]
    assert {len(batch) for batch in found} == {2}
    for batch in found:
        assert len({uneven.bucket_of(index) for index in batch}) == 1
    counts = Counter(index for batch in found for index in batch)
    assert counts == dict.fromkeys(range(9), 4)
    assert len({index for batch in found[:4] for index in batch}) == 8  # the first epoch leaves one of the seven over


@pytest.mark.parametrize("size", [1, 3, 4, 5, 8, 20])
def test_no_item_is_drawn_more_often_because_few_have_its_shape(uneven: Dataset, size: int):
    """At batches of 8 a lone shape came eight times an epoch: now nobody is ahead by more than one batch's worth."""
    batches = Batches(uneven, [0, 1, 2, 3, 4, 5, 6, 7], size, seed=1)  # of one size seven, of the other one
    counts = Counter(index for k in range(6 * 8) for index in batches[k])
    drawn = 6 * 8 * size / 8
    assert set(counts) == set(range(8))
    assert all(abs(count - drawn) <= size for count in counts.values())


def test_a_bucket_smaller_than_a_batch_fills_one_over_several_epochs(uneven: Dataset):
    batches = Batches(uneven, range(9), 5, seed=3)
    wide = [batch for batch in (batches[k] for k in range(18)) if uneven.bucket_of(batch[0])[0] == 48]
    assert len(wide) == 4  # 90 draws are ten epochs: 20 draws of the two
    assert all(sorted(Counter(batch).values()) == [2, 3] for batch in wide)


def test_a_batch_depends_on_its_number_and_the_seed_alone(uneven: Dataset):
    one, other = Batches(uneven, range(9), 2, seed=3), Batches(uneven, range(9), 2, seed=3)
    forwards = [one[k] for k in range(23)]
    assert [other[k] for k in reversed(range(23))] == forwards[::-1]
    one[4].append(5)  # a list of the caller's own
    assert one[4] == forwards[4]
    assert [Batches(uneven, range(9), 2, seed=4)[k] for k in range(23)] != forwards
    assert forwards[:5] != forwards[5:10]  # and every epoch has its own order


def test_only_the_items_that_were_given_come(uneven: Dataset):
    batches = Batches(uneven, [0, 3, 4], 2, seed=0)
    assert {index for k in range(20) for index in batches[k]} == {0, 3, 4}


def test_nothing_is_no_order(uneven: Dataset):
    with pytest.raises(DatasetError, match="found 0 items in batches of 2"):
        Batches(uneven, [], 2, seed=0)


# -- what is held out -------------------------------------------------------------------------------------------------


def test_held_out_items_are_of_one_size_and_not_learnt_from(tmp_path: Path):
    cache(tmp_path, items(24, [(64, 64), (64, 64), (48, 80)]), options=replace(SMALL, mirror=True))
    dataset = Dataset.open(tmp_path)
    assert len(dataset) == 48
    watched, learnt = dataset.split(3, seed=1)
    assert len(watched) == 3
    assert {dataset.bucket_of(index) for index in watched} == {(64, 64)}
    assert not any(dataset.names[index].endswith("(mirrored)") for index in watched)
    # six are left out: the three, and their mirror images
    assert len(learnt) == 42
    names = {dataset.places[index].name for index in watched}
    assert not names & {dataset.places[index].name for index in learnt}
    assert dataset.split(3, seed=1) == (watched, learnt)
    assert dataset.split(3, seed=2)[0] != watched
    assert len(dataset.split(100, seed=1)[0]) == 16 // 4
    assert dataset.split(0, seed=1) == ([], list(range(48)))
