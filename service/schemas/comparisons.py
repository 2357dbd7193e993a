"""Documents of comparisons: request, state, verdict and runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from finetune.comparison_spec import arms_asked_for, settings_of
from finetune.jobs.job import Job
from finetune.jobs.kinds import COMPARISON
from service.schemas.jobs import JobError, JobState, job_error, job_state


class ArmDocument(BaseModel):
    """One arm of a comparison's request."""

    name: str
    set: dict[str, Any] = Field(description="The fields of the request that the arm changes: `key.path` to value.")


class VerdictDocument(BaseModel):
    """The arm to choose, and why."""

    choose: str = Field(description="The name of the arm.")
    outcome: Literal["better", "equivalent", "undecided"]
    sentence: str
    pareto: list[str] = Field(description="The Pareto front: arms that no other arm matches in quality at lower cost.")
    margin: float


class ComparisonDocument(JobState):
    """A comparison, which is a queued job. `verdict` is null before it has succeeded."""

    object: Literal["fine_tuning.comparison"] = "fine_tuning.comparison"
    description: str = Field(description="A summary of the request.")
    arms: list[ArmDocument] = Field(description="Every arm, those of `methods` and `models` included; empty for `runs`.")
    seeds: int | None = Field(description="Number of runs of each arm.")
    runs: list[str] | None = Field(description="The jobs whose runs are compared, if existing jobs are compared.")
    margin: float = Field(description="The largest difference of the headline metric that does not matter.")
    budget_seconds: float | None
    register_chosen: bool
    training_file: str | None
    validation_file: str | None
    test_file: str | None
    suffix: str | None
    metadata: dict[str, str]
    verdict: VerdictDocument | None
    fine_tuned_model: str | None = Field(description="The model that the chosen arm's best run was registered as.")
    fine_tuned_version: str | None
    error: JobError | None
    result_files: list[str] = Field(description="Paths on this server: result and report.")


class FigureDocument(BaseModel):
    """A mean over runs with its 95 % interval."""

    value: float | None
    low: float | None = Field(description="Of the 95 % interval.")
    high: float | None
    n: int
    sd: float | None = Field(description="Standard deviation over runs; null for one run.")


class ArmResultDocument(BaseModel):
    """The metrics and costs of one arm."""

    name: str
    runs: list[str] = Field(description="Paths on this server of the runs, by seed.")
    metrics: dict[str, FigureDocument] = Field(description="By `split/name`: the mean over runs.")
    cost: dict[str, float | None] = Field(description="Means over runs; names end in their unit.")
    per_class_recall: list[float | None]
    note: str = Field(description="Why the arm has fewer runs than requested.")


class PairDocument(BaseModel):
    """The difference of one metric between two arms on the same images. Only the headline metric has a test."""

    a: str
    b: str
    metric: str
    difference: float | None
    low: float | None
    high: float | None
    standard_error: float | None
    degrees_of_freedom: float | None
    seed_share: float | None
    p_value: float | None
    p_exact: float | None
    p_adjusted: float | None = Field(description="The p-value after Holm's adjustment for the number of pairs.")
    test: str | None
    smallest_detectable: float | None
    n: int | None
    only_a: float | None = Field(description="Number of images that only `a` predicts correctly, mean over runs.")
    only_b: float | None
    outcome: str | None


class ComparisonResult(BaseModel):
    """The result of a comparison: the document of `finetune compare --json`, with paths on this server."""

    object: Literal["comparison"] = "comparison"
    id: str
    dataset: str
    split: str = Field(description="What the arms were evaluated on: test, or cv.")
    classes: list[str]
    headline: str = Field(description="The metric that the arms are compared by in tests, such as `test/top1`.")
    leading: str | None = Field(
        default=None, description="The metric that is displayed first: a mean over classes if their sizes are very unequal."
    )
    arms: list[ArmResultDocument]
    pairs: list[PairDocument]
    verdict: VerdictDocument
    left_out: int = Field(description="Number of images that are left out because one of the runs was trained or chosen on them.")
    cost: dict[str, float | None] = Field(description="Cost of the whole comparison.")
    registered: str | None
    report: str
    mlflow_run_id: str | None


class ComparedRun(BaseModel):
    """One run of a comparison."""

    object: Literal["fine_tuning.comparison.run"] = "fine_tuning.comparison.run"
    name: str
    arm: str
    seed: int
    status: Literal["waiting", "begun", "finished", "left_out"]
    metrics: dict[str, float | None] = {}
    cost: dict[str, float | None] = {}
    links: dict[str, str | None] = Field({}, description="Paths on this server: the run, and its report if it has one.")


class RunList(BaseModel):
    """The runs of a comparison, in order."""

    object: Literal["list"] = "list"
    data: list[ComparedRun]


class RunResult(ComparedRun):
    """One finished run with all its metrics."""

    classes: list[str]
    hyperparameters: dict[str, Any] = Field(description="The resolved values: no field is `auto`.")
    splits: dict[str, Any] = Field(
        description="By split: number of images, metrics with intervals, table by class, confusion matrix."
    )
    warnings: list[str]
    summary: str


def comparison_document(job: Job, *, queue_position: int | None, within: Callable[[str], str]) -> ComparisonDocument:
    """Return the document of a comparison; `within` removes local paths from texts."""
    result, asked = job.result or {}, job.request or job.spec
    registered = COMPARISON.registered(result) if result else None
    model, _, version = (registered or "").partition("@")
    return ComparisonDocument(
        **job_state(job, queue_position),
        description=COMPARISON.describe(job.spec),
        **(_of_runs(job.spec, asked) if "runs" in job.spec else _of_arms(job.spec, asked)),
        metadata=dict(job.spec["metadata"]),
        verdict=VerdictDocument.model_validate(result["verdict"]) if result else None,
        fine_tuned_model=model or None,
        fine_tuned_version=version or None,
        error=job_error(job, within),
        result_files=[f"{COMPARISON.path}/{job.id}/{name}" for name in ("result", "report")] if result else [],
    )


def _of_arms(spec: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    settings = settings_of(spec)
    return {
        "arms": [ArmDocument(name=arm.name, set=arm.set) for _, arm in arms_asked_for(settings)],
        "seeds": settings.seeds,
        "runs": None,
        "margin": settings.margin,
        "budget_seconds": settings.budget_seconds,
        "register_chosen": settings.register_chosen,
        "suffix": spec["suffix"],
        **{name: asked.get(name) for name in ("training_file", "validation_file", "test_file")},
    }


def _of_runs(spec: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    absent = ("seeds", "budget_seconds", "training_file", "validation_file", "test_file", "suffix")
    runs = [run.rpartition("/")[2] for run in asked["runs"]]
    return {**dict.fromkeys(absent), "arms": [], "runs": runs, "margin": spec["margin"], "register_chosen": False}
