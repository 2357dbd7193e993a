"""Limits are checked before pixels, big JPEGs are decoded small, and errors name the file."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from awkward import AWKWARD, REFUSED, SRGB_PROFILE, WIDE_SPACES, encoded, heic, scene, textured
from PIL import Image, ImageFile
from PIL.WebPImagePlugin import WebPImageFile
from standin import PREPROCESS

from finetune.bundle.image import decode_image, header_size, image_size
from finetune.bundle.image_formats import FORMATS, looks_like_image, sniff
from finetune.bundle.image_limits import ImageLimits
from finetune.errors import ImageError, ImageTooLarge, UnsupportedImage


@pytest.mark.parametrize(
    ("short_side_px", "expected"), [(None, 768), (768, 768), (385, 768), (384, 384), (200, 384), (192, 192), (96, 96), (1, 96)]
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_is_not_below_what_is_asked(
    short_side_px: int | None, expected: int
) -> None:
    data = encoded(textured(1024, 768), "JPEG")
    assert decode_image(data, short_side_px=short_side_px).shape == (expected, expected * 1024 // 768, 3)


def test_formats_without_reduced_scales_are_decoded_whole() -> None:
    assert decode_image(encoded(scene(), "PNG"), short_side_px=1).shape == (64, 96, 3)


def test_more_bytes_than_allowed_are_refused_before_they_are_read(tmp_path: Path) -> None:
    data = encoded(scene(), "PNG")
    path = tmp_path / "big.png"
    path.write_bytes(data)
    limits = ImageLimits(max_bytes=len(data) - 1)
    with pytest.raises(ImageTooLarge, match=f"the file has {len(data):,} bytes, more than the {len(data) - 1:,} allowed"):
        decode_image(data, limits=limits)
    with pytest.raises(ImageTooLarge, match=r"big\.png: the file has"):
        PREPROCESS.load_file(path, limits=limits)
    assert decode_image(data, limits=ImageLimits(max_bytes=len(data))).shape == (64, 96, 3)


def test_the_pixel_limit_is_ours_and_not_pillows(recwarn: pytest.WarningsRecorder) -> None:
    data = encoded(Image.new("1", (10_000, 9_500)), "PNG")  # 95 MP: over Pillow's own warning, under our limit
    assert image_size(data) == (10_000, 9_500)
    with pytest.raises(ImageTooLarge, match="10000×9500 = 95,000,000 pixels, more than the 94,999,999 allowed"):
        decode_image(data, limits=ImageLimits(max_pixels=94_999_999))
    assert not recwarn.list


@pytest.mark.parametrize("name", [name for name in REFUSED if name.startswith("bomb_")])
def test_a_bomb_is_refused_before_any_pixel_is_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(_: ImageFile.ImageFile) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    monkeypatch.setattr(WebPImageFile, "load", decode)
    with pytest.raises(ImageTooLarge):
        decode_image(AWKWARD[name][0])
    with pytest.raises(AssertionError, match="pixels were decoded"):
        decode_image(AWKWARD["plain.webp"][0])


def test_errors_of_a_file_name_it_and_keep_their_kind(tmp_path: Path) -> None:
    for name, kind in (("truncated.jpg", ImageError), ("float.tiff", UnsupportedImage), ("bomb_30k.png", ImageTooLarge)):
        path = tmp_path / name
        path.write_bytes(AWKWARD[name][0])
        with pytest.raises(kind) as caught:
            PREPROCESS.load_file(path)
        assert type(caught.value) is kind
        assert caught.value.message.startswith(f"{path}: ")


def test_a_file_that_cannot_be_read_is_an_image_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent\.jpg: the file cannot be read: No such file or directory"):
        PREPROCESS.load_file(tmp_path / "absent.jpg")
    with pytest.raises(ImageError, match="the file cannot be read: Is a directory"):
        PREPROCESS.load_file(tmp_path)


def test_the_kind_of_a_file_is_told_by_its_first_bytes() -> None:
    kinds = {sniff(heic(scene()) if format == "HEIF" else encoded(scene(), format)) for format in FORMATS}
    assert kinds == set(FORMATS)
    with pytest.raises(UnsupportedImage, match="JPEG, PNG, WebP, HEIC, AVIF, BMP, GIF and TIFF are read"):
        sniff(b"")


def test_the_array_belongs_to_the_caller() -> None:
    rgb = decode_image(encoded(scene(), "PNG"))
    rgb[:] = 0
    assert rgb.flags.c_contiguous
    assert not np.any(rgb)


# ---- files that cost far more than their size --------------------------------------------------------------------------------


def jpeg(width: int, height: int, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(stream, "JPEG", **options)
    return stream.getvalue()


def test_a_large_jpeg_is_read_at_a_reduced_scale_and_the_limit_is_on_pixels_that_are_decoded() -> None:
    limits = ImageLimits(max_pixels=100_000)
    data = jpeg(800, 600)
    assert decode_image(data, short_side_px=100, limits=limits).shape == (150, 200, 3)
    assert image_size(data, limits=limits) == (800, 600)
    for short_side_px in (None, 400):  # all of it, or more of it than is allowed
        with pytest.raises(ImageTooLarge, match="800×600 = 480,000 pixels"):
            decode_image(data, short_side_px=short_side_px, limits=limits)
    with pytest.raises(ImageTooLarge, match="more work than is allowed"):
        decode_image(data, short_side_px=100, limits=ImageLimits(max_pixels=100_000, max_file_pixels=400_000))
    with pytest.raises(ImageTooLarge, match="800×600 = 480,000 pixels"):  # its coefficients are all held in memory
        decode_image(jpeg(800, 600, progressive=True), short_side_px=100, limits=limits)


def test_a_jpeg_of_a_thousand_scans_is_refused_before_it_is_decoded() -> None:
    data = jpeg(1200, 1200, progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(ImageTooLarge, match=r"1200×1200 pixels in [\d,]+ scans"):
        decode_image(data[:-2] + last_scan * 1000 + data[-2:])
    assert decode_image(data).shape == (1200, 1200, 3)


def tiff(*entries: tuple[int, int, int, int]) -> bytes:
    """A little-endian TIFF of 8×8 grey pixels with these (tag, type, count, value) entries over the usual ones."""
    usual = {
        256: (3, 1, 8),
        257: (3, 1, 8),
        258: (3, 1, 8),
        259: (3, 1, 1),
        262: (3, 1, 1),
        273: (4, 1, 8),
        277: (3, 1, 1),
        279: (4, 1, 64),
    }
    usual |= {tag: (kind, count, value) for tag, kind, count, value in entries}
    directory = b"".join(struct.pack("<HHII", tag, *usual[tag]) for tag in sorted(usual))
    head = struct.pack("<2sHI", b"II", 42, 8 + 64)
    return head + bytes(range(64)) + struct.pack("<H", len(usual)) + directory + bytes(4)


def test_a_tiff_whose_tiles_are_far_larger_than_its_picture_is_refused_before_it_is_decoded() -> None:
    assert decode_image(tiff()).shape == (8, 8, 3)
    with pytest.raises(ImageTooLarge, match="8×8 pixels in tiles of 8000×60000"):
        decode_image(tiff((322, 3, 1, 8000), (323, 3, 1, 60000)))
    with pytest.raises(ImageTooLarge, match="8×8 pixels in tiles of 8000×60000"):  # libtiff takes the strip's rows for a length
        decode_image(tiff((322, 3, 1, 8000), (278, 3, 1, 60000)))


def test_numbers_in_a_tiff_that_are_too_large_for_the_machine_are_damage() -> None:
    big = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16 + 64) + bytes(range(64))
    entries = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 2**64 - 1, 277: 1, 279: 64}
    big += (
        struct.pack("<Q", len(entries))
        + b"".join(struct.pack("<HHQQ", tag, 16, 1, entries[tag]) for tag in sorted(entries))
        + bytes(8)
    )
    with pytest.raises(ImageError, match="damaged"):
        decode_image(big)
    palette = struct.pack("<768I", *[2**32 - 1] * 768)
    with pytest.raises(ImageError, match="damaged"):
        decode_image(tiff((262, 3, 1, 3), (320, 4, 768, 8 + 64 + 2 + 12 * 9 + 4)) + palette)


def test_a_very_large_grey_png_is_averaged_down_before_it_becomes_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.linspace(0, 65_535, 900 * 1000).reshape(900, 1000).astype(np.uint16)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    whole = decode_image(stream.getvalue())
    monkeypatch.setattr("finetune.bundle.image._LARGE_PIXELS", 1)
    small = decode_image(stream.getvalue(), short_side_px=100)
    assert small.shape == (225, 250, 3)
    blocks = whole.reshape(225, 4, 250, 4, 3).mean(axis=(1, 3))
    assert np.abs(small - blocks).max() <= 1.0


def test_a_file_with_the_profile_of_srgb_keeps_its_pixels_bit_for_bit() -> None:
    for image in (textured(96, 64), textured(96, 64).convert("L")):
        plain, tagged = encoded(image, "PNG"), encoded(image, "PNG", icc_profile=SRGB_PROFILE)
        assert plain != tagged
        np.testing.assert_array_equal(decode_image(tagged), decode_image(plain))


def test_a_profile_that_is_too_large_or_damaged_is_left_aside() -> None:
    profile = WIDE_SPACES["adobe_rgb"].profile()
    plain = decode_image(encoded(scene(), "PNG"))
    for broken in (profile[:200], profile[:36] + b"nope" + profile[40:], profile + bytes(5_000_000)):
        np.testing.assert_array_equal(decode_image(encoded(scene(), "TIFF", icc_profile=broken)), plain)


def test_every_colour_of_a_wide_space_comes_out_as_its_definition_says() -> None:
    """Against the formulas, over colours that sRGB can show; the library that converts has no part in what is expected."""
    colours = np.random.default_rng(3).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    for name, space in WIDE_SPACES.items():
        given, shown = space.of_srgb(colours)
        rgb = decode_image(encoded(Image.fromarray(given), "PNG", icc_profile=space.profile()))
        differences = np.abs(rgb.astype(int) - shown)
        assert differences.max() <= 6, name
        assert differences.mean() < 1.0, name


@pytest.mark.parametrize(
    ("head", "is_image"),
    [
        (encoded(scene(), "PNG")[:256], True),
        (b"\r\n" + encoded(scene(), "JPEG")[:200], True),
        (heic(scene())[:64], True),
        (encoded(scene(), "BMP")[:32], True),
        (b"BMW and other makers of cars", False),
        (b"file_name,label\n1.jpg,cat\n", False),
        (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", False),
        (b"", False),
    ],
)
def test_a_file_without_an_ending_is_known_by_its_first_bytes(head: bytes, is_image: bool) -> None:
    assert looks_like_image(head) is is_image


def _directory(*entries: tuple[int, int, int]) -> bytes:
    """Return a TIFF without pixels, with one directory of these tags: number, type, value."""
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 0)


@pytest.mark.parametrize(
    "data",
    [
        b"II*\0\x10\0\0\0CR\x02\0" + bytes(100),
        b"IIRO\x08\0\0\0" + bytes(100),
        b"IIU\0" + bytes(100),
        b"FUJIFILMCCD-RAW 0201" + bytes(100),
        b"\0\0\0\x18ftypcrx \0\0\0\x01crx isom" + bytes(100),
        _directory((254, 4, 1), (330, 4, 8)),
        _directory((50706, 1, 4)),
        _directory((262, 3, 32803)),
    ],
    ids=["cr2", "orf", "rw2", "raf", "cr3", "nef", "dng", "sensor"],
)
def test_raw_files_of_cameras_are_named_with_what_to_do(data: bytes) -> None:
    for read in (decode_image, header_size):
        with pytest.raises(UnsupportedImage, match=r"raw file of a camera .*: export it as JPEG"):
            read(data)
