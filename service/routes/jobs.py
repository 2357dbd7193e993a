"""``/v1/fine_tuning/jobs``: create fine-tuning jobs, and return their results.

State comes from the database; logs, checkpoints and metrics come from the run's folder. Routes that all kinds of jobs share are
in `service.routes.lifecycle`.
"""

from __future__ import annotations

import json
from functools import partial

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from finetune.bundle.manifest import read_manifest
from finetune.errors import BundleError, Conflict, NotFound
from finetune.evaluation.diagnose import diagnose, read_diagnosis
from finetune.jobs.job import Job
from finetune.jobs.kinds import TRAINING
from service.creation import IdempotencyKey, Submission, announce, create_checked, json_body
from service.job_request import read_body, read_request
from service.middleware.auth import Submitting
from service.problems import RESPONSES
from service.results import evaluated_splits, read_object, resolved_hyperparameters
from service.routes.lifecycle import add_lifecycle
from service.schemas.diagnosis import DiagnosisDocument
from service.schemas.job_create import JOB_BODY
from service.schemas.jobs import (
    CheckpointList,
    JobDocument,
    ResultDocument,
    checkpoint_documents,
    job_document,
    result_links,
)
from service.schemas.lists import After, Limit
from service.state import Server, ServerState

jobs_router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["jobs"], responses=RESPONSES)


@jobs_router.post("", status_code=201, openapi_extra=JOB_BODY)
async def create_job(
    request: Request, response: Response, caller: Submitting, server: Server, idempotency_key: IdempotencyKey = None
) -> JobDocument:
    """Queue a fine-tuning job. All problems of the request and its dataset are reported at once, with field paths."""
    body = await json_body(request, "job")
    job, new = await create_checked(Submission(server, caller, idempotency_key), partial(_create, body))
    announce(response, job, new=new)
    return await run_in_threadpool(_document, server, job)


def _create(raw: bytes, submission: Submission) -> tuple[Job, bool]:
    server = submission.server
    asked = read_request(
        read_body(raw),
        locate=submission.locate,
        find_model=submission.find_model,
        data_roots=server.data_roots,
        hub_models=server.hub_models,
        check_names=submission.check_names,
    )
    return submission.create_named(
        TRAINING,
        lambda name: asked.spec.model_copy(update={"suffix": name}).model_dump(mode="json"),
        asked.body,
        asked.digest,
        suffix=asked.spec.suffix,
        training_file=asked.spec.training_file,
    )


def _document(server: ServerState, job: Job) -> JobDocument:
    return job_document(
        job,
        queue_position=server.database.jobs.queue_position(job),
        within=server.without_home,
        resolved=resolved_hyperparameters(server.run_of(job.id)) if job.attempts else None,
    )


add_lifecycle(jobs_router, TRAINING, "job", JobDocument, _document)


@jobs_router.get("/{job_id}/checkpoints")
def job_checkpoints(caller: Submitting, server: Server, job_id: str, after: After = None, limit: Limit = 10) -> CheckpointList:
    """List the checkpoints from which the job could resume, newest first. A linear probe has none."""
    job = server.database.jobs.get(job_id, caller.sees, TRAINING)
    documents = checkpoint_documents(job.id, server.run_of(job.id))
    if after is not None:
        ids = [one.id for one in documents]
        if after not in ids:
            raise NotFound(f"no checkpoint {after!r} of {job_id}; runs keep only the newest few")
        documents = documents[ids.index(after) + 1 :]
    page = documents[:limit]
    return CheckpointList.of(page, len(documents) > limit)


@jobs_router.get("/{job_id}/result")
def job_result(caller: Submitting, server: Server, job_id: str) -> ResultDocument:
    """Return the result of a job: metrics with n and intervals, resolved hyperparameters, and links."""
    job = server.database.jobs.get(job_id, caller.sees, TRAINING)
    if job.state != "succeeded":
        raise Conflict(f"{job_id} is {job.state}; only a job that has succeeded has a result")
    run = server.run_of(job.id)
    outcome = {**read_object(run.outcome), **(job.result or {})}
    model, version = outcome.get("model"), outcome.get("version")
    metrics = dict(outcome.get("metrics") or {})
    return ResultDocument(
        job_id=job.id,
        status="succeeded",
        model=model,
        version=version,
        classes=list(outcome.get("classes") or ()),
        method=dict(job.spec["method"]),
        hyperparameters={**job.spec["hyperparameters"], **resolved_hyperparameters(run)},
        metrics={name: value for name, value in metrics.items() if not name.startswith("cost/")},
        cost=dict(
            outcome.get("cost") or {name.removeprefix("cost/"): metrics[name] for name in metrics if name.startswith("cost/")}
        ),
        splits=evaluated_splits(run),
        cross_validation=outcome.get("cross_validation"),
        warnings=[server.without_home(str(warning)) for warning in outcome.get("warnings") or ()],
        summary=str(outcome.get("summary") or ""),
        license=_license(server, model, version),
        links=dict(zip(("result", "report", "bundle"), [*result_links(job.id, outcome), None, None], strict=False)),
    )


@jobs_router.get("/{job_id}/diagnosis")
def job_diagnosis(caller: Submitting, server: Server, job_id: str) -> DiagnosisDocument:
    """Return the diagnosis of a job's run from its own records, also while it is running or after it has failed."""
    job = server.database.jobs.get(job_id, caller.sees, TRAINING)
    run = server.run_of(job.id)
    try:
        found = read_diagnosis(run) or diagnose(run.root)
    except NotFound:
        raise Conflict(f"{job_id} is {job.state} and has not begun to train, so there is nothing to diagnose yet") from None
    return DiagnosisDocument.model_validate_json(server.without_home(json.dumps(found.to_dict())))


def _license(server: ServerState, model: str | None, version: str | None) -> str | None:
    """Return the licence of the pretrained weights, or None if the version is no longer registered."""
    try:
        manifest = read_manifest(server.models.registry.resolve(str(model), version).path)
    except (NotFound, BundleError):
        return None
    found = (manifest.backbone.get("weights") or {}).get("license")
    return None if found is None else str(found)
