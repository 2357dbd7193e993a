"""Cache the decoded pixels of large photographs on disk, so that only the first epoch decodes them. Torch-free.

Decoding a 12-megapixel JPEG takes about 40 ms of a core, and reading its decoded pixels 1 ms. Small photographs decode almost as
fast as their pixels are read, so they are not stored (`LARGE_PX`). The key of a stored image is the sha256 of its file and the
way of decoding. Each is written atomically into a file of its own, so several runs can share the folder. The folder has a size
limit; images that do not fit are decoded again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from finetune.bundle.image import DECODER, decode_image, naming
from finetune.data.dataset import Sample
from finetune.errors import DiskFull, ImageError
from finetune.storage.files import write_atomic
from finetune.storage.store import Store, mark_used

LARGE_PX = 2_000_000  # pixels of the encoded image from which storing pays


class PixelStore:
    """Reads and decodes images through the cache. Threads and processes may share it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.folder = store.folder("pixels")

    def read(self, sample: Sample, short_side_px: int) -> np.ndarray:
        """Return the image, (H, W, 3) uint8, upright. The pixels are the same whether they were cached or not.

        Raises:
            ImageError: the file cannot be decoded, and its pixels are not cached; the error names it.
        """
        path = self._path(sample, short_side_px)
        if path is not None and (stored := _load(path)) is not None:
            return stored
        try:
            data = sample.file.read()
            rgb = decode_image(data, short_side_px=short_side_px)
        except ImageError as error:
            raise naming(str(sample.file), error) from None
        unchanged = path is not None and hashlib.sha256(data).hexdigest() == sample.sha256  # since it was checked
        if path is not None and unchanged:
            self._store(path, rgb)
        return rgb

    def _path(self, sample: Sample, short_side_px: int) -> Path | None:
        """Return the path of the sample's cached pixels; None if decoding is as fast as reading."""
        if not sample.sha256 or sample.size_px is None or sample.size_px[0] * sample.size_px[1] < LARGE_PX:
            return None
        return self.folder / f"{DECODER}-short-side-{short_side_px}" / sample.sha256[:2] / f"{sample.sha256}.npy"

    def _store(self, path: Path, rgb: np.ndarray) -> None:
        if not self.store.reserve(rgb.nbytes):
            return
        try:
            write_atomic(path, lambda stream: np.save(stream, rgb, allow_pickle=False), mode=0o600)
        except DiskFull:  # the image is decoded again the next time
            self.store.forget_room()


def _load(path: Path) -> np.ndarray | None:
    """Return the cached pixels and mark them as used; None if there are none, or they cannot be read."""
    try:
        rgb: np.ndarray = np.load(path, allow_pickle=False)
        mark_used(path)
    except FileNotFoundError:
        return None
    except (ValueError, EOFError):  # the file is damaged
        path.unlink(missing_ok=True)
        return None
    return rgb
