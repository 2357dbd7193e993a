"""Jobs, claims and events as values, and how they are encoded in the columns of the database."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import RowMapping

from finetune.jobs.kinds import KINDS, Kind
from finetune.jobs.schema import TERMINAL

LOCAL_OWNER = "local"  # owner of jobs that were submitted without an API key


class LeaseLost(Exception):
    """The job is no longer held under this claim. The caller must stop working on it and write nothing more."""


@dataclass(frozen=True)
class Job:
    """One job, decoded from its row."""

    id: str
    kind: Kind
    owner: str
    state: str
    phase: str | None
    spec: Mapping[str, Any]
    request: Mapping[str, Any] | None
    suffix: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    attempts: int
    progress: Mapping[str, Any] | None
    result: Mapping[str, Any] | None
    error_code: str | None
    error_message: str | None
    cancel_requested_at: float | None
    worker: str | None  # name of the worker that holds it now

    @property
    def finished(self) -> bool:
        return self.state in TERMINAL


@dataclass(frozen=True)
class Claim:
    """The right to work on a job until the lease ends; `fence` is the token that every write needs."""

    job: Job
    worker: str
    fence: int


@dataclass(frozen=True)
class Event:
    """One event of a job's history; `seq` increases over all jobs and is the cursor of readers."""

    seq: int
    job_id: str
    at: float
    level: str
    kind: str
    message: str
    data: Mapping[str, Any]

    @staticmethod
    def of(row: RowMapping) -> Event:
        data = json.loads(row["data"] or "{}")
        return Event(row["seq"], row["job_id"], row["at"], row["level"], row["kind"], row["message"], data)


def job_of(row: RowMapping) -> Job:
    """Decode a row of the table of jobs."""
    return Job(
        id=row["id"], kind=KINDS[row["kind"]], owner=row["owner"], state=row["state"], phase=row["phase"],
        spec=json.loads(row["spec"]),
        request=from_json(row["request"]), suffix=row["suffix"], created_at=row["created_at"], started_at=row["started_at"],
        finished_at=row["finished_at"], attempts=row["attempts"], progress=from_json(row["progress"]),
        result=from_json(row["result"]),
        error_code=row["error_code"], error_message=row["error_message"], cancel_requested_at=row["cancel_requested_at"],
        worker=row["lease_owner"],
    )  # fmt: skip


def to_json(value: Mapping[str, Any]) -> str:
    """Return ASCII JSON, in which lone surrogates and NULs, which databases reject as text, are escaped."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def storable_text(text: str) -> str:
    """Return `text` with the characters replaced that databases reject."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def finite_values(value: Any) -> Any:
    """Return `value` with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite_values(inner) for key, inner in value.items()}
    return [finite_values(inner) for inner in value] if isinstance(value, list) else value


def from_json(text: str | None) -> Any:
    """Return the value of a column with JSON; None if it is empty."""
    return None if text is None else json.loads(text)
