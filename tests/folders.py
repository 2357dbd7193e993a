"""Folders of class folders with small distinct images in them, for tests."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.data.dataset import LocalFile, Sample


def encoded(content: str, size_px: tuple[int, int] = (20, 16), format: str = "PNG", **options: int) -> bytes:
    """An image file (width, height) whose pixels are a function of `content`."""
    seed = int.from_bytes(hashlib.sha256(os.fsencode(content)).digest()[:8], "little")
    width, height = size_px
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(stream, format, **options)
    return stream.getvalue()


def write_classes(root: Path, counts: Mapping[str, int], size_px: tuple[int, int] = (20, 16)) -> Path:
    """``root/<class>/<number>.png``, all different, the same for the same names below `root`."""
    for name, count in counts.items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / f"{number}.png").write_bytes(encoded(f"{root.name}/{name}/{number}", size_px))
    return root


def local_sample(
    path: Path, target: int, split: str | None = None, sha256: str = "", size_px: tuple[int, int] | None = None
) -> Sample:
    """A sample on disk whose id is its path."""
    return Sample(str(path), LocalFile(path), target, split, sha256=sha256, size_px=size_px)


def path_of(sample: Sample) -> Path:
    """Where a sample on disk lies."""
    assert isinstance(sample.file, LocalFile)
    return sample.file.path
