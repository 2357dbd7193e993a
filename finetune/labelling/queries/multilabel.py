"""Any number of labels per image: an image is uncertain if labels have probabilities near their thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.labelling.choose import label_margins, label_uncertainty
from finetune.labelling.queries.query import Thresholds
from finetune.labelling.suggestion import Suggestion
from finetune.storage.files import json_text


class MultilabelQuery:
    """Asks whether the labels that are given are right, the least certain ones first."""

    titles = ("least certain", "and")
    columns = (
        "predicted",
        "least_certain",
        "least_certain_probability",
        "second_least_certain",
        "second_least_certain_probability",
    )
    lead = "least certain: "
    choice = "multiple"

    def margins(self, probs: NDArray[np.float64], thresholds: Thresholds) -> NDArray[np.float64]:
        return 1 - label_uncertainty(probs, thresholds)

    def order(self, probs: NDArray[np.float64], thresholds: Thresholds) -> NDArray[np.int64]:
        return np.argsort(label_margins(probs, thresholds), kind="stable")

    def names(self, one: Suggestion) -> Sequence[str]:
        return (", ".join(one.given) or "no label",)

    def cells(self, one: Suggestion) -> Sequence[Any]:
        return (json_text(list(one.given)), *one.first_two)

    def score(self, one: Suggestion) -> float:
        return one.margin
