"""The document of a diagnosis, the same as of `finetune diagnose RUN --json`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class EvidenceDocument(BaseModel):
    """One figure that supports a finding."""

    what: str
    value: str
    expected: str = Field(description="The expected value in a healthy run; may be empty.")


class FindingDocument(BaseModel):
    """Something that is wrong with a run."""

    code: str = Field(description="A stable code for programs.")
    title: str
    severity: Literal["problem", "note"] = Field(
        description="A problem lowers quality or falsifies a metric; a note does neither."
    )
    confidence: float = Field(description="0 to 1; 0.5 if the evidence just reaches its threshold.")
    certainty: Literal["sure", "likely", "possible"]
    sentence: str
    evidence: list[EvidenceDocument]
    advice: list[str]
    source: str
    caused_by: str | None = Field(description="The code of another finding that explains this one.")


class ClearDocument(BaseModel):
    """A check that found nothing."""

    code: str
    title: str
    figure: str


class NotCheckedDocument(BaseModel):
    """A check that could not be made."""

    code: str
    title: str
    reason: str


class DiagnosisDocument(BaseModel):
    """The diagnosis of a job's run from its records."""

    object: Literal["diagnosis"]
    schema_version: int
    run: str
    against: str | None
    sentence: str
    findings: list[FindingDocument] = Field(description="Problems first, causes before their consequences.")
    clear: list[ClearDocument]
    not_checked: list[NotCheckedDocument]
