"""Folders as people keep them become items, and what cannot be used is told by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zeroconv.controlnet_core.data import pictures
from zeroconv.controlnet_core.data.sources import Item, SourceError, read

from .toy import array, save


def lines(path: Path, records: list, **how: str) -> None:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", **({"encoding": "utf-8"} | how))


def said(folder: Path) -> list[tuple]:
    """Of each item name, prompt, and where picture and hint lie in the folder."""
    return [
        (item.name, item.prompt, *(path and path.relative_to(folder).as_posix() for path in (item.picture, item.hint)))
        for item in read(folder).items
    ]


# -- pictures with captions -------------------------------------------------------------------------------------------


def test_captions_lie_beside_pictures_and_subfolders_count(tmp_path: Path):
    for name in ("b.png", "a.JPG", "more/c.webp", "._b.png", ".cache/d.png", "more/notes.md"):
        save(tmp_path / name, array(1)) if not name.endswith(".md") else (tmp_path / name).write_text("x")
    (tmp_path / "a.txt").write_bytes("\ufeffa caf\u00e9,\r\nby night \r\n".encode())
    (tmp_path / "more" / "c.txt").write_text("")
    assert read(tmp_path).layout == "pictures with captions"
    assert said(tmp_path) == [
        ("a.JPG", "a caf\u00e9, by night", "a.JPG", None),
        ("b.png", "", "b.png", None),
        ("more/c.webp", "", "more/c.webp", None),
    ]
    assert list(map(str, read(tmp_path).skipped)) == ["more/notes.md: neither a picture nor the caption of one"]


def test_hints_lie_in_a_folder_of_their_own_or_beside(tmp_path: Path):
    for name in ("a.jpg", "b.png", "c.png", "sub/a.png", "d.png"):
        save(tmp_path / name, array(1))
    for name in ("hints/a.png", "b_hint.jpg", "Conditioning/c.webp", "sub/hints/a.png", "hints/none.png"):
        save(tmp_path / name, array(2))
    assert [(name, hint) for name, _, _, hint in said(tmp_path)] == [
        ("a.jpg", "hints/a.png"),
        ("b.png", "b_hint.jpg"),
        ("c.png", "Conditioning/c.webp"),
        ("d.png", None),
        ("sub/a.png", "sub/hints/a.png"),
    ]
    (skipped,) = read(tmp_path).skipped
    assert str(skipped) == "hints/none.png: a hint without picture: expected one of the same name"


FOLDERS = [
    ("images", "conditioning_images"),
    ("Images", "Conditioning"),
    ("target", "source"),
    ("targets", "sources"),
    ("images", "hints"),
    ("train/images", "train/hints"),
    ("pictures", "control"),
]


@pytest.mark.parametrize(("pictures", "hints"), FOLDERS)
def test_hints_of_a_folder_beside_the_pictures_are_never_pictures(tmp_path: Path, pictures: str, hints: str):
    save(tmp_path / pictures / "a.png", array(1))
    save(tmp_path / hints / "a.jpg", array(2))
    (tmp_path / pictures / "a.caption").write_text("a cat")
    assert said(tmp_path) == [(f"{pictures}/a.png", "a cat", f"{pictures}/a.png", f"{hints}/a.jpg")]
    assert read(tmp_path).skipped == ()


def test_a_folder_source_holds_pictures_where_no_target_is_beside_it(tmp_path: Path):
    save(tmp_path / "source" / "a.png", array(1))
    assert said(tmp_path) == [("source/a.png", "", "source/a.png", None)]


def test_any_picture_that_pillow_opens_is_read_and_any_other_is_named(tmp_path: Path):
    names = ("a.jfif", "b.gif", "c.tga", "d.JPE", "e.jp2")
    for name in names:
        Image.fromarray(array(1)).save(tmp_path / name, "JPEG" if name[-3:] in ("fif", "JPE") else None)
    (tmp_path / "f.heic").write_bytes(b"x")
    save(tmp_path / "g.png", array(1))
    save(tmp_path / "hints" / "g.png", array(1))
    (tmp_path / "hints" / "g.png").rename(tmp_path / "hints" / "g.jxl")
    assert [item.name for item in read(tmp_path).items] == list(names)
    assert all(pictures.read(tmp_path / name).size == (64, 64) for name in names)
    assert list(map(str, read(tmp_path).skipped)) == [
        "f.heic: this Pillow reads no .heic: save it as .png",
        "g.png: this Pillow reads no .jxl, as its hint is: save it as .png",
    ]


def test_captions_have_either_suffix_in_any_case(tmp_path: Path):
    for name in "abc":
        save(tmp_path / f"{name}.png", array(1))
    for name, text in {"a.TXT": "one", "b.Caption": "two", "c.txt": "three", "c.caption": "four", "d.txt": "x"}.items():
        (tmp_path / name).write_text(text)
    assert [item.prompt for item in read(tmp_path).items] == ["one", "two", "three"]
    assert list(map(str, read(tmp_path).skipped)) == [
        "c.caption: c.txt is the caption of c.png already",
        "d.txt: a caption without picture: expected one of the same name",
    ]


def test_pictures_of_one_name_get_no_hint_or_caption_by_guess(tmp_path: Path):
    for name in ("0.png", "0.jpg", "1.png", "1.jpg", "2.png", "3.png"):
        save(tmp_path / name, array(1))
    (tmp_path / "0.txt").write_text("whose?")
    for name in ("hints/2.png", "2_hint.png", "hints/3.png"):
        save(tmp_path / name, array(2))
    assert [(item.name, item.hint is not None) for item in read(tmp_path).items] == [
        *(("1.jpg", False), ("1.png", False), ("3.png", True))
    ]
    several = "caption or hint may be of 0.jpg and 0.png: give each a name of its own"
    assert list(map(str, read(tmp_path).skipped)) == [
        *(f"0.jpg: {several}", f"0.png: {several}"),
        "2.png: its hint may be 2_hint.png and hints/2.png: leave one",
    ]


def test_a_caption_that_is_no_utf8_skips_its_picture(tmp_path: Path):
    save(tmp_path / "a.png", array(1))
    save(tmp_path / "b.png", array(1))
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    found = read(tmp_path)
    assert [item.name for item in found.items] == ["b.png"]
    (skipped,) = found.skipped
    assert skipped.name == "a.png"
    assert "a.txt cannot be read" in skipped.reason and "save it as UTF-8" in skipped.reason


# -- lists ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Three pictures in target/, three hints in source/."""
    for i in range(3):
        save(tmp_path / "target" / f"{i}.png", array(i))
        save(tmp_path / "source" / f"{i}.png", array(10 + i))
    return tmp_path


EXPECTED = [(f"target/{i}.png", f"prompt {i}", f"target/{i}.png", f"source/{i}.png") for i in range(3)]


def fill50k(slash: str = "/") -> list[dict]:
    return [
        {"source": f"source{slash}{i}.png", "target": f"target{slash}{i}.png", "prompt": f"prompt {i}"}
        for i in range(3)
    ]


def test_fill50k(three: Path):
    lines(three / "prompt.json", fill50k())
    assert read(three).layout == "fill50k"
    assert said(three) == EXPECTED


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("slash", ["/", "\\"])
def test_lists_from_windows(three: Path, slash: str, newline: str):
    lines(three / "prompt.json", fill50k(slash), encoding="utf-8-sig", newline=newline)
    assert said(three) == EXPECTED


def test_a_list_in_one_piece(three: Path):
    (three / "prompt.json").write_text(json.dumps(fill50k(), indent=2))
    assert said(three) == EXPECTED


@pytest.mark.parametrize(
    "keys", [("image", "text", "hint"), ("file_name", "caption", "conditioning_image"), ("target", "prompt", "source")]
)
def test_json_lines_of_any_name(three: Path, keys: tuple[str, str, str]):
    lines(
        three / "my data.jsonl",
        [dict(zip(keys, (f"target/{i}.png", f"prompt {i}", f"source/{i}.png"))) for i in range(3)],
    )
    assert read(three).layout == "JSON lines"
    assert said(three) == EXPECTED


def test_image_folder_with_json_lines(three: Path):
    lines(
        three / "metadata.jsonl",
        [
            {"file_name": f"target/{i}.png", "text": f"prompt {i}", "conditioning_image_file_name": f"source/{i}.png"}
            for i in range(3)
        ],
    )
    assert read(three).layout == "a Hugging Face image folder"
    assert said(three) == EXPECTED


def test_image_folder_with_a_table_in_a_subfolder(three: Path):
    (three / "train").mkdir()
    rows = [f'../target/{i}.png,"prompt ""{i}"", quoted",../source/{i}.png' for i in range(3)]
    text = "\r\n".join(["file_name,text,conditioning_image", *rows, ""])
    (three / "train" / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = read(three)
    assert found.layout == "a Hugging Face image folder"
    assert [item.prompt for item in found.items] == [f'prompt "{i}", quoted' for i in range(3)]
    assert all(item.picture.samefile(three / "target" / f"{i}.png") for i, item in enumerate(found.items))
    assert all(item.hint.samefile(three / "source" / f"{i}.png") for i, item in enumerate(found.items))


def test_splits_of_an_image_folder_are_all_read(tmp_path: Path):
    for split in ("train", "validation"):
        save(tmp_path / split / "a.png", array(1))
        lines(tmp_path / split / "metadata.jsonl", [{"file_name": "a.png", "text": split}])
    assert said(tmp_path) == [
        ("train/a.png", "train", "train/a.png", None),
        ("validation/a.png", "validation", "validation/a.png", None),
    ]


def test_one_picture_with_two_prompts_is_two_items(three: Path):
    lines(three / "a.jsonl", [{"image": "target/0.png", "text": "one"}, {"image": "target/0.png", "text": "two"}])
    assert [(name, prompt) for name, prompt, *_ in said(three)] == [("target/0.png", "one"), ("target/0.png #2", "two")]


def test_prompts_are_one_line_of_whole_letters(three: Path):
    (three / "a.jsonl").write_text('{"image": "target/0.png", "text": " one\\n two\\u00e9\\ud83d three "}')
    assert [prompt for _, prompt, *_ in said(three)] == ["one two\u00e9? three"]


def test_a_list_names_no_file_outside_of_its_folder(three: Path, tmp_path: Path):
    secret = three.parent / f"{three.name} secret.png"
    save(secret, array(3))
    (three / "link.png").symlink_to(secret)
    ways_out = [str(secret), f"../{secret.name}", f"target/../../{secret.name}", "link.png"]
    good = {"image": "target/0.png", "text": "good"}
    lines(
        three / "list.jsonl",
        [good, *({"image": way} for way in ways_out), {"image": "target/1.png", "hint": ways_out[0]}],
    )
    found = read(three)
    assert [item.name for item in found.items] == ["target/0.png"]
    assert len(found.skipped) == 5
    assert all("lies outside of" in skipped.reason for skipped in found.skipped)


def test_bad_lines_are_told_and_the_rest_is_read(three: Path):
    good = {"image": "target/0.png", "text": "good"}
    records = [
        json.dumps(good),
        '{"image": "target/1.png"',
        json.dumps(["target/1.png"]),
        json.dumps({"text": "no picture"}),
        json.dumps({"image": 5, "text": "a number"}),
        json.dumps({"image": "target/1.png", "text": ["two", "captions"]}),
        json.dumps({"image": "target/9.png", "text": "missing"}),
        json.dumps({"image": "target/1.png", "hint": "source/9.png"}),
        json.dumps({"image": "long" * 1000}),
        "",
        json.dumps({"image": "target/1.png", "text": None}),
    ]
    (three / "list.jsonl").write_text("\n".join(records))
    found = read(three)
    assert [(item.name, item.prompt) for item in found.items] == [("target/0.png", "good"), ("target/1.png", "")]
    reasons = {skipped.name: skipped.reason for skipped in found.skipped}
    expected = {
        2: "this line is no JSON",
        3: "expected names and values, found ['target/1.png']",
        4: "it names no picture: expected one of file_name, image, target",
        5: "its image is 5: expected a text",
        6: "its text is ['two', 'captions']: expected a text",
        7: f"there is no file {three / 'target' / '9.png'}",
        8: f"there is no file {three / 'source' / '9.png'}",
        9: f"there is no file {three / ('long' * 1000)}",
    }
    assert list(reasons) == [f"list.jsonl, item {number}" for number in expected]
    for number, reason in expected.items():
        assert reasons[f"list.jsonl, item {number}"].startswith(reason)


def test_a_list_that_is_no_text_is_told(three: Path):
    (three / "a.jsonl").write_bytes(b"\xff\xfe" + json.dumps({"image": "target/0.png"}).encode("utf-16-le"))
    lines(three / "b.jsonl", [{"image": "target/0.png"}])
    found = read(three)
    assert len(found.items) == 1
    assert found.skipped[0].name == "a.jsonl"
    assert "save it as UTF-8" in found.skipped[0].reason


# -- nothing to train on ----------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(SourceError, match="there is no folder .*none: give the whole path"):
        read(tmp_path / "none")


def test_a_folder_without_pictures_says_what_is_read_and_what_was_found(tmp_path: Path):
    for name in ("a.mp4", "b.mp4", "c.zip"):
        (tmp_path / name).touch()
    with pytest.raises(SourceError) as error:
        read(tmp_path)
    assert "holds 2 .mp4, 1 .zip: expected one of: prompt.json with lines of source" in str(error.value)
    for word in ("metadata.jsonl", "*.jsonl", "cat_hint.png"):
        assert word in str(error.value)


def test_a_list_of_which_nothing_can_be_used_says_why(three: Path):
    lines(three / "prompt.json", [{"source": "s.png", "target": "t.png", "prompt": "p"}] * 5)
    with pytest.raises(
        SourceError, match=r"read as fill50k, and none of its 5 items can be used: prompt.json, item 1: "
    ):
        read(three)


# -- stamps -----------------------------------------------------------------------------------------------------------


def test_a_stamp_changes_with_picture_hint_and_prompt_alone(tmp_path: Path):
    picture, hint = save(tmp_path / "a.png", array(1)), save(tmp_path / "h.png", array(2))
    item = Item("a", picture, "prompt", hint)
    stamps = {item.stamp, Item("a", picture, "other", hint).stamp, Item("a", picture, "prompt").stamp}
    assert len(stamps) == 3
    assert Item("b", picture, "prompt", hint).stamp == item.stamp
    before = item.stamp
    os.utime(picture, ns=(1, 1))
    assert item.stamp != before
    with pytest.raises(OSError):
        Item("a", tmp_path / "none.png").stamp  # noqa: B018


def test_pictures_in_memory_are_told_by_their_numbers():
    assert Item("a", array(1)).stamp == Item("a", array(1)).stamp
    assert Item("a", array(1)).stamp != Item("a", array(2)).stamp
    assert Item("a", array(1)).stamp != Item("a", array(1).reshape(32, 128, 3)).stamp
    assert Item("a", array(1), hint=array(1)).stamp != Item("a", array(1)).stamp
    assert Item("a", np.asfortranarray(array(1))).stamp == Item("a", array(1)).stamp
