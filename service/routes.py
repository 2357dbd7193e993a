"""The HTTP surface, route by route: each translates a request to one call and the result to one answer.

Knows paths and documents; everything it calls lives in `models`, `predictions`, `metrics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from finetune.bundle.image import ImageLimits
from finetune.bundle.registry import ModelVersion
from service.limits import Slots
from service.metrics import CONTENT_TYPE, Metrics
from service.models import Live, LiveModels
from service.predictions import PredictionAnswer, PredictOptions, predict, read_upload
from service.problems import RESPONSES

STATIC = Path(__file__).parent / "static"


@dataclass(frozen=True)
class Parts:
    """What the routes work with; the app carries it in its state."""

    models: LiveModels
    metrics: Metrics
    slots: Slots
    image_limits: ImageLimits


async def _parts(request: Request) -> Parts:  # async: a plain function would cost every request a hop to a thread
    parts: Parts = request.app.state.parts
    return parts


Server = Annotated[Parts, Depends(_parts)]
Options = Annotated[PredictOptions, Query()]


# --- predict --------------------------------------------------------------------------------------

_BINARY = {"schema": {"type": "string", "format": "binary"}}
PREDICT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A JPEG, PNG, WebP, BMP, GIF or TIFF file: as the form field `image`, or as the body itself.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "additionalProperties": False,
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        "top_k": {"type": ["integer", "null"], "minimum": 1},
                        "explain": {"type": ["boolean", "null"]},
                    },
                }
            },
            "image/*": _BINARY,
            "application/octet-stream": _BINARY,
        },
    }
}


def predict_router(max_body_bytes: int) -> APIRouter:
    """The two predict routes, the only ones that take a body of an image's size."""
    router = APIRouter(tags=["predict"], responses=RESPONSES)

    @router.post("/predict", openapi_extra=PREDICT_BODY, max_body_size=max_body_bytes)
    async def predict_with_default_model(request: Request, options: Options, server: Server) -> PredictionAnswer:
        """Classify one image with the model that this server was started with, or the newest one."""
        return await _predict(request, options, server, server.models.default())

    @router.post("/v1/models/{name}/predict", openapi_extra=PREDICT_BODY, max_body_size=max_body_bytes)
    async def predict_with_named_model(request: Request, name: str, options: Options, server: Server) -> PredictionAnswer:
        """Classify one image with a registered model: `name`, `name@version` or `name@alias`."""
        live = await run_in_threadpool(server.models.named, name)  # the first time, this loads the bundle
        return await _predict(request, options, server, live)

    return router


async def _predict(request: Request, options: PredictOptions, server: Parts, live: Live) -> PredictionAnswer:
    upload = await read_upload(request, options)
    answer = await server.slots.run(predict, live, upload, server.image_limits)
    server.metrics.predictions.labels(live.name).inc()
    return answer


# --- models ---------------------------------------------------------------------------------------


class VersionDocument(BaseModel):
    version: str
    created: int = Field(description="Unix seconds.")
    aliases: list[str]
    live: bool = Field(description="In memory now.")
    refused: str | None = Field(description="Why the server does not serve this version although it was asked to.")


class ModelDocument(BaseModel):
    """A registered model, in the words of the public fine-tuning API (`id`, `object`, `created`, `owned_by`) and our own."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix seconds, of the newest version.")
    owned_by: str
    versions: list[VersionDocument] = Field(description="Newest first.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelDocument]
    has_more: bool
    first_id: str | None
    last_id: str | None


models_router = APIRouter(prefix="/v1/models", tags=["models"], responses=RESPONSES)


@models_router.get("")
def list_models(
    server: Server,
    after: Annotated[str | None, Query(description="The `last_id` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> ModelList:
    """Registered models by name."""
    documents = _documents(server.models, server.models.registry.list())
    rest = [document for document in documents if after is None or document.id > after]
    page = rest[:limit]
    return ModelList(
        data=page,
        has_more=len(rest) > len(page),
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
    )


@models_router.get("/{name}")
def get_model(server: Server, name: str) -> ModelDocument:
    """One registered model with its versions."""
    found = server.models.find(name)
    versions = [version for version in server.models.registry.list() if version.name == found.name]
    return _documents(server.models, versions)[0]


def _documents(models: LiveModels, versions: Sequence[ModelVersion]) -> list[ModelDocument]:
    live, refused = set(models.loaded()), models.refused()
    by_name: dict[str, list[ModelVersion]] = {}
    for version in reversed(versions):
        by_name.setdefault(version.name, []).append(version)
    return [
        ModelDocument(
            id=name,
            created=int(of_name[0].created_at),
            owned_by="finetune",
            versions=[
                VersionDocument(
                    version=one.version,
                    created=int(one.created_at),
                    aliases=list(one.aliases),
                    live=(one.name, one.version) in live,
                    refused=refused.get((one.name, one.version)),
                )
                for one in of_name
            ],
        )
        for name, of_name in sorted(by_name.items())
    ]


# --- the server itself ----------------------------------------------------------------------------


class Status(BaseModel):
    status: Literal["ok"] = "ok"


server_router = APIRouter(tags=["server"], responses={"5XX": RESPONSES["5XX"]})


@server_router.get("/livez")
async def alive() -> Status:
    """The process answers."""
    return Status()


@server_router.get("/readyz")
async def ready(server: Server) -> Status:
    """The default model has passed its probes; until then 503, with what is missing."""
    server.models.check_ready()
    return Status()


@server_router.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
def metrics(server: Server) -> Response:
    """Counters for Prometheus."""
    return Response(server.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


@server_router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})
