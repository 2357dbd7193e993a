"""Choose unlabelled images to label next, by a bundle's probabilities and embeddings. Torch-free.

Left out are images whose labels would add nothing: files that the model was trained or validated on, exact duplicates, and near
duplicates of a chosen image or, if labelled data is given, of a labelled one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.bundle.predictor import Predictor, Seen, read_seen
from finetune.data.dataset import Sample
from finetune.data.index import index_dataset
from finetune.data.places.opening import check_present
from finetune.doctor.looks import look_at_all
from finetune.errors import DataError, InvalidInput, Problem
from finetune.evaluation.predict import SamplePrediction, UnreadableSample, image_samples, predict_samples
from finetune.labelling.choose import choose, unit
from finetune.labelling.queries import query_of
from finetune.labelling.suggestion import Suggestion, Suggestions
from finetune.messages import plural, printable
from finetune.progress import ProgressCallback, silent
from finetune.runtime.cores import available_cores
from finetune.tasks import Task

SHOWN_CLASSES = 3
NEIGHBOURS = 3  # labelled images that a suggestion is compared with


def suggest(
    bundle: Path,
    folders: Sequence[Path],
    n: int = 50,
    *,
    labelled: Path | str | None = None,
    seed: int = 0,
    progress: ProgressCallback = silent,
) -> Suggestions:
    """Choose `n` images from `folders` that are most informative for the model in `bundle`.

    Args:
        folders: folders, files and glob patterns.
        labelled: data with labels, in any supported format; near duplicates of its images are not suggested.

    Raises:
        InvalidInput: `n` is less than one.
        DataError: there is no readable unlabelled image.
    """
    if n < 1:
        raise InvalidInput(f"the number of suggestions must be at least 1, given {n}")
    check_present(*(folder for folder in folders if not set("*?[") & set(str(folder))), labelled)
    predictor = Predictor.load(bundle, threads=available_cores())
    manifest = predictor.manifest
    pool, unreadable = _predict(predictor, image_samples(folders), "the pictures", progress)
    known = _predict(predictor, _labelled(labelled), "the labelled pictures", progress)[0] if labelled is not None else []
    seen = read_seen(bundle) or Seen()
    fresh, same_bytes, n_seen = _without_known(pool, {one.sample.sha256 for one in known}, seen)
    if not fresh:
        problems = [Problem(printable(bad.sample.id), bad.error.message) for bad in unreadable[:10]]
        where = ", ".join(printable(folder) for folder in folders)
        raise DataError(f"{where}: holds no readable picture that is not labelled already", problems)
    certainty = PoolCertainty.of(predictor, np.stack([one.probs for one in fresh]).astype(np.float64))
    embeddings = np.stack([one.embedding for one in fresh])
    rows, blank, near = _chosen_without_copies(fresh, 1 - certainty.margins, embeddings, known, n, seed, progress)
    version = "" if manifest.version is None else f"@{manifest.version}"
    return Suggestions(
        f"{manifest.name}{version}",
        manifest.classes,
        predictor.task.name,
        len(pool) + len(unreadable),
        _described(fresh, rows, certainty, embeddings, folders),
        tuple(unreadable),
        same_bytes,
        n_seen,
        blank,
        near,
    )


@dataclass(frozen=True)
class PoolCertainty:
    """How certain a model is of N images.

    Args:
        margins: (N,) 0 is maximal uncertainty.
        thresholds: (C,) probabilities from which on labels are given; empty if the task decides without them.
    """

    task: Task
    classes: tuple[str, ...]
    probs: NDArray[np.float64]  # (N, C)
    margins: NDArray[np.float64]
    thresholds: NDArray[np.float64]

    @classmethod
    def of(cls, predictor: Predictor, probs: NDArray[np.float64]) -> PoolCertainty:
        """Return the certainty of the predictor about images with probabilities `probs` (N, C)."""
        thresholds = np.array(predictor.manifest.label_thresholds or (), np.float64)
        margins = query_of(predictor.task.name).margins(probs, thresholds)
        return cls(predictor.task, predictor.manifest.classes, probs, margins, thresholds)

    def given(self, row: int) -> tuple[str, ...]:
        """Return the labels that the model predicts for an image, the most probable first."""
        return tuple(self.classes[one] for one in self.task.predict_labels(self.probs[row], tuple(self.thresholds)))

    def likely(self, row: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Return the classes that an annotator is asked about first, with their probabilities."""
        order = query_of(self.task.name).order(self.probs[row], self.thresholds)[:SHOWN_CLASSES]
        return tuple(self.classes[one] for one in order), tuple(float(self.probs[row, one]) for one in order)


def _labelled(data: Path | str) -> Sequence[Sample]:
    return index_dataset(data, for_training=False).samples


def _predict(
    predictor: Predictor, samples: Sequence[Sample], what: str, progress: ProgressCallback
) -> tuple[list[SamplePrediction], list[UnreadableSample]]:
    predicted: list[SamplePrediction] = []
    unreadable: list[UnreadableSample] = []
    for prediction in predict_samples(predictor, samples, what=what, progress=progress):
        # Without the pixels: a pool may have many images.
        predicted.append(_without_picture(prediction)) if isinstance(prediction, SamplePrediction) else unreadable.append(
            prediction
        )
    return predicted, unreadable


def _without_picture(prediction: SamplePrediction) -> SamplePrediction:
    return SamplePrediction(
        prediction.sample, np.empty((0, 0, 3), np.uint8), prediction.probs, prediction.logits, prediction.embedding, None
    )


def _without_known(pool: Sequence[SamplePrediction], labelled: set[str], seen: Seen) -> tuple[list[SamplePrediction], int, int]:
    """Return the unlabelled predicted without exact duplicates; the number of duplicates; the number of labelled files."""
    fresh: dict[str, SamplePrediction] = {}
    same_bytes = n_seen = 0
    for one in pool:
        digest = one.sample.sha256
        if digest in labelled or seen.trained_on(digest) or seen.chosen_on(digest):
            n_seen += 1
        elif digest in fresh:
            same_bytes += 1
        else:
            fresh[digest] = one
    return list(fresh.values()), same_bytes, n_seen


def _chosen_without_copies(
    fresh: Sequence[SamplePrediction],
    uncertainty: NDArray[np.float64],
    embeddings: NDArray[np.float32],
    known: Sequence[SamplePrediction],
    n: int,
    seed: int,
    progress: ProgressCallback,
) -> tuple[list[int], int, int]:
    """Choose `n` rows; remove blank images and near duplicates of chosen or labelled images, and repeat until there are none.

    Returns:
        The rows, the number of blank images that were removed, and that of near duplicates.

    Raises:
        DataError: every image is blank.
    """
    left, n_blank = np.arange(len(fresh)), 0
    while True:
        if not len(left):
            raise DataError("every picture that is not labelled already has one colour throughout, so there is nothing to label")
        picked = left[choose(uncertainty[left], embeddings[left], n, seed)]
        if blank := _blank(fresh, picked):
            n_blank += len(blank)
            left = np.setdiff1d(left, blank)
            continue
        copies = _copies(fresh, embeddings, picked, known, progress)
        if not copies:
            return [int(one) for one in picked], n_blank, len(fresh) - len(left) - n_blank
        left = np.setdiff1d(left, sorted(copies))


def _blank(fresh: Sequence[SamplePrediction], picked: NDArray[np.int64]) -> list[int]:
    """Return the choices that show nothing, as `finetune check` judges it."""
    looks = look_at_all([fresh[one].sample for one in picked])
    return [int(one) for one in picked if (look := looks.get(fresh[one].sample.sha256)) is not None and look.is_blank]


def _copies(
    fresh: Sequence[SamplePrediction],
    embeddings: NDArray[np.float32],
    picked: NDArray[np.int64],
    known: Sequence[SamplePrediction],
    progress: ProgressCallback,
) -> set[int]:
    """Return the choices that are near duplicates of an earlier choice or of a labelled image."""
    from finetune.features.duplicates import clusters, near_duplicates  # imports OpenCV, which only this function needs

    near = _nearest(embeddings[picked], known)
    samples = [*(known[one].sample for one in near), *(fresh[one].sample for one in picked)]
    vectors = np.concatenate([*(known[one].embedding[None] for one in near), embeddings[picked]])
    pairs = near_duplicates(samples, vectors, progress)
    found: set[int] = set()
    for group in clusters(len(samples), ((pair.first, pair.second) for pair in pairs)):
        found.update(int(picked[one - len(near)]) for one in group[1:] if one >= len(near))
    return found


def _nearest(embeddings: NDArray[np.float32], known: Sequence[SamplePrediction]) -> list[int]:
    """Return the indices of the labelled images that are among the nearest to any of the embeddings."""
    if not known:
        return []
    of_known = np.stack([one.embedding for one in known])
    centre = of_known.mean(axis=0)
    near = unit(embeddings - centre) @ unit(of_known - centre).T
    count = min(NEIGHBOURS, len(known))
    return sorted({int(one) for row in np.argpartition(-near, count - 1, axis=1)[:, :count] for one in row})


def _described(
    fresh: Sequence[SamplePrediction],
    rows: Sequence[int],
    certainty: PoolCertainty,
    embeddings: NDArray[np.float32],
    folders: Sequence[Path],
) -> tuple[Suggestion, ...]:
    """Return the choices as suggestions with reasons, least certain first."""
    centred = unit(embeddings - embeddings.mean(axis=0))
    nearest = (centred @ centred[list(rows)].T).argmax(axis=1)  # (N,) the nearest suggestion to each image
    nearest[list(rows)] = np.arange(len(rows))
    stands_for = np.bincount(nearest, minlength=len(rows))
    certain = certainty.margins[list(rows)]
    found = []
    for rank, place in enumerate(np.argsort(certain, kind="stable"), start=1):
        row = rows[place]
        prediction = fresh[row]
        likely, probabilities = certainty.likely(row)
        found.append(
            Suggestion(
                rank,
                prediction.sample.id,
                _relative(prediction.sample.id, folders),
                prediction.sample.sha256,
                certainty.given(row),
                likely,
                probabilities,
                float(certain[place]),
                int(stands_for[place]),
                _reason(likely, probabilities, int(stands_for[place]), query_of(certainty.task.name).lead),
                prediction.sample,
            )
        )
    return tuple(found)


def _reason(likely: Sequence[str], probabilities: Sequence[float], stands_for: int, lead: str) -> str:
    said = f"{lead}{likely[0]} {probabilities[0]:.0%}"
    if len(likely) > 1:
        said += f", {likely[1]} {probabilities[1]:.0%}"
    others = (
        f"; nearest to {plural(stands_for - 1, 'picture')} that {'was' if stands_for == 2 else 'were'} not chosen"
        if stands_for > 1
        else "; unlike the others"
    )
    return said + others


def _relative(file: str, folders: Sequence[Path]) -> str:
    """Return a file's path relative to the folder in which it was found; its name if the file itself was given."""
    path = Path(file)
    for folder in folders:
        if path.is_relative_to(folder) and path != folder:
            return path.relative_to(folder).as_posix()
    return path.name
