"""Limits are checked before pixels, big JPEGs are decoded small, and errors name the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from awkward import AWKWARD, REFUSED, encoded, scene, textured
from PIL import Image, ImageFile
from PIL.WebPImagePlugin import WebPImageFile

from finetune.bundle.image import FORMATS, ImageLimits, decode_image, image_size, read_image, sniff
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
        read_image(path, limits=limits)
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
            read_image(path)
        assert type(caught.value) is kind
        assert caught.value.message.startswith(f"{path}: ")


def test_a_file_that_cannot_be_read_is_an_image_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent\.jpg: the file cannot be read: No such file or directory"):
        read_image(tmp_path / "absent.jpg")
    with pytest.raises(ImageError, match="the file cannot be read: Is a directory"):
        read_image(tmp_path)


def test_the_kind_of_a_file_is_told_by_its_first_bytes() -> None:
    kinds = {sniff(encoded(scene(), format)) for format in FORMATS}
    assert kinds == set(FORMATS)
    with pytest.raises(UnsupportedImage, match="JPEG, PNG, WebP, BMP, GIF and TIFF are read"):
        sniff(b"")


def test_the_array_belongs_to_the_caller() -> None:
    rgb = decode_image(encoded(scene(), "PNG"))
    rgb[:] = 0
    assert rgb.flags.c_contiguous
    assert not np.any(rgb)
