"""The protocol of a query strategy: what a model is uncertain of in unlabelled images, and how that is worded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.labelling.suggestion import Suggestion

Thresholds = NDArray[np.float64]  # (C,) probabilities from which on labels are given; empty in a task that decides without them


class Query(Protocol):
    """A query strategy. Stateless."""

    @property
    def titles(self) -> tuple[str, str]:
        """The headings, in the terminal, of the two classes that come first in `order`."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the table that `cells` fills."""
        ...

    @property
    def lead(self) -> str:
        """The beginning of the reason for a suggestion, before the probabilities."""
        ...

    @property
    def choice(self) -> str:
        """How many labels annotators may choose: the attribute ``choice`` in Label Studio's configuration."""
        ...

    def margins(self, probs: NDArray[np.float64], thresholds: Thresholds) -> NDArray[np.float64]:
        """Return (N,) how certain the model is of images with probabilities (N, C), 0 to 1; 0 is maximal uncertainty."""
        ...

    def order(self, probs: NDArray[np.float64], thresholds: Thresholds) -> NDArray[np.int64]:
        """Return the class indices of one image with probabilities (C,), those to ask an annotator about first."""
        ...

    def names(self, one: Suggestion) -> Sequence[str]:
        """Return the answers between which the annotator decides, as the page shows them."""
        ...

    def cells(self, one: Suggestion) -> Sequence[Any]:
        """Return the values of a suggestion in `columns`."""
        ...

    def score(self, one: Suggestion) -> float:
        """Return the score of the model's prediction in Label Studio."""
        ...
