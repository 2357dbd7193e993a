"""Align two pictures and compare their fine structure, to decide whether one is a copy of the other. Needs OpenCV."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

LEAST_OVERALL = 0.8  # correlation of the small pictures, below which the fine structure is not compared
_SMALL_PX = 64
_SCALES = tuple(np.linspace(0.7, 1.0, 7))
_SMALLEST_OVERLAP = 0.4
_STOP = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 1e-4)

Grey = NDArray[np.uint8]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let OpenCV use one thread per call in the block."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


@dataclass(frozen=True)
class _Placing:
    """Where one picture lies in another: the part of it, in shares of its sides, and how well it fits there."""

    fit: float
    part: tuple[float, float, float, float]  # left, top, width, height
    around: Grey
    inner: Grey


def score(first: Grey | None, second: Grey | None) -> float:
    """Return the correlation of the fine structure of two pictures after alignment; 0 if they do not fit each other."""
    if first is None or second is None:
        return 0.0
    placings = []
    for other in (second, np.ascontiguousarray(second[:, ::-1])):
        placings += [_place(first, other), _place(other, first)]
    best = max(placings, key=lambda placing: placing.fit)
    return _detail(best) if best.fit >= LEAST_OVERALL else 0.0


def _place(around: Grey, inner: Grey) -> _Placing:
    """Find the place of `inner` in `around`, at any of a few scales."""
    large, small = _shrunk(around), _shrunk(inner)
    height, width = large.shape
    aspect = small.shape[0] / small.shape[1]
    widest = min(width, height / aspect)
    fit, part = -1.0, (0.0, 0.0, 1.0, 1.0)
    for scale in _SCALES:
        w = min(width, max(8, round(widest * scale)))
        h = min(height, max(8, round(w * aspect)))
        found = cv2.matchTemplate(large, cv2.resize(small, (w, h), interpolation=cv2.INTER_AREA), cv2.TM_CCOEFF_NORMED)
        _, value, _, (x, y) = cv2.minMaxLoc(found)
        if np.isfinite(value) and value > fit:
            fit, part = float(value), (x / width, y / height, w / width, h / height)
    return _Placing(fit, part, around, inner)


def _shrunk(picture: Grey) -> Grey:
    scale = _SMALL_PX / max(picture.shape)
    size = (max(8, round(picture.shape[1] * scale)), max(8, round(picture.shape[0] * scale)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


def _detail(placing: _Placing) -> float:
    """Refine the alignment, and return the correlation of the fine structure where the pictures overlap."""
    around, inner = placing.around, placing.inner
    (height, width), (h, w) = around.shape, inner.shape
    left, top, across, down = placing.part
    start = np.array([[across * width / w, 0, left * width], [0, down * height / h, top * height]], np.float32)
    try:
        _, warp = cv2.findTransformECC(inner, around, start, cv2.MOTION_AFFINE, _STOP, None, 5)
    except cv2.error:  # no convergence: the pictures have nothing in common
        return 0.0
    options = cv2.WARP_INVERSE_MAP
    aligned = cv2.warpAffine(around, warp, (w, h), flags=cv2.INTER_LINEAR | options)
    covered = cv2.warpAffine(np.ones_like(around), warp, (w, h), flags=cv2.INTER_NEAREST | options)
    inside = cv2.erode(covered, np.ones((9, 9), np.uint8)) > 0
    if inside.mean() < _SMALLEST_OVERLAP:
        return 0.0
    one, other = (_fine(picture)[inside] for picture in (aligned, inner))
    one, other = one - one.mean(), other - other.mean()
    return float((one * other).sum() / np.sqrt((one * one).sum() * (other * other).sum() + 1e-9))


def _fine(picture: Grey) -> NDArray[np.float32]:
    values = picture.astype(np.float32)
    return np.asarray(cv2.GaussianBlur(values, (0, 0), 1.0) - cv2.GaussianBlur(values, (0, 0), 4.0), np.float32)
