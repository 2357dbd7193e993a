"""``/v1/batch_predictions``: predictions for many images by one model, as a queued job with a table to download."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from finetune.batch_spec import BatchSpec, parse_batch
from finetune.errors import Conflict, NotFound, NotReady, Problem, SpecError
from finetune.jobs.creation import digest_of
from finetune.jobs.job import Job
from finetune.jobs.kinds import BATCH
from service.creation import IdempotencyKey, Submission, announce, json_body
from service.job_request import find_folders, metadata_problems, others, parse_body, read_body, summary
from service.middleware.auth import Caller, Submitting
from service.problems import RESPONSES
from service.results import MEDIA_TYPES, TABLE_ANSWER, Format
from service.routes.lifecycle import add_lifecycle
from service.routes.models import find_model
from service.schemas.batch_predictions import BATCH_BODY, BatchDocument, BatchResult, answer_links, batch_document
from service.state import Server, ServerState

batch_router = APIRouter(prefix=BATCH.path, tags=["batch predictions"], responses=RESPONSES)


@batch_router.post("", status_code=201, openapi_extra=BATCH_BODY)
async def create_batch(
    request: Request, response: Response, caller: Submitting, server: Server, idempotency_key: IdempotencyKey = None
) -> BatchDocument:
    """Queue a batch prediction for the images of an upload (`purpose` `batch`, or a dataset). An alias is resolved now."""
    body = await json_body(request, "batch prediction")
    job, new = await run_in_threadpool(_create, Submission(server, caller, idempotency_key), body)
    announce(response, job, new=new)
    return await run_in_threadpool(_document, server, job)


def _create(submission: Submission, raw: bytes) -> tuple[Job, bool]:
    body, server = read_body(raw), submission.server
    folders, problems = find_folders(body, submission.locate, server.data_roots, ("input_file",))
    model = ""
    try:
        asked = parse_body(body, parse_batch, BatchSpec.model_dump, ("model", "embedding", "metadata"))
        problems += metadata_problems(asked.metadata)
        model = _version(server, submission.caller, asked.model)
    except NotFound as error:
        problems.append(Problem("model", error.message))
    except SpecError as error:
        problems += others(error.problems, problems)
    if problems:
        raise SpecError(summary(problems), problems)
    spec = {**asked.model_dump(mode="json"), "input_file": str(folders["input_file"]), "model": model}
    return submission.create(BATCH, spec, body, digest_of({"batch": body}))


def _version(server: ServerState, caller: Caller, reference: str | None) -> str:
    """Resolve the model reference of a request to ``name@version``.

    Raises:
        NotFound: there is no such model that this caller may use.
    """
    if reference is not None:
        found = find_model(server, caller, reference)
        return f"{found.name}@{found.version}"
    try:
        default = server.models.default()
    except NotReady:
        raise NotFound("this server has no default model; name one (GET /v1/models lists those that you may use)") from None
    if server.models.serves_a_folder or not server.may_use_default(caller, default):
        raise NotFound("this server's default is no registered model that you may use; name one (GET /v1/models lists them)")
    return f"{default.name}@{default.version}"


def _document(server: ServerState, job: Job) -> BatchDocument:
    return batch_document(job, queue_position=server.database.jobs.queue_position(job), within=server.without_home)


add_lifecycle(batch_router, BATCH, "batch", BatchDocument, _document)


@batch_router.get("/{batch_id}/result")
def batch_result(caller: Submitting, server: Server, batch_id: str) -> BatchResult:
    """Return the number of predicted images, those that could not be read with the reasons, and links to the tables."""
    job, result = _finished(server, caller, batch_id)
    return BatchResult.model_validate({**result, "answers": answer_links(job.id, result["files"])})


@batch_router.get("/{batch_id}/answers", response_class=FileResponse, responses=TABLE_ANSWER)
def batch_answers(
    caller: Submitting,
    server: Server,
    batch_id: str,
    format: Annotated[Format, Query(description="`npz` contains the logits, and the embeddings if they were requested.")] = "csv",
) -> FileResponse:
    """Download the predictions, one row per image: file, sha256, predicted class, its probability, all probabilities."""
    job, result = _finished(server, caller, batch_id)
    path = server.run_of(job.id).root / f"answers.{format}"
    if path.name not in result["files"] or not path.exists():
        known = ", ".join(name.rpartition(".")[2] for name in result["files"])
        raise NotFound(
            f"{batch_id} has no predictions as {format} (the worker lacks its library, or they were deleted); it has {known}"
        )
    return FileResponse(path, media_type=MEDIA_TYPES[format], filename=f"{job.id}.{format}")


def _finished(server: ServerState, caller: Caller, batch_id: str) -> tuple[Job, Mapping[str, Any]]:
    job = server.database.jobs.get(batch_id, caller.sees, BATCH)
    if job.result is None:
        raise Conflict(f"{batch_id} is {job.state}; only a batch prediction that has succeeded has a table")
    return job, job.result
