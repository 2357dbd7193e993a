"""Multi-part uploads: received parts survive a lost connection, a reload of the page and a restart of the server.

Each is a folder beside the finished uploads, named by its id with a leading dot, with its description (``upload.json``) and one
file per part. Independent of HTTP routes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from finetune.errors import Conflict, InvalidInput, NotFound, Problem
from finetune.jobs.creation import new_id
from finetune.storage.files import file_lock, read_json, write_json

PREFIX, PART_PREFIX = "upload", "part"
KEPT_SECONDS = 24 * 3600.0  # from the last part that arrived
MAX_PENDING_OF_AN_OWNER = 16
MAX_PARTS = 10_000
_FOLDERS = f".{PREFIX}-*"
_ID = re.compile(rf"{PREFIX}-[0-9a-z]+\Z")
_PART = re.compile(rf"(?P<number>\d+)-(?P<id>{PART_PREFIX}-[0-9a-z]+)\Z")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class PartUpload:
    """A multi-part upload.

    Args:
        size_bytes: announced size of all parts together.
        idempotency_key: given by the owner, to find an interrupted upload again.
        file_id: of the file that was made from the parts; None until the upload is complete.
    """

    id: str
    owner: str
    filename: str
    purpose: str
    size_bytes: int
    created_at: float
    idempotency_key: str | None = None
    file_id: str | None = None


@dataclass(frozen=True)
class Part:
    """One part that was received."""

    id: str
    number: int
    size_bytes: int
    created_at: float
    path: Path


class PartUploads:
    """The multi-part uploads of one workspace.

    Methods that change an upload hold its lock, a file beside its folder, and check again that the upload still exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(
        self,
        owner: str,
        filename: str,
        purpose: str,
        size_bytes: int,
        idempotency_key: str | None = None,
        *,
        check: Callable[[int], object] = lambda pending_bytes: None,
    ) -> tuple[PartUpload, bool]:
        """Begin an upload; return it and whether it is new. The same key with the same arguments returns the existing one.

        Args:
            check: called with the announced bytes of this owner's other unfinished uploads; raises if one more is not allowed.

        Raises:
            InvalidInput: the key was used with other arguments.
            Conflict: this owner has too many unfinished uploads.
        """
        with file_lock(self._folder / ".uploads.lock"):
            mine = self.of(owner)
            if idempotency_key is not None:
                for known in (one for one in mine if one.idempotency_key == idempotency_key):
                    if (known.filename, known.purpose, known.size_bytes) != (filename, purpose, size_bytes):
                        raise InvalidInput("this Idempotency-Key was used for an upload of another name, purpose or size")
                    return known, False
            pending = [one for one in mine if one.file_id is None]
            if len(pending) >= MAX_PENDING_OF_AN_OWNER:
                raise Conflict(
                    f"{len(pending)} uploads of yours have begun and are not complete: GET /v1/uploads lists them. "
                    "Complete or cancel one"
                )
            check(sum(one.size_bytes for one in pending))
            made = PartUpload(new_id(PREFIX), owner, filename, purpose, size_bytes, time.time(), idempotency_key)
            self._place(made.id).mkdir(mode=0o700)
            self._write(made)
        return made, True

    def get(self, upload_id: str, sees: str | None) -> PartUpload:
        """Return an upload of owner `sees`, or of any owner if None. Raises `NotFound` for an upload of another owner too."""
        if _ID.match(upload_id):
            with contextlib.suppress(FileNotFoundError):
                found = PartUpload(**read_json(self._place(upload_id) / "upload.json"))
                if sees in (None, found.owner):
                    return found
        raise _no_upload(upload_id)

    def of(self, owner: str | None) -> list[PartUpload]:
        """Return the uploads of an owner, or of all owners if None, newest first."""
        found = []
        for file in self._folder.glob(f"{_FOLDERS}/upload.json"):
            with contextlib.suppress(FileNotFoundError):  # cancelled in the meantime
                found.append(PartUpload(**read_json(file)))
        return sorted((one for one in found if owner in (None, one.owner)), key=lambda one: one.id, reverse=True)

    def pending_bytes(self, owner: str) -> int:
        """Return the announced bytes of an owner's unfinished uploads."""
        return sum(one.size_bytes for one in self.of(owner) if one.file_id is None)

    def parts(self, upload: PartUpload) -> list[Part]:
        """Return the received parts, sorted by number.

        Raises:
            NotFound: the upload was cancelled.
        """
        found = []
        try:
            paths = list(self._place(upload.id).iterdir())
        except FileNotFoundError:
            raise _no_upload(upload.id) from None
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # replaced in the meantime
                if (named := _PART.match(path.name)) is not None:
                    stat = path.stat()
                    found.append(Part(named["id"], int(named["number"]), stat.st_size, stat.st_mtime, path))
        return sorted(found, key=lambda part: (part.number, part.id))

    def add(self, upload: PartUpload, arrived: Path, number: int | None) -> Part:
        """Add a received file as a part by moving it; replace an earlier part with the same number.

        Args:
            number: from 1; by default the next one.

        Raises:
            Conflict: the upload is complete.
            InvalidInput: the parts would exceed the announced size or the number of allowed parts.
        """
        with self._held(upload) as known:
            if known.file_id is not None:
                raise Conflict(f"{upload.id} is complete; begin another upload")
            parts = self.parts(upload)
            number = number if number is not None else max((part.number for part in parts), default=0) + 1
            replaced = [part for part in parts if part.number == number]
            n_bytes = sum(part.size_bytes for part in parts) - sum(part.size_bytes for part in replaced)
            if n_bytes + arrived.stat().st_size > upload.size_bytes:
                raise InvalidInput(
                    f"with this part, the upload would exceed the {upload.size_bytes:,} bytes that were announced",
                    [Problem("data", "is too large")],
                )
            if number > MAX_PARTS:
                problems = [Problem("data", "too many parts")]
                raise InvalidInput(f"an upload has at most {MAX_PARTS:,} parts; send larger ones", problems)
            target = self._place(upload.id) / f"{number}-{new_id(PART_PREFIX)}"
            os.replace(arrived, target)
            for part in replaced:
                part.path.unlink()
            return next(part for part in self.parts(upload) if part.path == target)

    @contextlib.contextmanager
    def completing(self, upload: PartUpload, part_ids: Sequence[str], archive: Path) -> Iterator[PartUpload]:
        """Join the parts into `archive`, unless the upload is already complete; yield the upload's present state.

        The upload's lock is held inside the block.

        Raises:
            InvalidInput: a part was not received or is listed twice, or the parts do not have the announced size.
        """
        with self._held(upload) as known:
            if known.file_id is None:
                _join(self._chosen(known, part_ids), archive)
            yield known

    def completed(self, upload: PartUpload, file_id: str) -> None:
        """Record the file that was made from an upload, and delete its parts."""
        self._write(replace(upload, file_id=file_id))
        for part in self.parts(upload):
            part.path.unlink()

    def cancel(self, upload: PartUpload) -> None:
        """Delete an unfinished upload with its parts.

        Raises:
            Conflict: it is complete.
        """
        with self._held(upload) as known:
            if known.file_id is not None:
                raise Conflict(f"{upload.id} is complete: DELETE /v1/files/{known.file_id} deletes its file")
            self._remove(upload.id)

    def forget(self, upload: PartUpload) -> None:
        """Delete an upload whose file was deleted."""
        with self._held(upload):
            self._remove(upload.id)

    def forget_file(self, file_id: str) -> None:
        """Delete the upload that a deleted file was made from, if it was uploaded in parts."""
        for upload in self.of(None):
            if upload.file_id == file_id:
                with contextlib.suppress(NotFound):  # deleted meanwhile
                    self.forget(upload)

    def sweep(self) -> None:
        """Delete uploads to which nothing was added for `KEPT_SECONDS`."""
        for folder in self._folder.glob(_FOLDERS):
            with contextlib.suppress(FileNotFoundError):
                if folder.is_dir() and time.time() - folder.stat().st_mtime > KEPT_SECONDS:
                    self._remove(folder.name.removeprefix("."))

    def expires_at(self, upload: PartUpload) -> float:
        """Return when an upload will be deleted if nothing is added to it, in Unix seconds.

        Raises:
            NotFound: the upload was cancelled.
        """
        try:
            return self._place(upload.id).stat().st_mtime + KEPT_SECONDS
        except FileNotFoundError:
            raise _no_upload(upload.id) from None

    def _chosen(self, upload: PartUpload, part_ids: Sequence[str]) -> list[Part]:
        arrived = {part.id: part for part in self.parts(upload)}
        seen: set[str] = set()
        problems = []
        for at, one in enumerate(part_ids):
            if one not in arrived:
                problems.append(Problem(f"part_ids[{at}]", f"no part {one[:60]!r} has arrived"))
            elif one in seen:
                problems.append(Problem(f"part_ids[{at}]", "is named twice"))
            seen.add(one)
        if problems:
            raise InvalidInput("; ".join(map(str, problems[:5])), problems[:100])
        chosen = [arrived[one] for one in part_ids]
        n_bytes = sum(part.size_bytes for part in chosen)
        if n_bytes != upload.size_bytes:
            raise InvalidInput(
                f"these parts are {n_bytes:,} bytes together, and {upload.size_bytes:,} were announced",
                [Problem("part_ids", f"make up {n_bytes:,} of {upload.size_bytes:,} bytes")],
            )
        return chosen

    @contextlib.contextmanager
    def _held(self, upload: PartUpload) -> Iterator[PartUpload]:
        """Hold an upload's lock; yield the upload's present state."""
        with file_lock(self._lock(upload.id)):
            try:
                known = self.get(upload.id, None)
            except NotFound:
                self._lock(upload.id).unlink(missing_ok=True)  # this call may have created it
                raise
            yield known

    def _remove(self, upload_id: str) -> None:
        shutil.rmtree(self._place(upload_id), ignore_errors=True)
        self._lock(upload_id).unlink(missing_ok=True)

    def _place(self, upload_id: str) -> Path:
        return self._folder / f".{upload_id}"

    def _lock(self, upload_id: str) -> Path:
        return self._folder / f".{upload_id}.lock"

    def _write(self, upload: PartUpload) -> None:
        write_json(self._place(upload.id) / "upload.json", asdict(upload))


def _no_upload(upload_id: str) -> NotFound:
    return NotFound(
        f"no upload {upload_id[:60]!r} has begun, or it was cancelled, or its last part is more than a day old, or its file was "
        "deleted"
    )


def _join(parts: Sequence[Part], archive: Path) -> None:
    with open(archive, "wb") as joined:
        for part in parts:
            with open(part.path, "rb") as stream:
                shutil.copyfileobj(stream, joined, _CHUNK_BYTES)


def md5_of(archive: Path) -> str:
    """Return the MD5 that the public API's clients can compare, against transmission errors, not against tampering."""
    with open(archive, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
