"""The routes that all kinds of jobs share: list, state, events, log, cancel and delete.

This module does not use ``from __future__ import annotations``, since FastAPI could not resolve annotations that are local to
`add_lifecycle`.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Header, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from finetune.jobs.history import newest_events
from finetune.jobs.job import Job
from finetune.jobs.kinds import Kind
from service.event_streams import event_seq
from service.job_request import metadata_filter
from service.middleware.auth import Submitting
from service.schemas.jobs import EventDocument, EventList, JobState, JobStatus, event_document
from service.schemas.lists import After, Limit, Page
from service.state import Server, ServerState

LARGEST_LOG_BYTES = 8 << 20  # of a log in one response
MAX_OFFSET = (1 << 63) - 1  # the largest offset of a file
EVENT_STREAM = "text/event-stream"
EVENTS_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A page of events; or, with `Accept: text/event-stream`, a stream of them (each `id` is an event's), "
        "`progress`, and `done` at the end.",
        "content": {EVENT_STREAM: {"schema": {"type": "string"}}},
    }
}

D = TypeVar("D", bound=JobState)


class Deleted(BaseModel):
    """The confirmation that a job was deleted."""

    id: str
    object: Literal["fine_tuning.job", "fine_tuning.comparison", "batch_prediction", "data_check"]
    deleted: Literal[True] = True


def add_lifecycle(router: APIRouter, kind: Kind, noun: str, model: type[D], document: Callable[[ServerState, Job], D]) -> None:
    """Add the routes of one kind of job.

    Args:
        noun: used in the names of operations and of the path parameter: ``get_job``, ``{job_id}``.
        document: converts a job to its document.
    """
    path = f"/{{{noun}_id}}"
    Id = Annotated[str, PathParameter(alias=f"{noun}_id")]
    title, plural = kind.title, f"{noun}es" if noun.endswith("h") else f"{noun}s"
    object_name: Any = kind.object  # `Deleted` lists the values

    @router.get("", name=f"list_{plural}", description=f"List your {plural}, newest first. {_FILTER}", response_model=Page[model])  # type: ignore[valid-type]
    def list_(
        request: Request,
        caller: Submitting,
        server: Server,
        after: After = None,
        limit: Limit = 20,
        status: Annotated[JobStatus | None, Query(description="Only jobs in this state.")] = None,
    ) -> Any:
        wanted = metadata_filter(request.query_params.multi_items())
        page, more = server.database.jobs.list(caller.sees, kind=kind, after=after, limit=limit, state=status, metadata=wanted)
        return Page[model].of([document(server, job) for job in page], more)  # type: ignore[valid-type]

    @router.get(path, name=f"get_{noun}", description=f"Return one {title} as it is now.", response_model=model)
    def get(caller: Submitting, server: Server, job_id: Id) -> Any:
        return document(server, server.database.jobs.get(job_id, caller.sees, kind))

    @router.delete(
        path,
        name=f"delete_{noun}",
        description=f"Delete a {title} that has ended, with its folder of checkpoints, reports and logs. Its model stays.",
    )
    def delete(caller: Submitting, server: Server, job_id: Id) -> Deleted:
        server.database.jobs.delete(job_id, caller.sees, kind)
        shutil.rmtree(server.run_of(job_id).root, ignore_errors=True)
        return Deleted(id=job_id, object=object_name)

    @router.post(
        f"{path}/cancel",
        name=f"cancel_{noun}",
        description=f"Cancel a {title}: at once where it is queued; a running one is `cancelling` until its process has ended.",
        response_model=model,
    )
    def cancel(caller: Submitting, server: Server, job_id: Id) -> Any:
        return document(server, server.database.jobs.request_cancel(job_id, caller.sees, kind))

    @router.get(
        f"{path}/events",
        name=f"{noun}_events",
        description=f"What happened to a {title}.",
        response_model=EventList,
        responses=EVENTS_ANSWER,
    )
    async def events(
        request: Request,
        caller: Submitting,
        server: Server,
        job_id: Id,
        after: Annotated[str | None, Query(max_length=100, description="The id of the last event of the previous page.")] = None,
        limit: Limit = 20,
        order: Annotated[Literal["desc", "asc"], Query(description="Newest first, or oldest first.")] = "desc",
        last_event_id: Annotated[
            str | None,
            Header(max_length=100, description="The id of the last event that was received; a stream continues after it."),
        ] = None,
    ) -> Any:
        job = await run_in_threadpool(server.database.jobs.get, job_id, caller.sees, kind)
        if EVENT_STREAM in request.headers.get("accept", ""):
            start = event_seq(last_event_id or after or "0")
            frames = server.event_streams.follow(job.id, start, still_allowed=lambda: server.still_valid(caller))
            return StreamingResponse(frames, media_type=EVENT_STREAM, headers={"X-Accel-Buffering": "no"})
        return await run_in_threadpool(_events, server, job.id, None if after is None else event_seq(after), limit, order)

    @router.get(
        f"{path}/logs",
        name=f"{noun}_logs",
        description=f"What the processes of a {title} have printed: the last 8 MiB, or those from `offset` on; nothing where "
        "there is no more yet.",
        response_class=PlainTextResponse,
    )
    def logs(
        caller: Submitting,
        server: Server,
        job_id: Id,
        tail: Annotated[int | None, Query(ge=1, le=100_000, description="Only the last lines of the log.")] = None,
        offset: Annotated[int | None, Query(ge=0, le=MAX_OFFSET, description="Return up to 8 MiB from this byte on.")] = None,
    ) -> PlainTextResponse:
        job = server.database.jobs.get(job_id, caller.sees, kind)
        printed = _part_of(server.run_of(job.id).log, offset)
        return PlainTextResponse(printed if tail is None else b"".join(printed.splitlines(keepends=True)[-tail:]))


_FILTER = "`metadata[key]=value`, which may be repeated, restricts the list to jobs with these values."


def _events(server: ServerState, job_id: str, after: int | None, limit: int, order: str) -> EventList:
    if order == "asc":
        found = server.database.jobs.events(job_id, after=after or 0, limit=limit + 1)
        page, more = found[:limit], len(found) > limit
    else:
        page, more = newest_events(server.database.engine, job_id, before=after, limit=limit)
    documents: list[EventDocument] = [event_document(event, server.without_home) for event in page]
    return EventList.of(documents, more)


def _part_of(log: Path, offset: int | None) -> bytes:
    """Return the log's bytes unchanged, so that clients can count offsets."""
    try:
        with open(log, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - LARGEST_LOG_BYTES) if offset is None else offset)
            return stream.read(LARGEST_LOG_BYTES)
    except FileNotFoundError:
        return b""  # it has not started yet
