"""Receive uploaded datasets: stream the body to disk, unpack and examine it, and move the contents to their place.

An upload becomes visible only after all checks have passed. Files that a killed server leaves behind are deleted at the next
start. Independent of HTTP routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import FormData, Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from finetune.data.intake import Intake, unpack_upload
from finetune.errors import DiskFull, InvalidInput, Overloaded, Problem
from finetune.jobs.job import LOCAL_OWNER
from finetune.storage.files import file_lock, folder_bytes, fsync_folder, sha256_file
from service.part_uploads import MAX_PARTS

TO_TRAIN_ON, TO_ANSWER = "fine-tune", "batch"
PURPOSES = (TO_TRAIN_ON, TO_ANSWER)
HOW_TO_SEND = "Send it as a form: curl -F purpose=fine-tune -F file=@photos.zip"
HOW_TO_SEND_A_PART = "Send it as a form: curl -F part_number=1 -F data=@part"
MAX_AT_ONCE = 32
MAX_AT_ONCE_OF_AN_OWNER = 4
SILENCE_SECONDS = 3.0  # when all places are taken, an upload of which nothing has arrived for so long makes room for another
DISPLACED = (
    "Too many uploads are arriving, and this one was silent or slow, so it made room for another. Send it again in a moment"
)
MIN_FREE_BYTES = 256 << 20
MAX_NAME_CHARACTERS = 255
_ARRIVING = ".arriving-"
_ORPHAN_SECONDS = 3600.0


@dataclass(frozen=True)
class Received:
    """A received and examined upload on disk."""

    filename: str
    purpose: str
    size_bytes: int
    sha256: str
    intake: Intake
    stored_bytes: int  # disk space of the contents
    contents: Path  # temporary folder, to be moved to its final place

    def summary(self) -> dict[str, Any]:
        """Return the description of the contents as JSON values."""
        return asdict(self.intake)


class Arrival:
    """One upload that is being received or examined: its owner, its temporary folder, and how fast its body arrives."""

    def __init__(self, owner: str, folder: Path) -> None:
        self.owner = owner
        self.folder = folder
        self.is_receiving = False
        self._began_at = self._last_at = time.monotonic()
        self._n_bytes = 0
        self._has_to_go = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: asyncio.Timeout | None = None

    @property
    def bytes_per_second(self) -> float:
        """The mean rate of the body so far."""
        return self._n_bytes / max(time.monotonic() - self._began_at, 1e-3)

    @property
    def may_be_displaced(self) -> bool:
        """Whether its body is still arriving, and has been for long enough to show how fast."""
        return self.is_receiving and not self._has_to_go and time.monotonic() - self._began_at >= SILENCE_SECONDS

    @property
    def is_silent(self) -> bool:
        """Whether nothing of its body has arrived for `SILENCE_SECONDS`."""
        return time.monotonic() - self._last_at >= SILENCE_SECONDS

    async def body_of(self, request: Request) -> AsyncGenerator[bytes, None]:
        """Yield the chunks of a request's body. Raises `Overloaded` if the upload is displaced."""
        self._loop, self.is_receiving = asyncio.get_running_loop(), True
        chunks = request.stream()
        try:
            while True:
                try:
                    async with asyncio.timeout(0.0 if self._has_to_go else None) as self._waiting:
                        chunk = await anext(chunks)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise Overloaded(DISPLACED) from None
                self._n_bytes += len(chunk)
                self._last_at = time.monotonic()
                yield chunk
        finally:
            self.is_receiving, self._waiting = False, None

    def displace(self) -> None:
        """End the upload with `Overloaded`. Can be called from any thread."""
        self._has_to_go = True
        assert self._loop is not None, "only an upload whose body is arriving can be displaced"
        self._loop.call_soon_threadsafe(self._stop_waiting)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.reschedule(0.0)


class Uploads:
    """The folder of uploaded datasets, ``files/<id>`` of the workspace."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._arriving: set[Arrival] = set()

    def place_of(self, file_id: str) -> Path:
        """Return the folder of an upload's contents, which need not exist."""
        return self.folder / file_id

    @contextlib.contextmanager
    def arriving(self, announced_bytes: int = 0, owner: str = LOCAL_OWNER) -> Iterator[Arrival]:
        """Yield one upload with a temporary folder, which is deleted at the end of the block.

        Raises:
            Overloaded: there are too many concurrent uploads of this owner, or in total and none of them has to make room.
            DiskFull: there is no space for the announced bytes and the unpacked contents.
        """
        arrival = Arrival(owner, self.folder / f"{_ARRIVING}{secrets.token_hex(8)}")
        self._admit(arrival)
        try:
            arrival.folder.mkdir(mode=0o700, parents=True)
            with file_lock(arrival.folder / ".lock"):
                if shutil.disk_usage(arrival.folder).free < 2 * announced_bytes + MIN_FREE_BYTES:
                    raise DiskFull(
                        "The server's disk has no room for this upload and its contents. Free some space and try again"
                    )
                yield arrival
        finally:
            with self._lock:
                self._arriving.discard(arrival)
            shutil.rmtree(arrival.folder, ignore_errors=True)

    def _admit(self, newcomer: Arrival) -> None:
        """Give an upload one of the places. If there is none, another upload has to make room, or `Overloaded` is raised."""
        with self._lock:
            n_of = Counter(one.owner for one in self._arriving)
            n_mine = n_of[newcomer.owner]
            if newcomer.owner != LOCAL_OWNER and n_mine >= MAX_AT_ONCE_OF_AN_OWNER:
                raise Overloaded(f"{n_mine} uploads of yours are arriving already. Try again when one has arrived")
            if len(self._arriving) >= MAX_AT_ONCE:
                slow = self._to_displace(n_of, n_mine)
                if slow is None:
                    raise Overloaded(f"{len(self._arriving)} uploads are arriving already. Try again in a moment")
                slow.displace()
            self._arriving.add(newcomer)

    def _to_displace(self, n_of: Mapping[str, int], n_mine: int) -> Arrival | None:
        """Return the upload that makes room: a silent one, else the slowest of the owner with the most; None if all is fair."""
        unfair = [one for one in self._arriving if one.may_be_displaced and (one.is_silent or n_of[one.owner] > n_mine + 1)]
        return max(unfair, key=lambda one: (one.is_silent, n_of[one.owner], -one.bytes_per_second), default=None)

    def sweep(self, known: Callable[[], Collection[str]]) -> None:
        """Delete files that killed servers left behind: unfinished uploads, and old contents without a database row."""
        for leftover in self.folder.glob(f"{_ARRIVING}*"):
            if _is_abandoned(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
        placed = {path.name: path for path in self.folder.glob("file-*") if _is_old(path)}
        for name in placed.keys() - set(known()) if placed else ():
            shutil.rmtree(placed[name], ignore_errors=True)

    def discard(self, file_id: str) -> None:
        """Delete the contents of an upload whose row was deleted. Unfinished jobs are not affected: they prevent the deletion."""
        shutil.rmtree(self.place_of(file_id), ignore_errors=True)


def _is_abandoned(arriving: Path) -> bool:
    lock = arriving / ".lock"
    if not lock.exists():
        return _is_old(arriving)  # it may just have been created
    with file_lock(lock, wait=False) as acquired:
        return acquired


def _is_old(path: Path) -> bool:
    """Return whether a folder is unchanged for an hour; False if it was deleted in the meantime."""
    try:
        return time.time() - path.stat().st_mtime > _ORPHAN_SECONDS
    except FileNotFoundError:
        return False


class _ToDisk(MultiPartParser):
    """Writes the uploaded file directly to `target`, instead of a spool file in the system's temporary folder."""

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None], target: Path) -> None:
        super().__init__(headers, stream, max_files=1, max_fields=8, max_part_size=1024)
        self._target = target

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        upload = self._current_part.file
        if upload is not None:
            upload.file.close()
            upload.file = open(self._target, "wb")  # noqa: SIM115 (closed by `receive`, and below when parsing fails)
            self._files_to_close_on_error.append(upload.file)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def _form(request: Request, arrival: Arrival, target: Path, how: str) -> AsyncIterator[FormData]:
    """Stream the file of a multipart request to `target` and yield the form.

    Raises:
        HTTPException: 415 if the body is not a form, 400 if it is an invalid one.
        Overloaded: the upload had to make room for another.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raise HTTPException(415, f"A body of type {media_type[:100]!r} is not an upload. {how}")
    try:
        form = await _ToDisk(request.headers, arrival.body_of(request), target).parse()
    except MultiPartException as error:
        raise HTTPException(400, f"The multipart body cannot be read: {error.message}") from None
    try:
        yield form
    finally:
        await form.close()


async def receive(request: Request, arrival: Arrival, target: Path) -> tuple[str, str]:
    """Stream the form's file to `target`; return its name and its purpose.

    Raises:
        HTTPException: 415 if the body is not a form, 400 if it is an invalid one.
        Overloaded: the upload had to make room for another.
        InvalidInput: fields are missing, unknown, given twice, or invalid.
    """
    async with _form(request, arrival, target, HOW_TO_SEND) as form:
        problems = _field_problems(form, "file", required=("purpose",))
        purpose, file = form.get("purpose"), form.get("file")
        if purpose is not None and purpose not in PURPOSES:
            message = f"must be {TO_TRAIN_ON!r} for a dataset to train on, or {TO_ANSWER!r} for images to be answered"
            problems.append(Problem("purpose", message))
        _refuse(problems, HOW_TO_SEND)
        assert isinstance(file, UploadFile)
        return plain_name(file.filename or "dataset"), str(purpose)


async def receive_part(request: Request, arrival: Arrival, target: Path) -> int | None:
    """Stream the form's part to `target`; return its number, or None if the client gave none.

    Raises:
        HTTPException: 415 if the body is not a form, 400 if it is an invalid one.
        Overloaded: the upload had to make room for another.
        InvalidInput: fields are missing, unknown, given twice, or invalid; or the part is empty.
    """
    async with _form(request, arrival, target, HOW_TO_SEND_A_PART) as form:
        problems = _field_problems(form, "data", optional=("part_number",))
        number = str(form.get("part_number", "1"))
        if re.fullmatch("[1-9][0-9]{0,4}", number) is None or int(number) > MAX_PARTS:
            problems.append(Problem("part_number", f"must be a whole number from 1 to {MAX_PARTS:,}"))
        if not problems and target.stat().st_size == 0:
            problems.append(Problem("data", "is empty"))
        _refuse(problems, HOW_TO_SEND_A_PART)
        return int(number) if "part_number" in form else None


def _field_problems(form: FormData, file: str, required: Sequence[str] = (), optional: Sequence[str] = ()) -> list[Problem]:
    fields = (file, *required, *optional)
    problems = [Problem(name, "unknown field") for name in sorted({*form} - set(fields))]
    problems += [Problem(name, "is given more than once") for name in fields if len(form.getlist(name)) > 1]
    problems += [Problem(name, "is missing") for name in (file, *required) if name not in form]
    if file in form and not isinstance(form[file], UploadFile):
        problems.append(Problem(file, "must be an uploaded file, not text; the server fetches nothing"))
    return problems


def _refuse(problems: Sequence[Problem], how: str) -> None:
    if problems:
        raise InvalidInput(f"{'; '.join(map(str, problems))}. {how}", problems)


def plain_name(filename: str) -> str:
    """Return a file name for display: printable, without folders."""
    name = "".join(character for character in filename.replace("\\", "/").rsplit("/", 1)[-1] if character.isprintable())
    return name.encode("utf-8", "replace").decode()[:MAX_NAME_CHARACTERS] or "dataset"


def examine(archive: Path, filename: str, purpose: str) -> Received:
    """Unpack an archive and return the description of its contents; see `unpack_upload` for the errors."""
    contents = archive.with_name("contents")
    size_bytes, sha256 = archive.stat().st_size, sha256_file(archive)
    if size_bytes == 0:
        raise InvalidInput(f"the file is empty. {HOW_TO_SEND}", [Problem("file", "is empty")])
    intake = unpack_upload(archive, contents, filename=filename, labelled=purpose == TO_TRAIN_ON)
    archive.unlink()
    return Received(filename, purpose, size_bytes, sha256, intake, folder_bytes(contents), contents)


def move_to(contents: Path, place: Path) -> None:
    """Move the contents to their place atomically, and flush the folder before the row is committed."""
    os.rename(contents, place)
    fsync_folder(place.parent)
