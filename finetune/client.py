"""A Python client of the server: predict, fine-tune, and manage models, without training libraries.

    from finetune import Client

    client = Client("http://127.0.0.1:3000", api_key="ft_…")
    client.predict("cat.jpg")["predictions"][0]["label"]
    job = client.create_job(client.upload("photos"), model="resnet50", method="partial", suffix="photos")
    for event in client.events(job["id"]):
        print(event["message"])
    client.download_bundle("photos", "1", "bundle")

Methods return the server's documents as dictionaries; `/docs` of a server describes them.
"""

from __future__ import annotations

import json
import tarfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import httpx

from finetune.errors import Conflict
from finetune.jobs.http import Connection, RequestRefused, ServerUnreachable, refusal
from finetune.jobs.kinds import BATCH, COMPARISON, TRAINING, Kind, kind_of_id
from finetune.storage.files import atomic_folder, atomic_path

__all__ = ["Client", "JobFailed", "RequestRefused", "ServerUnreachable"]

Document = dict[str, Any]
Image = str | Path | bytes | BinaryIO

EXPORT_SECONDS = 900.0  # for the server to write a large model
_TERMINAL = ("succeeded", "failed", "cancelled")


class JobFailed(Conflict):
    """The job that `Client.wait` waited for failed or was cancelled; `job` is its document."""

    code = "job_failed"

    def __init__(self, job: Document) -> None:
        error = job.get("error") or {}
        super().__init__(f"{job['id']} {job['status']}: {error.get('message', 'no error is recorded')}")
        self.job = job


class Client:
    """A client of one server.

    Args:
        url: the server's URL.
        api_key: a key from `finetune keys create`; None for a server without keys.
        transport: for tests.
    """

    def __init__(
        self, url: str = "http://127.0.0.1:3000", api_key: str | None = None, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        self._connection = Connection(url, api_key, transport)

    def close(self) -> None:
        """Close the connections to the server."""
        self._connection.http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ── predictions ──────────────────────────────────────────────────────────────────────────────

    def predict(
        self,
        image: Image,
        *,
        model: str | None = None,
        top_k: int | None = None,
        explain: bool = False,
        embedding: bool = False,
        coverage: float | None = None,
        per_class: bool = False,
        abstain: bool | None = None,
        precision: float | None = None,
    ) -> Document:
        """Classify one image: a path, its bytes, or an open file.

        Args:
            model: ``name``, ``name@version`` or ``name@alias``; None for the server's default.
            top_k: number of classes to return.
            explain: also return the class activation map of the most probable class.
            embedding: also return the embedding of the image.
            coverage: also return a prediction set that contains the true label with this probability.
            per_class: guarantee the coverage for each class separately.
            abstain: also return whether the model abstains.
            precision: the share of correct predictions among those without abstention.
        """
        named = _named(image)
        options = _options(top_k, explain, embedding, coverage, per_class, abstain, precision)
        return self._json("POST", _predict_path(model), files={"image": named}, params=options)

    def predict_many(
        self,
        images: Sequence[Image],
        *,
        model: str | None = None,
        top_k: int | None = None,
        explain: bool = False,
        embedding: bool = False,
        coverage: float | None = None,
        per_class: bool = False,
        abstain: bool | None = None,
        precision: float | None = None,
    ) -> Document:
        """Classify up to 64 images in one request; an unreadable image has an ``error`` instead of a ``result``."""
        files = [("images", _named(image)) for image in images]
        options = _options(top_k, explain, embedding, coverage, per_class, abstain, precision)
        return self._json("POST", _predict_path(model), files=files, params=options)

    def create_batch(
        self,
        input_file: str,
        *,
        model: str | None = None,
        embedding: bool = False,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> Document:
        """Queue a batch prediction for an upload. Call `wait` for its end, then `download_answers`.

        Args:
            input_file: the id that ``upload(folder, purpose="batch")`` returned.
            model: ``name``, ``name@version`` or ``name@alias``; None for the server's default.
            embedding: write each image's embedding into the ``.npz`` table.
        """
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        body = {"input_file": input_file, "model": model, "embedding": embedding, "metadata": dict(metadata or {})}
        return self._json("POST", BATCH.path, json=body, headers=headers)

    def drift(self, name: str, version: str = "champion") -> Document:
        """Return whether a version's predictions in production have drifted from its predictions for held-out images."""
        return self._json("GET", f"/v1/models/{quote(name, safe='')}/versions/{quote(version, safe='')}/drift")

    def set_drift_reference(self, use: str, name: str, version: str = "champion") -> Document:
        """Accept the last images in production as the reference of later ones (``live``), or restore that of the ``bundle``."""
        path = f"/v1/models/{quote(name, safe='')}/versions/{quote(version, safe='')}/drift/reference"
        return self._json("PUT", path, json={"use": use})

    def download_answers(self, batch_id: str, path: str | Path) -> Path:
        """Download the table of a batch prediction to a ``.csv``, ``.npz`` or ``.parquet`` file."""
        target = Path(path)
        self._connection.download(f"{_job(batch_id)}/answers", target, format=target.suffix.removeprefix("."))
        return target

    def batches(self, *, status: str | None = None, metadata: Mapping[str, str] | None = None) -> Iterator[Document]:
        """Yield your batch predictions, newest first."""
        yield from self._listed(BATCH, status, metadata)

    def check_file(self, file_id: str, **fields: Any) -> Document:
        """Queue a data check of an upload. Call `wait` for its end, then `result` for the findings and `report` for the page.

        Args:
            fields: those of a job spec on how the data is read, such as ``data={"label_column": "species"}`` or ``model``.
        """
        return self._json("POST", f"/v1/files/{file_id}/check", json=fields, headers={"Idempotency-Key": str(uuid.uuid4())})

    # ── fine-tuning ──────────────────────────────────────────────────────────────────────────────

    def upload(self, path: str | Path, *, purpose: str = "fine-tune") -> str:
        """Upload a folder or an archive; return the file's id.

        Args:
            purpose: ``fine-tune`` for labelled images to train on, ``batch`` for images to predict.
        """
        document = self._connection.upload(Path(path), purpose=purpose)
        return str(document["id"])

    def create_job(self, training_file: str, *, idempotency_key: str | None = None, **spec: Any) -> Document:
        """Queue a fine-tuning job; `spec` are the other fields of a job spec (``model``, ``method``, ``suffix`` …)."""
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return self._json("POST", TRAINING.path, json={"training_file": training_file, **spec}, headers=headers)

    def create_comparison(
        self,
        training_file: str | None = None,
        *,
        runs: Sequence[str] | None = None,
        idempotency_key: str | None = None,
        **request: Any,
    ) -> Document:
        """Queue a comparison of several ways to train, or of finished jobs.

        Args:
            runs: ids of finished jobs, instead of `training_file`.
            request: other fields: ``methods``, ``models``, ``arms``, ``seeds``, and fields of a job spec that all arms share.
        """
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        given = {"training_file": training_file, "runs": None if runs is None else list(runs)}
        body = {**{key: value for key, value in given.items() if value is not None}, **request}
        return self._json("POST", COMPARISON.path, json=body, headers=headers)

    def job(self, job_id: str) -> Document:
        """Return the present document of a job. The methods below accept ids of jobs of any kind."""
        return self._json("GET", _job(job_id))

    def jobs(self, *, status: str | None = None, metadata: Mapping[str, str] | None = None) -> Iterator[Document]:
        """Yield your fine-tuning jobs, newest first."""
        yield from self._listed(TRAINING, status, metadata)

    def comparisons(self, *, status: str | None = None, metadata: Mapping[str, str] | None = None) -> Iterator[Document]:
        """Yield your comparisons, newest first."""
        yield from self._listed(COMPARISON, status, metadata)

    def cancel(self, job_id: str) -> Document:
        """Cancel a job of any kind; return its document."""
        return self._json("POST", f"{_job(job_id)}/cancel")

    def delete_job(self, job_id: str) -> None:
        """Delete a job that has ended, with its folder. Its model is kept."""
        self._json("DELETE", _job(job_id))

    def events(self, job_id: str) -> Iterator[Document]:
        """Yield a job's events as they happen, until it ends. After a lost connection, reconnect and continue."""
        last: str | None = None
        while True:
            headers = {"Accept": "text/event-stream", **({} if last is None else {"Last-Event-ID": last})}
            try:
                with self._connection.http.stream("GET", f"{_job(job_id)}/events", headers=headers) as answer:
                    if not answer.is_success:
                        answer.read()
                        raise refusal(answer)
                    for kind, data in _server_sent(answer.iter_lines()):
                        if kind == "done":
                            return
                        if kind == "message":
                            last = data["id"]
                            yield data
            except httpx.TransportError:
                pass
            if self.job(job_id)["status"] in _TERMINAL and last is not None:
                return
            time.sleep(1.0)

    def wait(self, job_id: str, *, poll_seconds: float = 2.0) -> Document:
        """Wait until a job has ended and return its document. Raises `JobFailed` if it failed or was cancelled."""
        while (job := self.job(job_id))["status"] not in _TERMINAL:
            time.sleep(poll_seconds)
        if job["status"] != "succeeded":
            raise JobFailed(job)
        return job

    def result(self, job_id: str) -> Document:
        """Return the result of a job that has succeeded.

        Fine-tuning job: metrics with n and intervals, resolved hyperparameters. Comparison: arms, pairs, the verdict. Batch
        prediction: number of predicted images, and those that could not be read. Data check: the findings.
        """
        return self._json("GET", f"{_job(job_id)}/result")

    def diagnosis(self, job_id: str) -> Document:
        """Return the diagnosis of a fine-tuning job's run: findings with evidence, confidence and advice."""
        return self._json("GET", f"{_job(job_id)}/diagnosis")

    def runs(self, comparison_id: str) -> list[Document]:
        """Return the runs of a comparison in order, with the status and the metrics of each."""
        found: list[Document] = self._json("GET", f"{_job(comparison_id)}/runs")["data"]
        return found

    def report(self, job_id: str) -> str:
        """Return the page of a finished comparison or data check as one self-contained HTML document."""
        return self._connection.request("GET", f"{_job(job_id)}/report").text

    # ── models ───────────────────────────────────────────────────────────────────────────────────

    def models(self) -> list[Document]:
        """Return the registered models that this key may use."""
        found: list[Document] = self._json("GET", "/v1/models")["data"]
        return found

    def version(self, name: str, version: str) -> Document:
        """Return the details of one version: classes, method, metrics, licence."""
        return self._json("GET", f"/v1/models/{quote(name)}/versions/{quote(version)}")

    def download_bundle(self, name: str, version: str, folder: str | Path) -> Path:
        """Download a version's bundle into `folder`, which must not exist yet; return the folder."""
        target = Path(folder)
        if target.exists():
            raise Conflict(f"{target} exists already; give another folder")
        path = f"/v1/models/{quote(name)}/versions/{quote(version)}/bundle"
        with atomic_folder(target) as arriving, self._connection.http.stream("GET", path) as answer:
            if not answer.is_success:
                answer.read()
                raise refusal(answer)
            with tarfile.open(fileobj=_Chunks(answer.iter_bytes()), mode="r|") as archive:  # type: ignore[call-overload]
                for member in archive:
                    contents = archive.extractfile(member) if member.isreg() else None
                    if contents is not None:
                        (arriving / Path(member.name).name).write_bytes(contents.read())
        return target

    def download_export(self, name: str, version: str, format: str, file: str | Path) -> Path:
        """Download a version in the format of another tool into `file`, which must not exist yet; return the file.

        Args:
            format: one of the version's `exports`. `web` is an HTML file, the others are zip files.
        """
        target = Path(file)
        if target.exists():
            raise Conflict(f"{target} exists already; give another file")
        path = f"/v1/models/{quote(name)}/versions/{quote(version)}/exports/{quote(format)}"
        with self._connection.http.stream("GET", path, timeout=EXPORT_SECONDS) as answer:
            if not answer.is_success:
                answer.read()
                raise refusal(answer)
            with atomic_path(target) as arriving, open(arriving, "wb") as stream:
                for piece in answer.iter_bytes():
                    stream.write(piece)
        return target

    def promote(self, name: str, version: str, alias: str = "champion", *, force: bool = False) -> Document:
        """Point an alias of a model at a version. A name without version or alias means ``champion``."""
        body = {"version": version, "force": force}
        return self._json("PUT", f"/v1/models/{quote(name)}/aliases/{quote(alias)}", json=body)

    def deploy(self, reference: str, *, force: bool = False) -> Document:
        """Make a model the server's default, for requests without a model name. Needs a key with the scope ``admin``."""
        return self._json("PUT", "/v1/deployments/default", json={"reference": reference, "force": force})

    def _json(self, method: str, path: str, **request: Any) -> Document:
        document: Document = self._connection.request(method, path, **request).json()
        return document

    def _listed(self, kind: Kind, status: str | None, metadata: Mapping[str, str] | None) -> Iterator[Document]:
        query = {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        return self._pages(kind.path, {**query, **({} if status is None else {"status": status})})

    def _pages(self, path: str, query: Mapping[str, str]) -> Iterator[Document]:
        after: dict[str, str] = {}
        while True:
            page = self._json("GET", path, params={**query, **after, "limit": "100"})
            yield from page["data"]
            if not page["has_more"]:
                return
            after = {"after": page["last_id"]}


class _Chunks:
    """The chunks of a download as a readable, non-seekable file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = b""

    def read(self, size: int) -> bytes:
        while len(self._left) < size and (piece := next(self._pieces, None)) is not None:
            self._left += piece
        found, self._left = self._left[:size], self._left[size:]
        return found


def _named(image: Image) -> tuple[str, bytes]:
    """Return an image's file name and contents."""
    if isinstance(image, bytes):
        return "image", image
    if isinstance(image, str | Path):
        return Path(image).name, Path(image).read_bytes()
    return Path(str(getattr(image, "name", "image"))).name, image.read()


def _options(
    top_k: int | None,
    explain: bool,
    embedding: bool,
    coverage: float | None,
    per_class: bool,
    abstain: bool | None,
    precision: float | None,
) -> dict[str, str]:
    given = {
        "top_k": top_k,
        "explain": explain or None,
        "embedding": embedding or None,
        "coverage": coverage,
        "per_class": per_class or None,
        "abstain": abstain,
        "precision": precision,
    }
    return {name: str(value).lower() for name, value in given.items() if value is not None}


def _predict_path(model: str | None) -> str:
    return "/predict" if model is None else f"/v1/models/{quote(model)}/predict"


def _job(job_id: str) -> str:
    return f"{kind_of_id(job_id).path}/{quote(job_id, safe='')}"


def _server_sent(lines: Iterator[str]) -> Iterator[tuple[str, Document]]:
    """Yield (kind, data) of each server-sent event; skip comments."""
    kind, data = "message", ""
    for line in lines:
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data += line.removeprefix("data: ")
        elif not line and data:
            yield kind, json.loads(data)
            kind, data = "message", ""
