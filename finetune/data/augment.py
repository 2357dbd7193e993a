"""Augment training images: random views, each a pure function of (image, seed).

There are four named policies and explicit transforms, all carried out by albumentations 2.0.8 (the last release under the MIT
licence; its successor is AGPL) and OpenCV. A view has the model's input size and is uint8, so augmentation in training takes the
place of preprocessing in evaluation.

| policy  | crop, share of the area | mirrored left-right | colour | more |
|---------|-------------------------|---------------------|--------|------|
| none    | the centre crop of evaluation | no | no | |
| light   | 0.7 to 1   | never: safe for digits, text and whatever has a left and a right | slight | |
| default | 0.35 to 1  | half of the time | mild | |
| strong  | 0.2 to 1   | half of the time | strong, sometimes grey | rotation, shear, blur, erased patches |

Two defaults of the library are replaced. Its random generators repeat in every worker and epoch, and ``set_random_seed`` gives
every transform the same stream, which correlates the flip with the position of the crop; here all transforms of one call draw
from one stream that starts at `sample_seed` (seed, epoch, index). The library also shrinks by bilinear interpolation, which
aliases; here a crop is shrunk by averaging areas, because evaluation resamples with antialiasing too.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from finetune.bundle.preprocess import Preprocess
from finetune.errors import DiskFull, Problem, SpecError
from finetune.storage.files import write_atomic

if TYPE_CHECKING:
    from finetune.data.transforms import Policy

_SMALLEST_CROP = {"none": 1.0, "light": 0.7, "default": 0.35, "strong": 0.2}


class _Arguments(NamedTuple):
    """The arguments that an augmentation was built from, except the preprocessing."""

    policy: Policy
    transforms: Sequence[Mapping[str, Mapping[str, Any]]] | None
    notes: Path | None


class Augment:
    """Computes ``augment(rgb, seed)``: (H, W, 3) uint8 → (h, w, 3) uint8. Threads may share it; each has its own transforms."""

    def __init__(
        self,
        name: str,
        make_transforms: Callable[[], Sequence[Any]],
        preprocess: Preprocess,
        smallest_crop: float,
        given: _Arguments,
    ) -> None:
        self.name = name
        self._given = given
        self.preprocess = preprocess
        self._make_transforms = make_transforms
        self._pads = preprocess.resize == "letterbox" and name in _SMALLEST_CROP
        self._smallest_crop = smallest_crop
        self._of_thread = threading.local()

    @property
    def decode_short_side_px(self) -> int:
        """The least length of an image's shorter side with which the smallest crop still has the model's input size."""
        return max(
            self.preprocess.decode_short_side_px, math.ceil(max(self.preprocess.input_size_px) / math.sqrt(self._smallest_crop))
        )

    def at_size(self, size_px: tuple[int, int]) -> Augment:
        """Return the same augmentation for views of another size (h, w)."""
        same = size_px == self.preprocess.input_size_px
        return self if same else _rebuilt(self._given, replace(self.preprocess, input_size_px=size_px))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments only; another process builds the augmentation again from them."""
        return _rebuilt, (self._given, self.preprocess)

    def __call__(self, rgb: np.ndarray, seed: int) -> np.ndarray:
        if not self._pipeline.transforms:
            return self.preprocess(rgb)
        view = self.transformed(_transforms().padded(rgb, self.preprocess) if self._pads else rgb, seed)
        # Explicit transforms may leave any size; they are then framed as in evaluation.
        return view if view.shape[:2] == self.preprocess.input_size_px else self.preprocess(view)

    def transformed(self, rgb: np.ndarray, seed: int) -> np.ndarray:
        """Return an image after the transforms, before it is brought to the input size.

        Raises:
            SpecError: explicit transforms that cannot take an image of this size.
        """
        view: np.ndarray = _transforms().transformed(self._pipeline_of_this_thread(), rgb, seed)
        return view

    def to_dict(self) -> dict[str, Any]:
        """Return everything that determines a view, as JSON values."""
        return {"name": self.name, "preprocess": self.preprocess.to_dict(), "pipeline": _transforms().described(self._pipeline)}

    def digest(self) -> str:
        """Return the sha256 of `to_dict`: equal digests mean equal views of the same image and seed.

        If there is a folder for notes, the digest is kept there, so that later processes need not import albumentations for it.
        """
        notes = self._given.notes
        note = notes / f"views-{self._identity()}.txt" if notes and self.name in _SMALLEST_CROP else None
        if note is not None and note.is_file():
            return note.read_text("ascii")
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), default=str)
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        if note is not None:
            with contextlib.suppress(DiskFull):
                write_atomic(note, lambda stream: stream.write(digest.encode("ascii")))
        return digest

    def _identity(self) -> str:
        """Return what determines the digest of a named policy: its arguments, this module's code, and the library's version."""
        code = [Path(__file__).with_name(name).read_bytes() for name in ("augment.py", "transforms.py")]
        parts = (self.name, self.preprocess.to_dict(), importlib.metadata.version("albumentations"), code)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @cached_property
    def _pipeline(self) -> Any:
        return _transforms().compose(self._make_transforms())

    def _pipeline_of_this_thread(self) -> Any:
        """Return the transforms of this thread. Transforms store the state of a call, so threads cannot share them."""
        if not hasattr(self._of_thread, "pipeline"):
            self._of_thread.pipeline = copy.deepcopy(self._pipeline)
        return self._of_thread.pipeline


def build_augment(
    policy: Policy,
    transforms: Sequence[Mapping[str, Mapping[str, Any]]] | None,
    preprocess: Preprocess,
    notes: Path | None = None,
) -> Augment:
    """Return the augmentation of a policy, or of explicit `transforms` if they are given.

    Args:
        notes: a folder in which the digests of policies are kept.

    Raises:
        SpecError: transforms are unknown (similar names are listed), refuse their parameters, or do not return repeatable 8-bit
            RGB.
    """
    given = _Arguments(policy, transforms, notes)
    if transforms is None:
        smallest = _SMALLEST_CROP[policy]
        return Augment(policy, lambda: _transforms().of_policy(policy, preprocess, smallest), preprocess, smallest, given)
    problems: list[Problem] = []
    built = _transforms().build_all(transforms, "augmentation.transforms", problems)
    augment = Augment("transforms", lambda: built, preprocess, smallest_crop=0.25, given=given)
    if not problems:
        problems += _check_transforms(augment)
    if problems:
        raise SpecError("the augmentation cannot be built", problems)
    return augment


def _rebuilt(given: _Arguments, preprocess: Preprocess) -> Augment:
    return build_augment(given.policy, given.transforms, preprocess, given.notes)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Return the 64-bit seed of one view. It depends on the position alone, so it is the same in a resumed run."""
    position = b"".join(number.to_bytes(8, "little") for number in (seed, epoch, index))
    return int.from_bytes(hashlib.blake2b(position, digest_size=8).digest(), "little")


def _check_transforms(augment: Augment) -> list[Problem]:
    """Try the transforms on a synthetic image, to refuse those that need masks, return floats or ignore the seed."""
    rgb = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    where = "augmentation.transforms"
    try:
        for seed in range(8):
            view, again = augment.transformed(rgb, seed), augment.transformed(rgb, seed)
            if view.dtype != np.uint8 or view.ndim != 3 or view.shape[2] != 3:
                return [
                    Problem(where, f"must leave 8-bit RGB, not {view.dtype} {view.shape}; normalising is the model's own work")
                ]
            if not np.array_equal(view, again):
                return [
                    Problem(where, "gives different views for one seed, so a run could not be repeated; leave that transform out")
                ]
    except SpecError as error:
        return [Problem(where, error.message.removeprefix(f"{where}: "))]
    return []


def _transforms() -> Any:
    """Import and return the module that needs albumentations."""
    from finetune.data import transforms

    return transforms
