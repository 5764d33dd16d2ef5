"""Any picture becomes 8-bit RGB of a bucket's size, and its hint is cut at the same place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zeroconv.controlnet_core.data.pictures import Crop, PictureError, bucket, buckets, hint_of, read, size_of

from .toy import array, save


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [
        ((512, 512), 512, (512, 512)),
        ((4000, 3000), 512, (576, 448)),
        ((3000, 4000), 512, (448, 576)),
        ((1920, 1080), 512, (640, 384)),
        ((100, 3000), 512, (256, 1024)),
        ((1024, 1024), 1024, (1024, 1024)),
        ((1920, 1080), 1024, (1344, 768)),
        ((128, 128), 128, (128, 128)),
        ((160, 96), 128, (160, 96)),
        ((300, 300), 500, (512, 512)),  # of 32: 500 is rounded to a multiple
        ((40, 30), 8, (8, 8)),
    ],
)
def test_buckets_written_out(size: tuple[int, int], resolution: int, expected: tuple[int, int]):
    assert bucket(*size, resolution) == expected


@pytest.mark.parametrize(("resolution", "multiple"), [(64, 8), (128, 16), (256, 32), (512, 64), (768, 64), (1024, 64)])
def test_buckets_have_the_squares_area_and_even_sides(resolution: int, multiple: int):
    found = buckets(resolution)
    assert (resolution, resolution) in found
    assert len(set(found)) == len(found) >= 7
    for width, height in found:
        assert width % multiple == height % multiple == 0
        assert 0.75 * resolution**2 <= width * height <= resolution**2
        assert max(width, height) <= 4 * min(width, height)
        assert (height, width) in found


def test_picture_and_hint_are_cut_at_the_same_place():
    """Of a picture of 120x40 squares and its hint of half the size the same squares stay."""
    picture = array(1, 320, 960)
    crop = Crop((960, 320), (640, 320))
    assert crop.sizes == (320, 960, 0, 160, 320, 640)
    cut = crop.of(Image.fromarray(picture), Image.Resampling.LANCZOS)
    assert np.array_equal(cut, picture[:, 160:800])
    small = picture[::2, ::2]
    hint = hint_of(small, crop)
    assert np.array_equal(hint, picture[:, 160:800])  # the nearest pixel where it grows: no colour that was not there


def test_pictures_are_resized_to_cover_and_cropped_at_the_centre():
    picture = np.zeros((200, 400, 3), np.uint8)
    picture[:, 190:210] = 255
    cut = Crop((400, 200), (64, 128)).of(Image.fromarray(picture), Image.Resampling.BOX)
    assert cut.shape == (128, 64, 3)
    # scaled by 0.64, the white stripe is 12.8 pixels wide around column 32
    assert cut[:, 27:37].min() == 255
    assert cut[:, :25].max() == cut[:, 39:].max() == 0
    assert np.array_equal(cut, cut[:, ::-1])


def test_thin_lines_of_a_hint_stay_when_it_is_made_smaller():
    hint = np.zeros((512, 512, 3), np.uint8)
    hint[:, ::8] = 255
    small = hint_of(hint, Crop((512, 512), (64, 64)))
    assert (small == round(255 / 8)).all()


def test_a_hint_of_another_shape_is_refused():
    with pytest.raises(PictureError, match="its hint is 64x32, the picture 100x100: they must show the same"):
        hint_of(array(1, 32, 64), Crop((100, 100), (64, 64)))
    hint_of(array(1, 64, 64), Crop((101, 100), (64, 64)))  # a pixel is rounding


def test_only_pictures_smaller_than_their_bucket_grow():
    assert Crop((100, 100), (64, 64)).scale == 0.64
    assert Crop((32, 64), (64, 64)).scale == 2


# -- kinds of files ---------------------------------------------------------------------------------------------------


def pixels(path: Path) -> np.ndarray:
    found = read(path)
    assert found.mode == "RGB"
    assert size_of(path) == found.size
    return np.asarray(found)


def test_transparency_is_on_white(tmp_path: Path):
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[:, 4:] = (200, 0, 0, 255)
    found = pixels(save(tmp_path / "a.png", picture))
    assert (found[:, :4] == 255).all()
    assert (found[:, 4:] == (200, 0, 0)).all()
    palette = Image.fromarray(picture[..., :3]).convert("P", palette=Image.Palette.ADAPTIVE)
    index = palette.getpixel((0, 0))
    palette.save(tmp_path / "p.png", transparency=index)
    assert (pixels(tmp_path / "p.png") == found).all()


def test_sixteen_bits_keep_their_range(tmp_path: Path):
    grey = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    found = pixels(save(tmp_path / "depth.png", grey))
    assert np.array_equal(found[..., 0], np.rint(grey / 257).astype(np.uint8))
    assert (found == found[..., :1]).all()
    assert np.array_equal(pixels(save(tmp_path / "depth.tiff", grey)), found)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA"])
def test_other_modes_are_read(tmp_path: Path, mode: str):
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    Image.fromarray(np.repeat(array(1)[:, :, :1], 3, axis=2)).convert(mode).save(path)
    assert pixels(path).shape == (64, 64, 3)


def test_a_camera_held_upright_gives_an_upright_picture(tmp_path: Path):
    picture = array(1, 64, 96)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise to see it
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "a.png"), np.rot90(picture, -1))


def test_floating_point_pictures_are_refused(tmp_path: Path):
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(PictureError, match=r"a.tiff holds floating-point numbers: save it with 8 bits"):
        read(tmp_path / "a.tiff")


def test_damaged_files_are_refused_by_name(tmp_path: Path):
    whole = save(tmp_path / "a.png", array(1)).read_bytes()
    for name, data in {"empty.png": b"", "text.jpg": b"<html>", "half.png": whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(PictureError, match=f"{name} cannot be read as a picture"):
            read(tmp_path / name)
    with pytest.raises(PictureError, match="none.png cannot be read"):
        size_of(tmp_path / "none.png")


def test_the_array_stays_as_it_is():
    picture = array(1, 64, 128)
    before = picture.copy()
    Crop((128, 64), (64, 64)).of(read(picture), Image.Resampling.LANCZOS)[:] = 0
    assert np.array_equal(picture, before)


def test_a_file_that_would_start_a_program_is_no_picture_whatever_it_is_called(tmp_path: Path):
    """Pillow gives EPS to Ghostscript, which is a program of its own."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    for look in (read, size_of):
        with pytest.raises(PictureError, match="a.png cannot be read as a picture"):
            look(tmp_path / "a.png")
