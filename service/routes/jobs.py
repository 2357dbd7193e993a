"""``/v1/fine_tuning/jobs``: each route translates one request to one call of the store and the result to one answer.

HTTP reads the database; only logs and checkpoints are looked up in the run's folder, where the run writes them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from finetune.bundle.manifest import read_manifest
from finetune.errors import BundleError, Conflict, NotFound
from finetune.jobs.history import newest_events
from finetune.jobs.store import Job, NameTaken
from finetune.naming import as_model_name
from service.event_streams import event_seq
from service.job_request import metadata_filter, read_body, read_request
from service.middleware.auth import Caller, Submitting
from service.problems import RESPONSES
from service.results import evaluated_splits, read_object, resolved_hyperparameters
from service.routes.files import REPLAYED, IdempotencyKey
from service.schemas.job_create import JOB_BODY
from service.schemas.jobs import (
    CheckpointList,
    EventDocument,
    EventList,
    JobDocument,
    JobList,
    ResultDocument,
    State,
    checkpoint_documents,
    event_document,
    job_document,
    result_links,
)
from service.schemas.lists import After, Limit
from service.state import Server, ServerState

LARGEST_LOG_BYTES = 8 << 20  # of a longer log, what one answer holds
MAX_OFFSET = (1 << 63) - 1  # what a file can be asked for
EVENT_STREAM = "text/event-stream"

jobs_router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["jobs"], responses=RESPONSES)


@jobs_router.post("", status_code=201, openapi_extra=JOB_BODY)
async def create_job(
    request: Request, response: Response, caller: Submitting, server: Server, idempotency_key: IdempotencyKey = None
) -> JobDocument:
    """Queue a fine-tuning job. What is wrong with the request or its dataset is said now, all at once, with field paths."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, f"A body of type {media_type[:100]!r} is not a job; send application/json")
    job, new = await server.checks.run(_create, server, caller, await request.body(), idempotency_key)
    response.headers["Location"] = f"/v1/fine_tuning/jobs/{job.id}"
    if not new:
        response.headers[REPLAYED] = "true"
    return await run_in_threadpool(_document, server, job)


def _create(server: ServerState, caller: Caller, raw: bytes, idempotency_key: str | None) -> tuple[Job, bool]:
    def locate(file_id: str) -> Path:
        return server.uploads.place_of(server.database.files.get(file_id, caller.sees).id).resolve()

    def create(name: str) -> tuple[Job, bool]:
        if _is_reserved(server, caller, name):
            raise NameTaken(name)
        spec = asked.spec.model_copy(update={"suffix": name})
        return server.database.jobs.create(
            caller.owner,
            spec.model_dump(mode="json"),
            spec_digest=spec.digest(),
            request=asked.body,
            suffix=name,
            idempotency_key=idempotency_key,
            body_sha256=asked.digest,
            max_queued=server.max_unfinished_jobs,
            any_suffix=caller.is_admin,
        )

    asked = read_request(read_body(raw), locate=locate, data_roots=server.data_roots, check_names=server.spec_checker.problems)
    if asked.spec.suffix is not None:
        return create(asked.spec.suffix)
    name = as_model_name(_dataset_name(server, Path(asked.spec.training_file)))
    try:
        return create(name)
    except NameTaken:
        return create(f"{name[:50]}-{asked.digest[:8]}")


def _dataset_name(server: ServerState, folder: Path) -> str:
    """What the client calls its dataset: the uploaded file's name without its ending, or the folder's."""
    if folder.parent == server.uploads.folder.resolve():
        return server.database.files.get(folder.name).filename.split(".")[0]
    return folder.name


def _is_reserved(server: ServerState, caller: Caller, name: str) -> bool:
    """Return whether there is a model of this name that the caller may not add versions to."""
    return server.models.registry.has(name) and not server.may_change(caller, name)


@jobs_router.get("")
def list_jobs(
    request: Request,
    caller: Submitting,
    server: Server,
    after: After = None,
    limit: Limit = 20,
    status: Annotated[State | None, Query(description="Only jobs in this state.")] = None,
) -> JobList:
    """List your jobs, newest first. `metadata[key]=value`, any number of times, keeps those with these values."""
    wanted = metadata_filter(request.query_params.multi_items())
    page, more = server.database.jobs.list(caller.sees, after=after, limit=limit, state=status, metadata=wanted)
    documents = [_document(server, job) for job in page]
    return JobList.of(documents, more)


@jobs_router.get("/{job_id}")
def get_job(caller: Submitting, server: Server, job_id: str) -> JobDocument:
    """One job as it is now."""
    return _document(server, server.database.jobs.get(job_id, caller.sees))


class JobDeleted(BaseModel):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    deleted: Literal[True] = True


@jobs_router.delete("/{job_id}")
def delete_job(caller: Submitting, server: Server, job_id: str) -> JobDeleted:
    """Delete a job that has ended, with its folder: checkpoints, report, logs. The model that it made stays."""
    server.database.jobs.delete(job_id, caller.sees)
    shutil.rmtree(server.run_of(job_id).root, ignore_errors=True)
    return JobDeleted(id=job_id)


@jobs_router.post("/{job_id}/cancel")
def cancel_job(caller: Submitting, server: Server, job_id: str) -> JobDocument:
    """Cancel a job: at once where it is queued; a running one is `cancelling` until its process has ended."""
    return _document(server, server.database.jobs.request_cancel(job_id, caller.sees))


EVENTS_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A page of events; or, with `Accept: text/event-stream`, a stream of them (each `id` is an event's), "
        "`progress`, and `done` at the job's end.",
        "content": {EVENT_STREAM: {"schema": {"type": "string"}}},
    }
}


@jobs_router.get("/{job_id}/events", response_model=EventList, responses=EVENTS_ANSWER)
async def job_events(
    request: Request,
    caller: Submitting,
    server: Server,
    job_id: str,
    after: Annotated[str | None, Query(max_length=100, description="The id of the last event of the page before.")] = None,
    limit: Limit = 20,
    order: Annotated[Literal["desc", "asc"], Query(description="Newest first, or oldest first.")] = "desc",
    last_event_id: Annotated[str | None, Header(max_length=100, description="Where a stream goes on.")] = None,
) -> Any:
    """What happened to a job."""
    job = await run_in_threadpool(server.database.jobs.get, job_id, caller.sees)
    if EVENT_STREAM in request.headers.get("accept", ""):
        start = event_seq(last_event_id or after or "0")
        frames = server.event_streams.follow(job.id, start, still_allowed=lambda: server.still_valid(caller))
        return StreamingResponse(frames, media_type=EVENT_STREAM, headers={"X-Accel-Buffering": "no"})
    return await run_in_threadpool(_events, server, job.id, None if after is None else event_seq(after), limit, order)


def _events(server: ServerState, job_id: str, after: int | None, limit: int, order: str) -> EventList:
    if order == "asc":
        found = server.database.jobs.events(job_id, after=after or 0, limit=limit + 1)
        page, more = found[:limit], len(found) > limit
    else:
        page, more = newest_events(server.database.engine, job_id, before=after, limit=limit)
    documents: list[EventDocument] = [event_document(event, server.without_home) for event in page]
    return EventList.of(documents, more)


@jobs_router.get("/{job_id}/checkpoints")
def job_checkpoints(caller: Submitting, server: Server, job_id: str, after: After = None, limit: Limit = 10) -> CheckpointList:
    """The checkpoints that the job could resume from, newest first. A solved head needs none."""
    job = server.database.jobs.get(job_id, caller.sees)
    documents = checkpoint_documents(job.id, server.run_of(job.id))
    if after is not None:
        ids = [one.id for one in documents]
        if after not in ids:
            raise NotFound(f"no checkpoint {after!r} of {job_id}; runs keep only the newest few")
        documents = documents[ids.index(after) + 1 :]
    page = documents[:limit]
    return CheckpointList.of(page, len(documents) > limit)


@jobs_router.get("/{job_id}/logs", response_class=PlainTextResponse)
def job_logs(
    caller: Submitting,
    server: Server,
    job_id: str,
    tail: Annotated[int | None, Query(ge=1, le=100_000, description="Only the last lines.")] = None,
    offset: Annotated[int | None, Query(ge=0, le=MAX_OFFSET, description="From this byte on: the next 8 MiB of it.")] = None,
) -> PlainTextResponse:
    """What the job's processes have printed: the last 8 MiB, or those from `offset` on; nothing where there is no more yet."""
    job = server.database.jobs.get(job_id, caller.sees)
    printed = _part_of(server.run_of(job.id).log, offset)
    return PlainTextResponse(printed if tail is None else b"".join(printed.splitlines(keepends=True)[-tail:]))


def _part_of(log: Path, offset: int | None) -> bytes:
    """Bytes as they are in the file, so that an offset means the same on both sides."""
    try:
        with open(log, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - LARGEST_LOG_BYTES) if offset is None else offset)
            return stream.read(LARGEST_LOG_BYTES)
    except FileNotFoundError:
        return b""  # it has not started yet


@jobs_router.get("/{job_id}/result")
def job_result(caller: Submitting, server: Server, job_id: str) -> ResultDocument:
    """Return what a job that has succeeded came to: figures with n and intervals, resolved hyperparameters, where the rest is."""
    job = server.database.jobs.get(job_id, caller.sees)
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


def _license(server: ServerState, model: str | None, version: str | None) -> str | None:
    """Return the licence of the pretrained weights, if the version is still registered."""
    try:
        manifest = read_manifest(server.models.registry.resolve(str(model), version).path)
    except (NotFound, BundleError):
        return None
    found = (manifest.backbone.get("weights") or {}).get("license")
    return None if found is None else str(found)


def _document(server: ServerState, job: Job) -> JobDocument:
    return job_document(
        job,
        queue_position=server.database.jobs.queue_position(job),
        within=server.without_home,
        resolved=resolved_hyperparameters(server.run_of(job.id)) if job.attempts else None,
    )
