"""Find images that occur more than once: files with the same bytes, or the same picture re-encoded, resized, cropped or mirrored.

Candidates come from the embeddings, because a copy is among the nearest neighbours of its original, however it was changed. The
decision comes from the pixels: the two pictures are aligned, also mirrored and as a part of each other, and their fine structure
is compared (`finetune.features.alignment`), which two different things of one kind do not share. Torch-free.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.data.dataset import Sample
from finetune.data.grey import grey
from finetune.data.parallel import ordered_map
from finetune.errors import ImageError
from finetune.progress import Progress, ProgressCallback, silent
from finetune.runtime.cores import available_cores

NEIGHBOURS = 3
LEAST_SIMILARITY = 0.6  # cosine of centred embeddings; measured: crops of four fifths of a side are above 0.64
LEAST_DETAIL = 0.88  # correlation of the fine structure; measured: copies from 0.87 up, others up to 0.87
_LARGE_PX = 160  # longer side of the pictures that are compared
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
    """Return the pairs of different files that show the same picture, most certain first.

    Args:
        embeddings: (N, D), one row for each sample.
    """
    candidates = [(first, second) for first, second in _neighbours(embeddings) if samples[first].sha256 != samples[second].sha256]
    scores = compare_pictures(samples, candidates, progress)
    found = [Pair(*pair, score) for pair, score in zip(candidates, scores, strict=True) if score >= LEAST_DETAIL]
    return sorted(found, key=lambda pair: (-pair.score, pair.first, pair.second))


def compare_pictures(
    samples: Sequence[Sample], pairs: Sequence[tuple[int, int]], progress: ProgressCallback = silent, threads: int | None = None
) -> list[float]:
    """Return for each pair of positions the correlation of the two pictures' fine structure; `LEAST_DETAIL` makes them copies.

    The score is 0 if the pictures cannot be aligned, or if one of them cannot be read.
    """
    if not pairs:
        return []
    from finetune.features.alignment import one_thread, score  # imports OpenCV, which a run with known scores does not need

    threads = threads or available_cores()
    needed = sorted({position for pair in pairs for position in pair})
    pictures = dict(
        zip(needed, ordered_map(lambda one: _picture(samples[one]), needed, threads=threads, ahead=64 * threads), strict=True)
    )
    found = []
    with one_thread():  # there are many small pairs, which are compared in parallel
        scores = ordered_map(lambda pair: score(pictures[pair[0]], pictures[pair[1]]), pairs, threads=threads, ahead=64 * threads)
        for done, one in enumerate(scores, start=1):
            found.append(one)
            if done % 256 == 0 or done == len(pairs):
                progress(Progress("preparing", done, len(pairs), "pairs", message="comparing images"))
    return found


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
    """Return the pairs, smaller position first, of which one is among the nearest neighbours of the other."""
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
