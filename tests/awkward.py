"""Image files of every awkward kind, made on the fly, each with what must come of it.

Most of them show one scene, whose four quadrants have four colours, so that a turn, a flip, a lost channel or a clipped
range is seen at once. `AWKWARD` maps a file name to its bytes and its expectation; `READABLE` and `REFUSED` are its names.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pillow_heif
from PIL import Image

from finetune.errors import ImageError, ImageTooLarge, UnsupportedImage

Colour = tuple[int, int, int]

RED, GREEN, BLUE, SAND = (200, 40, 30), (40, 170, 60), (30, 60, 190), (230, 210, 150)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
WIDTH, HEIGHT = 96, 64


@dataclass(frozen=True)
class Expectation:
    """What decoding must give: an upright size and the colours of its quadrants, or an error and words in its message."""

    size_px: tuple[int, int] | None = (HEIGHT, WIDTH)  # (H, W)
    quadrants: tuple[Colour, ...] | None = (RED, GREEN, BLUE, SAND)  # upper left, upper right, lower left, lower right
    tolerance: int = 3  # grey levels
    error: type[ImageError] | None = None
    says: str = ""


def refused(error: type[ImageError], says: str) -> Expectation:
    return Expectation(size_px=None, quadrants=None, error=error, says=says)


SCENE = Expectation()
JPEG_SCENE = Expectation(tolerance=8)


def quadrants_of(rgb: np.ndarray) -> np.ndarray:
    """(4, 3) mean colours of the middle of each quadrant of an (H, W, 3) image."""
    height, width = rgb.shape[:2]
    rows = (slice(height // 8, 3 * height // 8), slice(5 * height // 8, 7 * height // 8))
    columns = (slice(width // 8, 3 * width // 8), slice(5 * width // 8, 7 * width // 8))
    return np.array([rgb[row, column].reshape(-1, 3).mean(axis=0) for row in rows for column in columns])


def painted(colours: tuple[Any, ...], width: int = WIDTH, height: int = HEIGHT, mode: str = "RGB") -> Image.Image:
    """The four colours as the four quadrants of an image of `mode`."""
    image = Image.new(mode, (width, height))
    for index, colour in enumerate(colours):
        left, top = (index % 2) * (width // 2), (index // 2) * (height // 2)
        image.paste(colour, (left, top, left + width - width // 2, top + height - height // 2))
    return image


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def scene() -> Image.Image:
    return painted((RED, GREEN, BLUE, SAND))


_STORED = {  # how a camera that was held so stores the upright scene
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned(orientation: int, format: str, **options: Any) -> bytes:
    """The scene as a camera held in `orientation` (EXIF, 1 to 8) stores it."""
    turn = _STORED[orientation]
    stored = scene() if turn is None else scene().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(stored, format, exif=exif, **options)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_file(width: int, height: int, depth: int, colour_type: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG written by hand, for what Pillow does not write. `rows` is raw, with each row's filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + b"".join(chunks) + png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


def png_rows(pixels: np.ndarray) -> bytes:
    """(H, W) or (H, W, channels) of 16 bits as unfiltered PNG rows."""
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)


def _grey(colour: Colour) -> int:
    return Image.new("RGB", (1, 1), colour).convert("L").getpixel((0, 0))


GREYS = tuple(_grey(colour) for colour in (RED, GREEN, BLUE, SAND))
GREY_QUADRANTS: tuple[Colour, ...] = tuple((grey, grey, grey) for grey in GREYS)
GREY_SCENE = Expectation(quadrants=GREY_QUADRANTS)


def grey16() -> np.ndarray:
    """(H, W) uint16, the grey scene at full 16-bit range."""
    return np.asarray(scene().convert("L")).astype(np.uint16) * 257


def with_tiff_tag(data: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF with one short or long tag of its first directory set to another value."""
    directory = int.from_bytes(data[4:8], "little")
    entries = range(directory + 2, directory + 2 + 12 * int.from_bytes(data[directory : directory + 2], "little"), 12)
    (at,) = (entry for entry in entries if int.from_bytes(data[entry : entry + 2], "little") == tag)
    return data[: at + 8] + value.to_bytes(4, "little") + data[at + 12 :]


def with_reduced_page(data: bytes) -> bytes:
    """A little-endian TIFF of two pages, the second marked as a smaller version of the first (by its width tag, which goes)."""
    directory = int.from_bytes(data[4:8], "little")
    n_entries = int.from_bytes(data[directory : directory + 2], "little")
    second = int.from_bytes(data[directory + 2 + 12 * n_entries : directory + 6 + 12 * n_entries], "little")
    entry = second + 2
    return data[:entry] + struct.pack("<HHII", 254, 4, 1, 1) + data[entry + 12 :]


def float_rgb_tiff() -> bytes:
    """A TIFF of three floating-point channels, as renderers write it."""
    pixels = (np.asarray(scene()) / np.float32(255)).astype("<f4").tobytes()
    entries = [(256, 4, 1, WIDTH), (257, 4, 1, HEIGHT), (258, 3, 3, 8 + 2 + 12 * 9 + 4), (262, 3, 1, 2), (259, 3, 1, 1)]
    entries += [(273, 4, 1, 200), (277, 3, 1, 3), (279, 4, 1, len(pixels)), (339, 3, 3, 8 + 2 + 12 * 9 + 4 + 6)]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    head = b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + struct.pack("<HHHHHH", 32, 32, 32, 3, 3, 3)
    return head + bytes(200 - len(head)) + pixels


def grey12_tiff() -> bytes:
    """The grey scene as a TIFF of packed 12-bit pixels, as scanners and microscopes write it."""
    values = (grey16() >> 4).reshape(-1, 2)
    pairs = np.stack([values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], axis=1)
    packed = pairs.astype(np.uint8).tobytes()
    plain = encoded(Image.fromarray(grey16()), "TIFF")
    strip = plain.index(grey16().tobytes())
    return with_tiff_tag(plain[:strip] + packed + plain[strip + len(packed) :], 258, 12)


def palette_with_hidden_colour() -> bytes:
    """Four palette entries; the last is transparent, and a loud pink hides under it."""
    image = painted((0, 1, 2, 3), mode="P")
    image.putpalette([*RED, *GREEN, *BLUE, 255, 0, 255])
    return encoded(image, "PNG", transparency=3)


def textured(width: int, height: int) -> Image.Image:
    """The scene with soft texture, so that it compresses and resamples like a photograph."""
    noise = np.random.default_rng(0).integers(-25, 26, (height // 16, width // 16, 1)).repeat(3, axis=2)
    texture = Image.fromarray((noise + 128).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    painting = painted((RED, GREEN, BLUE, SAND), width, height)
    return Image.blend(painting, texture, 0.2)


TEXTURED = tuple(tuple(round(0.8 * level + 0.2 * 128) for level in colour) for colour in (RED, GREEN, BLUE, SAND))


def with_jpeg_size(data: bytes, width: int, height: int) -> bytes:
    """A baseline JPEG whose header claims another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def with_heic_size(data: bytes, width: int, height: int) -> bytes:
    """A HEIC or AVIF file whose picture claims another size."""
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", width, height) + data[at + 8 :]


def with_gif_size(data: bytes, width: int, height: int) -> bytes:
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def with_bmp_size(data: bytes, width: int, height: int) -> bytes:
    return data[:18] + struct.pack("<ii", width, height) + data[26:]


def with_webp_canvas(data: bytes, width: int, height: int) -> bytes:
    """An extended WebP whose canvas claims another size."""
    at = data.index(b"VP8X") + 12
    return data[:at] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + data[at + 6 :]


def icc_profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A monitor's ICC profile (version 2) of these tags; D50 is its white."""
    table, bodies, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, body in tags.items():
        body += bytes(-len(body) % 4)
        table += struct.pack(">4sII", name, at + len(bodies), len(body))
        bodies += body
    size = 128 + len(table) + len(bodies)
    header = struct.pack(">I4sI4s4s4s12s4s", size, b"lcms", 0x02100000, b"mntr", space, b"XYZ ", bytes(12), b"acsp")
    header += bytes(28) + struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    return header + bytes(128 - len(header)) + table + bodies


def _xyz(values: Any) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">iii", *(round(float(value) * 65_536) for value in values))


def _curve(linear_of_encoded: np.ndarray) -> bytes:
    """The tone curve of a profile: linear light of encoded levels from 0 to 1, evenly spaced."""
    return (
        b"curv"
        + bytes(4)
        + struct.pack(">I", len(linear_of_encoded))
        + (linear_of_encoded * 65_535 + 0.5).astype(">u2").tobytes()
    )


def _srgb_to_linear(encoded_levels: Any) -> np.ndarray:
    levels = np.asarray(encoded_levels, np.float64)
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def _srgb_from_linear(linear: Any) -> np.ndarray:
    linear = np.clip(np.asarray(linear, np.float64), 0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


# Columns are red, green and blue in XYZ relative to D50, from the definitions of these spaces.
_SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
_DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
_ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
_PROPHOTO = np.array([[0.79767, 0.13519, 0.03135], [0.28804, 0.71188, 0.00009], [0.00000, 0.00000, 0.82510]])


@dataclass(frozen=True)
class WideSpace:
    """A colour space larger than sRGB, and the scene in it."""

    matrix: np.ndarray  # (3, 3) linear RGB to XYZ
    gamma: float | None  # None: the curve of sRGB

    def scene(self) -> Image.Image:
        """The scene's colours, as this space writes them."""
        given, _ = self.of_srgb(np.array([RED, GREEN, BLUE, SAND], np.uint8))
        return painted(tuple(tuple(int(level) for level in row) for row in given))

    def of_srgb(self, colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(…, 3) uint8 sRGB as this space writes it, rounded to uint8; and in float what such rounded levels are in sRGB."""
        linear = _srgb_to_linear(colours / 255) @ (np.linalg.inv(self.matrix) @ _SRGB).T
        levels = _srgb_from_linear(linear) if self.gamma is None else np.clip(linear, 0, 1) ** (1 / self.gamma)
        given = np.round(levels * 255).astype(np.uint8)
        back = _srgb_to_linear(given / 255) if self.gamma is None else (given / 255) ** self.gamma
        return given, 255 * _srgb_from_linear(back @ (np.linalg.inv(_SRGB) @ self.matrix).T)

    def profile(self) -> bytes:
        steps = np.linspace(0, 1, 1024)
        curve = _curve(_srgb_to_linear(steps) if self.gamma is None else steps**self.gamma)
        red, green, blue = (_xyz(column) for column in self.matrix.T)
        white = _xyz((0.96420, 1.0, 0.82491))
        tags = {b"wtpt": white, b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue, b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
        return icc_profile(b"RGB ", tags)


WIDE_SPACES = {
    "display_p3": WideSpace(_DISPLAY_P3, None),
    "adobe_rgb": WideSpace(_ADOBE_RGB, 2.19921875),
    "prophoto": WideSpace(_PROPHOTO, 1.8),
}
SRGB_PROFILE = WideSpace(_SRGB, None).profile()


def heic(image: Image.Image, **options: Any) -> bytes:
    """A HEIC photograph, as phones take them."""
    stream = io.BytesIO()
    pillow_heif.from_pillow(image).save(stream, quality=-1, chroma=444, **options)
    return stream.getvalue()


def grey_scene_of_gamma(gamma: float) -> tuple[Image.Image, bytes]:
    """The grey scene written with another tone curve than that of sRGB, and the profile that says so."""
    levels = (_srgb_to_linear(np.arange(256) / 255) ** (1 / gamma) * 255).round().astype(np.uint8)
    profile = icc_profile(b"GRAY", {b"wtpt": _xyz((0.96420, 1.0, 0.82491)), b"kTRC": _curve(np.linspace(0, 1, 1024) ** gamma)})
    return Image.fromarray(levels[np.asarray(scene().convert("L"))]), profile


def lab_tiff() -> bytes:
    """The scene in CIELab, as scanners write it, converted here and not by the library that reads it."""
    xyz = _srgb_to_linear(np.asarray(scene()) / 255.0) @ _SRGB.T / np.array([0.96420, 1.0, 0.82491])
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    lightness, a, b = 116 * root[..., 1] - 16, 500 * (root[..., 0] - root[..., 1]), 200 * (root[..., 1] - root[..., 2])
    pixels = np.stack([lightness * 2.55, a, b], axis=-1).round().astype(np.int16).astype(np.uint8)
    return encoded(Image.frombytes("LAB", (WIDTH, HEIGHT), pixels.tobytes()), "TIFF")


def _readable() -> dict[str, tuple[bytes, Expectation]]:
    files: dict[str, tuple[bytes, Expectation]] = {}
    for orientation in range(1, 9):
        files[f"exif_{orientation}.jpg"] = turned(orientation, "JPEG", quality=95), JPEG_SCENE
    for format, extension in (("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tiff")):
        options = {"lossless": True} if format == "WEBP" else {}
        files[f"exif_6.{extension}"] = turned(6, format, **options), SCENE
        files[f"plain.{extension}"] = encoded(scene(), format, **options), SCENE
    files["plain.bmp"] = encoded(scene(), "BMP"), SCENE
    files["wrong_name.png"] = encoded(scene(), "JPEG", quality=95), JPEG_SCENE
    files["exif_broken.jpg"] = encoded(scene(), "JPEG", quality=95, exif=b"Exif\0\0not a TIFF header"), JPEG_SCENE
    files["icc_broken.jpg"] = encoded(scene(), "JPEG", quality=95, icc_profile=b"not a profile"), JPEG_SCENE
    files["progressive.jpg"] = encoded(scene(), "JPEG", quality=95, progressive=True), JPEG_SCENE
    files["jpeg_and_zip.jpg"] = encoded(scene(), "JPEG", quality=95) + b"PK\3\4" + bytes(64), JPEG_SCENE
    files["mpo.jpg"] = encoded(scene(), "MPO", save_all=True, append_images=[Image.new("RGB", (32, 32))], quality=95), JPEG_SCENE

    files["grey.jpg"] = encoded(scene().convert("L"), "JPEG", quality=95), GREY_SCENE
    files["grey.png"] = encoded(scene().convert("L"), "PNG"), GREY_SCENE
    files["grey_16bit.png"] = encoded(Image.fromarray(grey16()), "PNG"), GREY_SCENE
    files["grey_16bit.tiff"] = encoded(Image.fromarray(grey16()), "TIFF"), GREY_SCENE
    big_endian = Image.frombytes("I;16B", (WIDTH, HEIGHT), grey16().astype(">u2").tobytes())
    files["grey_16bit_big_endian.tiff"] = encoded(big_endian, "TIFF"), GREY_SCENE
    inverted = with_tiff_tag(encoded(Image.fromarray(65_535 - grey16()), "TIFF"), 262, 0)
    files["grey_16bit_white_is_zero.tiff"] = inverted, GREY_SCENE
    files["grey_12bit.tiff"] = grey12_tiff(), GREY_SCENE
    key = png_chunk(b"tRNS", struct.pack(">H", GREYS[3] * 257))
    files["grey_16bit_transparent.png"] = (
        png_file(WIDTH, HEIGHT, 16, 0, png_rows(grey16()), key),
        Expectation(quadrants=(*GREY_QUADRANTS[:3], WHITE)),
    )
    rgb16 = np.asarray(scene()).astype(np.uint16) * 257
    files["rgb_16bit.png"] = png_file(WIDTH, HEIGHT, 16, 2, png_rows(rgb16)), SCENE
    key = png_chunk(b"tRNS", struct.pack(">HHH", *(level * 257 for level in SAND)))
    files["rgb_16bit_transparent.png"] = (
        png_file(WIDTH, HEIGHT, 16, 2, png_rows(rgb16), key),
        Expectation(quadrants=(RED, GREEN, BLUE, WHITE)),
    )
    files["one_bit.png"] = encoded(painted((1, 0, 0, 1), mode="1"), "PNG"), Expectation(quadrants=(WHITE, BLACK, BLACK, WHITE))

    palette = scene().quantize(4)
    files["palette.png"] = encoded(palette, "PNG"), SCENE
    files["palette_transparent.png"] = palette_with_hidden_colour(), Expectation(quadrants=(RED, GREEN, BLUE, WHITE))
    files["grey_alpha.png"] = (
        encoded(painted(((200, 255), (100, 255), (0, 0), (0, 128)), mode="LA"), "PNG"),
        Expectation(quadrants=((200, 200, 200), (100, 100, 100), WHITE, (127, 127, 127))),
    )
    files["alpha.png"] = (
        encoded(painted(((*RED, 255), (*GREEN, 255), (255, 0, 255, 0), (0, 0, 0, 128)), mode="RGBA"), "PNG"),
        Expectation(quadrants=(RED, GREEN, WHITE, (127, 127, 127))),
    )
    files["alpha.webp"] = (
        encoded(
            painted(((*RED, 255), (*GREEN, 255), (255, 0, 255, 0), (*SAND, 255)), mode="RGBA"), "WEBP", lossless=True, exact=True
        ),
        Expectation(quadrants=(RED, GREEN, WHITE, SAND)),
    )
    files["cmyk.jpg"] = encoded(scene().convert("CMYK"), "JPEG", quality=95), JPEG_SCENE
    files["cmyk.tiff"] = encoded(scene().convert("CMYK"), "TIFF"), SCENE
    files["ycbcr.tiff"] = encoded(scene().convert("YCbCr"), "TIFF"), Expectation(tolerance=4)
    files["compressed.tiff"] = encoded(scene(), "TIFF", compression="tiff_lzw"), SCENE

    for name, space in WIDE_SPACES.items():
        profile = space.profile()
        files[f"{name}.png"] = encoded(space.scene(), "PNG", icc_profile=profile), Expectation(tolerance=4)
        files[f"{name}.tiff"] = encoded(space.scene(), "TIFF", icc_profile=profile), Expectation(tolerance=4)
    profile = WIDE_SPACES["display_p3"].profile()
    files["display_p3.jpg"] = encoded(WIDE_SPACES["display_p3"].scene(), "JPEG", quality=95, icc_profile=profile), JPEG_SCENE
    wide_alpha = WIDE_SPACES["display_p3"].scene().convert("RGBA")
    wide_alpha.paste((255, 0, 255, 0), (0, HEIGHT // 2, WIDTH // 2, HEIGHT))
    files["display_p3_alpha.png"] = (
        encoded(wide_alpha, "PNG", icc_profile=profile),
        Expectation(quadrants=(RED, GREEN, WHITE, SAND), tolerance=4),
    )
    wide_palette = WIDE_SPACES["display_p3"].scene().quantize(4)
    files["display_p3_palette.png"] = encoded(wide_palette, "PNG", icc_profile=profile), Expectation(tolerance=4)
    files["display_p3.heic"] = heic(WIDE_SPACES["display_p3"].scene(), icc_profile=profile), Expectation(tolerance=5)
    files["display_p3.avif"] = (
        encoded(WIDE_SPACES["display_p3"].scene(), "AVIF", quality=95, subsampling="4:4:4", icc_profile=profile),
        JPEG_SCENE,
    )
    files["icc_of_grey_on_colour.png"] = encoded(scene(), "PNG", icc_profile=grey_scene_of_gamma(1.0)[1]), SCENE
    grey, grey_profile = grey_scene_of_gamma(1.4)
    files["grey_gamma.png"] = encoded(grey, "PNG", icc_profile=grey_profile), GREY_SCENE
    files["lab.tiff"] = lab_tiff(), Expectation(tolerance=3)
    files["plain.heic"] = heic(scene()), Expectation(tolerance=4)
    files["plain.avif"] = encoded(scene(), "AVIF", quality=95, subsampling="4:4:4"), JPEG_SCENE
    files["alpha.heic"] = (
        heic(painted(((*RED, 255), (*GREEN, 255), (0, 0, 0, 0), (*SAND, 255)), mode="RGBA")),
        Expectation(quadrants=(RED, GREEN, WHITE, SAND), tolerance=5),
    )
    for orientation in (3, 6):
        files[f"exif_{orientation}.avif"] = turned(orientation, "AVIF", quality=95, subsampling="4:4:4"), JPEG_SCENE
        turn = _STORED[orientation]
        assert turn is not None
        exif = Image.Exif()
        exif[0x0112] = orientation
        files[f"exif_{orientation}.heic"] = heic(scene().transpose(turn), exif=exif.tobytes()), Expectation(tolerance=4)

    whole = encoded(textured(96, 64), "JPEG", quality=90)
    textured_scene = Expectation(quadrants=TEXTURED, tolerance=20)
    files["no_end_mark.jpg"] = whole[:-2], textured_scene
    files["half_an_end_mark.jpg"] = whole[:-1], textured_scene
    files["no_end_mark_progressive.jpg"] = encoded(textured(96, 64), "JPEG", quality=90, progressive=True)[:-2], textured_scene
    files["line_breaks_before.jpg"] = b"\r\n\r\n" + whole, textured_scene
    files["line_break_before.png"] = b"\n" + encoded(scene(), "PNG"), SCENE
    thumbnail = encoded(scene(), "TIFF", save_all=True, append_images=[scene().resize((24, 16))])
    files["with_thumbnail.tiff"] = with_reduced_page(thumbnail), SCENE

    second = [painted((BLACK, BLACK, BLACK, BLACK))]
    files["animated.gif"] = encoded(scene(), "GIF", save_all=True, append_images=second, duration=100), SCENE
    files["animated.webp"] = encoded(scene(), "WEBP", save_all=True, append_images=second, duration=100, lossless=True), SCENE
    files["animated.png"] = encoded(scene(), "PNG", save_all=True, append_images=second, duration=100), SCENE

    files["tiny_1x1.png"] = encoded(Image.new("RGB", (1, 1), RED), "PNG"), Expectation((1, 1), None)
    files["tiny_8x8.png"] = encoded(painted((RED, GREEN, BLUE, SAND), 8, 8), "PNG"), Expectation((8, 8))
    files["wide_4000x20.jpg"] = (
        encoded(painted((RED, GREEN, BLUE, SAND), 4000, 20), "JPEG", quality=95, subsampling=0),
        Expectation((20, 4000), tolerance=20),
    )
    files["tall_20x4000.png"] = encoded(painted((RED, GREEN, BLUE, SAND), 20, 4000), "PNG"), Expectation((4000, 20))
    files["photo_12mp.jpg"] = (
        encoded(textured(4032, 3024), "JPEG", quality=90),
        Expectation((3024, 4032), TEXTURED, tolerance=8),
    )
    return files


def _refused() -> dict[str, tuple[bytes, Expectation]]:
    jpeg = encoded(textured(256, 256), "JPEG", quality=95)
    png = encoded(textured(256, 256), "PNG")
    webp = encoded(
        painted(((*RED, 255), (*GREEN, 9), (*BLUE, 9), (*SAND, 9)), mode="RGBA"), "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"
    )
    ztxt = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 * 1024 * 1024), 9))
    damaged, too_large, unsupported = ImageError, ImageTooLarge, UnsupportedImage
    grey_float = Image.fromarray(np.linspace(0, 1, WIDTH * HEIGHT, dtype=np.float32).reshape(HEIGHT, WIDTH))
    grey_int = Image.fromarray(np.arange(WIDTH * HEIGHT, dtype=np.int32).reshape(HEIGHT, WIDTH))
    return {
        "empty.jpg": (b"", refused(damaged, "empty")),
        "truncated.jpg": (jpeg[: len(jpeg) * 6 // 10], refused(damaged, "truncated")),
        "truncated.png": (png[: len(png) // 2], refused(damaged, "truncated")),
        "header_only.jpg": (jpeg[:12], refused(damaged, "damaged")),
        "bad_checksum.png": (png.replace(b"IDAT", b"IDAX", 1), refused(damaged, "damaged")),
        "no_width.png": (png_file(0, 10, 8, 2, b""), refused(damaged, "damaged")),
        "text_bomb.png": (png_file(1, 1, 8, 2, bytes(4), ztxt), refused(damaged, "damaged")),
        "bomb_30k.png": (png_file(30_000, 30_000, 8, 2, bytes(64)), refused(too_large, "30000×30000")),
        "bomb_13k.png": (png_file(13_000, 13_000, 8, 2, bytes(64)), refused(too_large, "169,000,000")),
        "bomb_60k.jpg": (with_jpeg_size(jpeg, 60_000, 60_000), refused(too_large, "60000×60000")),
        "bomb_65k.gif": (with_gif_size(encoded(scene(), "GIF"), 65_535, 65_535), refused(too_large, "65535×65535")),
        "bomb_30k.bmp": (with_bmp_size(encoded(scene(), "BMP"), 30_000, 30_000), refused(too_large, "30000×30000")),
        "bomb_60k.webp": (with_webp_canvas(webp, 60_000, 60_000), refused(too_large, "more pixels")),
        "long_side.png": (png_file(70_000, 1, 8, 2, bytes(64)), refused(too_large, "65,500")),
        "float.tiff": (encoded(grey_float, "TIFF"), refused(unsupported, "floating-point")),
        "int32.tiff": (encoded(grey_int, "TIFF"), refused(unsupported, "32-bit")),
        "float_rgb.tiff": (float_rgb_tiff(), refused(unsupported, "32-bit floating-point")),
        "pages.tiff": (
            encoded(scene(), "TIFF", save_all=True, append_images=[scene(), scene()]),
            refused(unsupported, "several pages"),
        ),
        "last_row_missing.jpg": (jpeg[:-60], refused(damaged, "truncated")),
        "last_scan_cut.jpg": (
            encoded(textured(256, 256), "JPEG", quality=95, progressive=True)[:-200],
            refused(damaged, "truncated"),
        ),
        "video.jpg": (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(64), refused(unsupported, "video")),
        "jpeg_xl.jpg": (b"\xff\x0a" + bytes(64), refused(unsupported, "JPEG XL")),
        "page.jpg": (b"<!DOCTYPE html><html><body>not found</body></html>", refused(unsupported, "HTML")),
        "drawing.jpg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', refused(unsupported, "SVG")),
        "document.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", refused(unsupported, "EPS")),
        "header_only.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", refused(damaged, "HEIF file is damaged")),
        "truncated.heic": (heic(textured(256, 256))[:-4000], refused(damaged, "HEIF file is truncated or damaged")),
        "truncated.avif": (encoded(textured(256, 256), "AVIF", quality=90)[:-500], refused(damaged, "AVIF file is ")),
        "bomb.heic": (with_heic_size(heic(scene()), 60_000, 60_000), refused(too_large, "60000×60000")),
        "bomb.avif": (with_heic_size(encoded(scene(), "AVIF"), 12_000, 12_000), refused(too_large, "12000×12000")),
        "address.jpg": (b"http://169.254.169.254/latest/meta-data", refused(unsupported, "nothing is fetched")),
        "garbage.jpg": (bytes(range(256)) * 16, refused(unsupported, "not an image")),
    }


READABLE_FILES = _readable()
REFUSED_FILES = _refused()
AWKWARD: dict[str, tuple[bytes, Expectation]] = {**READABLE_FILES, **REFUSED_FILES}
READABLE: tuple[str, ...] = tuple(READABLE_FILES)
REFUSED: tuple[str, ...] = tuple(REFUSED_FILES)
