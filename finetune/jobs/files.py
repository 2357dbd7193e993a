"""Uploaded datasets: who brought them, what is in them. The rows only; the contents lie in the workspace's ``files/<id>``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, delete, insert, select

from finetune.errors import Conflict, NotFound
from finetune.jobs.database import reading, writing
from finetune.jobs.schema import UNFINISHED, files, idempotency, jobs
from finetune.jobs.store import _earlier_answer, _one_creation_at_a_time, new_id

PREFIX = "file"


@dataclass(frozen=True)
class UploadedFile:
    """One upload. `size_bytes` and `sha256` are those of the archive as it came; `summary` says what was found in it."""

    id: str
    owner: str
    filename: str
    purpose: str
    size_bytes: int
    sha256: str
    created_at: float
    summary: Mapping[str, Any]


class FileStore:
    """The uploads of one job database."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def create(
        self,
        owner: str,
        *,
        filename: str,
        purpose: str,
        size_bytes: int,
        sha256: str,
        summary: Mapping[str, Any],
        place: Callable[[str], object],
        idempotency_key: str | None = None,
        body_sha256: str = "",
    ) -> tuple[UploadedFile, bool]:
        """Record an upload; returns it and whether it is new. The same key and body give the upload of the first time.

        Args:
            place: puts the contents where this id's contents belong. It runs before the row is committed, so a row never
                stands for contents that are not there.

        Raises:
            InvalidInput: the key was used with another body.
        """
        now = time.time()
        with writing(self.engine) as connection:
            _one_creation_at_a_time(connection, owner)
            if idempotency_key is not None:
                earlier = _earlier_answer(connection, owner, idempotency_key, body_sha256, now)
                if earlier is not None:
                    return _file(_row(connection, earlier, owner)), False
            file_id = new_id(PREFIX)
            values = {
                "id": file_id, "owner": owner, "filename": filename, "purpose": purpose, "size_bytes": size_bytes,
                "sha256": sha256, "created_at": now, "summary": json.dumps(summary, allow_nan=False),
            }  # fmt: skip
            connection.execute(insert(files).values(values))
            if idempotency_key is not None:
                answer = {"owner": owner, "key": idempotency_key, "body_sha256": body_sha256, "object_id": file_id}
                connection.execute(insert(idempotency).values({**answer, "created_at": now}))
            place(file_id)
            return _file(_row(connection, file_id, owner)), True

    def get(self, file_id: str, owner: str | None = None) -> UploadedFile:
        """One upload; another owner's does not exist (NotFound). `owner` None sees every upload."""
        with reading(self.engine) as connection:
            return _file(_row(connection, file_id, owner))

    def list(self, owner: str | None = None, *, after: str | None = None, limit: int = 20) -> tuple[Sequence[UploadedFile], bool]:
        """Newest first, from the one after `after`; returns the page and whether there is more."""
        query = select(files).order_by(files.c.id.desc()).limit(limit + 1)
        if owner is not None:
            query = query.where(files.c.owner == owner)
        if after is not None:
            query = query.where(files.c.id < after)
        with reading(self.engine) as connection:
            rows = connection.execute(query).mappings().all()
        return [_file(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, file_id: str, owner: str | None = None) -> None:
        """Forget an upload.

        Raises:
            NotFound: no such upload.
            Conflict: a job that has not finished reads it.
        """
        with writing(self.engine) as connection:
            _row(connection, file_id, owner)
            reads = select(jobs.c.id).where(jobs.c.state.in_(UNFINISHED), jobs.c.spec.contains(file_id, autoescape=True)).limit(1)
            reader = connection.execute(reads).scalar_one_or_none()
            if reader is not None:
                raise Conflict(f"{file_id} is read by {reader}, which has not finished; cancel that job or wait for its end")
            connection.execute(delete(idempotency).where(idempotency.c.object_id == file_id))
            connection.execute(delete(files).where(files.c.id == file_id))

    def ids(self) -> frozenset[str]:
        """The ids of all uploads, of every owner."""
        with reading(self.engine) as connection:
            return frozenset(connection.execute(select(files.c.id)).scalars())


def _row(connection: Connection, file_id: str, owner: str | None) -> RowMapping:
    row = connection.execute(select(files).where(files.c.id == file_id)).mappings().one_or_none()
    if row is None or (owner is not None and row["owner"] != owner):
        raise NotFound(f"no file {file_id[:100]!r}; GET /v1/files lists yours")
    return row


def _file(row: RowMapping) -> UploadedFile:
    return UploadedFile(**{**row, "summary": json.loads(row["summary"])})
