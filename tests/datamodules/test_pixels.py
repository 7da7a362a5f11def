"""What is read from image files, against what a viewer shows of them."""

import numpy as np
import pytest
from PIL import Image

from fdl.datamodules.files import decode_image
from fdl.datamodules.pixels import PLAIN, Reading, colour, white
from fdl.errors import UserError

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
GREY[0, :2] = 0, 255


def read(image, path, channels=3, reading=PLAIN, **options):
    image.save(path, **options)
    return decode_image(path, 8, channels, reading).transpose(1, 2, 0)


def test_what_is_transparent_shows_the_background_and_not_what_it_hides(tmp_path):
    alpha = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
    alpha[:3], alpha[5:] = 0, 255
    image = Image.fromarray(np.dstack([COLOURS, alpha]))
    share = alpha[..., None] / 255
    for background in ((255, 255, 255), (0, 0, 0), (200, 30, 90)):
        expected = COLOURS * share + np.array(background) * (1 - share)
        got = read(image, tmp_path / "photo.png", reading=Reading(background))
        assert np.abs(got - expected).max() <= 1  # Porter and Duff's "over", in whole numbers


def test_an_icon_that_is_drawn_by_transparency_alone(tmp_path):
    image = Image.fromarray(np.dstack([np.zeros((8, 8, 3), np.uint8), GREY]))
    np.testing.assert_array_equal(read(image, tmp_path / "icon.png", 1)[..., 0], 255 - GREY)
    np.testing.assert_array_equal(read(image, tmp_path / "icon.webp", 1, lossless=True)[..., 0], 255 - GREY)


def test_transparency_of_palettes_of_greyscale_and_of_one_colour(tmp_path):
    palette = Image.fromarray((np.arange(64).reshape(8, 8) % 4).astype(np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    got = read(palette, tmp_path / "palette.png", transparency=1)
    table = np.array([[0, 0, 0], [255, 255, 255], [0, 255, 0], [0, 0, 255]])
    np.testing.assert_array_equal(got, table[np.arange(64).reshape(8, 8) % 4])
    grey = Image.fromarray(GREY).convert("LA")
    grey.putalpha(Image.fromarray(np.repeat(np.uint8([[0], [255]]), 32).reshape(8, 8)))
    got = read(grey, tmp_path / "grey.png", 1)[..., 0]
    assert (got[:4] == 255).all()
    np.testing.assert_array_equal(got[4:], GREY[4:])
    pixels = COLOURS.copy()
    pixels[0, 0] = pixels[7, 7] = 1, 2, 3
    got = read(Image.fromarray(pixels), tmp_path / "one.png", transparency=(1, 2, 3))
    assert (got[0, 0] == 255).all() and (got[7, 7] == 255).all()
    np.testing.assert_array_equal(got[1:7], pixels[1:7])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_photographs_are_upright(tmp_path, orientation, suffix):
    turned = {  # how a camera stores an image for each orientation, CIPA DC-008
        1: COLOURS,
        2: COLOURS[:, ::-1],
        3: COLOURS[::-1, ::-1],
        4: COLOURS[::-1],
        5: COLOURS.transpose(1, 0, 2),
        6: COLOURS.transpose(1, 0, 2)[::-1],
        7: COLOURS.transpose(1, 0, 2)[::-1, ::-1],
        8: COLOURS.transpose(1, 0, 2)[:, ::-1],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(turned[orientation]))
    np.testing.assert_array_equal(read(image, tmp_path / f"photo.{suffix}", exif=exif), COLOURS)


def test_damaged_exif_data_do_not_spoil_an_image(tmp_path):
    got = read(Image.fromarray(COLOURS), tmp_path / "photo.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(got, COLOURS)


@pytest.mark.parametrize(
    ("stored", "suffix", "tolerance"),
    [
        (GREY.astype(np.int32), "tif", 0),
        (GREY.astype(np.uint16) * 257, "png", 0),
        (GREY.astype(np.uint16) * 257, "tif", 0),
        (GREY.astype(np.uint16) * 16, "png", 1),
        (GREY.astype(np.uint16) * 4, "png", 1),
        (GREY.astype(">u2") * 257, "tif", 0),
        (GREY.astype(np.float32) / 255, "tif", 0),
        (GREY.astype(np.float32), "tif", 0),
    ],
    ids=["8 in 32 bits", "16", "16 tif", "12 in 16", "10 in 16", "big-endian", "0 to 1", "0 to 255"],
)
def test_greyscale_beyond_8_bits(tmp_path, stored, suffix, tolerance):
    got = read(Image.fromarray(stored), tmp_path / f"xray.{suffix}", 1)[..., 0].astype(int)
    assert np.abs(got - GREY).max() <= tolerance


def test_a_window_of_values(tmp_path):
    hounsfield = np.array([[-1024, -160], [40, 3000]], np.int32)
    Image.fromarray(hounsfield).save(tmp_path / "ct.tif")
    with pytest.raises(
        UserError, match=r"ct\.tif: has values from -1024 to 3000, .* set value_range .* \[-1024, 3000\]"
    ):
        decode_image(tmp_path / "ct.tif", 2, 1)
    got = decode_image(tmp_path / "ct.tif", 2, 1, Reading(integers=(-160, 240)))[0]
    np.testing.assert_array_equal(got, [[0, 0], [128, 255]])  # 200 of 400 is 127.5


def test_values_that_are_no_numbers(tmp_path):
    Image.fromarray(np.array([[0, np.nan], [1, 0]], np.float32)).save(tmp_path / "gap.tif")
    with pytest.raises(UserError, match=r"gap\.tif: holds values that are no finite numbers"):
        decode_image(tmp_path / "gap.tif", 2, 1)


@pytest.mark.parametrize(
    ("high", "whole", "expected"),
    [
        *[(0, True, 255), (200, True, 255), (256, True, 1023), (4080, True, 4095), (4096, True, 16383)],
        *[(65535, True, 65535), (0.2, False, 1), (1, False, 1), (200, False, 255)],
    ],
)
def test_white_by_the_largest_value(high, whole, expected):
    assert white(0, high, whole) == expected


@pytest.mark.parametrize(("low", "high", "whole"), [(0, 9, True), (0, 70_000, True), (0, 7.5, False), (-1, 1, False)])
def test_values_of_no_image(low, high, whole):
    with pytest.raises(UserError, match="set value_range"):
        white(low, high, whole)


def test_other_modes_are_as_pillow_shows_them(tmp_path):
    photo = Image.fromarray(COLOURS)
    for mode, suffix in (("CMYK", "jpg"), ("1", "png"), ("YCbCr", "jpg"), ("L", "bmp"), ("P", "gif"), ("RGB", "tga")):
        got = read(photo.convert(mode), tmp_path / f"{mode}.{suffix}")
        with Image.open(tmp_path / f"{mode}.{suffix}") as image:
            np.testing.assert_array_equal(got, np.asarray(image.convert("RGB")))


def test_names_of_colours():
    assert colour("white") == (255, 255, 255)
    assert colour("#102030") == (16, 32, 48)
    with pytest.raises(UserError, match="background must be the name of a colour, or #rrggbb; got 'whyte'"):
        colour("whyte")
