"""Images that are there more than once: the same bytes, or the same picture re-encoded, resized, cropped, mirrored or framed.

Who may be a copy of whom is told by the embeddings: a copy is among the nearest neighbours of its original, however it was
changed. Whether it is one is told by the pixels: the two pictures are laid over each other, as a mirrored picture and as a part
of the other one too, and their fine structure is compared, which two different things of one kind do not share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from finetune.data.dataset import Sample
from finetune.data.parallel import ordered_map
from finetune.doctor.looks import grey
from finetune.errors import ImageError
from finetune.progress import Progress, ProgressCallback, silent
from finetune.runtime.cores import available_cores

NEIGHBOURS = 3
LEAST_SIMILARITY = 0.6  # cosine of centred embeddings; measured: crops of four fifths of a side are above 0.64
LEAST_OVERALL = 0.8  # correlation of the small pictures, below which fine structure is not looked at
LEAST_DETAIL = 0.88  # correlation of fine structure; measured: copies from 0.87 up, others up to 0.87
_SMALL_PX, _LARGE_PX = 64, 160
_SCALES = tuple(np.linspace(0.7, 1.0, 7))
_SMALLEST_OVERLAP = 0.4
_STOP = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 1e-4)
_BLOCK_ROWS = 1024

Grey = NDArray[np.uint8]


@dataclass(frozen=True)
class Pair:
    """Two samples, by position, that show the same picture. `score` is the correlation of their fine structure."""

    first: int
    second: int
    score: float


def same_bytes(samples: Sequence[Sample]) -> list[list[int]]:
    """Return the positions of samples whose files have the same bytes, in groups of two or more."""
    found: dict[str, list[int]] = defaultdict(list)
    for position, sample in enumerate(samples):
        found[sample.sha256].append(position)
    return [group for group in found.values() if len(group) > 1]


def near_duplicates(
    samples: Sequence[Sample], embeddings: NDArray[np.float32], progress: ProgressCallback = silent
) -> list[Pair]:
    """Return pairs of different files that show the same picture, the surest first.

    Args:
        embeddings: (N, D), one row for each sample.
    """
    candidates = [(first, second) for first, second in _neighbours(embeddings) if samples[first].sha256 != samples[second].sha256]
    if not candidates:
        return []
    threads = available_cores()
    needed = sorted({position for pair in candidates for position in pair})
    pictures = dict(
        zip(needed, ordered_map(lambda one: _picture(samples[one]), needed, threads=threads, ahead=64 * threads), strict=True)
    )
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)  # each pair is small, and there are many
    try:
        found = []
        scores = ordered_map(
            lambda pair: _score(pictures[pair[0]], pictures[pair[1]]), candidates, threads=threads, ahead=64 * threads
        )
        for done, ((first, second), score) in enumerate(zip(candidates, scores, strict=True), start=1):
            if score >= LEAST_DETAIL:
                found.append(Pair(first, second, score))
            if done % 256 == 0 or done == len(candidates):
                progress(Progress("preparing", done, len(candidates), "pairs", message="comparing images"))
    finally:
        cv2.setNumThreads(before)
    return sorted(found, key=lambda pair: (-pair.score, pair.first, pair.second))


def clusters(n_samples: int, pairs: Iterable[Sequence[int]]) -> list[list[int]]:
    """Return the positions that pairs connect, directly or through others, in groups of two or more."""
    parent = list(range(n_samples))

    def root(one: int) -> int:
        while parent[one] != one:
            parent[one] = one = parent[parent[one]]
        return one

    for pair in pairs:
        first, *rest = (root(one) for one in pair)
        for other in rest:
            parent[max(first, other)] = min(first, other)
            first = min(first, other)
    found: dict[int, list[int]] = defaultdict(list)
    for position in range(n_samples):
        found[root(position)].append(position)
    return [group for group in found.values() if len(group) > 1]


def _neighbours(embeddings: NDArray[np.float32]) -> list[tuple[int, int]]:
    """Return pairs of which one is among the nearest neighbours of the other, (smaller, larger) position."""
    centred = embeddings - embeddings.mean(axis=0)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    count = min(NEIGHBOURS, len(centred) - 1)
    found: set[tuple[int, int]] = set()
    for start in range(0, len(centred) if count > 0 else 0, _BLOCK_ROWS):
        similarity = centred[start : start + _BLOCK_ROWS] @ centred.T  # (B, N)
        similarity[np.arange(len(similarity)), start + np.arange(len(similarity))] = -2.0
        nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
        for row, others in enumerate(nearest):
            for other in others:
                if similarity[row, other] >= LEAST_SIMILARITY:
                    one = start + row
                    found.add((min(one, int(other)), max(one, int(other))))
    return sorted(found)


def _picture(sample: Sample) -> Grey | None:
    try:
        return grey(sample, _LARGE_PX)
    except ImageError:
        return None


@dataclass(frozen=True)
class _Placing:
    """Where one picture lies in another one: a part of it, in shares of its sides, and how well it fits there."""

    fit: float
    part: tuple[float, float, float, float]  # left, top, width, height
    around: Grey
    inner: Grey


def _score(first: Grey | None, second: Grey | None) -> float:
    """Return how far two pictures agree in their fine structure once they are laid over each other; 0 where they do not fit."""
    if first is None or second is None:
        return 0.0
    placings = []
    for other in (second, np.ascontiguousarray(second[:, ::-1])):
        placings += [_place(first, other), _place(other, first)]
    best = max(placings, key=lambda placing: placing.fit)
    return _detail(best) if best.fit >= LEAST_OVERALL else 0.0


def _place(around: Grey, inner: Grey) -> _Placing:
    """Find where `inner` lies in `around`, at any of a few scales."""
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
    """Return the correlation of the fine structure after the placing has been refined."""
    around, inner = placing.around, placing.inner
    (height, width), (h, w) = around.shape, inner.shape
    left, top, across, down = placing.part
    start = np.array([[across * width / w, 0, left * width], [0, down * height / h, top * height]], np.float32)
    try:
        _, warp = cv2.findTransformECC(inner, around, start, cv2.MOTION_AFFINE, _STOP, None, 5)
    except cv2.error:  # it does not converge: the pictures have nothing in common
        return 0.0
    options = cv2.WARP_INVERSE_MAP
    laid = cv2.warpAffine(around, warp, (w, h), flags=cv2.INTER_LINEAR | options)
    covered = cv2.warpAffine(np.ones_like(around), warp, (w, h), flags=cv2.INTER_NEAREST | options)
    inside = cv2.erode(covered, np.ones((9, 9), np.uint8)) > 0
    if inside.mean() < _SMALLEST_OVERLAP:
        return 0.0
    one, other = (_fine(picture)[inside] for picture in (laid, inner))
    one, other = one - one.mean(), other - other.mean()
    return float((one * other).sum() / np.sqrt((one * one).sum() * (other * other).sum() + 1e-9))


def _fine(picture: Grey) -> NDArray[np.float32]:
    values = picture.astype(np.float32)
    return np.asarray(cv2.GaussianBlur(values, (0, 0), 1.0) - cv2.GaussianBlur(values, (0, 0), 4.0), np.float32)


def by_content(samples: Sequence[Sample]) -> Mapping[str, list[int]]:
    """Return the positions of samples by the sha256 of their bytes."""
    found: dict[str, list[int]] = defaultdict(list)
    for position, sample in enumerate(samples):
        found[sample.sha256].append(position)
    return found
