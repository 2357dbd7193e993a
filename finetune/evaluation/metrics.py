"""From logits and labels to every figure that judges a classifier: accuracy, calibration, confusion, per-class table.

Knows numpy and nothing else: the logits of a torch model and of its exported ONNX graph go through this one function. Sums are
taken in float64 in a fixed order, so equal logits give equal figures to the last bit. A class that has no image in the split is
left out of the means over classes, and named in `Evaluation.absent`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import InvalidInput, TrainingError
from finetune.storage.files import read_json, write_atomic

ECE_BINS = 15
"""Equal-width bins of the top label's probability, each open below and closed above: ``(i/15, (i+1)/15]`` (Guo et al. 2017)."""

TOP_K = 5
_Z95 = 1.959963984540054  # the 0.975 quantile of the standard normal
_BLOCK_ROWS = 4096  # bounds the float64 copy of the logits; fixed, so that sums do not depend on memory
_BETA_LIMIT = 100.0  # inverse temperatures are looked for between 1/100 and 100

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class ClassMetrics:
    """One row of the per-class table. A ratio whose denominator is zero is None, never 0 or 1."""

    name: str
    n: int  # images of this class
    n_predicted: int  # images given this label
    n_correct: int
    precision: float | None  # None: this label was never given
    recall: float | None  # None: no image of this class in the split
    f1: float | None  # None: no image of this class in the split


@dataclass(frozen=True)
class ReliabilityBin:
    """Images whose top probability lies in ``(lower, upper]``."""

    lower: float
    upper: float
    n: int
    confidence: float | None  # mean top probability; None when the bin is empty
    accuracy: float | None


@dataclass(frozen=True)
class Evaluation:
    """What a classifier did on one split. `brier` is the sum over classes, so it runs from 0 to 2; `nll` is in nats."""

    classes: tuple[str, ...]
    n: int
    top1: float
    top1_interval: tuple[float, float]  # Wilson, 95 %
    top5: float
    top5_k: int  # min(5, number of classes)
    macro_f1: float
    mean_per_class_accuracy: float
    nll: float
    ece: float
    brier: float
    confusion: tuple[tuple[int, ...], ...]  # [true][predicted] counts, (C, C)
    per_class: tuple[ClassMetrics, ...]
    bins: tuple[ReliabilityBin, ...]

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes without an image in this split; the means over classes leave them out."""
        return tuple(row.name for row in self.per_class if row.n == 0)

    def metrics(self, split: str) -> dict[str, float]:
        """The flat figures under their ``split/name`` keys; the loss of an evaluation is the plain NLL."""
        values = {
            "loss": self.nll,
            "top1": self.top1,
            "top5": self.top5,
            "macro_f1": self.macro_f1,
            "mean_per_class_accuracy": self.mean_per_class_accuracy,
            "ece": self.ece,
            "brier": self.brier,
        }
        return {f"{split}/{name}": value for name, value in values.items()}

    def confused_pairs(self, limit: int) -> list[tuple[str, str, int]]:
        """The most frequent mistakes as (true, predicted, count), largest first, ties in class order."""
        matrix = np.array(self.confusion, dtype=np.int64)
        np.fill_diagonal(matrix, 0)
        order = np.argsort(-matrix, axis=None, kind="stable")[:limit]
        cells = (divmod(int(cell), len(self.classes)) for cell in order)
        found = [(self.classes[true], self.classes[given], int(matrix[true, given])) for true, given in cells]
        return [pair for pair in found if pair[2]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evaluation:
        """The inverse of `to_json`, also after a trip through a JSON file, where tuples became lists."""
        return cls(
            **{
                **data,
                "classes": tuple(data["classes"]),
                "top1_interval": tuple(data["top1_interval"]),
                "confusion": tuple(tuple(row) for row in data["confusion"]),
                "per_class": tuple(ClassMetrics(**row) for row in data["per_class"]),
                "bins": tuple(ReliabilityBin(**row) for row in data["bins"]),
            }
        )


@dataclass(frozen=True)
class Mistake:
    """One image that was labelled wrongly; `index` is its row in the logits."""

    index: int
    true: int
    predicted: int
    confidence: float  # the probability that the wrong label was given
    true_probability: float


@dataclass(frozen=True)
class Temperature:
    """The fitted divisor of the logits. Both ECEs are measured on the images it was fitted on, so `ece_after` is optimistic."""

    temperature: float
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float
    n: int
    at_limit: bool  # the best value lies outside 1/100 .. 100, as when every image is labelled rightly: do not apply it


def evaluate_logits(logits: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]], classes: Sequence[str]) -> Evaluation:
    """Judge `logits` (N, C) against `labels` (N,).

    Raises:
        InvalidInput: no image, or shapes and labels that do not fit each other.
        TrainingError: a logit is NaN or infinite.
    """
    labels = _checked(logits, labels, len(classes))
    n, n_classes = logits.shape
    rows = _judge_rows(logits, labels)
    confusion = np.bincount(labels * n_classes + rows.predicted, minlength=n_classes**2).reshape(n_classes, n_classes)
    per_class = _per_class(confusion, classes)
    present = [row for row in per_class if row.n]
    n_correct = int(np.trace(confusion))
    bins = _reliability_bins(rows.confidence, rows.predicted == labels)
    return Evaluation(
        classes=tuple(classes),
        n=n,
        top1=n_correct / n,
        top1_interval=wilson_interval(n_correct, n),
        top5=float(np.count_nonzero(rows.rank < TOP_K)) / n,
        top5_k=min(TOP_K, n_classes),
        macro_f1=math.fsum(row.f1 or 0.0 for row in present) / len(present),
        mean_per_class_accuracy=math.fsum(row.recall or 0.0 for row in present) / len(present),
        nll=math.fsum(rows.nll) / n,
        ece=_ece(bins),
        brier=math.fsum(rows.brier) / n,
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        per_class=per_class,
        bins=bins,
    )


def confident_mistakes(logits: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]], limit: int) -> tuple[Mistake, ...]:
    """The wrong answers given with the most confidence, most confident first, ties in row order."""
    labels = _checked(logits, labels, logits.shape[1])
    rows = _judge_rows(logits, labels)
    confidence = np.where(rows.predicted == labels, -1.0, rows.confidence)
    order = np.argsort(-confidence, kind="stable")[: min(limit, int(np.count_nonzero(rows.predicted != labels)))]
    return tuple(
        Mistake(int(i), int(labels[i]), int(rows.predicted[i]), float(rows.confidence[i]), math.exp(-rows.nll[i])) for i in order
    )


def fit_temperature(logits: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]) -> Temperature:
    """Find the T > 0 that minimises the NLL of ``logits / T`` (Guo et al. 2017, arXiv:1706.04599).

    The NLL is convex in 1/T, so Newton's method inside a shrinking bracket finds the one minimum. The predicted labels stay as
    they are. Fit it on val, never on the test split.
    """
    labels = _checked(logits, labels, logits.shape[1])
    beta = _best_beta(logits, labels)
    before = _judge_rows(logits, labels)
    after = _judge_rows(logits, labels, beta)
    n = len(labels)
    return Temperature(
        temperature=1.0 / beta,
        nll_before=math.fsum(before.nll) / n,
        nll_after=math.fsum(after.nll) / n,
        ece_before=_ece(_reliability_bins(before.confidence, before.predicted == labels)),
        ece_after=_ece(_reliability_bins(after.confidence, after.predicted == labels)),
        n=n,
        at_limit=beta in (1.0 / _BETA_LIMIT, _BETA_LIMIT),
    )


def wilson_interval(n_correct: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927): inside 0..1 and honest also when `n_correct` is 0 or `n`."""
    share = n_correct / n
    centre = share + _Z95**2 / (2 * n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + _Z95**2 / (4 * n**2))
    scale = 1 + _Z95**2 / n
    return max(0.0, min(share, (centre - half) / scale)), min(1.0, max(share, (centre + half) / scale))


def write_evaluations(path: Path, evaluations: Mapping[str, Evaluation], temperature: Temperature | None = None) -> None:
    """Write ``evaluation.json``: each split's evaluation, and the temperature if one was fitted. Compact: confusion is large."""
    document = {
        "schema_version": 1,
        "splits": {split: evaluation.to_json() for split, evaluation in evaluations.items()},
        "temperature": asdict(temperature) if temperature else None,
    }
    text = json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(path, lambda stream: stream.write(text.encode()))


def read_evaluations(path: Path) -> dict[str, Evaluation]:
    """The evaluations by split, from ``evaluation.json``."""
    return {split: Evaluation.from_json(data) for split, data in read_json(path)["splits"].items()}


@dataclass(frozen=True)
class _Rows:
    """One value an image."""

    predicted: Integers
    rank: Integers  # of the true class: 0 is best
    confidence: Floats  # probability of the predicted class
    nll: Floats
    brier: Floats


def _judge_rows(logits: NDArray[np.floating[Any]], labels: Integers, beta: float = 1.0) -> _Rows:
    starts = range(0, len(labels), _BLOCK_ROWS)
    parts = [_judge_block(logits[i : i + _BLOCK_ROWS], labels[i : i + _BLOCK_ROWS], beta) for i in starts]
    return _Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _judge_block(
    logits: NDArray[np.floating[Any]], labels: Integers, beta: float
) -> tuple[Integers, Integers, Floats, Floats, Floats]:
    log_probs = _log_softmax(logits.astype(np.float64) * beta)  # (B, C)
    every = np.arange(len(labels))
    predicted = logits.argmax(axis=1)  # ties go to the first class, here and in `rank`
    true_logit = logits[every, labels][:, None]
    ahead = (logits > true_logit) | ((logits == true_logit) & (np.arange(logits.shape[1]) < labels[:, None]))
    probs = np.exp(log_probs)
    confidence = probs[every, predicted]
    probs[every, labels] -= 1.0  # now the distance from the one-hot truth
    return predicted, ahead.sum(axis=1), confidence, -log_probs[every, labels], np.square(probs).sum(axis=1)


def _log_softmax(scores: Floats) -> Floats:
    shifted = scores - scores.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), dtype=np.float64)


def _best_beta(logits: NDArray[np.floating[Any]], labels: Integers) -> float:
    """The inverse temperature of the lowest NLL, between the limits; 1 when the NLL does not depend on it."""
    lower, upper, beta = 1.0 / _BETA_LIMIT, _BETA_LIMIT, 1.0
    if _nll_derivatives(logits, labels, upper)[0] < 0:
        return upper
    if _nll_derivatives(logits, labels, lower)[0] > 0:
        return lower
    for _ in range(100):
        slope, curvature = _nll_derivatives(logits, labels, beta)
        if slope == 0:
            break
        lower, upper = (lower, beta) if slope > 0 else (beta, upper)
        newton = beta - slope / curvature if curvature > 0 else math.inf
        candidate = newton if lower < newton < upper else math.sqrt(lower * upper)
        if abs(candidate - beta) <= 1e-12 * beta:
            break
        beta = candidate
    return beta


def _nll_derivatives(logits: NDArray[np.floating[Any]], labels: Integers, beta: float) -> tuple[float, float]:
    """First and second derivative in beta of the summed NLL of ``beta * logits``: E[z] - z_true and Var[z] under the softmax."""
    slopes, curvatures = [], []
    for start in range(0, len(labels), _BLOCK_ROWS):
        block = logits[start : start + _BLOCK_ROWS].astype(np.float64)
        block -= block.max(axis=1, keepdims=True)
        probs = np.exp(_log_softmax(block * beta))
        mean = (probs * block).sum(axis=1)
        true_logit = block[np.arange(len(block)), labels[start : start + _BLOCK_ROWS]]
        slopes.append(float((mean - true_logit).sum()))
        curvatures.append(float((probs * np.square(block - mean[:, None])).sum()))
    return math.fsum(slopes), math.fsum(curvatures)


def _per_class(confusion: Integers, classes: Sequence[str]) -> tuple[ClassMetrics, ...]:
    counts = zip(classes, confusion.sum(axis=1), confusion.sum(axis=0), np.diagonal(confusion), strict=True)
    return tuple(_class_metrics(name, int(n), int(n_predicted), int(n_correct)) for name, n, n_predicted, n_correct in counts)


def _class_metrics(name: str, n: int, n_predicted: int, n_correct: int) -> ClassMetrics:
    return ClassMetrics(
        name=name,
        n=n,
        n_predicted=n_predicted,
        n_correct=n_correct,
        precision=n_correct / n_predicted if n_predicted else None,
        recall=n_correct / n if n else None,
        f1=2 * n_correct / (n + n_predicted) if n else None,
    )


def _reliability_bins(confidence: Floats, correct: NDArray[np.bool_]) -> tuple[ReliabilityBin, ...]:
    edges = np.linspace(0.0, 1.0, ECE_BINS + 1)
    bin_of = np.searchsorted(edges[1:-1], confidence, side="left")
    n = np.bincount(bin_of, minlength=ECE_BINS)
    confidence_sum = np.bincount(bin_of, weights=confidence, minlength=ECE_BINS)
    correct_sum = np.bincount(bin_of, weights=correct, minlength=ECE_BINS)
    return tuple(
        ReliabilityBin(
            lower=float(edges[i]),
            upper=float(edges[i + 1]),
            n=int(n[i]),
            confidence=float(confidence_sum[i] / n[i]) if n[i] else None,
            accuracy=float(correct_sum[i] / n[i]) if n[i] else None,
        )
        for i in range(ECE_BINS)
    )


def _ece(bins: Sequence[ReliabilityBin]) -> float:
    """The mean over images of the gap between accuracy and confidence in their bin."""
    gaps = (b.n * abs(b.accuracy - b.confidence) for b in bins if b.accuracy is not None and b.confidence is not None)
    return math.fsum(gaps) / sum(b.n for b in bins)


def _checked(logits: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]], n_classes: int) -> Integers:
    """The labels as int64, after every check that makes the arithmetic below safe."""
    if logits.ndim != 2 or logits.shape[1] != n_classes or labels.shape != logits.shape[:1]:
        raise InvalidInput(
            f"cannot evaluate logits of shape {logits.shape} against labels of shape {labels.shape} and {n_classes} classes: "
            "expected (images, classes) and (images,)"
        )
    if not len(labels):
        raise InvalidInput("nothing to evaluate: the split holds no image. Give it some, or leave the split out")
    if labels.min() < 0 or labels.max() >= n_classes:
        raise InvalidInput(
            f"labels run from {labels.min()} to {labels.max()}; {n_classes} classes are numbered 0 to {n_classes - 1}"
        )
    bad_rows = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad_rows):
        raise TrainingError(
            f"{len(bad_rows)} of {len(labels)} images have NaN or infinite logits (first: row {bad_rows[0]}): "
            "the model diverged. Try a lower learning_rate, or float32 precision"
        )
    return labels.astype(np.int64)
