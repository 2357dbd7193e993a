"""``/v1/fine_tuning/comparisons``: compare several ways to train on the same images, or existing jobs."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse
from starlette.concurrency import run_in_threadpool

from finetune.comparison_spec import ComparisonSpec, parse_comparison
from finetune.errors import Conflict, NotFound
from finetune.jobs.job import Job
from finetune.jobs.kinds import COMPARISON
from finetune.jobs.tracking import mlflow_run_of
from finetune.storage.rundir import RunDir
from service.comparison_request import read_comparison
from service.creation import IdempotencyKey, Submission, announce, create_checked, json_body
from service.job_request import read_body
from service.middleware.auth import Caller, Submitting
from service.problems import RESPONSES
from service.results import evaluated_splits, link_of_run, read_object, report_answer, resolved_hyperparameters
from service.routes.lifecycle import add_lifecycle
from service.schemas.comparisons import (
    ComparedRun,
    ComparisonDocument,
    ComparisonResult,
    RunList,
    RunResult,
    comparison_document,
)
from service.schemas.job_create import COMPARISON_BODY
from service.state import Server, ServerState

comparisons_router = APIRouter(prefix=COMPARISON.path, tags=["comparisons"], responses=RESPONSES)


@comparisons_router.post("", status_code=201, openapi_extra=COMPARISON_BODY)
async def create_comparison(
    request: Request, response: Response, caller: Submitting, server: Server, idempotency_key: IdempotencyKey = None
) -> ComparisonDocument:
    """Queue a comparison. All problems of the arms and of the dataset are reported at once, with field paths."""
    body = await json_body(request, "comparison")
    job, new = await create_checked(Submission(server, caller, idempotency_key), partial(_create, body))
    announce(response, job, new=new)
    return await run_in_threadpool(_document, server, job)


def _create(raw: bytes, submission: Submission) -> tuple[Job, bool]:
    server = submission.server
    request = read_comparison(
        read_body(raw),
        locate=submission.locate,
        find_model=submission.find_model,
        find_run=submission.find_run,
        data_roots=server.data_roots,
        hub_models=server.hub_models,
        check_names=submission.check_names,
    )
    asked = request.asked
    if not isinstance(asked, ComparisonSpec):
        return submission.create(COMPARISON, asked.model_dump(mode="json"), request.body, request.digest)
    if not asked.settings.register_chosen:
        return submission.create(COMPARISON, asked.to_dict(), request.body, request.digest)
    return submission.create_named(
        COMPARISON,
        lambda name: asked.with_job(asked.job.model_copy(update={"suffix": name})).to_dict(),
        request.body,
        request.digest,
        suffix=asked.job.suffix,
        training_file=asked.job.training_file,
    )


def _document(server: ServerState, job: Job) -> ComparisonDocument:
    return comparison_document(job, queue_position=server.database.jobs.queue_position(job), within=server.without_home)


add_lifecycle(comparisons_router, COMPARISON, "comparison", ComparisonDocument, _document)


@comparisons_router.get("/{comparison_id}/result")
def comparison_result(caller: Submitting, server: Server, comparison_id: str) -> ComparisonResult:
    """Return the result of a comparison: arms with metrics and intervals, pairs with their tests, the verdict, and costs."""
    job, result = _finished(server, caller, comparison_id)
    runs = server.home / "runs"
    arms = [{**arm, "runs": [link_of_run(runs, Path(run)) or "" for run in arm["runs"]]} for arm in result["arms"]]
    here = {
        "dataset": _dataset_name(server, job),
        "arms": arms,
        "report": f"{COMPARISON.path}/{job.id}/report",
        "mlflow_run_id": mlflow_run_of(server.run_of(job.id)),
    }
    return ComparisonResult.model_validate({**result, **here})


@comparisons_router.get("/{comparison_id}/report", response_class=HTMLResponse)
def comparison_report(caller: Submitting, server: Server, comparison_id: str) -> HTMLResponse:
    """Return the page of a comparison: verdict, differences, costs, disputed images. It is self-contained, without scripts."""
    job, result = _finished(server, caller, comparison_id)
    named = (html.escape(result["dataset"]), html.escape(_dataset_name(server, job)))
    return report_answer(server.run_of(job.id), lambda page: server.without_home(page).replace(*named))


@comparisons_router.get("/{comparison_id}/runs")
def comparison_runs(caller: Submitting, server: Server, comparison_id: str) -> RunList:
    """List the runs of a comparison in order, with status and metrics. A comparison of existing jobs has none."""
    job = server.database.jobs.get(comparison_id, caller.sees, COMPARISON)
    return RunList(data=list(_runs(server, job)))


@comparisons_router.get("/{comparison_id}/runs/{run_name}")
def comparison_run(caller: Submitting, server: Server, comparison_id: str, run_name: str) -> RunResult:
    """Return one finished run: metrics with n and intervals by split, and resolved hyperparameters."""
    run, summary = _run(server, caller, comparison_id, run_name)
    outcome = read_object(run.outcome)
    if summary.status != "finished":
        raise Conflict(f"{run_name} of {comparison_id} is {summary.status}; only a finished run has a result")
    return RunResult(
        **summary.model_dump(),
        classes=list(outcome.get("classes") or ()),
        hyperparameters=resolved_hyperparameters(run),
        splits=evaluated_splits(run),
        warnings=[server.without_home(str(warning)) for warning in outcome.get("warnings") or ()],
        summary=str(outcome.get("summary") or ""),
    )


@comparisons_router.get("/{comparison_id}/runs/{run_name}/report", response_class=HTMLResponse)
def comparison_run_report(caller: Submitting, server: Server, comparison_id: str, run_name: str) -> HTMLResponse:
    """Return the report of one run. Only the first run of each arm and the chosen run have a report."""
    run, _ = _run(server, caller, comparison_id, run_name)
    return report_answer(run, server.without_home)


def _finished(server: ServerState, caller: Caller, comparison_id: str) -> tuple[Job, Mapping[str, Any]]:
    job = server.database.jobs.get(comparison_id, caller.sees, COMPARISON)
    if job.result is None:
        raise Conflict(f"{comparison_id} is {job.state}; only a comparison that has succeeded has a result")
    return job, job.result


def _dataset_name(server: ServerState, job: Job) -> str:
    """Return the display name of the compared data, since the folder of an upload is named after its id."""
    assert job.result is not None
    name = str(job.result["dataset"])
    try:
        return server.dataset_name(server.uploads.place_of(name).resolve())
    except NotFound:
        return name


def _runs(server: ServerState, job: Job) -> Iterator[ComparedRun]:
    """Yield the summary of each run, in the order in which they are made."""
    if "runs" in job.spec:
        return
    spec = parse_comparison(job.spec)
    study = server.run_of(job.id)
    for number in range(spec.settings.seeds):
        for arm in spec.arms:
            run = study.child(arm.run_name(number))
            outcome = read_object(run.outcome)
            place = f"{COMPARISON.path}/{job.id}/runs/{run.name}"
            metrics = dict(outcome.get("metrics") or {})
            yield ComparedRun(
                name=run.name,
                arm=arm.name,
                seed=arm.spec.seed + number,
                status="finished" if outcome else "left_out" if job.finished else "begun" if run.root.exists() else "waiting",
                metrics={name: value for name, value in metrics.items() if not name.startswith("cost/")},
                cost=dict(outcome.get("cost") or {}),
                links={"run": place, "report": f"{place}/report" if run.report.exists() else None},
            )


def _run(server: ServerState, caller: Caller, comparison_id: str, run_name: str) -> tuple[RunDir, ComparedRun]:
    """Return a run of a comparison by its name. Only names from the comparison's spec are accepted, never paths."""
    job = server.database.jobs.get(comparison_id, caller.sees, COMPARISON)
    found = next((run for run in _runs(server, job) if run.name == run_name), None)
    if found is None:
        raise NotFound(f"{comparison_id} has no run {run_name[:100]!r}; GET {COMPARISON.path}/{comparison_id}/runs lists them")
    return server.run_of(job.id).child(run_name), found
