"""Predict for a whole folder of images, in parts, so that a killed process can resume after its last finished part. Torch-free.

Each part is ``parts/<number>.npz``, a table of predictions, and ``parts/<number>.json``, the images that could not be read. When
all parts are finished they are joined to ``answers.csv``, ``answers.npz`` and, if pyarrow is installed, ``answers.parquet``.
``batch.json``, the result, is written last.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.bundle.predictor import Predictor
from finetune.data.dataset import Sample
from finetune.data.places import open_place
from finetune.data.reading import Reading
from finetune.errors import DataError, MissingExtra
from finetune.evaluation import predictions as tables
from finetune.evaluation.predict import SamplePrediction, UnreadableSample, predict_samples, predictions_table
from finetune.evaluation.predictions import Predictions
from finetune.evaluation.tables import write_table
from finetune.messages import plural, printable
from finetune.monitoring.statistics import PredictionStatistics, concatenated, read_statistics, statistics_of, write_statistics
from finetune.monitoring.window import WINDOW_IMAGES
from finetune.progress import Progress, ProgressCallback, silent
from finetune.storage.files import read_json, write_json

FORMATS = (".csv", ".npz", ".parquet")
PART_IMAGES = 512
STATISTICS = ".statistics"  # of a part: statistics of its predictions for drift monitoring, as .npz
SHOWN_UNREADABLE = 1000


def predict_folder(
    predictor: Predictor,
    images: Path,
    out: Path,
    *,
    embedding: bool = False,
    progress: ProgressCallback = silent,
    answered: Callable[[PredictionStatistics], None] = lambda _: None,
) -> dict[str, Any]:
    """Predict for every image under `images`, write the tables into the folder `out` and return the content of ``batch.json``.

    If ``batch.json`` exists, it is returned and nothing is computed.

    Args:
        images: a folder, an archive, or the stored form of an upload.
        embedding: write the embeddings too.
        answered: called before the result is written, with the statistics of the last predictions for drift monitoring.

    Raises:
        DataError: there is no image file under `images`.
    """
    result = out / "batch.json"
    if result.exists():
        found: dict[str, Any] = read_json(result)
        return found
    files = open_place(images, Reading()).tree.root().all_files()
    samples = [Sample(node.path, node.file, ()) for node in files if node.is_image]
    if not samples:
        raise DataError(f"{printable(images)}: holds no image file")
    parts, unreadable = out / "parts", []
    parts.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(samples), PART_IMAGES)):
        part = parts / f"{number:06d}.npz"
        if not part.exists():
            moved = _moved(progress, start, len(samples))
            _predict_part(predictor, samples[start : start + PART_IMAGES], part, embedding, moved)
        unreadable += read_json(part.with_suffix(".json"))
    statistics = [read_statistics(path.read_bytes())[0] for path in sorted(parts.glob(f"*{STATISTICS}"))]
    table = _joined([tables.read(part) for part in sorted(parts.glob("*.npz"))])
    manifest = predictor.manifest
    written = _write_tables(table, out, float(manifest.calibration.get("temperature", 1.0)))
    document = {
        "object": "batch_prediction",
        "id": out.name,
        "model": manifest.name,
        "version": manifest.version,
        "classes": list(manifest.classes),
        "n_answered": len(table),
        "n_unreadable": len(unreadable),
        "unreadable": unreadable[:SHOWN_UNREADABLE],
        "files": written,
        "summary": f"{plural(len(table), 'image')} predicted by {manifest.reference}"
        + (f", {len(unreadable):,} could not be read" if unreadable else ""),
    }
    if statistics:
        answered(concatenated(statistics).last(WINDOW_IMAGES))
    write_json(result, document)
    shutil.rmtree(parts)
    return document


def _statistics(predicted: Sequence[SamplePrediction], predictor: Predictor) -> PredictionStatistics:
    probs, embeddings = np.stack([one.probs for one in predicted]), np.stack([one.embedding for one in predicted])
    manifest = predictor.manifest
    return statistics_of(manifest.task, probs, embeddings, predictor.estimator.subspace, manifest.thresholds)


def _moved(progress: ProgressCallback, start: int, total: int) -> ProgressCallback:
    """Return a callback that reports a part's progress as progress of the whole; the part begins at image `start`."""

    def report(update: Progress) -> None:
        progress(replace(update, done=start + update.done, total=total, message=""))

    return report


def _predict_part(
    predictor: Predictor, samples: Sequence[Sample], part: Path, embedding: bool, progress: ProgressCallback
) -> None:
    predicted: list[SamplePrediction] = []
    unreadable: list[dict[str, str]] = []
    for prediction in predict_samples(predictor, samples, progress=progress):
        if isinstance(prediction, UnreadableSample):
            unreadable.append(_refused(prediction))
        else:
            predicted.append(prediction)
    table = predictions_table(predicted, predictor, "given", labelled=False)
    write_json(part.with_suffix(".json"), unreadable)
    if predicted:
        write_statistics(part.with_suffix(STATISTICS), _statistics(predicted, predictor))
    tables.write(part, table if embedding else replace(table, embedding=None))


def _refused(prediction: UnreadableSample) -> dict[str, str]:
    return {
        "file": printable(prediction.sample.id),
        "code": prediction.error.code,
        "message": printable(prediction.error.message),
    }


def _joined(parts: Sequence[Predictions]) -> Predictions:
    embeddings = [part.embedding for part in parts if part.embedding is not None]
    return replace(
        parts[0],
        ids=tuple(sample for part in parts for sample in part.ids),
        sha256=np.concatenate([part.sha256 for part in parts]),
        logits=np.concatenate([part.logits for part in parts]),
        embedding=np.concatenate(embeddings) if embeddings else None,
    )


def _write_tables(table: Predictions, out: Path, temperature: float) -> list[str]:
    """Write the predictions in every format whose library is installed; return the file names."""
    for suffix in FORMATS:
        with contextlib.suppress(MissingExtra):
            write_table(out / f"answers{suffix}", table, temperature)
    return [f"answers{suffix}" for suffix in FORMATS if (out / f"answers{suffix}").exists()]
