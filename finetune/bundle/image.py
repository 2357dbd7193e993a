"""Decode image files into upright RGB pixels. This is the only decoder of the project. Torch-free.

Training, validation, export checks, ``predict`` and the server all decode images here, so all of them get the same pixels.
Resizing to the input of a model is done by `preprocess`.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL
from PIL import AvifImagePlugin, Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ExifTags import Base as ExifTag
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from finetune.bundle.colour import to_srgb
from finetune.bundle.image_formats import CAMERA_RAW, from_first_byte, sniff
from finetune.bundle.image_limits import DEFAULT_LIMITS, ImageLimits, check_bytes, check_pixels, check_scans, check_tiles
from finetune.bundle.tiff import is_camera_raw, refuse_pages, unusual_numbers
from finetune.errors import ImageError, ImageTooLarge, UnsupportedImage

DECODER = f"pillow-{PIL.__version__}-heif-{version('pillow-heif')}-srgb"
"""The name of the decoder in the keys of cached data; another decoder may return other pixels for the same file."""


def _open_avif(stream: io.BytesIO) -> ImageFile.ImageFile:
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # several images are decoded in parallel already
    return AvifImagePlugin.AvifImageFile(stream)


def _open_heif(stream: io.BytesIO) -> ImageFile.ImageFile:
    return _heif_reader()(stream)


@functools.cache
def _heif_reader() -> Callable[[io.BytesIO], ImageFile.ImageFile]:
    """Return the reader of HEIC images; its library is imported with the first such image."""
    import pillow_heif

    # An embedded thumbnail may differ from the image, and depth maps are not used.
    pillow_heif.options.THUMBNAILS = pillow_heif.options.DEPTH_IMAGES = pillow_heif.options.AUX_IMAGES = False
    pillow_heif.options.DECODE_THREADS = 1
    reader: Callable[[io.BytesIO], ImageFile.ImageFile] = pillow_heif.HeifImageFile
    return reader


# Plugins are called directly and not through Image.open: its pixel limit is a global of the process and only warns, and it opens
# a JPEG that contains a second image (MPO, as phones write for panoramas) as another format, which has no `draft`.
_READERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "HEIF": _open_heif,
    "AVIF": _open_avif,
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
    "TIFF": TiffImageFile,
}

# The exceptions of plugins for damaged files: 180,000 mutated files raised the first three; Image.open handles the others too.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, RuntimeError, struct.error)

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags; photometric 0 is "white is zero"
_LARGE_PIXELS = 25_000_000  # larger images other than JPEGs are averaged down before they are converted
_END_OF_JPEG = b"\xff\xd9"
_CONTINUATIONS = (b"\x55" * 512, b"\x9c\x33" * 256)  # two arbitrary continuations of truncated JPEG data
_MAX_COMPLETED_PIXELS = 50_000_000  # size limit of a JPEG without end mark, because it is decoded several times
_SAVE_PLAINLY = "save them as 8-bit or 16-bit first"

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


@dataclass(frozen=True)
class Orientation:
    """The operation that turns a stored image upright: as a Pillow method, and as a swap of the axes followed by mirroring."""

    method: Image.Transpose
    swaps: bool
    mirrors_x: bool
    mirrors_y: bool


_ORIENTATIONS = {  # by EXIF value
    2: Orientation(Image.Transpose.FLIP_LEFT_RIGHT, swaps=False, mirrors_x=True, mirrors_y=False),
    3: Orientation(Image.Transpose.ROTATE_180, swaps=False, mirrors_x=True, mirrors_y=True),
    4: Orientation(Image.Transpose.FLIP_TOP_BOTTOM, swaps=False, mirrors_x=False, mirrors_y=True),
    5: Orientation(Image.Transpose.TRANSPOSE, swaps=True, mirrors_x=False, mirrors_y=False),
    6: Orientation(Image.Transpose.ROTATE_270, swaps=True, mirrors_x=True, mirrors_y=False),
    7: Orientation(Image.Transpose.TRANSVERSE, swaps=True, mirrors_x=True, mirrors_y=True),
    8: Orientation(Image.Transpose.ROTATE_90, swaps=True, mirrors_x=False, mirrors_y=True),
}


def decode_image(data: bytes, *, short_side_px: int | None = None, limits: ImageLimits = DEFAULT_LIMITS) -> np.ndarray:
    """Decode one image file. Of an animation, the first frame is returned; transparent pixels are drawn on white.

    Args:
        short_side_px: the number of pixels that the caller needs on the shorter side. A larger JPEG may be decoded at a half, a
            quarter or an eighth of its size, which is several times faster, but not smaller than this.

    Returns:
        (H, W, 3) uint8 RGB, upright.

    Raises:
        UnsupportedImage: the format is not one of `FORMATS`, or the pixels have no defined range (float, 32-bit).
        ImageTooLarge: the image exceeds `limits`.
        ImageError: the file is empty, truncated or damaged.
    """
    image, _ = open_upright(data, short_side_px=short_side_px, limits=limits)
    return np.array(image)


def read_bytes(path: Path, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """Return the bytes of an image file, after checking its size.

    Raises:
        ImageError: the file is too large or cannot be read. The message does not name the file; use `naming` for that.
    """
    try:
        check_bytes(path.stat().st_size, limits)
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"the file cannot be read: {error.strerror or error}") from None


def naming(path: Path | str, error: ImageError) -> ImageError:
    """Return the same error with the path of the file before its message."""
    return type(error)(f"{path}: {error.message}")


def image_size(data: bytes, *, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Return the upright (width, height) of an image file, which is decoded completely, at the smallest scale possible.

    Raises:
        ImageError: `decode_image` would raise it too.
    """
    image, data = _opened(data, limits)
    width, height = image.size
    _, _, turn = _decoded(image, data, 1, limits)
    return (height, width) if turn is not None and turn.swaps else (width, height)


def header_size(data: bytes, *, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Return the upright (width, height) in the header of an image file. No pixel is decoded, so the rest may be damaged.

    Raises:
        ImageError: the header cannot be read, or the image exceeds `limits`.
    """
    image, _ = _opened(data, limits)
    width, height = image.size
    if image.format == "TIFF":  # Pillow reports the upright size, although it turns the pixels only while loading them
        return width, height
    turn = _upright_turn(image)
    return (height, width) if turn is not None and turn.swaps else (width, height)


def open_upright(data: bytes, *, short_side_px: int | None, limits: ImageLimits) -> tuple[Image.Image, Box]:
    """Decode an image as `decode_image` does, into a Pillow image of mode RGB; also return the box of it that has content.

    The box is the whole image, except for a JPEG that is decoded at a reduced scale that does not divide its sides: 533 pixels at
    a half become 267, half of the last one beyond the edge. Resampling must use the box, or the content is shifted by a fraction
    of a pixel.
    """
    image, data = _opened(data, limits)
    rgb, box, turn = _decoded(image, data, short_side_px, limits)
    if turn is None:
        return rgb, box
    return rgb.transpose(turn.method), _turned(box, rgb.size, turn)


def _opened(data: bytes, limits: ImageLimits) -> tuple[ImageFile.ImageFile, bytes]:
    """Open a file and check its header against `limits`, without decoding pixels.

    Returns:
        The image, and its bytes without anything before the first byte of the image.

    Raises:
        UnsupportedImage, ImageTooLarge, ImageError: as `decode_image`.
    """
    if not data:
        raise ImageError("the image is empty (0 bytes). Check that the upload or the copy finished")
    check_bytes(len(data), limits)
    data = from_first_byte(data)
    name = sniff(data)
    if name == "TIFF":
        if is_camera_raw(data):
            raise UnsupportedImage(CAMERA_RAW)
        refuse_pages(data)
    try:
        image = _READERS[name](io.BytesIO(data))
    except Image.DecompressionBombError:  # Pillow itself checks a WebP's header before it allocates the canvas
        raise ImageTooLarge(f"the {name} image has far more pixels than the {limits.max_pixels:,} allowed") from None
    except _DAMAGED as error:
        if name == "TIFF" and (numbers := unusual_numbers(data)) is not None:
            raise UnsupportedImage(f"the pixels are {numbers}: {_SAVE_PLAINLY}") from None
        raise ImageError(f"the {name} file is damaged: {_reason(error)}. Export or download it again") from None
    if isinstance(image, JpegImageFile):
        check_scans(image, data, limits)
    else:
        check_pixels(name, *image.size, limits)
    if isinstance(image, TiffImageFile):
        check_tiles(image)
    return image, data


def _decoded(
    image: ImageFile.ImageFile, data: bytes, short_side_px: int | None, limits: ImageLimits
) -> tuple[Image.Image, Box, Orientation | None]:
    """Return the RGB image as stored, the box of it that has content, and the operation that turns it upright.

    Raises:
        ImageTooLarge: the image exceeds `limits`.
        ImageError: the file is truncated or damaged.
    """
    name = image.format
    try:
        box = _reduced_box(image, short_side_px)
        check_pixels(str(name), *image.size, limits)  # for a JPEG after the reduction
        try:
            image.load()
        except OSError:
            whole = _with_end_mark(data) if isinstance(image, JpegImageFile) else None
            if whole is None:
                raise
            image = JpegImageFile(io.BytesIO(whole))
            _reduced_box(image, short_side_px)
            image.load()
        profile, turn = image.info.get("icc_profile"), _upright_turn(image)
        eight_bit = _to_8_bit(image)
        if short_side_px is not None and (factor := _reduction(eight_bit, short_side_px)) > 1:
            width, height = eight_bit.size
            eight_bit, box = eight_bit.reduce(factor), (0.0, 0.0, width / factor, height / factor)
        return _to_rgb(eight_bit, profile), box, turn
    except Image.DecompressionBombError:
        raise ImageTooLarge(f"the {name} image has far more pixels inside than its header says") from None
    except _DAMAGED as error:
        raise ImageError(f"the {name} file is truncated or damaged: {_reason(error)}. Export or download it again") from None


def _reduced_box(image: ImageFile.ImageFile, short_side_px: int | None) -> Box:
    """Set a JPEG to be decoded at a reduced scale, not below `short_side_px`; return the box that has content."""
    reduced = None if short_side_px is None else image.draft(None, (short_side_px, short_side_px))  # only JPEG supports it
    return reduced[1] if reduced else (0.0, 0.0, *image.size)


def _with_end_mark(data: bytes) -> bytes | None:
    """Return a JPEG that lacks only its end mark with that mark; None if data of its pixels is missing too.

    A decoder invents missing pixels from the bits that follow. If no pixel is missing, the result does not depend on these bits,
    so the file is decoded with different continuations of its data and the results are compared.
    """
    data = data.rstrip(b"\xff")
    whole = data + _END_OF_JPEG
    image = JpegImageFile(io.BytesIO(whole))
    if image.width * image.height > _MAX_COMPLETED_PIXELS:
        return None
    pixels = np.asarray(image)
    for bits in _CONTINUATIONS:
        if not np.array_equal(np.asarray(JpegImageFile(io.BytesIO(data + bits + _END_OF_JPEG))), pixels):
            return None
    return whole


def _reason(error: BaseException) -> str:
    text = str(error).strip().rstrip(".")
    return text or type(error).__name__


def _reduction(image: Image.Image, short_side_px: int) -> int:
    """Return the factor by which a very large image is averaged down before it is converted to RGB, to save memory.

    The shorter side of the result has at least twice the pixels that are needed.
    """
    if image.width * image.height < _LARGE_PIXELS or image.mode not in ("L", "RGB"):
        return 1
    return max(1, min(image.size) // (2 * short_side_px))


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Return an image with 8 bits per channel.

    Raises:
        UnsupportedImage: the pixels are 32-bit integers or floating-point numbers, which have no defined range.
    """
    if image.mode in ("I", "F"):  # convert() would silently clip these to black or white
        kind = "32-bit integer" if image.mode == "I" else "floating-point"
        raise UnsupportedImage(f"the pixels are {kind} numbers without a defined maximum: {_SAVE_PLAINLY}")
    return Image.fromarray(_grey16_to_8(image)) if image.mode.startswith("I;16") else image


def _to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return an image with 8 bits per channel as sRGB, with its profile applied and transparent pixels on white."""
    if image.mode == "RGBa":
        image = image.convert("RGBA")
    if not image.has_transparency_data:  # convert() would show the invisible colours of transparent pixels
        return to_srgb(_plain_colours(image), profile)
    opacity = image.convert("RGBA").getchannel("A")
    page = Image.new("RGB", image.size, "white")
    page.paste(to_srgb(_plain_colours(image), profile), mask=opacity)
    return page


def _plain_colours(image: Image.Image) -> Image.Image:
    """Return an image without transparency, in the colour space that its profile describes: grey, RGB, CMYK or Lab."""
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image
    return image.getchannel("L") if image.mode == "LA" else image.convert("RGB")


def _grey16_to_8(image: Image.Image) -> np.ndarray:
    """Return a 16-bit grey image as (H, W) uint8, scaled so that white stays white; ``convert`` would clip values over 255."""
    white, inverted = 65_535, False
    if isinstance(image, TiffImageFile):
        white = 4_095 if image.tag_v2.get(_BITS_PER_SAMPLE) == (12,) else white
        inverted = image.tag_v2.get(_PHOTOMETRIC) == 0
    values = np.arange(65_536, dtype=np.int64)  # 0..65535; the values of a 12-bit TIFF are 0..4095
    levels = white - values if inverted else values
    grey = (((levels % 2**32) * 255 + white // 2) % 2**32 // white).astype(np.uint8)  # a table saves memory
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[levels == key] = 255
    looked_up: np.ndarray = grey[np.asarray(image).astype(np.uint16, copy=False)]
    return looked_up


def _upright_turn(image: Image.Image) -> Orientation | None:
    """Return the operation that turns a loaded image upright, by its EXIF orientation; None for none, or if EXIF is damaged."""
    if image.format == "TIFF":  # Pillow turns these itself while loading
        return None
    try:
        return _ORIENTATIONS.get(image.getexif().get(ExifTag.Orientation, 1))
    except _DAMAGED:
        return None


def _turned(box: Box, size: tuple[int, int], turn: Orientation) -> Box:
    """Return the position of a box in an image of `size` (width, height) after the image has been turned."""
    left, top, right, bottom = box
    width, height = size
    if turn.swaps:
        left, top, right, bottom, width, height = top, left, bottom, right, height, width
    if turn.mirrors_x:
        left, right = width - right, width - left
    if turn.mirrors_y:
        top, bottom = height - bottom, height - top
    return left, top, right, bottom
