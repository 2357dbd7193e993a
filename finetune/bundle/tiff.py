"""Read the directories of a TIFF file without its pixels: whether it has several pages, and the type of its pixels."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from finetune.errors import UnsupportedImage

_NEW_SUBFILE_TYPE, _SUBFILE_TYPE = 254, 255
_BITS_PER_SAMPLE, _SAMPLES_PER_PIXEL, _SAMPLE_FORMAT = 258, 277, 339
_PHOTOMETRIC, _SUB_DIRECTORIES, _DNG_VERSION = 262, 330, 50706
_SENSOR = (32803, 34892)  # photometric values: a mosaic of sensor values, linear sensor values
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType: a reduced version of another page, or its transparency mask
_INTEGER_TYPES = {1: "B", 3: "H", 4: "I", 8: "h", 9: "i", 13: "I", 16: "Q"}  # TIFF types and their struct formats
_FLOAT_FORMAT, _SIGNED_FORMAT = 3, 2
_MOST_DIRECTORIES = 16  # that are read; a photograph has fewer thumbnails
_MOST_VALUES = 16  # of a tag that are read

Tags = Mapping[int, tuple[int, ...]]


def refuse_pages(data: bytes) -> None:
    """Refuse a TIFF with more than one page. Reduced versions and masks of a page do not count.

    Raises:
        UnsupportedImage: there are several pages, and it is not known which one is meant.
    """
    pages = sum(_is_page(tags) for tags in _directories(data))
    if pages > 1:
        raise UnsupportedImage(
            "the TIFF file has several pages, and nothing says which one is meant: save that page as a file of its own"
        )


def is_camera_raw(data: bytes) -> bool:
    """Return whether a TIFF is a raw file of a camera: sensor values, or a preview before the image (NEF, ARW, DNG)."""
    tags = next(_directories(data), {})
    has_preview = any(value & _REDUCED for value in tags.get(_NEW_SUBFILE_TYPE, ())[:1])
    return (
        _DNG_VERSION in tags
        or any(one in _SENSOR for one in tags.get(_PHOTOMETRIC, ()))
        or (has_preview and _SUB_DIRECTORIES in tags)
    )


def unusual_numbers(data: bytes) -> str | None:
    """Return the type of a TIFF's pixels, in words, if they are not unsigned integers of up to 16 bits in 1 to 4 channels.

    Returns:
        None if they are.
    """
    tags = next(_directories(data), {})
    bits, channels = tags.get(_BITS_PER_SAMPLE, (1,)), tags.get(_SAMPLES_PER_PIXEL, (1,))[0]
    formats = tags.get(_SAMPLE_FORMAT, (1,))
    if _FLOAT_FORMAT in formats:
        return f"{bits[0]}-bit floating-point numbers without a defined maximum"
    if _SIGNED_FORMAT in formats:
        return f"{bits[0]}-bit signed numbers without a defined maximum"
    if max(bits) > 16:
        return f"{max(bits)}-bit numbers without a defined maximum"
    if channels > 4:
        return f"of {channels} channels, which do not describe colours"
    return None


@dataclass(frozen=True)
class _Layout:
    """The binary layout of directories: that of classic TIFF, or of BigTIFF for files beyond 4 GiB."""

    order: str  # struct's character for the byte order
    count: str
    offset: str
    entry_bytes: int


def _directories(data: bytes) -> Iterator[Tags]:
    """Yield the tags of each directory in the chain, up to the point where the chain is damaged."""
    order = "<" if data[:2] == b"II" else ">"
    try:
        (magic,) = struct.unpack_from(f"{order}H", data, 2)
        layout = _Layout(order, "H", "I", 12) if magic == 42 else _Layout(order, "Q", "Q", 20)
        (at,) = struct.unpack_from(f"{order}{layout.offset}", data, 4 if magic == 42 else 8)
        for _ in range(_MOST_DIRECTORIES):
            if at == 0:
                return
            (n_entries,) = struct.unpack_from(f"{order}{layout.count}", data, at)
            first = at + struct.calcsize(f"{order}{layout.count}")
            if first + n_entries * layout.entry_bytes > len(data):
                return
            yield _tags(data, first, n_entries, layout)
            (at,) = struct.unpack_from(f"{order}{layout.offset}", data, first + n_entries * layout.entry_bytes)
    except (struct.error, OverflowError):
        return


def _tags(data: bytes, first: int, n_entries: int, layout: _Layout) -> Tags:
    """Return the integer tags of a directory that this module uses."""
    wanted = {
        *(_NEW_SUBFILE_TYPE, _SUBFILE_TYPE, _BITS_PER_SAMPLE, _SAMPLES_PER_PIXEL, _SAMPLE_FORMAT),
        *(_PHOTOMETRIC, _SUB_DIRECTORIES, _DNG_VERSION),
    }
    tags: dict[int, tuple[int, ...]] = {}
    for start in range(first, first + n_entries * layout.entry_bytes, layout.entry_bytes):
        tag, kind = struct.unpack_from(f"{layout.order}HH", data, start)
        if tag not in wanted or kind not in _INTEGER_TYPES:
            continue
        (n_values,) = struct.unpack_from(f"{layout.order}{layout.offset}", data, start + 4)
        form = f"{layout.order}{min(n_values, _MOST_VALUES)}{_INTEGER_TYPES[kind]}"
        room = struct.calcsize(f"{layout.order}{layout.offset}")  # values that fit into the entry are stored in it
        at = start + 4 + room
        if n_values * struct.calcsize(f"{layout.order}{_INTEGER_TYPES[kind]}") > room:
            (at,) = struct.unpack_from(f"{layout.order}{layout.offset}", data, at)
        tags[tag] = struct.unpack_from(form, data, at)
    return tags


def _is_page(tags: Tags) -> bool:
    kind = tags.get(_NEW_SUBFILE_TYPE, (0,))
    older = tags.get(_SUBFILE_TYPE, (1,))
    return not (kind and kind[0] & (_REDUCED | _MASK)) and not (older and older[0] == 2)
