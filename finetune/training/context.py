"""The inputs that all training of one run shares, and the result of training. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.augment import Augment
from finetune.data.dataset import Dataset, Sample, targets_of
from finetune.features.rows import FeatureContext
from finetune.features.solve import SolvedHead
from finetune.progress import ProgressCallback, silent
from finetune.runtime.seconds import Seconds
from finetune.storage.rundir import RunDir
from finetune.storage.store import Store
from finetune.tasks import Task
from finetune.tasks.balance import Balance
from finetune.training.choices import Choices
from finetune.training.compute import Compute


@dataclass(frozen=True)
class TrainingContext:
    """The inputs that all training of one run shares.

    Args:
        dataset: its train split is trained on; on its val split, weights and hyperparameters are chosen.
        identity: digests that identify the run, by name (``spec``, ``dataset``); checkpoints with others are refused.
        balance: how unequal class sizes are compensated.
        image_weights: (N,) weights of the training images in the loss (`finetune.training.image_weights`); None: all equal.
        store: the cache of frozen features and decoded images.
        sample_size: number of training images that are predicted at some steps as in evaluation (`finetune.training.sample`);
            None: as many as cost little.
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
    balance: Balance = field(default_factory=Balance)
    image_weights: NDArray[np.float64] | None = None

    def features(
        self, spent: Callable[[Seconds], None] = lambda _: None, progress: ProgressCallback | None = None
    ) -> FeatureContext:
        """Return the context in which features are computed.

        Args:
            spent: is called with the seconds that computing the features takes or, if they are cached, took.
        """
        return FeatureContext(
            self.store,
            self.compute.device,
            self.compute.threads,
            progress=progress or self.progress,
            event=self.run.record,
            spent=spent,
        )

    def targets(self, samples: tuple[Sample, ...]) -> NDArray[Any]:
        """Return the targets of samples, encoded by the task."""
        return self.task.encode(targets_of(samples), len(self.dataset.classes))


@dataclass(frozen=True)
class TrainingCost:
    """The seconds that training would take without any cached features, so that methods can be compared.

    Args:
        own: solving the head and taking steps, in all attempts together.
        features: computing the frozen features of the training and validation images; if an earlier run computed them, the
            seconds that it took then.
    """

    own: Seconds
    features: Seconds

    def to_dict(self) -> dict[str, float]:
        """Return the cost under the names of ``outcome.json``."""
        total = self.own + self.features
        return {
            "train_seconds": total.wall,
            "train_cpu_seconds": total.cpu,
            "feature_seconds": self.features.wall,
            "feature_cpu_seconds": self.features.cpu,
        }


@dataclass(frozen=True)
class Trained:
    """The result of training."""

    summary: str  # one sentence
    cost: TrainingCost
    n_trainable: int  # parameters, the head's included
    n_parameters: int  # of the whole network
    frozen: Mapping[str, Any]  # which stages never trained, and the sha256 of their parameters and buffers before and after
    choices: Choices
    head: SolvedHead | None  # None if it was not solved, or was solved by an earlier attempt at this run
