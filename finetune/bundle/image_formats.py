"""Recognise the format of an image file by its first bytes. Torch-free."""

from __future__ import annotations

from finetune.errors import UnsupportedImage

FORMATS = ("JPEG", "PNG", "WEBP", "HEIF", "AVIF", "BMP", "GIF", "TIFF")
_FORMATS_READ = "JPEG, PNG, WebP, HEIC, AVIF, BMP, GIF and TIFF are read"
HEAD_BYTES = 256  # number of first bytes of a file that `sniff` and `looks_like_image` need

CAMERA_RAW = "this is a raw file of a camera (CR2, NEF, ARW, DNG …): export it as JPEG, with the camera's program or another"
_RAW_MARKS = (
    *(
        (8, b"CR\x02"),
        (0, b"IIRO"),
        (0, b"IIRS"),
        (0, b"MMOR"),
        (0, b"IIU\0"),
        (0, b"FUJIFILMCCD-RAW"),
        (0, b"FOVb"),
        (0, b"\0MRM"),
    ),
    (4, b"ftypcrx "),
)  # of Canon, Olympus, Panasonic, Fujifilm, Sigma and Minolta, by their place in the file; other raw files are TIFFs
_BMP_HEADERS = tuple(size.to_bytes(4, "little") for size in (12, 16, 40, 52, 56, 64, 108, 124))
_AVIF_BRANDS, _ANY_CODEC_BRANDS = frozenset({b"avif", b"avis"}), frozenset({b"mif1", b"msf1"})
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})


def from_first_byte(data: bytes) -> bytes:
    """Remove line breaks and spaces at the start of a file: no image begins with them, and some servers add them."""
    return data.lstrip(b"\r\n\t ") if data[:1] in (b"\r", b"\n", b"\t", b" ") else data


def looks_like_image(head: bytes) -> bool:
    """Return whether a file that begins with these bytes is an image in one of `FORMATS`; for files without a known suffix."""
    head = from_first_byte(head)
    try:
        name = sniff(head)
    except UnsupportedImage:
        return False
    return name != "BMP" or head[14:18] in _BMP_HEADERS  # a text may begin with the letters BM


def sniff(data: bytes) -> str:
    """Return which of `FORMATS` a file has according to its first bytes, whatever its name is.

    Raises:
        UnsupportedImage: it has none of them; the message says what it looks like instead.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if any(data[at : at + len(mark)] == mark for at, mark in _RAW_MARKS):
        raise UnsupportedImage(CAMERA_RAW)
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if data.startswith(b"BM"):
        return "BMP"
    if data[4:8] == b"ftyp" and (name := _sniff_container(data)) is not None:
        return name
    raise UnsupportedImage(f"{_unsupported_reason(data)}; {_FORMATS_READ}")


def _sniff_container(data: bytes) -> str | None:
    """Return "AVIF" or "HEIF" for an image in the ISO container format, by its brands; None for videos and others."""
    box_bytes = min(int.from_bytes(data[:4], "big"), HEAD_BYTES)
    brands = {data[8:12], *(data[start : start + 4] for start in range(16, box_bytes - 3, 4))}
    if data[8:12] in _AVIF_BRANDS or (data[8:12] in _ANY_CODEC_BRANDS and brands & _AVIF_BRANDS):
        return "AVIF"
    return "HEIF" if brands & (_HEIF_BRANDS | _ANY_CODEC_BRANDS) else None


def _unsupported_reason(data: bytes) -> str:
    """Return what an unsupported file looks like, and what to do about it."""
    if data[4:8] == b"ftyp":
        return "this is a video or another file of the MP4 family: save one frame of it as JPEG"
    if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "this is a JPEG XL image: convert it to JPEG or PNG first"
    if data.startswith((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")):
        return "this is a JPEG 2000 image: convert it to JPEG or PNG first"
    if data.startswith(b"8BPS"):
        return "this is a Photoshop document: export it as JPEG or PNG first"
    start = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "this is an HTML page, not an image (a download that led to a web page?)"
    if start.startswith(b"version https://git-lfs"):
        return "this is a pointer of Git LFS, not the image itself: fetch the files with git lfs pull"
    if start.startswith((b"<svg", b"<?xml")):
        return "this is SVG or XML, a drawing and not pixels: render it to PNG first"
    if start.startswith((b"%!ps", b"\xc5\xd0\xd3\xc6", b"%pdf")):
        return "this is a PostScript, EPS or PDF document: render it to PNG first"
    if start.startswith((b"http://", b"https://")):
        return "this is an address, not an image: download it and send its bytes (nothing is fetched from here)"
    return "this is not an image file that can be read"
