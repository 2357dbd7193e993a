"""Documents of batch predictions: request, state and result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, Field

from finetune.batch_spec import BatchSpec
from finetune.jobs.job import Job
from finetune.jobs.kinds import BATCH
from service.schemas.jobs import JobError, JobState, job_error, job_state


class BatchDocument(JobState):
    """A batch prediction, which is a queued job."""

    object: Literal["batch_prediction"] = "batch_prediction"
    description: str = Field(description="A summary of the request.")
    input_file: str
    model: str = Field(description="The version that predicts, `name@version`, resolved when the request was made.")
    embedding: bool
    metadata: dict[str, str]
    conclusion: str | None = Field(description="A summary of the result; null before it has succeeded.")
    error: JobError | None
    result_files: list[str] = Field(description="Paths on this server: the result, and the table of predictions in each format.")


class UnreadableDocument(BaseModel):
    """An image that could not be read, and why."""

    file: str
    code: str
    message: str


class BatchResult(BaseModel):
    """The result of a batch prediction."""

    object: Literal["batch_prediction"] = "batch_prediction"
    id: str
    model: str
    version: str
    classes: list[str]
    n_answered: int
    n_unreadable: int
    unreadable: list[UnreadableDocument] = Field(description="At most 1,000 images.")
    summary: str
    answers: list[str] = Field(description="Paths on this server, one for each format.")


def _schema() -> dict[str, Any]:
    schema = BatchSpec.model_json_schema()
    for field in schema["properties"].values():
        field.pop("title", None)
    return {**schema, "title": "BatchCreate"}


BATCH_SCHEMAS = {"BatchCreate": _schema()}
BATCH_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The images, and the model that predicts them.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/BatchCreate"}}},
    }
}


def batch_document(job: Job, *, queue_position: int | None, within: Callable[[str], str]) -> BatchDocument:
    """Return the document of a batch prediction; `within` removes local paths from texts."""
    asked, result = job.request or job.spec, job.result
    return BatchDocument(
        **job_state(job, queue_position),
        description=BATCH.describe(job.spec),
        input_file=str(asked["input_file"]),
        model=str(job.spec["model"]),
        embedding=bool(job.spec["embedding"]),
        metadata=dict(job.spec["metadata"]),
        conclusion=BATCH.conclude(result) if result else None,
        error=job_error(job, within),
        result_files=[] if result is None else [f"{BATCH.path}/{job.id}/result", *answer_links(job.id, result["files"])],
    )


def answer_links(job_id: str, files: list[str]) -> list[str]:
    """Return the URL path of the table in each format."""
    return [f"{BATCH.path}/{job_id}/answers?format={name.rpartition('.')[2]}" for name in files]
