"""Limits on the size of an image, and checks that refuse what exceeds them before any pixel is decoded. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from finetune.errors import ImageError, ImageTooLarge

MIB = 1024 * 1024


@dataclass(frozen=True)
class ImageLimits:
    """Limits on the size of an image. They are checked from the headers, before any pixel is decoded.

    Args:
        max_pixels: of the decoded image. The file may have more if it is a baseline JPEG that is decoded at a reduced scale.
        max_file_pixels: of such a JPEG in the file.
        max_scan_pixels: pixels times scans of a JPEG, because decoding passes over all pixels once for each scan.
    """

    max_bytes: int = 64 * MIB
    max_pixels: int = 100_000_000
    max_side_px: int = 65_500
    max_file_pixels: int = 400_000_000
    max_scan_pixels: int = 1_200_000_000


DEFAULT_LIMITS = ImageLimits()
_ROWS_PER_STRIP, _TILE_WIDTH, _TILE_LENGTH = 278, 322, 323
_SMALL_TILE_PIXELS = 4 * 1024 * 1024  # a tile may be larger than its image up to this size; a tile is always decoded as a whole
_START_OF_SCAN = b"\xff\xda"  # cannot occur inside compressed data, where 0xff is followed by 0x00 or a restart marker


def check_bytes(size: int, limits: ImageLimits) -> None:
    """Check the size of a file.

    Raises:
        ImageTooLarge: it has more bytes than `limits` allow.
    """
    if size > limits.max_bytes:
        raise ImageTooLarge(f"the file has {size:,} bytes, more than the {limits.max_bytes:,} allowed. Make it smaller first")


def check_pixels(name: str, width: int, height: int, limits: ImageLimits) -> None:
    """Check the size of an image.

    Raises:
        ImageTooLarge: it has too many pixels, or too long a side.
    """
    if width * height > limits.max_pixels:
        raise ImageTooLarge(
            f"the {name} image is {width}×{height} = {width * height:,} pixels, more than the {limits.max_pixels:,} allowed."
            " Make it smaller first"
        )
    if max(width, height) > limits.max_side_px:
        raise ImageTooLarge(
            f"the {name} image is {width}×{height} pixels; a side may have {limits.max_side_px:,}. Make it smaller first"
        )


def check_scans(image: JpegImageFile, data: bytes, limits: ImageLimits) -> None:
    """Refuse a JPEG that takes far more time or memory to decode than its size suggests.

    Raises:
        ImageTooLarge: it has too many pixels, or too many pixels times scans.
    """
    width, height = image.size
    n_scans = max(1, data.count(_START_OF_SCAN))  # counts the few scans of embedded previews too
    progressive = "progressive" in image.info
    if progressive or n_scans > 250:  # the decoder keeps all coefficients in memory, whatever the scale
        check_pixels("JPEG", width, height, limits)
    if width * height > limits.max_file_pixels or width * height * n_scans > limits.max_scan_pixels:
        raise ImageTooLarge(
            f"the JPEG image is {width}×{height} pixels in {n_scans:,} scans, more work than is allowed. Save it again"
        )


def check_tiles(image: TiffImageFile) -> None:
    """Refuse a TIFF whose tiles are far larger than the image, because the decoder allocates a whole tile.

    Raises:
        ImageTooLarge: the tiles are too large.
        ImageError: the tiles have no valid size.
    """
    tags, (width, height) = image.tag_v2, image.size
    if _TILE_WIDTH not in tags and _TILE_LENGTH not in tags:
        return
    tile_width = tags.get(_TILE_WIDTH, width)
    tile_length = tags.get(_TILE_LENGTH, tags.get(_ROWS_PER_STRIP, height))
    if not isinstance(tile_width, int) or not isinstance(tile_length, int) or min(tile_width, tile_length) < 1:
        raise ImageError("the TIFF file is damaged: its tiles have no size. Export or download it again")
    if tile_width * tile_length > max(_SMALL_TILE_PIXELS, 4 * width * height):
        raise ImageTooLarge(
            f"the TIFF image is {width}×{height} pixels in tiles of {tile_width}×{tile_length}. Save it again without such tiles"
        )
