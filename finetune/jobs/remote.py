"""Jobs on a server, over its HTTP API. Local files and folders are uploaded first."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from finetune.batch_spec import BatchSpec
from finetune.comparison_spec import ComparisonSpec
from finetune.jobs.client import EventView, JobView, Request
from finetune.jobs.http import Connection
from finetune.jobs.kinds import BATCH, COMPARISON, KINDS, TRAINING, Kind, kind_of_id
from finetune.progress import ProgressCallback, silent
from finetune.spec import JobSpec

_PAGE = 100
_FILE_FIELDS = {"training_file": "fine-tune", "validation_file": "fine-tune", "test_file": "fine-tune", "input_file": "batch"}


class RemoteJobs:
    """The jobs on one server that the key gives access to."""

    def __init__(self, server: str, api_key: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        self.connection = Connection(server, api_key, transport)

    def submit(
        self, asked: Request | BatchSpec, idempotency_key: str | None = None, progress: ProgressCallback = silent
    ) -> JobView:
        """Upload the local files that the request names, then create the job; exactly once, even if requests are retried."""
        body = asked.given() if isinstance(asked, ComparisonSpec) else asked.model_dump(mode="json", exclude_unset=True)
        for name, purpose in _FILE_FIELDS.items():
            if (given := body.get(name)) is not None and Path(given).exists():
                body[name] = self.connection.upload(Path(given), progress, purpose)["id"]
        key = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        kind = TRAINING if isinstance(asked, JobSpec) else BATCH if isinstance(asked, BatchSpec) else COMPARISON
        return _job_view(self.connection.request("POST", kind.path, json=body, headers=key).json())

    def list(self, limit: int) -> Sequence[JobView]:
        """Return the newest jobs of all kinds, newest first."""
        found = [view for kind in KINDS.values() for view in self._newest(kind, limit)]
        return sorted(found, key=lambda view: (view.created_at, view.id.partition("-")[2]), reverse=True)[:limit]

    def _newest(self, kind: Kind, limit: int) -> Sequence[JobView]:
        found: list[JobView] = []
        more = True
        while more and len(found) < limit:
            page = {"limit": min(limit - len(found), _PAGE)} | ({"after": found[-1].id} if found else {})
            answer = self.connection.request("GET", kind.path, params=page).json()
            found += [_job_view(document) for document in answer["data"]]
            more = answer["has_more"]
        return found

    def get(self, job_id: str) -> JobView:
        return _job_view(self.connection.request("GET", _path(job_id)).json())

    def cancel(self, job_id: str) -> JobView:
        return _job_view(self.connection.request("POST", f"{_path(job_id)}/cancel").json())

    def result(self, job_id: str) -> Mapping[str, Any]:
        document: Mapping[str, Any] = self.connection.request("GET", f"{_path(job_id)}/result").json()
        return document

    def download_answers(self, job_id: str, table_format: str, target: Path) -> None:
        """Download the predictions of a batch job to a file, as ``csv``, ``npz`` or ``parquet``."""
        self.connection.download(f"{_path(job_id)}/answers", target, format=table_format)

    def events(self, job_id: str, after: int = 0) -> Sequence[EventView]:
        found: list[EventView] = []
        more = True
        while more:
            page = {"order": "asc", "limit": _PAGE, "after": f"ftevent-{found[-1].seq if found else after}"}
            answer = self.connection.request("GET", f"{_path(job_id)}/events", params=page).json()
            found += [_event_view(document) for document in answer["data"]]
            more = answer["has_more"]
        return found

    def log(self, job_id: str, offset: int = 0) -> bytes:
        found = b""
        while more := self.connection.request("GET", f"{_path(job_id)}/logs", params={"offset": offset + len(found)}).content:
            found += more
        return found


def _path(job_id: str) -> str:
    return f"{kind_of_id(job_id).path}/{quote(job_id, safe='')}"


def _job_view(document: Mapping[str, Any]) -> JobView:
    error, name = document["error"] or {}, document.get("fine_tuned_model")
    kind = kind_of_id(document["id"])
    is_training = kind is TRAINING
    return JobView(
        id=document["id"],
        kind=kind.name,
        what=f"{document['model']}, {document['method']['type']}" if is_training else document["description"],
        state=document["status"],
        phase=document["phase"],
        created_at=document["created_at"],
        started_at=document["started_at"],
        finished_at=document["finished_at"],
        attempts=document["attempts"],
        progress=document["progress"],
        model=None if name is None else f"{name}@{document['fine_tuned_version']}",
        error_code=error.get("code"),
        error_message=error.get("message"),
        conclusion=_conclusion(document),
        backbone=document["model"] if is_training else None,
        method=document["method"]["type"] if is_training else None,
        metrics=document["metrics"] if is_training else {},
    )


def _conclusion(document: Mapping[str, Any]) -> str | None:
    """Return the sentence that summarises the result of a comparison or a batch prediction, if there is one."""
    verdict = document.get("verdict") or {}
    found: str | None = document.get("conclusion", verdict.get("sentence"))
    return found


def _event_view(document: Mapping[str, Any]) -> EventView:
    return EventView(
        int(document["id"].removeprefix("ftevent-")), document["created_at"], document["level"], str(document["message"])
    )
