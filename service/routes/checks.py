"""``POST /v1/files/{id}/check`` and ``/v1/checks``: the examination of an upload, as a queued job."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse
from starlette.concurrency import run_in_threadpool

from finetune.errors import Conflict, InvalidInput, NotFound, Problem, SpecError
from finetune.jobs.job import Job
from finetune.jobs.kinds import CHECK
from service.acknowledgements import accepted_as, without_accepted
from service.creation import IdempotencyKey, Submission, announce, create_checked, json_body
from service.job_request import read_body, read_request, summary
from service.middleware.auth import Caller, Submitting
from service.problems import RESPONSES
from service.results import read_object, report_answer
from service.routes.lifecycle import add_lifecycle
from service.schemas.checks import CHECK_BODY, FIELDS, Acknowledgement, CheckDocument, CheckResult, check_document
from service.state import Server, ServerState

file_checks_router = APIRouter(prefix="/v1/files", tags=["data checks"], responses=RESPONSES)
checks_router = APIRouter(prefix=CHECK.path, tags=["data checks"], responses=RESPONSES)


@file_checks_router.post("/{file_id}/check", status_code=201, openapi_extra=CHECK_BODY)
async def check_file(
    request: Request, response: Response, caller: Submitting, server: Server, file_id: str, idempotency_key: IdempotencyKey = None
) -> CheckDocument:
    """Queue a data check of an upload: copies, leakage, probable label errors, shortcuts, classes, empty images."""
    submission = Submission(server, caller, idempotency_key)
    await run_in_threadpool(submission.locate, file_id)  # 404 for a missing file comes before errors of the body
    raw = await request.body()
    body = await json_body(request, "data check") if raw.strip() else b"{}"
    job, new = await create_checked(submission, partial(_create, file_id, body))
    announce(response, job, new=new)
    return await run_in_threadpool(_document, server, job)


def _create(file_id: str, raw: bytes, submission: Submission) -> tuple[Job, bool]:
    server, given = submission.server, read_body(raw)
    if unknown := [name for name in given if name not in FIELDS]:
        problems = [Problem(name, f"not a field of a data check; it has {', '.join(FIELDS)}") for name in unknown]
        raise SpecError(summary(problems), problems)
    asked = read_request(
        {**given, "training_file": file_id},
        locate=submission.locate,
        find_model=submission.find_model,
        data_roots=server.data_roots,
        hub_models=server.hub_models,
        check_names=submission.check_names,
    )
    return submission.create(CHECK, asked.spec.model_dump(mode="json"), asked.body, asked.digest)


def _document(server: ServerState, job: Job) -> CheckDocument:
    return check_document(job, queue_position=server.database.jobs.queue_position(job), within=server.without_home)


add_lifecycle(checks_router, CHECK, "check", CheckDocument, _document)


@checks_router.get("/{check_id}/result")
def check_result(caller: Submitting, server: Server, check_id: str) -> CheckResult:
    """Return all findings, worst first, each with its evidence, advice, and the images concerned."""
    return _result(server, _finished(server, caller, check_id))


@checks_router.post("/{check_id}/acknowledgements")
def acknowledge_cases(caller: Submitting, server: Server, check_id: str, asked: Acknowledgement) -> CheckResult:
    """Accept cases of a finding, or withdraw their acceptance; return the cases that remain.

    Cases of images are accepted in all uploads that hold these images, others in this upload.
    """
    job = _finished(server, caller, check_id)
    finding = next((one for one in _found(server, job)["findings"] if one["kind"] == asked.kind), None)
    if finding is None:
        raise NotFound(f"{check_id} has no finding of the kind {asked.kind!r}")
    known = {case["key"] for case in finding["cases"]}
    if unknown := [key for key in asked.keys or () if key not in known]:
        problem = Problem("keys", f"no case {unknown[0]!r} among those that are listed")
        raise InvalidInput(f"{check_id}: {asked.kind} has {problem.message}", [problem])
    meant = [
        accepted_as(_file_of(job), case)
        for case in finding["cases"]
        if case["key"] in (known if asked.keys is None else asked.keys)
    ]
    server.acknowledgements.change(job.owner, *((meant, ()) if asked.acknowledged else ((), meant)))
    return _result(server, job)


def _result(server: ServerState, job: Job) -> CheckResult:
    found, accepted = _found(server, job), server.acknowledgements.of(job.owner)
    findings = [without_accepted(one, _file_of(job), accepted) for one in found["findings"]]
    return CheckResult.model_validate({**found, "findings": findings, "id": job.id, "report": f"{CHECK.path}/{job.id}/report"})


def _found(server: ServerState, job: Job) -> Mapping[str, Any]:
    found: Mapping[str, Any] = read_object(server.run_of(job.id).examination)
    if not found:
        raise NotFound(f"what {job.id} found no longer exists; request the check again")
    return found


def _file_of(job: Job) -> str:
    return str((job.request or job.spec)["training_file"])


@checks_router.get("/{check_id}/report", response_class=HTMLResponse)
def check_report(caller: Submitting, server: Server, check_id: str) -> HTMLResponse:
    """Return the findings as one self-contained HTML page with images."""
    job = _finished(server, caller, check_id)
    return report_answer(server.run_of(job.id), server.without_home)


def _finished(server: ServerState, caller: Caller, check_id: str) -> Job:
    job = server.database.jobs.get(check_id, caller.sees, CHECK)
    if job.state != "succeeded":
        raise Conflict(f"{check_id} is {job.state}; only a check that has succeeded has findings")
    return job
