"""Weights on demand: found where people keep them, else fetched, whole and the right ones, or a clear error."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from zeroconv.annotators import ANNOTATORS, networks
from zeroconv.annotators.fetching import fetch, find, place
from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.networks import NETWORKS, File, Network

from .loopback_hub import COMMIT, LoopbackHub, loopback_hub, set_offline

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = save({"weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(1))})
SETTINGS = b'{"size": 64}'
REPOSITORY = "someone/tiny-lines"
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


def network(*files: File) -> Network:
    return Network("tiny", "tiny:build", files, "MIT")


ONE = network(File(REPOSITORY, "tiny.safetensors", len(WEIGHTS), SHA256))
TWO = network(File(REPOSITORY, "config.json", len(SETTINGS)), File(REPOSITORY, "sub/tiny.safetensors", 16_000))


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with loopback_hub() as served:
        served.files = {
            f"{REPOSITORY}/tiny.safetensors": WEIGHTS,
            f"{REPOSITORY}/config.json": SETTINGS,
            f"{REPOSITORY}/sub/tiny.safetensors": WEIGHTS,
        }
        yield served


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The hub's own cache is an empty folder of this test."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


pytestmark = pytest.mark.usefixtures("no_cache")


class Cancel(Exception):
    pass


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def ignore(done: int, total: int) -> None:
    """A progress that nobody looks at."""


def no_server(*_: int) -> None:
    raise AssertionError("nothing was to be fetched")


# -- found -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where", [f"{REPOSITORY}/tiny.safetensors", "tiny-lines/tiny.safetensors", "tiny.safetensors"], ids=str
)
def test_a_single_file_is_found_in_each_layout_and_each_folder(tmp_path: Path, where: str):
    folders = [tmp_path / "first", tmp_path / "second"]
    assert find(ONE, folders) == [None]
    later = put(folders[1] / where, WEIGHTS)
    assert find(ONE, folders) == [later]
    assert fetch([ONE], folders, no_server) == [[later]]
    sooner = put(folders[0] / where, WEIGHTS)
    assert find(ONE, folders) == [sooner]


def test_a_file_among_several_is_not_taken_by_its_name_alone(tmp_path: Path):
    put(tmp_path / "config.json", SETTINGS)  # whose config.json this is, nobody knows
    weights = put(tmp_path / "tiny-lines" / "sub" / "tiny.safetensors", WEIGHTS)
    assert find(TWO, [tmp_path]) == [None, weights]


def test_a_file_in_the_hubs_own_cache_is_found(tmp_path: Path, no_cache: Path):
    stored = no_cache / "models--someone--tiny-lines"
    put(stored / "refs" / "main", COMMIT.encode())
    cached = put(stored / "snapshots" / COMMIT / "tiny.safetensors", WEIGHTS)
    assert find(ONE, [tmp_path]) == [cached]


def test_a_file_that_cannot_be_the_published_one_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folders = [tmp_path / "first", tmp_path / "second"]
    wrong = put(folders[0] / "tiny.safetensors", WEIGHTS[:-1])
    right = put(folders[1] / "tiny.safetensors", WEIGHTS)
    with caplog.at_level(logging.WARNING):
        assert find(ONE, folders) == [right]
    size = len(WEIGHTS)
    expected = f"{wrong} is {size - 1} bytes, where tiny.safetensors of {REPOSITORY} has {size}: passed over"
    assert caplog.messages == [expected]


def test_without_a_checksum_a_size_only_tells_a_file_from_a_stump(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    about = network(File(REPOSITORY, "tiny.safetensors", 2_000_000))
    path = put(tmp_path / "tiny.safetensors", bytes(1_000_000))
    assert find(about, [tmp_path]) == [path]
    put(path, bytes(999_999))
    assert find(about, [tmp_path]) == [None]
    settings = network(File(REPOSITORY, "tiny.json", 999_999))  # they may change at their source
    small = put(tmp_path / "tiny.json", SETTINGS)
    assert find(settings, [tmp_path]) == [small]
    assert "is 999999 bytes, where tiny.safetensors of someone/tiny-lines has about 2000000" in caplog.text


# -- fetched -----------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_fetched_whole_with_progress(tmp_path: Path, hub: LoopbackHub):
    told: list[tuple[int, int]] = []
    folders = [tmp_path / "models" / "annotators", tmp_path / "other"]
    (paths,) = fetch([TWO], folders, lambda done, total: told.append((done, total)))
    assert paths == [folders[0] / REPOSITORY / "config.json", folders[0] / REPOSITORY / "sub" / "tiny.safetensors"]
    assert [path.read_bytes() for path in paths] == [SETTINGS, WEIGHTS]
    total = len(SETTINGS) + len(WEIGHTS)
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    assert told == sorted(told)
    assert sorted(p.name for p in folders[0].rglob("*") if p.is_file()) == ["config.json", "tiny.safetensors"]
    assert hub.sent == total
    torch.testing.assert_close(load_file(paths[1])["weight"], torch.randn(64, 64, generator=torch.manual_seed(1)))
    fetch([TWO], folders, no_server)
    assert hub.sent == total


def test_only_what_is_missing_is_fetched(tmp_path: Path, hub: LoopbackHub):
    here = put(tmp_path / "second" / REPOSITORY / "sub" / "tiny.safetensors", WEIGHTS)
    folders = [tmp_path / "first", tmp_path / "second"]
    assert fetch([TWO], folders, ignore) == [[place(TWO.files[0], folders[0]), here]]
    assert hub.sent == len(SETTINGS)


def test_a_download_that_broke_off_goes_on_where_it_stopped(tmp_path: Path, hub: LoopbackHub):
    hub.cut_after = 10_000
    path = place(ONE.files[0], tmp_path)
    with pytest.raises(
        AnnotatorError, match=rf"10000 of {len(WEIGHTS)} bytes are here; the next run goes on from there"
    ):
        fetch([ONE], [tmp_path], ignore)
    assert not path.exists()
    assert find(ONE, [tmp_path]) == [None]
    assert hub.sent == 10_000
    hub.cut_after = None
    told: list[int] = []
    assert fetch([ONE], [tmp_path], lambda done, _: told.append(done)) == [[path]]
    assert path.read_bytes() == WEIGHTS
    assert hub.sent == len(WEIGHTS)  # the second time, only the rest
    assert hub.ranges[-1] == "bytes=10000-"
    assert told[0] == 10_000
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_cancel_ends_a_download_that_the_next_one_takes_up(tmp_path: Path, hub: LoopbackHub):
    def cancel(done: int, total: int) -> None:
        if done == total:
            raise Cancel

    path = place(ONE.files[0], tmp_path)
    with pytest.raises(Cancel):
        fetch([ONE], [tmp_path], cancel)
    assert not path.exists()
    assert fetch([ONE], [tmp_path], ignore) == [[path]]
    assert path.read_bytes() == WEIGHTS
    assert hub.sent == len(WEIGHTS)


def test_a_machine_set_up_for_hf_transfer_fetches_and_goes_on_all_the_same(
    tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
):
    """HF_HUB_ENABLE_HF_TRANSFER=1, which rented machines come with, whether that package is there or not."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_ENABLE_HF_TRANSFER", True, raising=False)
    monkeypatch.setitem(sys.modules, "hf_transfer", None)
    hub.cut_after = 10_000
    with pytest.raises(AnnotatorError, match=rf"10000 of {len(WEIGHTS)} bytes are here"):
        fetch([ONE], [tmp_path], ignore)
    hub.cut_after = None
    assert fetch([ONE], [tmp_path], ignore)[0][0].read_bytes() == WEIGHTS
    assert hub.ranges[0] == "bytes=0-"
    assert hub.ranges[-1] == "bytes=10000-"
    assert hub.sent == len(WEIGHTS)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_what_the_hubs_library_refuses_to_fetch_can_be_put_there_by_hand(
    tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
):
    from huggingface_hub import file_download

    def refuse(url: str, stream: io.BufferedRandom, **_: object) -> None:
        assert isinstance(stream.name, str)  # other ways of fetching than the library's own open it themselves
        raise kind("it is too large\nfor us")

    monkeypatch.setattr(file_download, "http_get", refuse)
    reason = rf"^it is too large \(0 of {len(WEIGHTS)} bytes are here; .*\): get .* from .* and put it into"
    with pytest.raises(AnnotatorError, match=reason):
        fetch([ONE], [tmp_path], ignore)


def test_bytes_that_are_not_the_promised_ones_do_not_stay(tmp_path: Path, hub: LoopbackHub):
    hub.garbled = True
    with pytest.raises(AnnotatorError, match="what came has another size or checksum"):
        fetch([ONE], [tmp_path], ignore)
    assert not any(p.is_file() for p in tmp_path.rglob("*"))
    hub.garbled = False
    assert fetch([ONE], [tmp_path], ignore)[0][0].read_bytes() == WEIGHTS


def test_a_part_of_another_version_is_not_gone_on_with(tmp_path: Path, hub: LoopbackHub):
    hub.cut_after = 10_000
    about = network(File(REPOSITORY, "tiny.safetensors", len(WEIGHTS)))
    with pytest.raises(AnnotatorError):
        fetch([about], [tmp_path], ignore)
    hub.cut_after = None
    changed = bytes(reversed(WEIGHTS))
    hub.files[f"{REPOSITORY}/tiny.safetensors"] = changed
    assert fetch([about], [tmp_path], ignore)[0][0].read_bytes() == changed
    assert hub.ranges[-1] == "bytes=0-"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            WEIGHTS[:-1],
            rf"the hub offers {len(WEIGHTS) - 1} bytes, where tiny.safetensors of .* has {len(WEIGHTS)}: get",
        ),
        (WEIGHTS[::-1], f"the hub offers a file with checksum [0-9a-f]*, where the published one has {SHA256}"),
    ],
    ids=["size", "checksum"],
)
def test_another_file_than_the_known_one_is_not_even_begun(tmp_path: Path, hub: LoopbackHub, data: bytes, said: str):
    hub.files[f"{REPOSITORY}/tiny.safetensors"] = data
    with pytest.raises(AnnotatorError, match=said):
        fetch([ONE], [tmp_path], ignore)
    assert hub.sent == 0
    assert not any(tmp_path.iterdir())


def test_a_file_that_is_not_there_is_named(tmp_path: Path, hub: LoopbackHub):
    hub.files.clear()
    folders = [tmp_path / "first", tmp_path / "second"]
    with pytest.raises(AnnotatorError) as caught:
        fetch([ONE], folders, ignore)
    assert str(caught.value) == (
        f"the hub answers 404: get {REPOSITORY}/tiny.safetensors (0.1 MB) from {hub.url} and put it into {folders[0]}, "
        "in the folders of its name"
    )


def test_one_sentence_names_all_that_is_missing_of_all_networks(tmp_path: Path, hub: LoopbackHub):
    put(place(TWO.files[0], tmp_path), SETTINGS)
    hub.close()
    large = network(File("else/where", "large.bin", 172_345_678))
    with pytest.raises(AnnotatorError) as caught:
        fetch([TWO, large], [tmp_path], ignore)
    assert str(caught.value) == (
        f"no connection: get {REPOSITORY}/sub/tiny.safetensors (0.1 MB), else/where/large.bin (172.3 MB) from "
        f"{hub.url} and put each into {tmp_path}, in the folders of its name"
    )


def test_offline_the_error_says_so_and_where_to_put_the_file(
    tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
):
    set_offline(monkeypatch, True)
    with pytest.raises(AnnotatorError, match=r"^no connection, for HF_HUB_OFFLINE is set: get .* and put it into"):
        fetch([ONE], [tmp_path], ignore)
    path = put(place(ONE.files[0], tmp_path), WEIGHTS)  # as the error told
    assert fetch([ONE], [tmp_path], no_server) == [[path]]
    assert hub.sent == 0


def test_no_server_is_an_error_with_the_reason(tmp_path: Path, hub: LoopbackHub):
    hub.close()
    with pytest.raises(AnnotatorError, match=r"^no connection: get .* from .* and put it into"):
        fetch([ONE], [tmp_path], ignore)


def test_a_full_disk_is_an_error_before_a_byte_comes(tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, len(WEIGHTS) - 1))
    with pytest.raises(AnnotatorError, match=rf"the disk is full: {len(WEIGHTS)} bytes are to come"):
        fetch([ONE], [tmp_path], ignore)
    assert hub.sent == 0


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, hub: LoopbackHub):
    put(tmp_path / "someone", b"a file where a folder should be")
    with pytest.raises(AnnotatorError, match=r"^\[?\w.*someone.* \(0 of \d+ bytes are here"):
        fetch([ONE], [tmp_path], ignore)


def test_another_file_at_its_place_is_never_overwritten(tmp_path: Path, hub: LoopbackHub):
    own = put(place(ONE.files[0], tmp_path), b"mine")
    with pytest.raises(
        AnnotatorError, match=r"tiny\.safetensors is 4 bytes, where .*: move it away, and the published"
    ):
        fetch([ONE], [tmp_path], ignore)
    assert own.read_bytes() == b"mine"
    assert hub.sent == 0


def test_nobodys_token_is_sent(tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch):
    """The files are public, and their store is another server than the hub."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch([TWO], [tmp_path], ignore)
    assert hub.seen_tokens == []


def test_the_environment_names_the_hub(tmp_path: Path, hub: LoopbackHub):
    """HF_ENDPOINT, as users of a mirror set it, in a process of its own."""
    code = f"""
import runpy
runpy.run_path({str(ROOT / "dev.py")!r})
from pathlib import Path
from zeroconv.annotators.fetching import fetch
from zeroconv.annotators.networks import File, Network
file = File({REPOSITORY!r}, "tiny.safetensors", {len(WEIGHTS)}, {SHA256!r})
print(*fetch([Network("tiny", "tiny:build", (file,), "MIT")], [Path({str(tmp_path)!r})], lambda done, total: None)[0])
"""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == WEIGHTS


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_is_sound():
    names = [entry.name for entry in NETWORKS]
    assert len(names) == len(set(names))
    wanted = {name for annotator in ANNOTATORS for name in annotator.networks}
    assert wanted == set(names), "every network has an annotator, every annotator its networks"
    for entry in NETWORKS:
        assert entry.files
        assert entry.licence
        for file in entry.files:
            assert file.repository.count("/") == 1
            assert file.size > 0
            assert file.sha256 is None or (len(file.sha256) == 64 and set(file.sha256) <= set("0123456789abcdef"))
        module, function = entry.build.split(":")
        assert callable(getattr(import_module(f".{module}", networks.__name__), function))


def test_defaults_are_free_to_use():
    """Whoever wants weights with a narrower licence asks for them by choosing; none is the only way to a hint."""
    assert all(entry.commercial for entry in NETWORKS)


def test_numpy_is_all_that_looking_for_files_imports():
    code = f"""
import runpy, sys
runpy.run_path({str(ROOT / "dev.py")!r})
import zeroconv.annotators.fetching, zeroconv.annotators.networks
print(sorted({{"torch", "huggingface_hub", "transformers", "cv2", "skimage", "scipy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("ConnectionError", r"^no connection: get "),
        ("SSLError", r"^certificate verify failed: get "),
        ("ProxyError", r"^certificate verify failed: get "),
    ],
)
def test_what_stands_between_is_said(
    tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, kind: str, said: str
):
    """A company's proxy has a cause that can be mended here; requests counts it among the connections that fail."""
    import huggingface_hub
    import requests

    def fails(*_: object, **__: object) -> None:
        raise getattr(requests.exceptions, kind)("certificate verify failed\nand more")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fails)
    with pytest.raises(AnnotatorError, match=said):
        fetch([ONE], [tmp_path], ignore)
