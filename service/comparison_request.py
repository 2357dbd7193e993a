"""Parse the body that creates a comparison into a request for a worker: a `ComparisonSpec`, or existing runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.comparison_spec import ComparedRuns, ComparisonSettings, ComparisonSpec, parse_comparison, parse_request
from finetune.errors import NotFound, Problem, SpecError
from finetune.jobs.creation import digest_of
from finetune.jobs.job import Job
from finetune.storage.rundir import RunDir
from service.job_request import (
    MAY_BE_NULL,
    CheckNames,
    FindModel,
    LocateFile,
    find_folders,
    metadata_problems,
    others,
    parse_body,
    read_dataset,
    server_problems,
    summary,
    with_folders,
)

MOST_RUNS = 300
NO_TEST_IMAGES = "the arms are compared on test images, and there are none: give data.test_fraction, test_file or data.folds"

FindRun = Callable[[str], tuple[Job, RunDir]]  # job id -> job and run; raises NotFound if the caller has no such job


@dataclass(frozen=True)
class ComparisonRequest:
    """A parsed request. `body` is the original; `digest` is equal for equivalent bodies."""

    body: Mapping[str, Any]
    asked: ComparisonSpec | ComparedRuns
    digest: str


def read_comparison(
    body: Mapping[str, Any],
    *,
    locate: LocateFile,
    find_run: FindRun,
    find_model: FindModel,
    data_roots: Sequence[Path],
    hub_models: bool,
    check_names: CheckNames,
) -> ComparisonRequest:
    """Parse the body that creates a comparison.

    Raises:
        SpecError: the body is invalid; it has one problem per invalid field.
        DataError: the dataset cannot be trained on.
    """
    if body.get("runs") is not None:
        return ComparisonRequest(dict(body), _read_runs(body, find_run), digest_of({"comparison": body}))
    asked = _read_arms(body, locate, find_model, data_roots, hub_models, check_names)
    return ComparisonRequest(dict(body), asked, digest_of({"comparison": body}))


def _read_arms(
    body: Mapping[str, Any],
    locate: LocateFile,
    find_model: FindModel,
    data_roots: Sequence[Path],
    hub_models: bool,
    check_names: CheckNames,
) -> ComparisonSpec:
    folders, problems = find_folders(body, locate, data_roots)
    may_be_null = (*MAY_BE_NULL, *ComparisonSettings.model_fields, "runs")
    try:
        spec = parse_body(body, parse_comparison, ComparisonSpec.to_dict, may_be_null)
        problems += _of_arms(
            spec, lambda specs: [server_problems(one, data_roots, find_model, hub_models=hub_models) for one in specs]
        )
        problems += _too_many_runs(spec)
        if not problems:
            problems += _of_arms(spec, check_names)
    except SpecError as error:
        problems += others(error.problems, problems)
    if problems:
        raise SpecError(summary(problems), problems)
    data = spec.job.data
    resolved = with_folders(spec.job, folders, data_roots)
    sizes = read_dataset(spec.job, resolved)
    if data.folds is None and data.held_out_fraction == 0 and not sizes.get("test"):
        raise SpecError(NO_TEST_IMAGES, [Problem("data.test_fraction", NO_TEST_IMAGES)])
    return spec.with_job(resolved)


def _of_arms(spec: ComparisonSpec, check: CheckNames) -> list[Problem]:
    """Return the problems of all arms; a problem of the shared spec is returned once, under its own path."""
    shared, *by_arm = check([spec.job, *(arm.spec for arm in spec.arms)])
    problems = [one for one in shared if any(one in found for found in by_arm)]
    for arm, found in zip(spec.arms, by_arm, strict=True):
        problems += [arm.problem(one) for one in found if one not in shared]
    return problems


def _too_many_runs(spec: ComparisonSpec) -> list[Problem]:
    seeds, folds = spec.settings.seeds, spec.job.data.folds or 1
    n_runs = len(spec.arms) * seeds * folds
    if n_runs <= MOST_RUNS:
        return []
    product = f"{len(spec.arms)} arms × {seeds} seeds" + (f" × {folds} folds" if folds > 1 else "")
    return [Problem("seeds", f"{product} are {n_runs} runs; at most {MOST_RUNS} are allowed in one comparison")]


def _read_runs(body: Mapping[str, Any], find_run: FindRun) -> ComparedRuns:
    given = {key: value for key, value in body.items() if value is not None or key not in ("margin", "metadata")}
    asked = parse_body(given, parse_request, lambda asked: asked.model_dump(mode="json"), ())  # type: ignore[union-attr]
    assert isinstance(asked, ComparedRuns)
    problems = metadata_problems(asked.metadata)
    found: dict[str, tuple[Job, RunDir]] = {}
    for position, job_id in enumerate(asked.runs):
        wrong = _run_problem(job_id, find_run, found)
        problems += [Problem(f"runs[{position}]", wrong)] if wrong else []
    if not problems and len({_without_seed(job) for job, _ in found.values()}) < 2:
        problems.append(Problem("runs", "their requests differ in the seed alone, so they are runs of one arm; name others too"))
    if problems:
        raise SpecError(summary(problems), problems)
    return asked.model_copy(update={"runs": tuple(str(run.root) for _, run in found.values())})


def _run_problem(job_id: str, find_run: FindRun, found: dict[str, tuple[Job, RunDir]]) -> str:
    """Add a job's run to `found`; return why it cannot be compared with the runs there, or an empty string if it can."""
    if job_id in found:
        return f"{job_id[:100]!r} is named twice"
    try:
        job, run = find_run(job_id)
    except NotFound:
        return f"{job_id[:100]!r} is not the id of a fine-tuning job of yours"
    found[job_id] = (job, run)
    if job.state != "succeeded":
        return f"{job_id} is {job.state}; only jobs that have succeeded can be compared"
    if not run.predictions_of("test").exists():
        return f"{job_id} was evaluated on no test images, and its weights were chosen on val"
    first, _ = next(iter(found.values()))
    classes, reference = ((one.result or {}).get("classes") for one in (job, first))
    return "" if classes == reference else f"{job_id} has other classes than {first.id}"


def _without_seed(job: Job) -> str:
    return repr({key: value for key, value in job.spec.items() if key not in ("seed", "suffix", "metadata")})
