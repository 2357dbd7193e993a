"""Embed images in self-contained pages."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL_PX = 176


def thumbnail(image: NDArray[np.uint8]) -> bytes:
    """Return an image, (h, w, 3) RGB, as a small JPEG."""
    small = Image.fromarray(image)
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    stream = io.BytesIO()
    small.save(stream, format="JPEG", quality=82)
    return stream.getvalue()


def data_uri(data: bytes, media_type: str) -> str:
    """Return bytes as a ``data:`` URI for an ``<img>`` element."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
