"""Uploaded datasets: owners, content summaries, and storage quotas. The contents are in the workspace's ``files/<id>``."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, delete, func, insert, select

from finetune.errors import Conflict, NotFound
from finetune.jobs.creation import creation_lock, earlier_object, new_id, remember_object
from finetune.jobs.database import reading, writing
from finetune.jobs.schema import UNFINISHED, files, idempotency, jobs

PREFIX = "file"
_WAY_OUT = (
    "Delete what is not needed any more: DELETE /v1/files/{id}, DELETE /v1/fine_tuning/jobs/{id} (its model stays), "
    "DELETE /v1/models/{name}@{version}, POST /v1/uploads/{id}/cancel"
)


@dataclass(frozen=True)
class UploadedFile:
    """One upload.

    Args:
        size_bytes, sha256: of the archive as it was uploaded.
        stored_bytes: disk space of its unpacked contents.
        summary: the classes and counts that were found in it.
    """

    id: str
    owner: str
    filename: str
    purpose: str
    size_bytes: int
    stored_bytes: int
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
        stored_bytes: int | None = None,
        sha256: str,
        summary: Mapping[str, Any],
        place: Callable[[str], object],
        idempotency_key: str | None = None,
        body_sha256: str = "",
        models_bytes: int = 0,
        max_owner_bytes: int | None = None,
    ) -> tuple[UploadedFile, bool]:
        """Record an upload; return it and whether it is new. The same key and body return the upload of the first request.

        Args:
            place: moves the contents to the place for the given id. Called before the row is committed, so that no row refers to
                missing contents.
            models_bytes: disk space of the owner's models, which are in the registry, not in the database.

        Raises:
            InvalidInput: the key was used with another body.
            FilesFull: the owner would exceed `max_owner_bytes`.
        """
        now = time.time()
        with writing(self.engine) as connection:
            creation_lock(connection, owner)
            earlier = earlier_object(connection, owner, idempotency_key, body_sha256)
            if earlier is not None:
                return _file(_row(connection, earlier, owner)), False
            if max_owner_bytes is not None:
                check_quota(stored_by(connection, owner) + models_bytes, stored_bytes or size_bytes, max_owner_bytes)
            file_id = new_id(PREFIX)
            values = {
                "id": file_id, "owner": owner, "filename": filename, "purpose": purpose, "size_bytes": size_bytes,
                "stored_bytes": stored_bytes or size_bytes, "sha256": sha256, "created_at": now,
                "summary": json.dumps(summary, allow_nan=False),
            }  # fmt: skip
            connection.execute(insert(files).values(values))
            remember_object(connection, owner, idempotency_key, body_sha256, file_id)
            place(file_id)
            return _file(_row(connection, file_id, owner)), True

    def has(self, file_id: str) -> bool:
        """Return whether an upload of any owner exists."""
        with reading(self.engine) as connection:
            return connection.execute(select(files.c.id).where(files.c.id == file_id)).first() is not None

    def get(self, file_id: str, owner: str | None = None) -> UploadedFile:
        """Return an upload of `owner`, or of any owner if None. Raises NotFound for an upload of another owner too."""
        with reading(self.engine) as connection:
            return _file(_row(connection, file_id, owner))

    def dataset_name(self, training_file: str) -> str | None:
        """Return the display name of a job's data: the archive's file name if it is an upload, else None."""
        name = Path(training_file).name
        if not name.startswith(f"{PREFIX}-"):
            return None
        try:
            filename = self.get(name).filename
        except NotFound:
            return None
        return re.sub(r"(\.tar)?\.\w+$", "", Path(filename).name).strip() or None

    def list(self, owner: str | None = None, *, after: str | None = None, limit: int = 20) -> tuple[Sequence[UploadedFile], bool]:
        """Return a page of uploads, newest first, beginning after the id `after`, and whether there are more."""
        query = select(files).order_by(files.c.id.desc()).limit(limit + 1)
        if owner is not None:
            query = query.where(files.c.owner == owner)
        if after is not None:
            query = query.where(files.c.id < after)
        with reading(self.engine) as connection:
            rows = connection.execute(query).mappings().all()
        return [_file(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, file_id: str, owner: str | None = None) -> None:
        """Delete the row of an upload.

        Raises:
            NotFound: there is no such upload.
            Conflict: an unfinished job uses it.
        """
        with writing(self.engine) as connection:
            _row(connection, file_id, owner, lock=True)
            reads = select(jobs.c.id).where(jobs.c.state.in_(UNFINISHED), jobs.c.spec.contains(file_id, autoescape=True)).limit(1)
            reader = connection.execute(reads).scalar_one_or_none()
            if reader is not None:
                raise Conflict(f"{file_id} is read by {reader}, which has not finished; cancel that job or wait for its end")
            connection.execute(delete(idempotency).where(idempotency.c.object_id == file_id))
            connection.execute(delete(files).where(files.c.id == file_id))

    def stored_bytes(self, owner: str) -> int:
        """Return the disk space of the owner's uploads and finished runs."""
        with reading(self.engine) as connection:
            return stored_by(connection, owner)

    def ids(self) -> frozenset[str]:
        """Return the ids of all uploads of all owners."""
        with reading(self.engine) as connection:
            return frozenset(connection.execute(select(files.c.id)).scalars())


class FilesFull(Conflict):
    """An owner's uploads, finished jobs and models exceed the limit on disk space."""

    code, http_status = "files_full", 413


def check_quota(stored_bytes: int, more_bytes: int, max_bytes: int) -> None:
    """Raise `FilesFull` if `more_bytes` on top of `stored_bytes` would exceed `max_bytes`."""
    if stored_bytes + more_bytes > max_bytes:
        raise FilesFull(
            f"this takes {more_bytes:,} bytes on disk, your uploads, finished jobs and models take {stored_bytes:,}, and"
            f" {max_bytes:,} are allowed in all. {_WAY_OUT}"
        )


def check_not_full(stored_bytes: int, max_bytes: int) -> None:
    """Raise `FilesFull` if an owner already stores more than `max_bytes`, so that new jobs do not add to it."""
    if stored_bytes > max_bytes:
        raise FilesFull(
            f"your uploads, finished jobs and models take {stored_bytes:,} bytes on disk, and {max_bytes:,} are allowed."
            f" {_WAY_OUT}"
        )


def stored_by(connection: Connection, owner: str) -> int:
    """Return the disk space of the owner's uploads and finished runs."""
    totals = [select(func.coalesce(func.sum(table.c.stored_bytes), 0)).where(table.c.owner == owner) for table in (files, jobs)]
    return sum(int(connection.execute(total).scalar_one()) for total in totals)


def lock_files(connection: Connection, file_ids: Collection[str]) -> None:
    """Keep uploads from being deleted until the transaction that queues their reader ends. Raises NotFound if one is gone.

    SQLite's write lock is sufficient by itself; PostgreSQL locks the rows, as the deletion does.
    """
    for file_id in sorted(file_ids):
        held = select(files.c.id).where(files.c.id == file_id).with_for_update(read=True)
        if connection.execute(held).first() is None:
            raise NotFound(f"{file_id} was deleted while this request was being checked; upload the data again")


def _row(connection: Connection, file_id: str, owner: str | None, *, lock: bool = False) -> RowMapping:
    query = select(files).where(files.c.id == file_id)
    if lock:
        query = query.with_for_update()  # SQLite's write lock is sufficient by itself, and SQLAlchemy leaves this out there
    row = connection.execute(query).mappings().one_or_none() if "\0" not in file_id else None
    if row is None or (owner is not None and row["owner"] != owner):
        raise NotFound(f"no file {file_id[:100]!r}; GET /v1/files lists yours")
    return row


def _file(row: RowMapping) -> UploadedFile:
    return UploadedFile(**{**row, "summary": json.loads(row["summary"])})
