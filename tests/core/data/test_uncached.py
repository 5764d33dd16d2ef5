"""Without a cache training reads what a cache would hold, and a picture that is no longer there is told by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zeroconv.controlnet_core.data.dataset import Dataset
from zeroconv.controlnet_core.data.manifest import DatasetError
from zeroconv.controlnet_core.data.uncached import Uncached
from zeroconv.controlnet_core.data.writer import CachingOptions

from .toy import SMALL, Encoders, array, cache, items, save


@pytest.mark.parametrize(
    "options", [SMALL, replace(SMALL, crops=2, mirror=True, caption_variants=2, tag_dropout=0.5)], ids=["plain", "more"]
)
@pytest.mark.parametrize("pooled", [False, True])
def test_it_is_the_dataset_that_a_cache_would_hold(tmp_path: Path, options: CachingOptions, pooled: bool):
    given = [replace(item, prompt=f"{item.prompt}, {i % 2}, tag") for i, item in enumerate(items(6))]
    cache(tmp_path, given, Encoders(pooled), options)
    expected = Dataset.open(tmp_path)
    encoders = Encoders(pooled)
    found = Uncached.of(tmp_path, given, encoders.encode_pictures, encoders.encode_prompt, options)
    ours, theirs = ([replace(place, file="", row=0) for place in each.places] for each in (found, expected))
    assert (ours, found.fingerprint, found.stamps) == (theirs, expected.fingerprint, expected.stamps)
    assert found.split(1, 0) == expected.split(1, 0)
    for bucket in expected.buckets.values():
        ours, theirs = found.read(bucket), expected.read(bucket)
        torch.testing.assert_close(ours.latents, theirs.latents)
        for name in ("context", "pooled", "sizes", "hint_bytes", "prompts"):
            own, other = getattr(ours, name), getattr(theirs, name)
            assert (own is None) == (other is None) == (name in ("pooled", "sizes") and not pooled)
            assert own is None or torch.equal(own, other)
    context, _ = found.empty_prompt
    assert torch.equal(context, expected.empty_prompt[0])
    latents = found.read([0]).latents
    torch.testing.assert_close(found.preview(latents), expected.preview(latents), atol=1e-3, rtol=0)


def test_nothing_is_encoded_before_it_is_asked_for(tmp_path: Path):
    encoders = Encoders()
    found = Uncached.of(tmp_path, items(40), encoders.encode_pictures, encoders.encode_prompt, SMALL)
    at_first = encoders.pictures
    assert at_first <= 1 + 20 and encoders.prompts.keys() == {""}  # the probe, and what tells the colours
    found.read(found.buckets[64, 64][:3])
    assert encoders.pictures == at_first + 3
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_used_is_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "no.png").write_text("no picture")
    given = [
        *items(2),
        replace(items(1)[0], name="bare.png", hint=None),
        replace(items(1)[0], name="no.png", picture=tmp_path / "no.png"),
        replace(items(1)[0], name="flat.png", hint=array(1, 16, 64)),
    ]
    encoders = Encoders()
    found = Uncached.of(tmp_path, given, encoders.encode_pictures, encoders.encode_prompt, SMALL)
    assert found.names == ("1.png", "0.png") or found.names == ("0.png", "1.png")
    assert (
        "left out: bare.png: it has no hint" in caplog.text and "left out: no.png: no.png cannot be read" in caplog.text
    )
    assert "left out: flat.png: its hint is 64x16, the picture" in caplog.text
    with pytest.raises(DatasetError, match="none of 3 pictures can be used: each needs a hint beside it"):
        Uncached.of(tmp_path, given[2:], encoders.encode_pictures, encoders.encode_prompt, SMALL)


def test_a_picture_that_is_gone_is_told_by_name(tmp_path: Path):
    file = save(tmp_path / "a.png", array(1))
    given = [replace(items(1)[0], name="a.png", picture=file), *items(3)]
    encoders = Encoders()
    found = Uncached.of(tmp_path, given, encoders.encode_pictures, encoders.encode_prompt, SMALL)
    file.unlink()
    with pytest.raises(DatasetError, match=r"a.png: a.png cannot be read as a picture .*goes on without it"):
        found.read([found.names.index("a.png")])
