"""A diagnosis as clients see it: the document that `finetune diagnose RUN --json` prints."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class EvidenceDocument(BaseModel):
    what: str
    value: str
    expected: str = Field(description="What the value would be where nothing is wrong; may be empty.")


class FindingDocument(BaseModel):
    """Something that is wrong with a run."""

    code: str = Field(description="Stable: branch on this.")
    title: str
    severity: Literal["problem", "note"] = Field(description="A problem costs quality; a note should be known.")
    confidence: float = Field(description="0 to 1; 0.5 where the evidence just reaches its threshold.")
    certainty: Literal["sure", "likely", "possible"]
    sentence: str
    evidence: list[EvidenceDocument]
    advice: list[str]
    source: str
    caused_by: str | None = Field(description="The code of another finding that explains this one.")


class ClearDocument(BaseModel):
    """Something that was looked at and is fine."""

    code: str
    title: str
    figure: str


class NotCheckedDocument(BaseModel):
    """Something that could not be looked at."""

    code: str
    title: str
    reason: str


class DiagnosisDocument(BaseModel):
    """What the records of a job's run say about it."""

    object: Literal["diagnosis"]
    schema_version: int
    run: str
    against: str | None
    sentence: str
    findings: list[FindingDocument] = Field(description="Problems first, causes before what follows from them.")
    clear: list[ClearDocument]
    not_checked: list[NotCheckedDocument]
