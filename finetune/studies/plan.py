"""Plan a request without carrying it out, for `finetune check`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finetune.data.dataset import Dataset
from finetune.data.split import fold_datasets
from finetune.progress import ProgressCallback, silent
from finetune.runs.estimate import Estimate, estimate, together
from finetune.runs.options import RunOptions
from finetune.runs.prepare import Prepared, prepare, read_and_build
from finetune.runs.shared import Shared
from finetune.spec import JobSpec
from finetune.storage.rundir import RunDir
from finetune.studies.escalate import escalation


@dataclass(frozen=True)
class Plan:
    """The resolved runs of a request, and an estimate of their cost."""

    spec: JobSpec
    candidates: tuple[Prepared, ...]  # in order of increasing cost; more than one only for method auto
    folds: tuple[Dataset, ...]  # for cross-validation: the dataset of each fold, with its train, val and test splits
    cost: Estimate

    @property
    def deepest(self) -> Prepared:
        """The candidate that trains the most stages."""
        return self.candidates[-1]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values: the resolved values of the deepest candidate, and the methods of all candidates."""
        return {
            **self.deepest.resolved.to_dict(),
            "spec": self.spec.model_dump(mode="json"),
            "folds": [dataset.counts() for dataset in self.folds],
            "fold_sizes": [dataset.sizes()["test"] for dataset in self.folds],  # images that each holds out
            "candidates": [candidate.resolved.recipe.method for candidate in self.candidates],
            "estimate": asdict(self.cost),
        }


def plan(spec: JobSpec, shared: Shared, progress: ProgressCallback = silent) -> Plan:
    """Read the data, build the network and measure this machine, without training anything; return the plan.

    Raises:
        InvalidInput: the data or the request cannot be used.
        ExportError: the backbone cannot be exported, although it could be trained.
    """
    candidates = tuple(prepare(candidate, shared, progress) for candidate in _methods(spec, shared, progress))
    n_folds, data = spec.data.folds, spec.data
    folds: tuple[Dataset, ...] = ()
    if n_folds is not None:
        folds = fold_datasets(candidates[0].dataset, n_folds, val_fraction=data.val_fraction, seed=data.split_seed)
    rounds = (1 + len(folds)) * (2 if spec.refits else 1)
    cost = together([estimate(candidate, shared, rounds=rounds) for candidate in candidates])
    return Plan(spec, candidates, folds, cost)


def _methods(spec: JobSpec, shared: Shared, progress: ProgressCallback) -> Sequence[JobSpec]:
    """Return the request itself or, for method auto, one request for each candidate."""
    if spec.method.type != "auto":
        return [spec]
    _, network = read_and_build(spec, shared, progress)
    nowhere = RunDir(shared.workspace.runs)
    return [child.spec for child in escalation(spec, len(network.facts.stages), RunOptions(), nowhere).candidates]
