"""The inputs that all training of one run shares, and the result of training. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from finetune.data.augment import Augment
from finetune.data.dataset import Dataset, Sample, targets_of
from finetune.features.rows import FeatureContext
from finetune.features.solve import SolvedHead
from finetune.progress import ProgressCallback, silent
from finetune.storage.rundir import RunDir
from finetune.storage.store import Store
from finetune.tasks import Task
from finetune.training.choices import Choices
from finetune.training.compute import Compute


@dataclass(frozen=True)
class TrainingContext:
    """The inputs that all training of one run shares.

    Args:
        dataset: the train split is learnt from, the val split chooses.
        identity: what makes this run this run (``spec``, ``dataset`` -> digest); checkpoints of another are refused.
        store: where frozen features and decoded photographs are kept.
        sample_size: training images that are answered now and then as evaluation would; None: as many as cost little.
    """

    dataset: Dataset
    task: Task
    augment: Augment
    run: RunDir
    compute: Compute
    identity: Mapping[str, str]
    store: Store
    progress: ProgressCallback = silent
    sample_size: int | None = None

    def features(self, progress: ProgressCallback | None = None) -> FeatureContext:
        """Return the context in which features are computed."""
        return FeatureContext(
            self.store,
            self.compute.device,
            self.compute.threads,
            progress=progress or self.progress,
            event=self.run.record,
        )

    def targets(self, samples: tuple[Sample, ...]) -> NDArray[Any]:
        """Return the labels of samples, encoded by the task."""
        return self.task.encode(targets_of(samples), len(self.dataset.classes))


@dataclass(frozen=True)
class Trained:
    """The result of training."""

    summary: str  # one sentence
    seconds: float  # of all attempts at the steps
    n_trainable: int  # parameters, the head's included
    n_parameters: int  # of the whole network
    frozen: Mapping[str, Any]  # which stages never trained, and the sha256 of their parameters and buffers before and after
    choices: Choices
    head: SolvedHead | None  # None where it was not solved, or in an earlier session
