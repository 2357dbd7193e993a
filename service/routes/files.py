"""``/v1/files``: upload, list and delete datasets."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from finetune.jobs.files import UploadedFile, check_quota
from service.creation import REPLAYED, IdempotencyKey
from service.limits import MULTIPART_OVERHEAD_BYTES
from service.middleware.auth import Submitting
from service.problems import RESPONSES
from service.schemas.lists import After, Limit, ListItem, Page
from service.state import Server, ServerState
from service.uploads import PURPOSES, Received, examine, move_to, receive

UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "With `fine-tune`: a zip, tar or tar.gz of class folders (daisy/1.jpg, rose/2.jpg), of train/, val/ and "
        "test/ with them, or of images with a table of labels; or one Parquet or JSON lines file with the images inside. With "
        "`batch`: a zip, tar or tar.gz of any image files.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                    },
                }
            }
        },
    }
}


class SummaryDocument(BaseModel):
    """What was found in an upload."""

    kind: Literal["zip", "tar", "tar.gz", "parquet", "jsonl"]
    n_files: int
    size_bytes: int = Field(description="Unpacked.")
    classes: list[str]
    counts: dict[str, dict[str, int]] = Field(
        description="Number of images by split (`all` if there are no splits) and class (an empty name for images without "
        "labels)."
    )
    warnings: list[str]
    understood: list[str] = Field(
        default_factory=list, description="How the data was interpreted, if several interpretations were possible."
    )


class FileDocument(ListItem):
    """An uploaded dataset: the fields of the public API, and `sha256` and `summary`."""

    object: Literal["file"] = "file"
    bytes: int = Field(description="Of the uploaded file.")
    stored_bytes: int = Field(description="Disk space of the unpacked contents, which counts towards your quota.")
    created_at: int = Field(description="Unix seconds.")
    filename: str
    purpose: Literal["fine-tune", "batch"] = Field(description="`fine-tune`: a dataset to train on. `batch`: images to predict.")
    status: Literal["processed"] = "processed"
    status_details: str | None = None
    expires_at: int | None = None
    sha256: str = Field(description="Of the uploaded file.")
    summary: SummaryDocument


FileList = Page[FileDocument]


class FileDeleted(BaseModel):
    """The confirmation that an upload was deleted."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def files_router(max_body_bytes: int) -> APIRouter:
    """Return the routes of uploads. Only the first accepts a large body."""
    router = APIRouter(prefix="/v1/files", tags=["files"], responses=RESPONSES)

    @router.post("", status_code=201, openapi_extra=UPLOAD_BODY, max_body_size=max_body_bytes)
    async def upload_file(
        request: Request, response: Response, caller: Submitting, server: Server, idempotency_key: IdempotencyKey = None
    ) -> FileDocument:
        """Upload a dataset. It is unpacked and examined at once; errors name the files that cannot be accepted."""
        given = request.headers.get("content-length", "")
        announced = int(given) if given.isdecimal() else 0
        if idempotency_key is None:  # with a key this may be a repetition, which adds nothing
            least = max(0, announced - MULTIPART_OVERHEAD_BYTES)
            stored = await run_in_threadpool(server.stored_bytes, caller.owner)
            stored += await run_in_threadpool(server.part_uploads.pending_bytes, caller.owner)
            check_quota(stored, least, server.max_files_bytes)
        with server.uploads.arriving(announced, caller.owner) as arrival:
            archive = arrival.folder / "archive"
            filename, purpose = await receive(request, arrival, archive)
            received = await run_in_threadpool(examine, archive, filename, purpose)
            file, new = await run_in_threadpool(record_upload, server, caller.owner, received, idempotency_key)
        response.headers["Location"] = f"/v1/files/{file.id}"
        if not new:
            response.headers[REPLAYED] = "true"
        return file_document(file)

    @router.get("")
    def list_files(
        caller: Submitting,
        server: Server,
        after: After = None,
        limit: Limit = 20,
        purpose: Annotated[str | None, Query(max_length=100)] = None,
    ) -> FileList:
        """List your uploads, newest first."""
        page, more = server.database.files.list(caller.sees, after=after, limit=limit)
        documents = [file_document(file) for file in page if purpose in (None, file.purpose)]
        return FileList.of(documents, more)

    @router.get("/{file_id}")
    def get_file(caller: Submitting, server: Server, file_id: str) -> FileDocument:
        """Return one upload with the summary of its contents."""
        return file_document(server.database.files.get(file_id, caller.sees))

    @router.delete("/{file_id}")
    def delete_file(caller: Submitting, server: Server, file_id: str) -> FileDeleted:
        """Delete an upload that no unfinished job uses. Models made from it are kept."""
        server.database.files.delete(file_id, caller.sees)
        server.uploads.discard(file_id)
        server.part_uploads.forget_file(file_id)
        server.pictures.forget(server.uploads.place_of(file_id).resolve())
        return FileDeleted(id=file_id)

    return router


def record_upload(server: ServerState, owner: str, received: Received, idempotency_key: str | None) -> tuple[UploadedFile, bool]:
    """Move received contents to their place and record the upload; return it and whether it is new."""
    body = f"{received.filename}\0{received.purpose}\0{received.sha256}"
    return server.database.files.create(
        owner,
        filename=received.filename,
        purpose=received.purpose,
        size_bytes=received.size_bytes,
        stored_bytes=received.stored_bytes,
        sha256=received.sha256,
        summary=received.summary(),
        place=lambda file_id: move_to(received.contents, server.uploads.place_of(file_id)),
        idempotency_key=idempotency_key,
        body_sha256=hashlib.sha256(body.encode()).hexdigest(),
        models_bytes=server.models.registry.owned_bytes(owner),
        max_owner_bytes=server.max_files_bytes,
    )


def file_document(file: UploadedFile) -> FileDocument:
    """Return the document of an upload."""
    return FileDocument(
        id=file.id,
        bytes=file.size_bytes,
        stored_bytes=file.stored_bytes,
        created_at=int(file.created_at),
        filename=file.filename,
        purpose=file.purpose,  # type: ignore[arg-type]
        sha256=file.sha256,
        summary=SummaryDocument.model_validate(file.summary),
    )
