"""Health, readiness, metrics, API documentation, and the page at ``/``."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from service.api_docs import docs_page
from service.metrics import CONTENT_TYPE
from service.middleware.auth import AnyCaller, KeyScope, Measuring
from service.problems import RESPONSES
from service.state import Server
from service.web import main_page


class Status(BaseModel):
    """The confirmation that the server is healthy."""

    status: Literal["ok"] = "ok"


class ReadyStatus(Status):
    """The default model of the server. A private model is not named, since this route needs no key."""

    reference: str | None = Field(description="The deployed reference, such as `flowers@champion`.")
    model: str | None
    version: str | None


class CallerDocument(BaseModel):
    """The caller and their scopes."""

    object: Literal["caller"] = "caller"
    owner: str
    scopes: list[KeyScope]
    needs_key: bool = Field(description="Whether the server has API keys, so that every request needs one.")


server_router = APIRouter(tags=["server"], responses={"5XX": RESPONSES["5XX"]})


@server_router.get("/livez")
async def alive() -> Status:
    """Report that the process responds."""
    return Status()


@server_router.get("/readyz")
async def ready(server: Server) -> ReadyStatus:
    """Return the default model once it has passed its self-test; until then 503 with the reason."""
    server.models.check_ready()
    model = server.models.default()
    if not server.models.serves_a_folder and server.access.of(model.name).visibility == "private":
        return ReadyStatus(reference=None, model=None, version=None)
    deployed = server.models.deployment()
    reference = server.models.pinned or (deployed.reference if deployed is not None else model.name)
    shown = str(model) if server.models.serves_a_folder else reference
    return ReadyStatus(reference=shown, model=model.name, version=model.version)


@server_router.get("/v1/caller", responses={"4XX": RESPONSES["4XX"]})
async def get_caller(caller: AnyCaller) -> CallerDocument:
    """Return the owner and the scopes of your key."""
    return CallerDocument(owner=caller.owner, scopes=sorted(caller.scopes), needs_key=caller.key_id is not None)  # type: ignore[arg-type]


@server_router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, "4XX": RESPONSES["4XX"]},
)
def metrics(_: Measuring, server: Server) -> Response:
    """Return the metrics in Prometheus format. They name every model, so the key needs the scope `metrics` (or admin)."""
    return Response(server.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


@server_router.get("/schema.json", include_in_schema=False)
async def bento_schema() -> JSONResponse:
    """Return the schema that BentoML's own Python client reads before its first call."""
    return JSONResponse(await run_in_threadpool(_client_schema))


def _client_schema() -> dict[str, Any]:
    from service.bento import client_schema  # importing BentoML takes a second, and only its own client needs this route

    return client_schema()


@server_router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    """Return the API documentation as a page."""
    page = await run_in_threadpool(docs_page, request.app.openapi(), str(request.base_url).rstrip("/"))
    return HTMLResponse(page, headers={"Cache-Control": "no-cache"})


@server_router.get("/", include_in_schema=False)
async def page(request: Request) -> HTMLResponse:
    text = main_page(request.headers.get("accept-language", ""), request.query_params.get("lang", ""))
    return HTMLResponse(text, headers={"Cache-Control": "no-cache", "Vary": "Accept-Language"})
