"""Plan a request without carrying it out, for `finetune check`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finetune.advice import for_python
from finetune.data.dataset import Dataset
from finetune.data.files import LocalFile
from finetune.data.split import fold_datasets
from finetune.doctor.finding import not_in
from finetune.messages import plural
from finetune.progress import ProgressCallback, silent
from finetune.runs.estimate import Estimate, estimate, together
from finetune.runs.forecast import Forecast, Images, forecast
from finetune.runs.known_speeds import measured_speeds, measurement_request
from finetune.runs.options import RunOptions
from finetune.runs.prepare import Prepared, prepare, read_and_build
from finetune.runs.shared import Shared
from finetune.spec import JobSpec, is_own_model, is_registered_model
from finetune.storage.rundir import RunDir
from finetune.studies.escalate import escalation
from finetune.studies.examination import Examined


@dataclass(frozen=True)
class Plan:
    """The resolved runs of a request, and an estimate of their cost."""

    spec: JobSpec
    candidates: tuple[Prepared, ...]  # in order of increasing cost; more than one only for method auto
    folds: tuple[Dataset, ...]  # for cross-validation: the dataset of each fold, with its train, val and test splits
    cost: Estimate  # of training alone
    whole_job: Forecast | None  # from the start to the registered model; None if the backbone cannot be measured
    examined: Examined | None = None  # the findings about the images; None: they were not examined

    @property
    def deepest(self) -> Prepared:
        """The candidate that trains the most stages."""
        return self.candidates[-1]

    def __repr__(self) -> str:
        """Return the plan in a few lines, for a prompt: methods, backbone, images, estimate, and findings about the data."""
        resolved = self.deepest.resolved
        methods = " or ".join(candidate.resolved.recipe.method for candidate in self.candidates)
        images = ", ".join(f"{count:,} {split}" for split, count in resolved.dataset.sizes.items())
        folds = f", {len(self.folds)} folds" if self.folds else ""
        seconds = self.cost.seconds if self.whole_job is None else self.whole_job.about
        lines = [
            f"Plan: {methods} on {resolved.backbone.name}{folds}, about {seconds:,.0f} s",
            f"{plural(len(resolved.dataset.classes), 'class')}; images: {images}",
        ]
        if self.examined is None:
            lines += [f"note: {for_python(warning)}" for warning in resolved.dataset.warnings]
        else:
            examination = self.examined.examination
            found = [one for one in examination.findings if one.count]
            lines += [f"note: {for_python(warning)}" for warning in not_in(examination, resolved.dataset.warnings)]
            lines += [examination.summary, *(f"{one.severity}: {one.title}: {for_python(one.evidence)}" for one in found)]
            lines += [f"page: {self.examined.page}"]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values: the resolved values of the deepest candidate, and the methods of all candidates."""
        return {
            **self.deepest.resolved.to_dict(),
            "spec": self.spec.model_dump(mode="json"),
            "folds": [dataset.counts() for dataset in self.folds],
            "fold_sizes": [dataset.sizes()["test"] for dataset in self.folds],  # images that each holds out
            "candidates": [candidate.resolved.recipe.method for candidate in self.candidates],
            "estimate": asdict(self.cost),
            "forecast": None if self.whole_job is None else asdict(self.whole_job),
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
    return Plan(spec, candidates, folds, cost, _whole_job(spec, candidates[0], shared))


def _whole_job(spec: JobSpec, prepared: Prepared, shared: Shared) -> Forecast | None:
    """Return the forecast that the server's plans give for these images."""
    if is_own_model(spec.model.backbone) and not is_registered_model(spec.model.backbone):
        return None
    speeds = measured_speeds(shared.workspace, measurement_request(spec, prepared.resolved.backbone.name))
    dataset = prepared.dataset
    sizes = [sample.file.path.stat().st_size for sample in dataset.samples if isinstance(sample.file, LocalFile)]
    images = Images(len(dataset.samples), len(dataset.classes), sum(sizes) / len(sizes) if sizes else None)
    return None if speeds is None else forecast(spec, speeds, images)


def _methods(spec: JobSpec, shared: Shared, progress: ProgressCallback) -> Sequence[JobSpec]:
    """Return the request itself or, for method auto, one request for each candidate."""
    if spec.method.type != "auto":
        return [spec]
    _, network = read_and_build(spec, shared, progress)
    nowhere = RunDir(shared.workspace.runs)
    return [child.spec for child in escalation(spec, len(network.facts.stages), RunOptions(), nowhere).candidates]
