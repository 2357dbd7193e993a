"""Errors as problem documents: RFC 9457 ``application/problem+json``.

Programs use ``code``, people read ``title`` and ``detail``, and the stock client of the public fine-tuning API reads the
``error`` object.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import MAX_BODY_SIZE_SCOPE_KEY
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from finetune.advice import for_http
from finetune.errors import DiskFull, FinetuneError, NotReady, Overloaded, StoreError

MEDIA_TYPE = "application/problem+json"
MAX_SENTENCES = 10  # of problems in one message
MAX_LISTED_PROBLEMS = 100
REQUEST_ID_HEADER = "X-Request-Id"
RETRY_AFTER = {429: 10, 503: 1}  # seconds; a full queue takes longer to empty than an overload
CLIENT_CLOSED_REQUEST = 499  # never read by the client; for the log and the metrics

log = logging.getLogger(__name__)

# Codes of errors by HTTP status; a FinetuneError has its own code, see finetune/errors.py.
CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    413: "request_too_large",
    415: "unsupported_media_type",
    422: "invalid_input",
    429: "too_many_requests",
    499: "client_closed_request",
    500: "internal_error",
    503: "unavailable",
}
INTERNAL_DETAIL = "Something went wrong in the server. Its log has the cause under this request id."


class FieldProblem(BaseModel):
    """One mistake in a request, and its field."""

    field: str = Field(description="Path of the field, such as `top_k` or `method.stages`.")
    detail: str


class ErrorObject(BaseModel):
    """The error in the form that the stock client of the public fine-tuning API reads."""

    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None = None
    code: str


class ProblemDocument(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(description="A stable name of the kind of problem.", examples=["urn:finetune:problem:invalid_image"])
    title: str
    status: int
    detail: str
    instance: str = Field(description="The path of the request.")
    code: str = Field(description="A stable code for programs.", examples=["invalid_image"])
    request_id: str
    errors: list[FieldProblem] = []
    error: ErrorObject


class InferenceProblemDocument(ProblemDocument):
    """RFC 9457 problem details on routes of the Open Inference Protocol, which wants the message itself as ``error``."""

    error: str  # type: ignore[assignment]


def _responses(document: type[ProblemDocument]) -> dict[int | str, dict[str, Any]]:
    content = {MEDIA_TYPE: {"schema": {"$ref": f"#/components/schemas/{document.__name__}"}}}
    return {
        "4XX": {"description": "The request is invalid, or conflicts with the present state", "content": content},
        "5XX": {"description": "The server cannot process the request now", "content": content},
    }


RESPONSES = _responses(ProblemDocument)
INFERENCE_RESPONSES = _responses(InferenceProblemDocument)


def component_schemas() -> dict[str, Any]:
    """Return the schemas to which the responses refer, for the components of the OpenAPI document."""
    _, schema = models_json_schema(
        [(ProblemDocument, "serialization"), (InferenceProblemDocument, "serialization")],
        ref_template="#/components/schemas/{model}",
    )
    definitions: dict[str, Any] = schema["$defs"]
    return definitions


def problem(
    scope: Mapping[str, Any],
    status: int,
    detail: str,
    *,
    code: str | None = None,
    errors: Sequence[FieldProblem] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return the problem document for an error as a response, which also middleware outside the app can send."""
    code = code or CODES.get(status, f"http_{status}")
    path = scope.get("path", "")
    fields: dict[str, Any] = {
        "type": f"urn:finetune:problem:{code}",
        "title": _title(status),
        "status": status,
        "detail": detail,
        "instance": path,
        "code": code,
        "request_id": scope.get("state", {}).get("request_id", ""),
        "errors": list(errors),
    }
    document: ProblemDocument
    if f"{path}/".startswith("/v2/"):
        document = InferenceProblemDocument(**fields, error=_with_fields(detail, errors))
    else:
        param = errors[0].field if errors else None
        document = ProblemDocument(**fields, error=ErrorObject(message=detail, type=_error_type(status), param=param, code=code))
    return JSONResponse(document.model_dump(), status_code=status, media_type=MEDIA_TYPE, headers=dict(headers or {}))


def _with_fields(detail: str, errors: Sequence[FieldProblem]) -> str:
    """Return the message with the fields, for a client that shows nothing else."""
    return "; ".join([detail, *(f"{one.field}: {one.detail}" for one in errors[:MAX_SENTENCES])])


def _title(status: int) -> str:
    return "Client Closed Request" if status == CLIENT_CLOSED_REQUEST else HTTPStatus(status).phrase


def _error_type(status: int) -> Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]:
    if status >= 500:
        return "server_error"
    if status in (401, 403):
        return "authentication_error"
    return "rate_limit_error" if status == 429 else "invalid_request_error"


# The messages of these errors contain addresses and paths of the server, so they are only logged.
_STORAGE_SENTENCES = {
    StoreError: "The server's job database cannot be used now. Try again in a moment; its log has the cause",
    DiskFull: "The server's disk is full, or has no room for this. Its operator must free some space",
}
_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)


def add_handlers(app: FastAPI) -> None:
    """Add handlers that return problem documents for expected errors. `service.middleware.responses` handles all others."""
    app.add_exception_handler(FinetuneError, _on_finetune_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(OSError, _on_os_error)


async def _on_finetune_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, FinetuneError)
    if error.http_status >= 500 and not isinstance(error, NotReady | Overloaded):
        log.error("%s %s: %s", request.state.request_id, error.code, error)
    return problem(
        request.scope,
        error.http_status,
        _STORAGE_SENTENCES.get(type(error), for_http(error.message)),
        code=error.code,
        errors=[FieldProblem(field=one.where, detail=for_http(one.message)) for one in error.problems],
        headers={"Retry-After": str(RETRY_AFTER[error.http_status])} if error.http_status in RETRY_AFTER else None,
    )


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    if isinstance(error.body, bytes):  # FastAPI did not parse the body, because its content type is not JSON
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        return problem(request.scope, 415, f"A body of type {media_type[:100]!r} is not accepted here; send application/json")
    errors = [FieldProblem(field=_field_path(one["loc"]), detail=_sentence(one)) for one in error.errors()]
    sentences = [f"{one.field}: {one.detail}" if one.field != "body" else one.detail for one in errors[:MAX_SENTENCES]]
    if (more := len(errors) - MAX_SENTENCES) > 0:
        sentences.append(f"and {more:,} problems more")
    return problem(request.scope, 422, "; ".join(sentences), errors=errors[:MAX_LISTED_PROBLEMS])


def unreadable_json(error: ValueError | RecursionError) -> str:
    """Return the message for a body that is not valid JSON, from the parser's exception."""
    if isinstance(error, RecursionError):
        return "the body is nested too deeply"
    if isinstance(error, UnicodeError):
        return "the body holds text that is not valid Unicode"
    if str(error).startswith("Exceeds the limit"):  # Python's limit on integers; its message is for programmers
        return f"the body holds a whole number of more than {sys.get_int_max_str_digits():,} digits"
    return f"the body is not JSON: {error}"


def _field_path(location: Sequence[int | str]) -> str:
    """Return the field path of a location: ``top_k`` for ``("query", "top_k")``, or ``body`` for the whole body."""
    inside = location[1:] or location
    if location[0] == "body" and isinstance(inside[0], int):  # a character position in a body that is not JSON
        return "body"
    return ".".join(str(part) for part in inside)


_JSON_KINDS = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false", type(None): "null"}


def _sentence(error: Mapping[str, Any]) -> str:
    given = error.get("input")
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']} (character {error['loc'][-1]})"
    if tuple(error["loc"]) == ("body",):
        kind = "" if error["type"] == "missing" else _JSON_KINDS.get(type(given), "")
        return f"the body must be a JSON object{f', not {kind}' if kind else ''}"
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) and error["type"] != "missing" else ""
    return f"{error['msg']}{shown[:80]}"


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    detail, headers = str(error.detail), error.headers
    if error.status_code == 400 and isinstance(error.__cause__, ValueError | RecursionError):  # FastAPI could not parse the JSON
        return problem(request.scope, 422, unreadable_json(error.__cause__), errors=[])
    if error.status_code == 404 and detail == HTTPStatus.NOT_FOUND.phrase:
        detail = f"There is nothing at {request.url.path}. What exists is listed in /docs.json"
    elif error.status_code == 413:
        detail = _too_large(request.scope)
    elif error.status_code == 405:
        allowed = _allowed(request) or (error.headers or {}).get("Allow", "")
        detail, headers = f"{request.method} does not work on {request.url.path}. Allowed: {allowed}", {"Allow": allowed}
    return problem(request.scope, error.status_code, detail, headers=headers)


def _allowed(request: Request) -> str:
    """Return the methods of all routes of a path, for the Allow header; the router only returns those of the first."""
    documented = request.app.openapi()["paths"].items()
    matching = [item for template, item in documented if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), request.url.path)]
    methods = {method.upper() for item in matching[:1] for method in item}
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))


async def _on_os_error(request: Request, error: Exception) -> JSONResponse:
    """Respond with 503 if the server cannot write: the disk is full or read-only, or there are no file descriptors left."""
    assert isinstance(error, OSError)
    if error.errno not in _UNWRITABLE:
        raise error
    log.error("%s %s: %s", request.state.request_id, type(error).__name__, error)
    detail = "The server cannot write to its storage now (full, or read-only). Its log has the cause"
    return problem(request.scope, 503, detail, code="storage_unavailable", headers={"Retry-After": "60"})


async def _on_disconnect(request: Request, _: Exception) -> JSONResponse:
    return problem(request.scope, CLIENT_CLOSED_REQUEST, "The client disconnected before its request was complete")


def _too_large(scope: Mapping[str, Any]) -> str:
    return f"The body is larger than the {scope[MAX_BODY_SIZE_SCOPE_KEY]:,} bytes that are accepted here"


def detail_of(scope: Mapping[str, Any], status: int, content_type: str, body: bytes) -> str:
    """Return the message in another library's error response: JSON with ``error`` or ``detail``, a list of these, or text."""
    if status >= 500:
        return INTERNAL_DETAIL if status == 500 else _title(status)
    if status == 413 and MAX_BODY_SIZE_SCOPE_KEY in scope:
        return _too_large(scope)
    text = body.decode("utf-8", "replace").strip()
    if content_type.startswith("application/json"):
        try:
            parsed = json.loads(text)
        except json.JSONDecodeError:
            parsed = None
        first = parsed[0] if isinstance(parsed, list) and parsed else parsed
        found = (first.get("error") or first.get("detail")) if isinstance(first, dict) else None
        return str(found) if found else _title(status)
    return text[:500] or _title(status)
