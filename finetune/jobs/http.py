"""HTTP requests to a server: the server's error messages, retries of temporary failures, and uploads of packed folders."""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import httpx

from finetune.errors import FinetuneError, InvalidInput, Problem
from finetune.progress import Progress, ProgressCallback, silent
from finetune.storage.files import write_atomic

_TRIES = 4  # of a request without a response, or with a status of `_LATER`
_FIRST_PAUSE_SECONDS = 0.5
_LATER = (429, 502, 503, 504)
_TIMEOUT = httpx.Timeout(30.0, write=300.0)
_UNPACKING = httpx.Timeout(30.0, read=600.0)
PART_BYTES = 16 << 20


class RequestRefused(InvalidInput):
    """The server rejected the request; the message contains the server's message and error code."""

    code = "request_refused"


class ServerUnreachable(FinetuneError):
    """The server did not respond, or failed, in all tries."""

    code = "server_unreachable"


class Connection:
    """The connection to one server, with its API key."""

    def __init__(self, server: str, api_key: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        if not server.startswith(("http://", "https://")):
            raise InvalidInput(f"{server!r} is not the address of a server; give one such as http://127.0.0.1:3000")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.server = server.rstrip("/")
        self.http = httpx.Client(base_url=self.server, headers=headers, timeout=_TIMEOUT, transport=transport)

    def upload(self, path: Path, progress: ProgressCallback = silent, purpose: str = "fine-tune") -> dict[str, Any]:
        """Upload a dataset, or images for batch prediction (``batch``), and return the file's document. A folder is packed first.

        Large files are sent in parts, so that a lost connection costs one part only. Uploading the same file again within a day
        resumes an interrupted upload, also from another process.
        """
        with packed(path, progress) as archive:
            name = path.name + ".tar" if path.is_dir() else path.name
            size_bytes = archive.seek(0, os.SEEK_END)
            archive.seek(0)
            if size_bytes > PART_BYTES:
                return self._upload_in_parts(archive, size_bytes, name, purpose, progress)
            answer = self.request("POST", "/v1/files", files={"file": (name, archive)}, data={"purpose": purpose}, tries=1)
            progress(Progress("preparing", size_bytes, size_bytes, "bytes", message="uploading"))
            document: dict[str, Any] = answer.json()
            return document

    def _upload_in_parts(
        self, archive: IO[bytes], size_bytes: int, name: str, purpose: str, progress: ProgressCallback
    ) -> dict[str, Any]:
        wanted = {"filename": name, "purpose": purpose, "bytes": size_bytes}
        contents = hashlib.sha256(name.encode())
        for chunk in iter(lambda: archive.read(1 << 20), b""):
            contents.update(chunk)
        upload = self.request("POST", "/v1/uploads", json=wanted, headers={"Idempotency-Key": contents.hexdigest()}).json()
        known = {part["part_number"]: part for part in upload["parts"]}
        for number, start in enumerate(range(0, size_bytes, PART_BYTES), 1):
            n_bytes = min(PART_BYTES, size_bytes - start)
            if upload["status"] == "pending" and known.get(number, {}).get("bytes") != n_bytes:
                archive.seek(start)
                part = {"data": (name, archive.read(n_bytes))}
                path = f"/v1/uploads/{upload['id']}/parts"
                known[number] = self.request("POST", path, files=part, data={"part_number": str(number)}).json()
            progress(Progress("preparing", start + n_bytes, size_bytes, "bytes", message="uploading"))
        if upload["status"] == "pending":
            parts = [known[number]["id"] for number in sorted(known)]
            path = f"/v1/uploads/{upload['id']}"
            try:
                upload = self.request("POST", f"{path}/complete", json={"part_ids": parts}, timeout=_UNPACKING).json()
            except RequestRefused:
                self.request("POST", f"{path}/cancel")  # the contents were rejected and would be rejected again
                raise
        document: dict[str, Any] = upload["file"]
        return document

    def request(self, method: str, path: str, *, tries: int = _TRIES, **request: Any) -> httpx.Response:
        """Send a request and return its successful response. Retry after a pause without a response or with a status of `_LATER`.

        Raises:
            RequestRefused: the server rejected the request.
            ServerUnreachable: there was no response, or a server error, in all tries.
        """
        pause = _FIRST_PAUSE_SECONDS
        for left in range(tries - 1, -1, -1):
            try:
                answer = self.http.request(method, path, **request)
            except httpx.TransportError as error:
                if not left:
                    raise ServerUnreachable(
                        f"{self.server}: no answer ({error}). Check the address, and whether the server is running (finetune "
                        f"serve)."
                    ) from error
            else:
                if answer.is_success:
                    return answer
                if answer.status_code not in _LATER or not left:
                    raise refusal(answer)
                pause = max(pause, float(answer.headers.get("Retry-After", 0)))
            time.sleep(pause)
            pause *= 2
        raise AssertionError("the last try returns or raises")

    def download(self, path: str, target: Path, **query: str) -> None:
        """Download a response to a file, atomically.

        Raises:
            RequestRefused: the server rejected the request.
        """
        with self.http.stream("GET", path, params=query) as answer:
            if not answer.is_success:
                answer.read()
                raise refusal(answer)
            write_atomic(target, lambda stream: stream.writelines(answer.iter_bytes()))


def packed(path: Path, progress: ProgressCallback) -> IO[bytes]:
    """Open a file for upload; pack a folder into an uncompressed tar first (photographs are already compressed)."""
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


def refusal(answer: httpx.Response) -> FinetuneError:
    """Return the error for an unsuccessful response, with the server's message if it sent one."""
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
