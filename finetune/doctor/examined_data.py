"""A dataset under examination, with what the examinations share: cases, the text of labels, and the time that each part takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from finetune.data.dataset import Dataset, Sample
from finetune.doctor.finding import Case, case_key


@dataclass
class ExaminedData:
    """A dataset, its embeddings, and what is recorded during the examination beside the findings.

    Args:
        embeddings: (N, D), one row for each sample.
        seconds: that each part of the examination took, by its name.
        confidence: (N,) of the labels of each sample as they are given; empty where labels are not judged.
    """

    dataset: Dataset
    embeddings: NDArray[np.float32]
    seconds: dict[str, float] = field(default_factory=dict)
    confidence: tuple[float, ...] = ()

    @property
    def samples(self) -> Sequence[Sample]:
        return self.dataset.samples

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Record the seconds that the block takes."""
        started = time.perf_counter()
        yield
        self.seconds[what] = round(time.perf_counter() - started, 3)

    def case(self, kind: str, positions: Sequence[int], score: float = 1.0, said: str = "", suggested: str | None = None) -> Case:
        """Return a case of the samples at these positions."""
        ids = tuple(self.samples[one].id for one in positions)
        return Case(ids, score, said, suggested, case_key(kind, [self.samples[one].sha256 for one in positions]))

    def label_text(self, position: int) -> str:
        """Return the labels of the sample at a position as one text."""
        return " + ".join(self.dataset.label_names(self.samples[position]))
