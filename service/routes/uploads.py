"""``/v1/uploads``: multi-part uploads of datasets, so that a lost connection costs one part only. They become files."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from finetune.errors import InvalidInput, NotFound, Problem
from finetune.jobs.files import check_quota
from service.creation import REPLAYED, IdempotencyKey
from service.limits import MIB, MULTIPART_OVERHEAD_BYTES
from service.middleware.auth import Caller, Submitting
from service.part_uploads import Part, PartUpload, md5_of
from service.problems import RESPONSES
from service.routes.files import FileDocument, file_document, record_upload
from service.schemas.body import RequestBody
from service.schemas.lists import After, Limit, ListItem, Page
from service.state import Server, ServerState
from service.uploads import examine, plain_name, receive_part

MAX_PART_BYTES = 64 * MIB
PART_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "additionalProperties": False,
                    "properties": {
                        "data": {"type": "string", "format": "binary", "description": f"At most {MAX_PART_BYTES // MIB} MiB."},
                        "part_number": {
                            "type": "integer",
                            "minimum": 1,
                            "maximum": 10_000,
                            "description": "The number of the part; a part that is sent again replaces the earlier one.",
                        },
                    },
                }
            }
        },
    }
}


class UploadRequest(RequestBody):
    """The announcement of a multi-part upload."""

    filename: str = Field(min_length=1, max_length=1000)
    purpose: Literal["fine-tune", "batch"]
    bytes: int = Field(ge=1, description="Total size of all parts.")
    mime_type: str | None = Field(None, max_length=200, description="Ignored: the kind of file is detected from its contents.")
    expires_after: dict[str, Any] | None = Field(None, description="Ignored: uploads expire a day after their last part.")


class CompletionRequest(RequestBody):
    """The parts of the file, in order."""

    part_ids: list[str] = Field(min_length=1, max_length=10_000)
    md5: str | None = Field(None, pattern=r"^[0-9a-fA-F]{32}$", description="MD5 of the complete file, hexadecimal.")


class PartDocument(BaseModel):
    """One received part."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int = Field(description="Unix seconds.")
    upload_id: str
    part_number: int
    bytes: int


class UploadDocument(ListItem):
    """A multi-part upload."""

    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int = Field(description="Unix seconds.")
    filename: str
    purpose: Literal["fine-tune", "batch"]
    status: Literal["pending", "completed", "cancelled"]
    expires_at: int = Field(description="When the upload is deleted if no part is added.")
    parts: list[PartDocument] = Field(description="The received parts, in order; none once the upload is complete.")
    file: FileDocument | None = Field(None, description="The file that was made from the parts.")


UploadList = Page[UploadDocument]


def uploads_router(max_bytes: int) -> APIRouter:
    """Return the routes of multi-part uploads.

    Args:
        max_bytes: largest total size of the parts of one upload.
    """
    router = APIRouter(prefix="/v1/uploads", tags=["files"], responses=RESPONSES)

    @router.post("", status_code=201)
    def begin_upload(
        caller: Submitting,
        server: Server,
        response: Response,
        wanted: UploadRequest,
        idempotency_key: IdempotencyKey = None,
    ) -> UploadDocument:
        """Begin a multi-part upload. With the same `Idempotency-Key` an interrupted one is returned, with its received parts."""
        if wanted.bytes > max_bytes:
            raise InvalidInput(
                f"an upload has at most {max_bytes:,} bytes, and {wanted.bytes:,} are announced",
                [Problem("bytes", "is too large")],
            )
        server.part_uploads.sweep()

        def begin() -> tuple[PartUpload, bool]:
            def check(pending_bytes: int) -> None:
                check_quota(server.stored_bytes(caller.owner) + pending_bytes, wanted.bytes, server.max_files_bytes)

            name = plain_name(wanted.filename)
            return server.part_uploads.create(caller.owner, name, wanted.purpose, wanted.bytes, idempotency_key, check=check)

        made, new = begin()
        if _file_is_gone(server, made):
            server.part_uploads.forget(made)
            made, new = begin()
        if not new:
            response.headers[REPLAYED] = "true"
        response.headers["Location"] = f"/v1/uploads/{made.id}"
        return _document(server, made, caller)

    @router.get("")
    def list_uploads(caller: Submitting, server: Server, after: After = None, limit: Limit = 20) -> UploadList:
        """List your multi-part uploads, newest first."""
        found = [one for one in server.part_uploads.of(caller.sees) if not _file_is_gone(server, one)]
        later = [one for one in found if after is None or one.id < after]
        documents = []
        for one in later[:limit]:
            with contextlib.suppress(NotFound):  # cancelled in the meantime
                documents.append(_document(server, one, caller))
        return UploadList.of(documents, len(later) > limit)

    @router.get("/{upload_id}")
    def get_upload(caller: Submitting, server: Server, upload_id: str) -> UploadDocument:
        """Return a multi-part upload with its received parts."""
        return _document(server, server.part_uploads.get(upload_id, caller.sees), caller)

    @router.post(
        "/{upload_id}/parts", status_code=201, openapi_extra=PART_BODY, max_body_size=MAX_PART_BYTES + MULTIPART_OVERHEAD_BYTES
    )
    async def add_upload_part(request: Request, caller: Submitting, server: Server, upload_id: str) -> PartDocument:
        """Add a part. Parts may be sent in any order and concurrently."""
        upload = server.part_uploads.get(upload_id, caller.sees)
        given = request.headers.get("content-length", "")
        with server.uploads.arriving(int(given) if given.isdecimal() else 0, caller.owner) as arrival:
            number = await receive_part(request, arrival, arrival.folder / "part")
            part = await run_in_threadpool(server.part_uploads.add, upload, arrival.folder / "part", number)
        return _part_document(upload, part)

    @router.post("/{upload_id}/complete")
    def complete_upload(caller: Submitting, server: Server, upload_id: str, wanted: CompletionRequest) -> UploadDocument:
        """Join the parts and examine the file, as `POST /v1/files` does. Idempotent.

        If the file is refused, the parts are kept until the upload is cancelled or a day has passed, so that they can be replaced
        or joined in another order.
        """
        upload = server.part_uploads.get(upload_id, caller.sees)
        with server.uploads.arriving(upload.size_bytes, caller.owner) as arrival:
            archive = arrival.folder / "archive"
            with server.part_uploads.completing(upload, wanted.part_ids, archive) as known:
                if known.file_id is None:
                    _check_md5(archive, wanted.md5)
                    _make_file(server, upload, archive)
        return _document(server, server.part_uploads.get(upload.id, caller.sees), caller)

    @router.post("/{upload_id}/cancel")
    def cancel_upload(caller: Submitting, server: Server, upload_id: str) -> UploadDocument:
        """Delete an unfinished upload and its parts. A completed one is a file and cannot be cancelled."""
        upload = server.part_uploads.get(upload_id, caller.sees)
        document = _document(server, upload, caller)
        server.part_uploads.cancel(upload)
        return document.model_copy(update={"status": "cancelled", "parts": []})

    return router


def _make_file(server: ServerState, upload: PartUpload, archive: Path) -> None:
    received = examine(archive, upload.filename, upload.purpose)
    # The upload's id is the idempotency key: if this process dies before `completed`, the next attempt finds the same file.
    file, _ = record_upload(server, upload.owner, received, upload.id)
    server.part_uploads.completed(upload, file.id)


def _file_is_gone(server: ServerState, upload: PartUpload) -> bool:
    """Return whether an upload was completed and its file was deleted later."""
    return upload.file_id is not None and not server.database.files.has(upload.file_id)


def _check_md5(archive: Path, wanted: str | None) -> None:
    if wanted is not None and (found := md5_of(archive)) != wanted.lower():
        raise InvalidInput(
            f"the parts together have the MD5 {found}, not {wanted}: they were damaged, or are in another order",
            [Problem("md5", f"is {found}")],
        )


def _document(server: ServerState, upload: PartUpload, caller: Caller) -> UploadDocument:
    if _file_is_gone(server, upload):
        raise NotFound(f"{upload.id} was complete, and its file was deleted since")
    file = file_document(server.database.files.get(upload.file_id, caller.sees)) if upload.file_id is not None else None
    return UploadDocument(
        id=upload.id,
        bytes=upload.size_bytes,
        created_at=int(upload.created_at),
        filename=upload.filename,
        purpose=upload.purpose,  # type: ignore[arg-type]
        status="pending" if file is None else "completed",
        expires_at=int(server.part_uploads.expires_at(upload)),
        parts=[_part_document(upload, part) for part in server.part_uploads.parts(upload)],
        file=file,
    )


def _part_document(upload: PartUpload, part: Part) -> PartDocument:
    return PartDocument(
        id=part.id, created_at=int(part.created_at), upload_id=upload.id, part_number=part.number, bytes=part.size_bytes
    )
