"""Preprocess RGB pixels of any size into the uint8 input of a model: the only implementation in the project. Torch-free.

Evaluation, export checks, ``predict`` and the server use it. A centred box is resampled once, with antialiasing, without an
intermediate image. Normalisation is not done here: `mean` and `std` are stored for the ONNX graph and the classifier, which apply
them to uint8 pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from finetune.bundle.image import Box, naming, open_upright, read_bytes
from finetune.bundle.image_limits import DEFAULT_LIMITS, ImageLimits
from finetune.errors import BundleError, ImageError, Problem

Resize = Literal["crop", "squash", "letterbox"]
Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}

# A JPEG is decoded at this multiple of the input size or more, so that the antialiased resample determines the result, and not
# the reduced DCT scale.
_DECODE_MARGIN = 2

_SidePx = Annotated[int, Field(ge=1, le=4096)]
_Level = Annotated[int, Field(ge=0, le=255)]
_Std = Annotated[float, Field(gt=0.0)]


@dataclass(frozen=True)
class Framing:
    """The part of an image that is resampled, and its place in the input."""

    box: Box  # in pixels of the image
    size_px: tuple[int, int]  # (h, w) of the box after resampling
    corner_px: tuple[int, int]  # (top, left) of the box in the input; the rest is `fill`


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing of images for one model.

    `resize` is the mode for an image with another aspect ratio than the input: ``crop`` keeps the aspect ratio and cuts off the
    longer ends, ``squash`` keeps the whole image and changes its aspect ratio, ``letterbox`` keeps both and pads with `fill`.
    `crop_fraction` then is the share of each side that is kept, around the centre; 1.0 keeps everything.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    input_size_px: tuple[_SidePx, _SidePx]  # (h, w)
    resize: Resize
    crop_fraction: Annotated[float, Field(gt=0.0, le=1.0)]
    interpolation: Interpolation
    fill: tuple[_Level, _Level, _Level]
    mean: tuple[float, float, float]  # of values in 0..1
    std: tuple[_Std, _Std, _Std]

    @property
    def decode_short_side_px(self) -> int:
        """The number of pixels on the shorter side that an image must be decoded with at least, if it has them."""
        return math.ceil(_DECODE_MARGIN * max(self.input_size_px) / self.crop_fraction)

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """Return RGB pixels (H, W, 3) uint8 of any size as the input (h, w, 3) uint8."""
        height, width = rgb.shape[:2]
        return self.resample(Image.fromarray(rgb), (0.0, 0.0, width, height))

    def load(self, data: bytes, *, limits: ImageLimits = DEFAULT_LIMITS) -> np.ndarray:
        """Return an encoded image as the input (h, w, 3) uint8.

        Raises:
            ImageError: as `decode_image`.
        """
        return self.resample(*self.decode(data, limits=limits))

    def decode(self, data: bytes, *, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[Image.Image, Box]:
        """Return an encoded image as an RGB image, and the box of it that has content: what `resample` takes.

        Raises:
            ImageError: as `decode_image`.
        """
        return open_upright(data, short_side_px=self.decode_short_side_px, limits=limits)

    def load_file(self, path: Path, *, limits: ImageLimits = DEFAULT_LIMITS) -> np.ndarray:
        """Return the image file at `path` as the input (h, w, 3) uint8; errors name the file."""
        try:
            return self.load(read_bytes(path, limits), limits=limits)
        except ImageError as error:
            raise naming(path, error) from None

    def framing(self, height: float, width: float) -> Framing:
        """Return the framing of an image of this size. This is the only place where the resize modes are implemented."""
        h, w = self.input_size_px
        scale_y, scale_x = h / height, w / width  # input pixels per image pixel, if the image filled the input
        if self.resize == "crop":
            scale_y = scale_x = max(scale_y, scale_x)
        elif self.resize == "letterbox":
            scale_y = scale_x = min(scale_y, scale_x)
        top, bottom, h_inner = _centred(height, h, scale_y / self.crop_fraction)
        left, right, w_inner = _centred(width, w, scale_x / self.crop_fraction)
        return Framing((left, top, right, bottom), (h_inner, w_inner), ((h - h_inner) // 2, (w - w_inner) // 2))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Preprocess:
        """Return the inverse of `to_dict`.

        Raises:
            BundleError: some fields are missing or not valid; the problems name them.
        """
        try:
            return _ADAPTER.validate_python(dict(given))
        except ValidationError as error:
            raise BundleError("the preprocessing cannot be read", problems_of(error)) from None

    def digest(self) -> str:
        """Return the sha256 of the canonical JSON; equal preprocessings have equal digests."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def resample(self, image: Image.Image, picture: Box) -> np.ndarray:
        """Return the input (h, w, 3) uint8 from the box `picture` of an RGB image."""
        x, y = picture[:2]
        framing = self.framing(picture[3] - y, picture[2] - x)
        left, top, right, bottom = framing.box
        h_inner, w_inner = framing.size_px
        box = (x + left, y + top, x + right, y + bottom)
        inner = image.resize((w_inner, h_inner), _FILTERS[self.interpolation], box=box, reducing_gap=None)
        if framing.size_px == self.input_size_px:
            return np.array(inner)
        pixels = np.empty((*self.input_size_px, 3), np.uint8)
        pixels[:] = self.fill
        top, left = framing.corner_px
        pixels[top : top + h_inner, left : left + w_inner] = np.asarray(inner)
        return pixels


_ADAPTER = TypeAdapter(Preprocess)


def _centred(side: float, target: int, scale: float) -> tuple[float, float, int]:
    """Return, for one axis, the interval of the image that is used, and the number of input pixels that it fills.

    Args:
        side: of the image, in pixels.
        target: side of the input, in pixels.
        scale: input pixels per image pixel.
    """
    shown = min(side, target / scale)
    start = (side - shown) / 2
    return start, min(side, start + shown), min(target, max(1, round(shown * scale)))


def problems_of(error: ValidationError) -> list[Problem]:
    """Convert pydantic's errors into problems, with the path of each field."""
    return [Problem(".".join(str(part) for part in detail["loc"]), detail["msg"]) for detail in error.errors(include_url=False)]
