"""Margin sampling: an image is uncertain if its two most probable classes are nearly equally probable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.labelling.choose import margins
from finetune.labelling.queries.query import Thresholds
from finetune.labelling.suggestion import Suggestion


class MulticlassQuery:
    """Asks which of the most probable classes an image has."""

    titles = ("perhaps", "or")
    columns = ("predicted", "probability", "second", "second_probability")
    lead = ""
    choice = "single"

    def margins(self, probs: NDArray[np.float64], thresholds: Thresholds) -> NDArray[np.float64]:
        return margins(probs)

    def order(self, probs: NDArray[np.float64], thresholds: Thresholds) -> NDArray[np.int64]:
        return np.argsort(-probs, kind="stable")

    def names(self, one: Suggestion) -> Sequence[str]:
        return one.likely[:2]

    def cells(self, one: Suggestion) -> Sequence[Any]:
        return one.first_two

    def score(self, one: Suggestion) -> float:
        return one.probabilities[0]
