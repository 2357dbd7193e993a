"""Find shortcuts: facts about files from which the label can be predicted, so that a model may learn them instead of the content.

For each fact alone, a small decision tree predicts the label, with cross-validation. A class is given away by the fact to the
extent of its recall minus the share of the other images that are predicted as this class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.preprocessing import OrdinalEncoder
from sklearn.tree import DecisionTreeClassifier

from finetune.data.dataset import Sample
from finetune.doctor.looks import Look

LEAST_OF_A_CLASS = 10
GIVEN_AWAY = 0.6
_FOLDS = 5

Fact = Callable[[Sample, Look], float | str]


@dataclass(frozen=True)
class Shortcut:
    """A property of the files, such as their size or name, that predicts the labels.

    Args:
        fact: its name.
        given_away: class indices with the extent to which the fact gives each away, largest first.
        accuracy: mean per-class accuracy of the prediction from this fact alone.
    """

    fact: str
    given_away: tuple[tuple[int, float], ...]
    accuracy: float


def _stem(sample: Sample) -> str:
    return sample.id.rpartition("/")[2].rpartition(".")[0] or sample.id.rpartition("/")[2]


def _number(sample: Sample) -> float:
    digits = re.findall(r"\d+", _stem(sample))
    return float(digits[-1][-9:]) if digits else -1.0


FACTS: Mapping[str, Fact] = {
    "width in pixels": lambda sample, look: float((sample.size_px or (0, 0))[0]),
    "height in pixels": lambda sample, look: float((sample.size_px or (0, 0))[1]),
    "shape (width over height)": lambda sample, look: _ratio(sample),
    "file size": lambda sample, look: float(look.n_bytes),
    "compression (bytes for each pixel)": lambda sample, look: look.n_bytes / max(1, _pixels(sample)),
    "file format": lambda sample, look: f"{look.format} {look.mode}",
    "camera": lambda sample, look: look.camera,
    "orientation flag": lambda sample, look: float(look.orientation),
    "pattern of the file name": lambda sample, look: re.sub(r"[0-9a-f]{6,}|\d+", "#", _stem(sample).lower()),
    "number in the file name": lambda sample, look: _number(sample),
    "length of the file name": lambda sample, look: float(len(_stem(sample))),
}


def _pixels(sample: Sample) -> int:
    width, height = sample.size_px or (0, 0)
    return width * height


def _ratio(sample: Sample) -> float:
    width, height = sample.size_px or (1, 1)
    return width / max(1, height)


def find_shortcuts(samples: Sequence[Sample], looks: Mapping[str, Look], n_classes: int) -> list[Shortcut]:
    """Return the facts that give classes away, the most severe first."""
    known = [sample for sample in samples if sample.sha256 in looks]
    labels = np.array([sample.labels[0] for sample in known])
    counts = np.bincount(labels, minlength=n_classes) if len(labels) else np.zeros(n_classes, np.int64)
    large = np.flatnonzero(counts >= LEAST_OF_A_CLASS)
    if len(large) < 2:
        return []
    kept = np.isin(labels, large)
    known, labels = [sample for sample, keep in zip(known, kept, strict=True) if keep], labels[kept]
    found = []
    for name, fact in FACTS.items():
        values = [fact(sample, looks[sample.sha256]) for sample in known]
        if len(set(values)) < 2:
            continue
        predicted = _predicted(values, labels)
        recall = {one: float((predicted[labels == one] == one).mean()) for one in large}
        false = {one: float((predicted[labels != one] == one).mean()) for one in large}
        given = sorted(((int(one), recall[one] - false[one]) for one in large), key=lambda pair: -pair[1])
        if given[0][1] >= GIVEN_AWAY:
            told = tuple(pair for pair in given if pair[1] >= GIVEN_AWAY)
            found.append(Shortcut(name, told, float(np.mean(list(recall.values())))))
    return sorted(found, key=lambda one: (-len(one.given_away), -one.given_away[0][1]))


def _predicted(values: Sequence[float | str], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each image the class that a tree predicts from the fact alone, fitted without this image."""
    if isinstance(values[0], str):
        column = OrdinalEncoder().fit_transform(np.array(values, dtype=object).reshape(-1, 1))
    else:
        column = np.array(values, dtype=np.float64).reshape(-1, 1)
    leaf = max(3, len(labels) // 200)
    tree = DecisionTreeClassifier(max_depth=8, min_samples_leaf=leaf, class_weight="balanced", random_state=0)
    return np.asarray(cross_val_predict(tree, column, labels, cv=StratifiedKFold(_FOLDS, shuffle=True, random_state=0)))
