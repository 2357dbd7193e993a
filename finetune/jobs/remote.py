"""Jobs on a server, over its HTTP surface. What is a folder here is packed and uploaded there first."""

from __future__ import annotations

import os
import tarfile
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import httpx

from finetune.errors import FinetuneError, InvalidInput, Problem
from finetune.jobs.client import EventView, JobView
from finetune.progress import Progress, ProgressCallback, silent
from finetune.spec import JobSpec

_TRIES = 4  # of a request that got no answer, or was answered "later"
_FIRST_PAUSE_SECONDS = 0.5
_LATER = (429, 502, 503, 504)
_TIMEOUT = httpx.Timeout(30.0, write=300.0)
_PAGE = 100


class RequestRefused(InvalidInput):
    """The server says why in its own words; `code` of its answer is in the message."""

    code = "request_refused"


class ServerUnreachable(FinetuneError):
    code = "server_unreachable"


class RemoteJobs:
    """The jobs of one server that the key may see."""

    def __init__(self, server: str, api_key: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.server = server.rstrip("/")
        self._http = httpx.Client(base_url=self.server, headers=headers, timeout=_TIMEOUT, transport=transport)

    def submit(self, spec: JobSpec, idempotency_key: str | None = None, progress: ProgressCallback = silent) -> JobView:
        """Upload what the spec names on this machine, then create the job, once however often the connection breaks."""
        body = spec.model_dump(mode="json", exclude_unset=True)
        for name in ("training_file", "validation_file", "test_file"):
            if (given := body.get(name)) is not None and Path(given).exists():
                body[name] = self._upload(Path(given), progress)
        key = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return _job_view(self._ask("POST", "/v1/fine_tuning/jobs", json=body, headers=key).json())

    def list(self, limit: int) -> Sequence[JobView]:
        found: list[JobView] = []
        more = True
        while more and len(found) < limit:
            page = {"limit": min(limit - len(found), _PAGE)} | ({"after": found[-1].id} if found else {})
            answer = self._ask("GET", "/v1/fine_tuning/jobs", params=page).json()
            found += [_job_view(document) for document in answer["data"]]
            more = answer["has_more"]
        return found

    def get(self, job_id: str) -> JobView:
        return _job_view(self._ask("GET", _path(job_id)).json())

    def cancel(self, job_id: str) -> JobView:
        return _job_view(self._ask("POST", f"{_path(job_id)}/cancel").json())

    def events(self, job_id: str, after: int = 0) -> Sequence[EventView]:
        found: list[EventView] = []
        more = True
        while more:
            page = {"order": "asc", "limit": _PAGE, "after": f"ftevent-{found[-1].seq if found else after}"}
            answer = self._ask("GET", f"{_path(job_id)}/events", params=page).json()
            found += [_event_view(document) for document in answer["data"]]
            more = answer["has_more"]
        return found

    def log(self, job_id: str, offset: int = 0) -> bytes:
        found = b""
        while more := self._ask("GET", f"{_path(job_id)}/logs", params={"offset": offset + len(found)}).content:
            found += more
        return found

    def _upload(self, path: Path, progress: ProgressCallback) -> str:
        """The id of the uploaded file; a folder is packed first, an archive goes as it is."""
        with _packed(path, progress) as archive:
            archive.seek(0)
            named = (path.name + ".tar" if path.is_dir() else path.name, _Reported(archive, progress))
            answer = self._ask("POST", "/v1/files", files={"file": named}, data={"purpose": "fine-tune"}, tries=1)
            return str(answer.json()["id"])

    def _ask(self, method: str, path: str, *, tries: int = _TRIES, **request: Any) -> httpx.Response:
        pause = _FIRST_PAUSE_SECONDS
        for left in range(tries - 1, -1, -1):
            try:
                answer = self._http.request(method, path, **request)
            except httpx.TransportError as error:
                if not left:
                    raise ServerUnreachable(
                        f"{self.server}: no answer ({error}). Is the address right, and does the server run (finetune serve)?"
                    ) from error
            else:
                if answer.is_success:
                    return answer
                if answer.status_code not in _LATER or not left:
                    raise _refusal(answer)
                pause = max(pause, float(answer.headers.get("Retry-After", 0)))
            time.sleep(pause)
            pause *= 2
        raise AssertionError("the last try returns or raises")


class _Reported:
    """A file that tells how much of it has been read."""

    def __init__(self, stream: IO[bytes], progress: ProgressCallback) -> None:
        self.stream = stream
        self.progress = progress
        self.total = os.fstat(stream.fileno()).st_size

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.progress(Progress("preparing", self.stream.tell(), self.total, "bytes", message="uploading"))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _packed(path: Path, progress: ProgressCallback) -> IO[bytes]:
    """An open file to send: of a folder, its files as an uncompressed tar (photographs are compressed already)."""
    if not path.is_dir():
        return open(path, "rb")
    files = sorted(entry for entry in path.rglob("*") if entry.is_file() and not entry.is_symlink())
    if not files:
        raise InvalidInput(f"{path}: there is no file in this folder")
    target = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    with tarfile.open(fileobj=target, mode="w") as archive:
        for number, file in enumerate(files, 1):
            archive.add(file, arcname=str(file.relative_to(path)))
            progress(Progress("preparing", number, len(files), "files", message="packing"))
    return target


def _path(job_id: str) -> str:
    return f"/v1/fine_tuning/jobs/{quote(job_id, safe='')}"


def _refusal(answer: httpx.Response) -> FinetuneError:
    """The server's own words, where it gave any."""
    try:
        document = answer.json()
    except ValueError:
        document = {}
    if not isinstance(document, Mapping):
        document = {}
    problems = [Problem(str(found.get("field", "")), str(found.get("detail", ""))) for found in document.get("errors", ())]
    code = document.get("code", answer.reason_phrase)
    message = f"{answer.request.url}: {answer.status_code} {code}: {document.get('detail', answer.text[:200])}"
    return RequestRefused(message, problems) if answer.is_client_error else ServerUnreachable(message)


def _job_view(document: Mapping[str, Any]) -> JobView:
    error, name = document["error"] or {}, document["fine_tuned_model"]
    return JobView(
        id=document["id"],
        state=document["status"],
        phase=document["phase"],
        backbone=document["model"],
        method=document["method"]["type"],
        created_at=document["created_at"],
        started_at=document["started_at"],
        finished_at=document["finished_at"],
        attempts=document["attempts"],
        progress=document["progress"],
        model=None if name is None else f"{name}@{document['fine_tuned_version']}",
        error_code=error.get("code"),
        error_message=error.get("message"),
        metrics=document["metrics"],
    )


def _event_view(document: Mapping[str, Any]) -> EventView:
    return EventView(
        int(document["id"].removeprefix("ftevent-")), document["created_at"], document["level"], str(document["message"])
    )
