"""Compute facts about each image file: format, mode, brightness, contrast, sharpness. Torch-free.

They are computed once and cached by the sha256 of the file, so a second examination decodes nothing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.bundle.image import DECODER
from finetune.bundle.image_formats import from_first_byte, sniff
from finetune.data.check import append_note
from finetune.data.dataset import Sample
from finetune.data.grey import grey
from finetune.data.parallel import ordered_map
from finetune.errors import ImageError
from finetune.progress import Progress, ProgressCallback, silent
from finetune.runtime.cores import available_cores

_VERSION = 2
_SIDE_PX = 128  # of the picture that is measured; blur is a matter of scale
_BLANK_CONTRAST = 4.0  # standard deviation of the grey values
_ANIMATED = ("GIF", "WEBP", "PNG")
_ORIENTATION, _MODEL = 0x0112, 0x0110  # EXIF tags


@dataclass(frozen=True)
class Look:
    """Facts about one image file.

    Args:
        mode: Pillow's name for the kind of pixels; empty if it is not known.
        brightness: mean of the grey values, 0 to 255; `darkest` and `brightest` are their 5th and 95th percentile.
        contrast: standard deviation of the grey values.
        sharpness: variance of the differences of neighbouring pixels, divided by the variance of the grey values.
        orientation: the EXIF value; 1 if the file is stored upright.
        animated: whether it has several frames, of which the first is used.
    """

    format: str
    mode: str
    n_bytes: int
    brightness: float
    darkest: float
    brightest: float
    contrast: float
    sharpness: float
    orientation: int = 1
    camera: str = ""
    animated: bool = False

    @property
    def is_blank(self) -> bool:
        """Whether the image shows nothing: one colour throughout."""
        return self.contrast < _BLANK_CONTRAST


def look_at_all(samples: Sequence[Sample], *, memory: Path | None = None, progress: ProgressCallback = silent) -> dict[str, Look]:
    """Return the facts about images by the sha256 of their bytes; images that cannot be read are left out."""
    known = _recall(memory)
    new = {sample.sha256: sample for sample in samples if sample.sha256 not in known}
    threads = available_cores()
    lines: list[str] = []
    for done, (sha256, look) in enumerate(
        zip(new, ordered_map(_look, new.values(), threads=threads, ahead=16 * threads), strict=True), start=1
    ):
        if look is not None:
            known[sha256] = look
            lines.append(json.dumps({"sha256": sha256, **asdict(look)}))
        if done % 64 == 0 or done == len(new):
            progress(Progress("preparing", done, len(new), "images", message="looking at images"))
    if memory is not None:
        append_note(_notes(memory), "".join(f"{line}\n" for line in lines))
    wanted = {sample.sha256 for sample in samples}
    return {sha256: look for sha256, look in known.items() if sha256 in wanted}


def _look(sample: Sample) -> Look | None:
    try:
        data = sample.file.read()
        values = grey(sample, _SIDE_PX).astype(np.float32)
    except ImageError:
        return None
    facts = _facts_of_file(data)
    between = [np.diff(values, axis=axis).var() for axis in (0, 1)]
    variance = float(values.var())
    return Look(
        **facts,
        n_bytes=len(data),
        brightness=round(float(values.mean()), 2),
        darkest=float(np.percentile(values, 5)),
        brightest=float(np.percentile(values, 95)),
        contrast=round(variance**0.5, 2),
        sharpness=round(float(np.mean(between)) / variance, 5) if variance > 0 else 0.0,
    )


def _facts_of_file(data: bytes) -> dict[str, Any]:
    """Return the facts in the header of a file that can be decoded; only the format if Pillow alone cannot read it."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            exif = picture.getexif()
            camera = exif.get(_MODEL)
            return {
                "format": picture.format or "",
                "mode": picture.mode,
                "orientation": int(exif.get(_ORIENTATION, 1) or 1),
                "camera": camera.strip("\x00 ")[:80] if isinstance(camera, str) else "",
                "animated": picture.format in _ANIMATED and bool(getattr(picture, "is_animated", False)),
            }
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError):
        return {"format": sniff(from_first_byte(data)), "mode": "", "orientation": 1, "camera": ""}  # HEIC: Pillow alone cannot


def _notes(memory: Path) -> Path:
    return memory / f"looks-{_VERSION}-{DECODER}.jsonl"


def _recall(memory: Path | None) -> dict[str, Look]:
    if memory is None or not _notes(memory).exists():
        return {}
    found = {}
    for line in _lines(_notes(memory)):
        try:
            facts: Mapping[str, Any] = json.loads(line)
            found[str(facts["sha256"])] = Look(**{key: value for key, value in facts.items() if key != "sha256"})
        except (ValueError, KeyError, TypeError):
            continue  # a killed process left this line incomplete
    return found


def _lines(path: Path) -> Iterable[str]:
    with open(path, encoding="utf-8", errors="replace") as stream:
        yield from stream
