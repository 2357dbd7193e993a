"""What an image may look like in training: random views of it, each a pure function of (image, seed).

Four named policies and explicit transforms, all carried out by albumentations 2.0.8 (the last release under the MIT licence;
its successor is AGPL) and OpenCV, which nothing else in the project imports. A view has the model's input size and is uint8,
so `augment` takes the place that `preprocess` has in evaluation.

| policy  | crop, share of the area | mirrored left-right | colour | more |
|---------|-------------------------|---------------------|--------|------|
| none    | the centre crop of evaluation | no | no | |
| light   | 0.7 to 1   | never: safe for digits, text and whatever has a left and a right | slight | |
| default | 0.35 to 1  | half of the time | mild | |
| strong  | 0.2 to 1   | half of the time | strong, sometimes grey | rotation, shear, blur, erased patches |

Two things are done otherwise than the library does them by itself. Its generators repeat in every worker and epoch, and
``set_random_seed`` gives every transform the same stream, which ties the flip to the place of the crop; here all transforms
of one call draw from one stream that starts at `sample_seed` (seed, epoch, index). And it enlarges and shrinks alike by
bilinear interpolation, which aliases; here a crop is shrunk by averaging areas, for evaluation resamples with antialiasing too.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import os
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import cv2
import numpy as np

from finetune.bundle.preprocess import Preprocess
from finetune.errors import Problem, SpecError, did_you_mean

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would otherwise ask the package index for news
import albumentations as A
from albumentations.augmentations.crops.transforms import CropSizeError

cv2.setNumThreads(0)  # the loader's threads share out the cores; OpenCV's own would fight them

Policy = Literal["none", "light", "default", "strong"]

COMPOSITES = ("OneOf", "SomeOf", "RandomOrder", "Sequential")
# Left out: abstract classes, volumes, and what needs Python functions or files of its own.
_NOT_OFFERED = {"DualTransform", "ImageOnlyTransform", "Transform3D", "Lambda", "TextImage"}
# What the library raises on an image that a transform cannot take; of its own errors there is just this one.
_REFUSALS = (CropSizeError, ValueError, TypeError, LookupError, NotImplementedError, ArithmeticError, cv2.error)
_SMALLEST_CROP = {"none": 1.0, "light": 0.7, "default": 0.35, "strong": 0.2}


class Augment:
    """``augment(rgb, seed)``: (H, W, 3) uint8 → (h, w, 3) uint8. Threads may share it: each has its own transforms."""

    def __init__(
        self,
        name: str,
        transforms: Sequence[Any],
        preprocess: Preprocess,
        smallest_crop: float,
        rebuilt: Callable[[Preprocess], Augment],
    ) -> None:
        self.name = name
        self._rebuilt = rebuilt
        self.preprocess = preprocess
        self._pipeline = A.Compose(list(transforms), p=1.0)
        self._pads = preprocess.resize == "letterbox" and name in _SMALLEST_CROP
        self._smallest_crop = smallest_crop
        self._of_thread = threading.local()

    @property
    def decode_short_side_px(self) -> int:
        """The fewest pixels on an image's shorter side that leave even the smallest crop as many as the model's input."""
        return max(
            self.preprocess.decode_short_side_px, math.ceil(max(self.preprocess.input_size_px) / math.sqrt(self._smallest_crop))
        )

    def at_size(self, size_px: tuple[int, int]) -> Augment:
        """The same augmentation for views of another size (h, w)."""
        same = size_px == self.preprocess.input_size_px
        return self if same else self._rebuilt(replace(self.preprocess, input_size_px=size_px))

    def __call__(self, rgb: np.ndarray, seed: int) -> np.ndarray:
        if not self._pipeline.transforms:
            return self.preprocess(rgb)
        view = self.transformed(_padded(rgb, self.preprocess) if self._pads else rgb, seed)
        # Explicit transforms may leave any size; they are then framed as in evaluation.
        return view if view.shape[:2] == self.preprocess.input_size_px else self.preprocess(view)

    def transformed(self, rgb: np.ndarray, seed: int) -> np.ndarray:
        """What the transforms make of an image, not yet framed.

        Raises:
            SpecError: explicit transforms that cannot take an image of this size.
        """
        pipeline = self._pipeline_of_this_thread()
        pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        try:
            view: np.ndarray = pipeline(image=rgb)["image"]
        except _REFUSALS as error:
            size = f"{rgb.shape[1]}×{rgb.shape[0]}"
            raise SpecError(f"augmentation.transforms: fails on an image of {size} pixels: {_in_one_line(error)}") from error
        return view

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: everything that decides what a view looks like."""
        return {"name": self.name, "preprocess": self.preprocess.to_dict(), "pipeline": A.to_dict(self._pipeline)}

    def digest(self) -> str:
        """sha256 of `to_dict`: equal digests mean equal views of the same image and seed."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), default=str)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def _pipeline_of_this_thread(self) -> Any:
        """Transforms keep the state of a call in themselves, so threads cannot share them."""
        if not hasattr(self._of_thread, "pipeline"):
            self._of_thread.pipeline = copy.deepcopy(self._pipeline)
        return self._of_thread.pipeline


def build_augment(
    policy: Policy, transforms: Sequence[Mapping[str, Mapping[str, Any]]] | None, preprocess: Preprocess
) -> Augment:
    """The augmentation of a policy; explicit `transforms` take its place when given.

    Raises:
        SpecError: unknown transforms (with near misses), parameters they refuse, or a result that is not repeatable 8-bit RGB.
    """

    def rebuilt(preprocess: Preprocess) -> Augment:
        return build_augment(policy, transforms, preprocess)

    if transforms is None:
        return Augment(policy, _of_policy(policy, preprocess), preprocess, _SMALLEST_CROP[policy], rebuilt)
    problems: list[Problem] = []
    built = _build_all(transforms, "augmentation.transforms", problems)
    augment = Augment("transforms", built, preprocess, smallest_crop=0.25, rebuilt=rebuilt)
    if not problems:
        problems += _rehearse(augment)
    if problems:
        raise SpecError("the augmentation cannot be built", problems)
    return augment


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The 64-bit seed of one view: of position alone, so neither workers nor a resumed run can change it."""
    position = b"".join(number.to_bytes(8, "little") for number in (seed, epoch, index))
    return int.from_bytes(hashlib.blake2b(position, digest_size=8).digest(), "little")


def preview_grid(images: Sequence[np.ndarray], augment: Augment, *, seed: int = 0, n_views: int = 6) -> np.ndarray:
    """One row per image for people to look at, (rows * h, (1 + n_views) * w, 3) uint8: first as evaluated, then as trained on."""
    rows = []
    for index, rgb in enumerate(images):
        views = [augment(rgb, sample_seed(seed, epoch, index)) for epoch in range(n_views)]
        rows.append(np.concatenate([augment.preprocess(rgb), *views], axis=1))
    return np.concatenate(rows, axis=0)


# ---------------------------------------------------------------------------------------------------------------- policies


def _of_policy(policy: Policy, preprocess: Preprocess) -> list[Any]:
    if policy == "none":
        return []
    crop = _crop(preprocess, _SMALLEST_CROP[policy])
    if policy == "light":
        return [crop, A.ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.0, p=0.5)]
    if policy == "default":
        return [crop, A.HorizontalFlip(p=0.5), A.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.0, p=0.8)]
    return [
        crop,
        A.HorizontalFlip(p=0.5),
        A.Affine(rotate=(-15, 15), shear=(-8, 8), fill=preprocess.fill, p=0.5),
        A.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.05, p=0.8),
        A.ToGray(p=0.1),
        A.GaussianBlur(sigma_limit=(0.3, 1.5), p=0.1),
        A.CoarseDropout(
            num_holes_range=(1, 2), hole_height_range=(0.1, 0.3), hole_width_range=(0.1, 0.3), fill="random_uniform", p=0.25
        ),
    ]


class _RandomResizedWindow(A.RandomResizedCrop):
    """A random crop of the picture as squashing shows it: `ratio` is the window's shape once the image has taken the input's."""

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, tuple[int, int, int, int]]:
        height, width = params["shape"][:2]
        area = self.py_random.uniform(*self.scale)
        ratio = math.exp(self.py_random.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
        crop_w = max(1, round(width * min(1.0, math.sqrt(area * ratio))))
        crop_h = max(1, round(height * min(1.0, math.sqrt(area / ratio))))
        left = self.py_random.randint(0, width - crop_w)
        top = self.py_random.randint(0, height - crop_h)
        return {"crop_coords": (left, top, left + crop_w, top + crop_h)}


def _crop(preprocess: Preprocess, smallest: float) -> Any:
    kind = _RandomResizedWindow if preprocess.resize == "squash" else A.RandomResizedCrop
    return kind(
        size=preprocess.input_size_px,
        scale=(smallest, 1.0),
        ratio=(3 / 4, 4 / 3),
        interpolation=cv2.INTER_CUBIC,
        area_for_downscale="image",
        p=1.0,
    )


def _padded(rgb: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """The image on a canvas of the input's shape, as a letterbox shows it, at full resolution."""
    height, width = rgb.shape[:2]
    h, w = preprocess.input_size_px
    extra_h, extra_w = max(0, round(width * h / w) - height), max(0, round(height * w / h) - width)
    top, left = extra_h // 2, extra_w // 2
    canvas: np.ndarray = cv2.copyMakeBorder(
        rgb, top, extra_h - top, left, extra_w - left, cv2.BORDER_CONSTANT, value=preprocess.fill
    )
    return canvas


# ----------------------------------------------------------------------------------------------------- explicit transforms


def offered_transforms() -> list[str]:
    """The names that explicit transforms may use."""
    kinds = (A.ImageOnlyTransform, A.DualTransform)
    classes = {name: value for name, value in vars(A).items() if isinstance(value, type) and issubclass(value, kinds)}
    return sorted(name for name, value in classes.items() if name not in _NOT_OFFERED and not issubclass(value, A.Transform3D))


def _build_all(given: Sequence[Mapping[str, Mapping[str, Any]]], where: str, problems: list[Problem]) -> list[Any]:
    built = [_build(entry, f"{where}[{position}]", problems) for position, entry in enumerate(given)]
    return [transform for transform in built if transform is not None]


def _build(entry: Mapping[str, Mapping[str, Any]], where: str, problems: list[Problem]) -> Any:
    """One transform, or None and a problem."""
    if not isinstance(entry, Mapping) or len(entry) != 1:
        problems.append(Problem(where, "expected one transform with its parameters, for example {HorizontalFlip: {p: 0.5}}"))
        return None
    ((name, given),) = entry.items()
    offered = [*offered_transforms(), *COMPOSITES]
    if name not in offered:
        problems.append(Problem(where, f"unknown transform {name!r}.{did_you_mean(name, offered)}"))
        return None
    transform = getattr(A, name)
    parameters = dict(given or {})
    known = [parameter for parameter in inspect.signature(transform).parameters if parameter != "strict"]
    if unknown := [parameter for parameter in parameters if parameter not in known]:
        hints = "".join(did_you_mean(parameter, known) for parameter in unknown)
        problems.append(Problem(f"{where}.{name}", f"has no {', '.join(unknown)}; its parameters are {', '.join(known)}.{hints}"))
        return None
    if name in COMPOSITES:
        parameters["transforms"] = _build_all(parameters.get("transforms", ()), f"{where}.{name}.transforms", problems)
    elif "InitSchema" in vars(transform):
        parameters["strict"] = True  # otherwise some refusals are warnings, and defaults are taken instead
    try:
        return transform(**parameters)
    except (ValueError, TypeError) as error:
        problems.append(Problem(f"{where}.{name}", _in_one_line(error)))
        return None


def _rehearse(augment: Augment) -> list[Problem]:
    """Try the transforms on a made-up image: what needs masks, yields floats or ignores the seed is found before training."""
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


def _in_one_line(error: Exception) -> str:
    """The library's sentence on one line, without the addresses that pydantic adds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "errors.pydantic.dev" not in line]
    return "; ".join(lines) or type(error).__name__
