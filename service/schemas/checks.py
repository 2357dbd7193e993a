"""Documents of data checks: request, state and findings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from finetune.doctor.finding import LISTED
from finetune.jobs.job import Job
from finetune.jobs.kinds import CHECK
from service.schemas.body import RequestBody
from service.schemas.jobs import JobError, JobState, job_error, job_state

FIELDS = ("model", "data", "validation_file", "test_file", "metadata")  # of a job spec that a data check accepts
CHECK_BODY: dict[str, Any] = {
    "requestBody": {
        "required": False,
        "description": "Optional fields of a job spec: `data`, `validation_file` and `test_file` on how the data is read, "
        "and the `model` whose features are used to find copies and wrong labels.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "model": {"description": "As for a job.", "anyOf": [{"type": "string"}, {"type": "object"}]},
                        "data": {"type": "object", "description": "As for a job."},
                        "validation_file": {"type": "string"},
                        "test_file": {"type": "string"},
                        "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
                    },
                }
            }
        },
    }
}


class CheckDocument(JobState):
    """A data check, which is a queued job."""

    object: Literal["data_check"] = "data_check"
    description: str = Field(description="A summary of the request.")
    file: str
    metadata: dict[str, str]
    conclusion: str | None = Field(description="A summary of the findings; null before it has succeeded.")
    error: JobError | None
    result_files: list[str] = Field(description="Paths on this server: the findings, and the page with pictures.")


class DataCaseDocument(BaseModel):
    """One image, or a group of related images, with the problem."""

    ids: list[str]
    score: float = Field(description="The certainty of the case; larger is more certain.")
    said: str
    suggested: str | None = Field(description="A label that is more probable than the given one, if there is one.")
    key: str = Field(description="Identifies the case: equal for the same images in another copy of the data.")


class DataFindingDocument(BaseModel):
    """One kind of problem in the data."""

    kind: str = Field(description="Such as `near_duplicates`; stable between releases.")
    severity: Literal["problem", "doubt", "note"]
    title: str
    count: int
    evidence: str
    advice: str
    cases: list[DataCaseDocument] = Field(description="The most certain ones first, at most 200.")
    fix: Literal["leave_out", "group", "relabel", "none"]
    acknowledged: int = Field(description="Number of cases that were reviewed and accepted; they are not among `cases`.")


class Acknowledgement(RequestBody):
    """The acceptance of cases of one finding, or its withdrawal."""

    kind: str = Field(max_length=100, description="Of the finding.")
    keys: list[Annotated[str, Field(max_length=100)]] | None = Field(
        default=None, max_length=LISTED, description="The keys of the cases; null for all listed ones."
    )
    acknowledged: bool = True


class CheckResult(BaseModel):
    """The result of a data check."""

    object: Literal["data_check"] = "data_check"
    id: str
    revision: str
    n_images: int
    classes: list[str]
    backbone: str
    findings: list[DataFindingDocument] = Field(description="The worst first.")
    report: str = Field(description="Path on this server of the page with pictures.")


def check_document(job: Job, *, queue_position: int | None, within: Callable[[str], str]) -> CheckDocument:
    """Return the document of a data check; `within` removes local paths from texts."""
    asked, result = job.request or job.spec, job.result
    return CheckDocument(
        **job_state(job, queue_position),
        description=CHECK.describe(job.spec),
        file=str(asked["training_file"]),
        metadata=dict(job.spec["metadata"]),
        conclusion=CHECK.conclude(result) if result else None,
        error=job_error(job, within),
        result_files=[] if result is None else [f"{CHECK.path}/{job.id}/{name}" for name in ("result", "report")],
    )
