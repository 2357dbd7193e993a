"""Build the transforms of the named policies and those of requests, with albumentations and OpenCV.

Only this module imports albumentations. It is imported when the first view is computed, because the import takes half a second,
which a run without augmentation does not need.
"""

from __future__ import annotations

import inspect
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import cv2
import numpy as np

from finetune.bundle.preprocess import Preprocess
from finetune.errors import Problem, SpecError, did_you_mean


@contextmanager
def _not_importable(module: str) -> Iterator[None]:
    """Make the import of a module fail in the block as if it were not installed, unless it is imported already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # without it, the import asks the package index for newer versions
with _not_importable("albumentations.pytorch"):  # optional, not used here, and it imports PyTorch, which takes seconds
    import albumentations as A
    from albumentations.augmentations.crops.transforms import CropSizeError

cv2.setNumThreads(0)  # the loader's threads use all cores already

Policy = Literal["none", "light", "default", "strong"]

COMPOSITES = ("OneOf", "SomeOf", "RandomOrder", "Sequential")
# Left out: abstract classes, volumes, and what needs Python functions or files of its own.
_NOT_OFFERED = {"DualTransform", "ImageOnlyTransform", "Transform3D", "Lambda", "TextImage"}
# The exceptions for an image that a transform cannot take; `CropSizeError` is the only one that the library defines itself.
_REFUSALS = (CropSizeError, ValueError, TypeError, LookupError, NotImplementedError, ArithmeticError, cv2.error)


def compose(transforms: Sequence[Any]) -> Any:
    """Return the composition of the transforms."""
    return A.Compose(list(transforms), p=1.0)


def described(pipeline: Any) -> dict[str, Any]:
    """Return the transforms as JSON values."""
    values: dict[str, Any] = A.to_dict(pipeline)
    return values


def transformed(pipeline: Any, rgb: np.ndarray, seed: int) -> np.ndarray:
    """Return the transformed image; all transforms draw from one random stream.

    Raises:
        SpecError: explicit transforms that cannot take an image of this size.
    """
    pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
    try:
        view: np.ndarray = pipeline(image=rgb)["image"]
    except _REFUSALS as error:
        size = f"{rgb.shape[1]}×{rgb.shape[0]}"
        raise SpecError(f"augmentation.transforms: fails on an image of {size} pixels: {in_one_line(error)}") from error
    return view


# ---------------------------------------------------------------------------------------------------------------- policies


def of_policy(policy: Policy, preprocess: Preprocess, smallest_crop: float) -> list[Any]:
    """Return the transforms of a named policy, whose crops contain at least `smallest_crop` of an image's area."""
    if policy == "none":
        return []
    crop = _crop(preprocess, smallest_crop)
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


def padded(rgb: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """Return the image on a canvas with the input's aspect ratio, as for letterboxing, at full resolution."""
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
    """Return the names that explicit transforms may use."""
    kinds = (A.ImageOnlyTransform, A.DualTransform)
    classes = {name: value for name, value in vars(A).items() if isinstance(value, type) and issubclass(value, kinds)}
    return sorted(name for name, value in classes.items() if name not in _NOT_OFFERED and not issubclass(value, A.Transform3D))


def build_all(given: Sequence[Mapping[str, Mapping[str, Any]]], where: str, problems: list[Problem]) -> list[Any]:
    built = [_build(entry, f"{where}[{position}]", problems) for position, entry in enumerate(given)]
    return [transform for transform in built if transform is not None]


def _build(entry: Mapping[str, Mapping[str, Any]], where: str, problems: list[Problem]) -> Any:
    """Return one transform; None if it cannot be built, which is added to the problems."""
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
        parameters["transforms"] = build_all(parameters.get("transforms", ()), f"{where}.{name}.transforms", problems)
    elif "InitSchema" in vars(transform):
        parameters["strict"] = True  # without it, some wrong parameters only cause a warning and are replaced by defaults
    try:
        return transform(**parameters)
    except (ValueError, TypeError) as error:
        problems.append(Problem(f"{where}.{name}", in_one_line(error)))
        return None


def in_one_line(error: Exception) -> str:
    """Return the library's message on one line, without the URLs that pydantic adds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "errors.pydantic.dev" not in line]
    return "; ".join(lines) or type(error).__name__
