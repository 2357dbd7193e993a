"""Convert images with an embedded colour profile to sRGB, which pretrained weights expect. Torch-free.

Phones write Display P3, cameras Adobe RGB, scanners Lab; without the conversion their colours are up to forty levels off. Images
without a profile are assumed to be sRGB. A profile that differs from sRGB only by rounding is ignored, so that ordinary files
keep their pixels bit for bit. Damaged profiles, and profiles for another kind of pixels, are ignored too, because the pixels are
usable.
"""

from __future__ import annotations

import functools
import hashlib
import io
import threading

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 4 * 1024 * 1024  # profiles of printers have about half a megabyte
_SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}  # Pillow's mode → the colour space that a profile of such pixels names
_SAME_LEVELS = 2  # a profile that changes no colour by more than this is sRGB with other rounding
_KINDS_OF_DEVICE = ("scnr", "mntr", "prtr", "spac")


class _Profiles:
    """A cache of transforms by profile and mode: building one may take 0.1 s, and a camera writes one profile into all files."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._profiles: dict[tuple[bytes, str], ImageCms.ImageCmsTransform | None] = {}

    def transform(self, profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
        """Return the transform to sRGB; None if the profile is sRGB already or cannot be used."""
        key = hashlib.sha256(profile).digest(), mode
        with self._lock:
            if key in self._profiles:
                return self._profiles[key]
        made = _build(profile, mode)
        with self._lock:
            while len(self._profiles) >= 32:
                del self._profiles[next(iter(self._profiles))]
            self._profiles[key] = made
        return made


_PROFILES = _Profiles()


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return an image without transparency as sRGB, mode RGB.

    Args:
        image: of mode L, RGB, CMYK or LAB; for another mode the profile is ignored.
        profile: the ICC profile embedded in the file.
    """
    if image.mode == "LAB":
        return _applied(image, _from_lab())
    if profile and image.mode in _SPACES and len(profile) <= MAX_PROFILE_BYTES:
        transform = _PROFILES.transform(profile, image.mode)
        if transform is not None:
            return _applied(image, transform)
    return image if image.mode == "RGB" else image.convert("RGB")


def _build(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB; None if they are equal, or if the profile is damaged or of another kind."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        described = source.profile
        if described.xcolor_space != _SPACES[mode] or described.device_class not in _KINDS_OF_DEVICE:
            return None
        transform = _transform(source, mode)
        colours = _sample_colours(mode)
        converted = _applied(colours, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    plain = np.asarray(colours.convert("RGB")).astype(np.int16)
    same = mode != "CMYK" and int(np.abs(np.asarray(converted) - plain).max()) <= _SAME_LEVELS
    return None if same else transform


def _transform(source: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    """Return the transform from a profile to sRGB for pixels of `mode`."""
    return ImageCms.buildTransform(
        source,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        # With tables of the default precision, Lab colours are up to three levels off.
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.HIGHRESPRECALC,
    )


@functools.cache
def _from_lab() -> ImageCms.ImageCmsTransform:
    return _transform(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), "LAB")


def _applied(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # only a conversion in place returns nothing
    return converted


def _sample_colours(mode: str) -> Image.Image:
    """Return an image of colours that cover the space: nine levels of each channel, for grey all levels."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    channels = len(Image.new(mode, (1, 1)).getbands())
    grid = np.stack(np.meshgrid(*[levels] * channels), axis=-1).reshape(1, -1, channels)
    return Image.frombytes(mode, (grid.shape[1], 1), np.ascontiguousarray(grid).tobytes())
